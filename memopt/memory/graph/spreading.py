"""Activation that spreads over links: what the memories found remind of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memopt.memory.store.links import Network

# Activation passed on per link, and how far it goes: Collins & Loftus 1975; two hops and a decay of
# 0.5 are in the range Crestani 1997 reports as useful, beyond it everything is lit.
HOPS = 2
PASSED_ON = 0.5
# Memories whose links are followed per hop: the strongest, so that a query stays milliseconds.
FRONTIER = 64

Fade = Callable[[NDArray[Any], NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True, slots=True, eq=False)
class Activation:
    """How strongly memories were reached, the strongest 1.

    Attributes:
        network: what it spread over.
        nodes: int64 (n,), ascending.
        values: float64 (n,), in (0, 1].
    """

    network: Network
    nodes: NDArray[np.int64]
    values: NDArray[np.float64]

    def of(self, ids: Sequence[str]) -> list[float]:
        """Return the value of each id, 0 where it was not reached."""
        values: list[float] = _looked_up(self.nodes, self.values, self.network.nodes(ids)).tolist()
        return values

    def above(self, least: float) -> dict[str, float]:
        """Return id -> value of those that have at least so much."""
        strong = self.values >= least
        names = self.network.names(self.nodes[strong])
        return dict(zip(names, self.values[strong].tolist(), strict=True))


def spread(start: Mapping[str, float], network: Network, fade: Fade) -> Activation:
    """Return what is reached from ``start`` within HOPS links.

    Args:
        start: id -> activation, above 0.
        fade: (weights as written, when) -> weights now.
    """
    nodes = network.nodes(list(start))
    linked = nodes >= 0
    frontier, activation = nodes[linked], np.array(list(start.values()))[linked]
    reached, values = np.zeros(0, np.int64), np.zeros(0)
    for _ in range(HOPS):
        frontier, activation = _strongest(network, frontier, activation)
        places, targets, weights, updated = network.leaving(frontier)
        given = activation[places] * fade(weights, updated) * PASSED_ON
        met, which = np.unique(targets, return_inverse=True)
        passed = np.zeros(len(met))
        np.maximum.at(passed, which, given)
        # Only what lights up more than before passes something on.
        more = passed > _looked_up(reached, values, met)
        frontier, activation = met[more], passed[more]
        if not len(frontier):
            break
        reached, which = np.unique(np.concatenate([reached, frontier]), return_inverse=True)
        best = np.zeros(len(reached))
        np.maximum.at(best, which, np.concatenate([values, activation]))
        values = best
    highest = values.max(initial=0)
    return Activation(network, reached, values / highest if highest else values)


def _strongest(
    network: Network, nodes: NDArray[np.int64], activation: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the FRONTIER strongest; of equals those whose ids come first."""
    if len(nodes) <= FRONTIER:
        return nodes, activation
    least = np.partition(activation, -FRONTIER)[-FRONTIER]
    kept = activation > least
    equal = np.flatnonzero(activation == least)
    names = network.names(nodes[equal])
    first = sorted(range(len(equal)), key=names.__getitem__)[: FRONTIER - int(kept.sum())]
    kept[equal[first]] = True
    return nodes[kept], activation[kept]


def _looked_up(
    nodes: NDArray[np.int64], values: NDArray[np.float64], wanted: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the values of ``wanted`` among ascending ``nodes``, 0 where they are not."""
    if not len(nodes):
        return np.zeros(len(wanted))
    at = np.minimum(np.searchsorted(nodes, wanted), len(nodes) - 1)
    return np.where(nodes[at] == wanted, values[at], 0.0)
