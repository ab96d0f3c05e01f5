"""Averaging the adapters of several clients, LoRA's two factors taken together.

The average of A and of B apart is not the average of the products B A: with clients that differ
it is another model. ``product`` averages B A and brings it back to rank r with an SVD (FlexLoRA,
Bai et al. 2024, arXiv:2402.11505); ``freeze-a`` needs the same A everywhere and averages B, which
is exact (FFA-LoRA, Sun et al. 2024, arXiv:2403.12313); ``naive`` averages both, for comparison
(FedIT, Zhang et al. 2023, arXiv:2305.05644). Weights are the clients' sample counts (FedAvg,
McMahan et al. 2017, arXiv:1602.05629); ``median`` and ``trimmed`` are coordinate-wise (Yin et al.
2018, arXiv:1803.01498). A product counts as PEFT adds it to the weights, scaled by
``lora_alpha / r`` of its client's config (:mod:`.lora`); the result's config says
the rank and the alpha that make it what it should be.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from memopt.federation.delta.adapters import CONFIG_TENSOR
from memopt.federation.delta.arrays import (
    FLOATS,
    Array,
    Weights,
    check_weights,
    dtype_name,
)
from memopt.federation.delta.factors import (
    AggregateSettings,
    average_pair,
    average_plain,
    client_norm,
)
from memopt.federation.delta.lora import config_of, read_config, scaling
from memopt.federation.failures import SyncFailure

_A = re.compile(r"(.*\blora_(?:embedding_)?)A(\b.*)\Z", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregate:
    """The averaged weights and what it took.

    ``error`` is the relative Frobenius error of the low-rank result against the exact average of
    the products, over all layers; ``left_out`` and ``clipped`` are client numbers.
    """

    weights: dict[str, Array]
    error: float
    layer_errors: dict[str, float]
    left_out: tuple[int, ...]
    clipped: tuple[int, ...]


def aggregate(
    clients: Sequence[Weights],
    weights: Sequence[float] | None = None,
    settings: AggregateSettings | None = None,
) -> Aggregate:
    """Average the adapters of several clients.

    Args:
        clients: one mapping per client, same names; LoRA pairs are found by PEFT's names
            (``...lora_A.weight`` of shape (r, in), ``...lora_B.weight`` of shape (out, r)).
            Ranks may differ between clients with ``product``.
        weights: sample counts; equal by default.
        settings: method, robustness, bounds.

    Raises:
        SyncFailure: no usable client, names or shapes that do not match, unequal A for freeze-a.

    >>> a = {"x.lora_A.weight": np.eye(1, 4), "x.lora_B.weight": np.ones((3, 1))}
    >>> b = {"x.lora_A.weight": -np.eye(1, 4), "x.lora_B.weight": -np.ones((3, 1))}
    >>> aggregate([a, b]).error < 1e-12  # both are the same update: A and B apart cancel out
    True
    """
    settings = settings or AggregateSettings()
    shares = _shares(len(clients), weights)
    checked = [check_weights(c) for c in clients]
    problems = [_problem(client) for client in checked]
    usable = [i for i, problem in enumerate(problems) if problem is None]
    while True:
        if not usable:
            why = next(filter(None, problems), "their averages are over what the dtype holds")
            raise SyncFailure("malformed", f"no client can be averaged: {why}")
        kept = [checked[i] for i in usable]
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            norms, made = _average(kept, [shares[i] for i in usable], settings)
        if _finite(made.weights) and np.isfinite(made.error):
            break
        # Finite numbers whose average the dtype cannot hold: the largest client is left out.
        del usable[int(np.argmax(norms))]
    return replace(
        made,
        left_out=tuple(i for i in range(len(clients)) if i not in usable),
        clipped=tuple(usable[i] for i in made.clipped),
    )


def _average(
    kept: Sequence[Weights], shares: Sequence[float], settings: AggregateSettings
) -> tuple[list[float], Aggregate]:
    """Return the norm of each client and their average; ``clipped`` counts in ``kept``."""
    share = np.array(shares)
    if not share.sum() > 0:
        raise SyncFailure("malformed", "the clients that are left have no weight")
    share = share / share.sum()
    pairs = _pairs(kept[0])
    _check_alike(kept, pairs, settings)
    configs = [read_config(c) for c in kept]
    scalings = {
        a: [scaling(f, a, c[a].shape[0]) for f, c in zip(configs, kept, strict=True)] for a in pairs
    }
    norms = [
        client_norm(client, number, pairs, scalings, settings) for number, client in enumerate(kept)
    ]
    most = settings.max_norm or float("inf")
    bounds = [most / norm if norm > most else 1.0 for norm in norms]
    result: dict[str, Array] = {}
    errors: dict[str, float] = {}
    missed = wanted = 0.0
    for name in kept[0]:
        if name in pairs or name in pairs.values():
            continue
        result[name] = average_plain([c[name] for c in kept], bounds, share, settings)
    # The config of the first client all of whose products count (with lora_alpha 0 they do not).
    first = next((n for n in range(len(kept)) if all(s[n] for s in scalings.values())), 0)
    scaled: dict[str, float] = {}
    for a_name, b_name in pairs.items():
        a, b = [c[a_name] for c in kept], [c[b_name] for c in kept]
        # The result has that client's scaling: the others' products are brought to it.
        theirs = scalings[a_name]
        scaled[a_name] = theirs[first] or next(filter(None, theirs), 0.0)
        scales = [
            bound * one / scaled[a_name] if scaled[a_name] else bound
            for bound, one in zip(bounds, theirs, strict=True)
        ]
        new_a, new_b, gap, size = average_pair(a, b, share, bounds, scales, settings, a_name)
        result[a_name], result[b_name] = new_a, new_b
        errors[a_name] = (gap / size) ** 0.5 if size > 0 else 0.0
        missed, wanted = missed + gap, wanted + size
    config = configs[first]
    if config is not None and CONFIG_TENSOR in result:
        result[CONFIG_TENSOR] = kept[first][CONFIG_TENSOR]
        ranks = {a: (result[a].shape[0], scaled[a]) for a in pairs}
        there = {a: (kept[first][a].shape[0], scalings[a][first]) for a in pairs}
        if ranks != there:
            result[CONFIG_TENSOR] = config_of(config, ranks)
    return norms, Aggregate(
        weights=result,
        error=(missed / wanted) ** 0.5 if wanted > 0 else 0.0,
        layer_errors=errors,
        left_out=(),
        clipped=tuple(i for i, bound in enumerate(bounds) if bound < 1),
    )


def _shares(number: int, weights: Sequence[float] | None) -> list[float]:
    if not number:
        raise SyncFailure("malformed", "there are no clients to average")
    if weights is None:
        return [1.0] * number
    good = isinstance(weights, list | tuple) and len(weights) == number
    if not good or not all(
        isinstance(w, int | float) and np.isfinite(w) and w >= 0 for w in weights
    ):
        raise SyncFailure("malformed", f"weights are not {number} numbers of at least 0")
    return [float(w) for w in weights]


def _finite(client: Weights) -> bool:
    return all(
        bool(np.all(np.isfinite(array.astype("<f8"))))
        for array in client.values()
        if dtype_name(array) in FLOATS
    )


def _problem(client: Weights) -> str | None:
    """Return why a client cannot be part of any average, None when it can."""
    if not _finite(client):
        return "weights that are NaN or infinite"
    try:
        config = read_config(client)
        for a, b in _pairs(client).items():
            scaling(config, a, client[a].shape[0])
            if client[b].shape[1] != client[a].shape[0]:
                return f"{a} and its B have different ranks"
    except SyncFailure as error:
        return error.problem
    return None


def _pairs(client: Weights) -> dict[str, str]:
    pairs = {}
    for name, array in client.items():
        match = _A.match(name)
        if match and f"{match[1]}B{match[2]}" in client:
            other = f"{match[1]}B{match[2]}"
            # Factors are matrices, or convolutions; a scalar of such a name is a plain tensor.
            if array.ndim >= 2 and client[other].ndim >= 2:
                pairs[name] = other
    return pairs


def _check_alike(
    clients: Sequence[Weights], pairs: Mapping[str, str], settings: AggregateSettings
) -> None:
    first = clients[0]
    factors = set(pairs) | set(pairs.values())
    for client in clients[1:]:
        if set(client) != set(first):
            odd = sorted(set(client) ^ set(first))[:3]
            raise SyncFailure("malformed", f"clients hold different tensors: {odd}")
        for name, array in client.items():
            one, other = array.shape, first[name].shape
            if array.ndim != first[name].ndim:
                pass  # other shapes, whatever else holds
            elif name in factors and settings.method == "product" and settings.robust == "mean":
                one, other = (one[1:], other[1:]) if name in pairs else (one[:1], other[:1])
            if (one != other and name != CONFIG_TENSOR) or array.dtype != first[name].dtype:
                raise SyncFailure(
                    "malformed", f"{name}: clients differ in shape or dtype ({one} and {other})"
                )
