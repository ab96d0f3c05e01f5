"""Links followed node by node: here by asking the table, in ``link_cache`` from memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memopt.memory.model.filters import one_of
from memopt.memory.store.database import Database

# Sources, targets, weights as written, and when (s).
Around = tuple[list[str], list[str], NDArray[np.float64], NDArray[np.float64]]
# The same with the sources as places in the nodes that were asked for, and the targets as nodes.
Leaving = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]


class Network(ABC):
    """Who is linked to whom; a memory is a node, a small integer, as long as the network lives."""

    @abstractmethod
    def nodes(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the node of each id, -1 where it has no link."""

    @abstractmethod
    def names(self, nodes: NDArray[np.int64]) -> list[str]:
        """Return the id of each node."""

    @abstractmethod
    def leaving(self, nodes: NDArray[np.int64]) -> Leaving:
        """Return the links that leave ``nodes``; one may come twice, as it was and as it is now."""

    def row_ids(self, ids: Sequence[str]) -> dict[str, int]:
        """Return where rows of ``memories`` were seen last; they may have moved since."""
        return {}

    def __call__(self, ids: Sequence[str]) -> Around:
        """Return the links that leave ``ids``."""
        places, targets, weights, updated = self.leaving(self.nodes(ids))
        return [ids[at] for at in places.tolist()], self.names(targets), weights, updated


class QueriedLinks(Network):
    """Links of the ``edges`` table, by a query each time; nodes are numbered as they come."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._at: dict[str, int] = {}
        self._names: list[str] = []

    def nodes(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the node of each id."""
        return np.array(numbered(ids, self._at, self._names), np.int64)

    def names(self, nodes: NDArray[np.int64]) -> list[str]:
        """Return the id of each node."""
        return [self._names[node] for node in nodes.tolist()]

    def leaving(self, nodes: NDArray[np.int64]) -> Leaving:
        """Return the links that leave ``nodes``."""
        ids = self.names(nodes)
        if not ids:
            nothing = np.zeros(0, np.int64)
            return nothing, nothing, np.zeros(0), np.zeros(0)
        query = self._database.query("edges").where(one_of("source", ids))
        table = self._database.fetch(query.select(["source", "target", "weight", "updated_at"]))
        at = {key: place for place, key in enumerate(ids)}
        places = np.array([at[key] for key in table["source"].to_pylist()], np.int64)
        targets = self.nodes(table["target"].to_pylist())
        weights = table["weight"].to_numpy().astype(float)
        return places, targets, weights, seconds(table["updated_at"])


def numbered(ids: Sequence[str], at: dict[str, int], names: list[str]) -> list[int]:
    """Return the node of each id, giving new ones the next numbers.

    >>> at, names = {"a": 0}, ["a"]
    >>> numbered(["b", "a", "b"], at, names), names
    ([1, 0, 1], ['a', 'b'])
    """
    for key in ids:
        if at.setdefault(key, len(names)) == len(names):
            names.append(key)
    return [at[key] for key in ids]


def seconds(column: pa.Array | pa.ChunkedArray) -> NDArray[np.float64]:
    """Return timestamps (us) as seconds since 1970, float64."""
    return np.asarray(column.cast(pa.int64()).to_numpy(zero_copy_only=False) / 1e6, np.float64)
