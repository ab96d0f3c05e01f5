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

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memopt.errors import ConfigurationError
from memopt.federation.delta.adapters import CONFIG_TENSOR
from memopt.federation.delta.arrays import (
    DTYPES,
    FLOATS,
    Array,
    Weights,
    check_weights,
    dtype_name,
    raw,
)
from memopt.federation.delta.lora import config_of, read_config, scaling
from memopt.federation.failures import SyncFailure
from memopt.registry import nearest

METHODS = ("product", "freeze-a", "naive")
ROBUST = ("mean", "median", "trimmed")
_A = re.compile(r"(.*\blora_(?:embedding_)?)A(\b.*)\Z", re.DOTALL)
Matrix = NDArray[np.float64]
# Ranks in use end at a few hundred; the result's factors take memory for each.
_MAX_RANK = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregateSettings:
    """How adapters are averaged.

    ``max_norm`` bounds the Frobenius norm of all that a client sends: every B A as PEFT scales it,
    and every other float tensor (``modules_to_save``, DoRA's magnitudes, plain weights); a client
    over it is scaled down as a whole, so leave room for what is no update. ``trim`` is the share
    cut off at each end.
    ``rank`` is the rank of the result with ``product``, the clients' largest by default.
    """

    method: str = "product"
    robust: str = "mean"
    trim: float = 0.2
    max_norm: float | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("method", self.method, METHODS),
            ("robust", self.robust, ROBUST),
        ):
            if value not in known:
                raise ConfigurationError(
                    f"unknown {name} {value!r}", fix=nearest(str(value), known)
                )
        if not 0 <= self.trim < 0.5:
            raise ConfigurationError(f"trim={self.trim} is not in [0, 0.5)")
        if self.max_norm is not None and not self.max_norm > 0:
            raise ConfigurationError(f"max_norm={self.max_norm} is not positive")
        if self.rank is not None and not 1 <= self.rank <= _MAX_RANK:
            raise ConfigurationError(f"rank={self.rank} is not in 1..{_MAX_RANK}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AggregateSettings:
        """Build from JSON; unknown keys and wrong types are refused."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigurationError(
                f"unknown setting {unknown[0]!r}", fix=nearest(unknown[0], known)
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigurationError(f"a setting has a wrong type ({error})") from error


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
    norms = [_norm(client, number, pairs, scalings, settings) for number, client in enumerate(kept)]
    most = settings.max_norm or float("inf")
    bounds = [most / norm if norm > most else 1.0 for norm in norms]
    result: dict[str, Array] = {}
    errors: dict[str, float] = {}
    missed = wanted = 0.0
    for name in kept[0]:
        if name in pairs or name in pairs.values():
            continue
        result[name] = _plain([c[name] for c in kept], bounds, share, settings)
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
        new_a, new_b, gap, size = _pair(a, b, share, bounds, scales, settings, a_name)
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


def _flat(a: Array, b: Array) -> tuple[Matrix, Matrix]:
    # A convolution's factors are (r, in, h, w) and (out, r, 1, 1): the product is that of matrices.
    wide, deep = math.prod(a.shape[1:]), math.prod(b.shape[1:])
    return a.astype("<f8").reshape(len(a), wide), b.astype("<f8").reshape(len(b), deep)


def _norm(
    client: Weights,
    number: int,
    pairs: Mapping[str, str],
    scalings: Mapping[str, Sequence[float]],
    settings: AggregateSettings,
) -> float:
    """Return the Frobenius norm of all that a client sends: products, and every other float."""
    square = 0.0
    # Averaged apart, a factor counts by itself: a huge A with a tiny B is a small product.
    apart = settings.method == "naive"
    factors = set() if apart else {*pairs, *pairs.values()}
    for name, array in client.items():
        if name not in factors and dtype_name(array) in FLOATS:
            square += float(np.sum(array.astype("<f8") ** 2))
    for a_name, b_name in () if apart else pairs.items():
        a, b = _flat(client[a_name], client[b_name])
        # |B A|^2 = trace((B^T B)(A A^T)): r by r, never out by in.
        square += scalings[a_name][number] ** 2 * float(np.sum((b.T @ b) * (a @ a.T)))
    # Beyond what a float64 holds it is the largest there is.
    return float(max(square, 0.0) ** 0.5) if np.isfinite(square) else float("inf")


def _pair(
    a: Sequence[Array],
    b: Sequence[Array],
    share: Matrix,
    bounds: Sequence[float],
    scales: Sequence[float],
    settings: AggregateSettings,
    name: str,
) -> tuple[Array, Array, float, float]:
    flat = [_flat(x, y) for x, y in zip(a, b, strict=True)]
    scaled = [(x, y * s) for (x, y), s in zip(flat, scales, strict=True)]
    if settings.method == "freeze-a":
        if any(not np.array_equal(raw(x), raw(a[0])) for x in a[1:]):
            raise SyncFailure(
                "malformed",
                f"{name}: the clients' A differ, so freeze-a cannot average them",
                fix="train with A frozen, or use method product",
            )
        mean_b = _center([y for _, y in scaled], share, settings)
        return a[0], _as(mean_b, b[0]), 0.0, _square(flat[0][0], mean_b)
    if settings.method == "naive":
        mean_a = _center([x * s for (x, _), s in zip(flat, bounds, strict=True)], share, settings)
        mean_b = _center([y for _, y in scaled], share, settings)
        exact_b, exact_a = _stacked(scaled, share)
        gap = _square(np.vstack([mean_a, exact_a]), np.hstack([mean_b, -exact_b]))
        return _as(mean_a, a[0]), _as(mean_b, b[0]), gap, _square(exact_a, exact_b)
    rank = settings.rank or max(x.shape[0] for x in a)
    if settings.robust == "mean":
        left, right = _stacked(scaled, share)
    else:
        # A median has no factors: the layer is built in full, one at a time.
        dense = _center([y @ x for x, y in scaled], share, settings)
        left, right = dense, np.eye(dense.shape[1])
    new_a, new_b, tail, size = _low_rank(left, right, rank)
    return _as(new_a, a[0]), _as(new_b, b[0]), tail, size


def _stacked(pairs: Sequence[tuple[Matrix, Matrix]], share: Matrix) -> tuple[Matrix, Matrix]:
    """Return the average of the products exactly, as one product of rank sum(r)."""
    left = np.hstack([y * s for (_, y), s in zip(pairs, share, strict=True)])
    return left, np.vstack([x for x, _ in pairs])


def _low_rank(left: Matrix, right: Matrix, rank: int) -> tuple[Matrix, Matrix, float, float]:
    """Return the best A (rank, in) and B (out, rank) for left @ right (Eckart and Young 1936)."""
    if not left.size or not right.size:  # rank 0, or a layer without inputs or outputs
        return np.zeros((rank, right.shape[1])), np.zeros((left.shape[0], rank)), 0.0, 0.0
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T)
    keep = min(rank, s.size)
    # A sign for each singular pair, so that the same input gives the same factors.
    signs = np.sign(vt[np.arange(s.size), np.argmax(np.abs(vt[: s.size]), axis=1)])
    root = np.sqrt(s[:keep])
    new_b = (q_left @ u[:, :keep]) * (root * signs[:keep])
    new_a = (q_right @ vt[:keep].T).T * (root * signs[:keep])[:, None]
    if keep < rank:
        new_b = np.pad(new_b, ((0, 0), (0, rank - keep)))
        new_a = np.pad(new_a, ((0, rank - keep), (0, 0)))
    return new_a, new_b, float(np.sum(s[keep:] ** 2)), float(np.sum(s**2))


def _square(a: Matrix, b: Matrix) -> float:
    return max(float(np.sum((b.T @ b) * (a @ a.T))), 0.0)


def _center(values: Sequence[Matrix], share: Matrix, settings: AggregateSettings) -> Matrix:
    if settings.robust == "mean":
        mean: Matrix = np.sum([v * s for v, s in zip(values, share, strict=True)], axis=0)
        return mean
    stacked = np.sort(np.stack(values), axis=0)
    if settings.robust == "median":
        middle: Matrix = np.median(stacked, axis=0)
        return middle
    cut = int(np.floor(settings.trim * len(values)))
    trimmed: Matrix = stacked[cut : len(values) - cut].mean(axis=0)
    return trimmed


def _plain(
    values: Sequence[Array], bounds: Sequence[float], share: Matrix, settings: AggregateSettings
) -> Array:
    if dtype_name(values[0]) not in FLOATS:
        return values[0]
    scaled = [v.astype("<f8") * bound for v, bound in zip(values, bounds, strict=True)]
    mean = np.asarray(_center(scaled, share, settings))
    return mean.astype(DTYPES[dtype_name(values[0])]).reshape(values[0].shape)


def _as(value: Matrix, like: Array) -> Array:
    """Return ``value`` in the dtype of ``like``, and its shape but for the rank."""
    array = value.astype(DTYPES[dtype_name(like)])
    if like.ndim <= 2:
        return array
    if array.shape[1] == int(np.prod(like.shape[1:])):
        return array.reshape(array.shape[0], *like.shape[1:])
    return array.reshape(array.shape[0], array.shape[1], *like.shape[2:])
