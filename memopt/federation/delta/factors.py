"""The average of LoRA's factors, pair by pair, and of every other tensor: the mathematics alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memopt.errors import ConfigurationError
from memopt.federation.delta.arrays import DTYPES, FLOATS, Array, Weights, dtype_name, raw
from memopt.federation.failures import SyncFailure
from memopt.registry import check_names

METHODS = ("product", "freeze-a", "naive")
ROBUST = ("mean", "median", "trimmed")
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
        check_names("method", [self.method], METHODS)
        check_names("robust", [self.robust], ROBUST)
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
        check_names("setting", sorted(values), known)
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigurationError(f"a setting has a wrong type ({error})") from error


def _flat(a: Array, b: Array) -> tuple[Matrix, Matrix]:
    # A convolution's factors are (r, in, h, w) and (out, r, 1, 1): the product is that of matrices.
    wide, deep = math.prod(a.shape[1:]), math.prod(b.shape[1:])
    return a.astype("<f8").reshape(len(a), wide), b.astype("<f8").reshape(len(b), deep)


def client_norm(
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


def average_pair(
    a: Sequence[Array],
    b: Sequence[Array],
    share: Matrix,
    bounds: Sequence[float],
    scales: Sequence[float],
    settings: AggregateSettings,
    name: str,
) -> tuple[Array, Array, float, float]:
    """Return the average A and B of a pair, and the squares of the error and of the exact average.

    Args:
        a, b: each client's factors.
        share: each client's weight, one in all.
        bounds, scales: what each client's A, when averaged apart, and B are multiplied with.
        name: of the pair, for messages.
    """
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


def average_plain(
    values: Sequence[Array], bounds: Sequence[float], share: Matrix, settings: AggregateSettings
) -> Array:
    """Return the average of a tensor that is no factor; the first client's where it is no float."""
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
