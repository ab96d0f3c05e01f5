"""What changed between two sets of weights, as a payload, and the payload applied.

Pure functions. The base is what the receiver holds (the sender's own record of it), so what a
lossy codec or the threshold left out is part of the next difference by itself: error feedback
(Seide et al. 2014, "1-bit stochastic gradient descent"; Karimireddy et al. 2019, arXiv:1901.09847).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from memopt.errors import SyncError
from memopt.federation.delta.arrays import (
    FLOATS,
    Array,
    Weights,
    check_weights,
    dtype_name,
    fp32_bytes,
    raw,
    total_bytes,
    weights_hash,
)
from memopt.federation.delta.codecs import (
    BY_NAME,
    INT4_BLOCK,
    INT8_BLOCK,
    INT8_LEVELS,
    Codec,
    difference,
    fp16_exponent,
)
from memopt.federation.delta.payload import Compressor, Row, Table, decode_row, pack, unpack
from memopt.federation.delta.settings import DeltaSettings, candidates
from memopt.federation.limits import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReport:
    """What became of one tensor."""

    name: str
    action: str  # sent | skipped | added | replaced | removed
    codec: str
    change: float  # relative mean change; inf where there was nothing before
    error: float  # relative L2 error of the update that the receiver gets; 1 where skipped
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A payload, the weights the receiver will hold, and how each tensor fared."""

    payload: bytes
    kind: str
    base_hash: str
    new_hash: str
    received: dict[str, Array]
    tensors: tuple[TensorReport, ...]
    fp32_bytes: int
    error: float  # relative L2 error of the whole update

    @property
    def sent(self) -> int:
        """Number of tensors in the payload."""
        return sum(t.action != "skipped" for t in self.tensors)

    @property
    def skipped(self) -> int:
        """Number of changed tensors that wait, their change carried forward."""
        return sum(t.action == "skipped" for t in self.tensors)

    @property
    def saving(self) -> float:
        """Share of the full fp32 size that was not sent."""
        return 1 - len(self.payload) / max(self.fp32_bytes, 1)


def relative_change(base: Array, new: Array) -> float:
    """Return mean|new - base| / mean|base|; inf when the base is all zero or a value is not finite.

    >>> round(relative_change(np.ones(4, "float32"), np.full(4, 1.02, "float32")), 4)
    0.02
    """
    if np.array_equal(raw(base), raw(new)):
        return 0.0
    if dtype_name(new) not in FLOATS:
        return float("inf")
    with np.errstate(over="ignore", invalid="ignore"):
        change = float(np.abs(difference(base, new)).astype("<f8").mean())
        size = float(np.abs(base.astype("<f8")).mean())
    if not np.isfinite(change) or not np.isfinite(size) or size == 0:
        return float("inf")
    return change / size


def compute_delta(base: Weights, new: Weights, settings: DeltaSettings | None = None) -> Delta:
    """Return the delta that brings a receiver holding ``base`` to ``new`` (or near it).

    Args:
        base: what the receiver holds; empty asks for a full payload.
        new: what it should hold. Any float dtype; integers travel losslessly.
        settings: threshold, codec and targets.

    Raises:
        SyncError: no tensors, an unsupported dtype, or ``max_bytes`` is too small for anything.

    >>> old = {"w": np.ones((4, 64), "float32")}
    >>> delta = compute_delta(old, {"w": old["w"] * 1.5}, DeltaSettings(codec="lossless"))
    >>> float(apply_delta(old, delta.payload)["w"][0, 0])
    1.5
    """
    settings = settings or DeltaSettings()
    base, new = (check_weights(base) if base else {}), check_weights(new)
    if not base:
        return full_payload(new, settings, base=base)
    changes = _changes(base, new)
    due = {
        name
        for name, change in changes.items()
        if change > settings.delta_threshold or (settings.delta_threshold == 0 and change > 0)
    }
    if settings.max_bytes is None:
        delta = _build(base, new, changes, due, settings)
        full = total_bytes(new)
        if len(delta.payload) > settings.full_ratio * full and full > 0:
            whole = full_payload(new, settings, base=base)
            # On a handful of tiny tensors the frame alone is over half: send the smaller one.
            return whole if len(whole.payload) <= len(delta.payload) or full > 1 << 16 else delta
        return delta
    return _fit(base, new, changes, due, settings)


def apply_delta(
    base: Weights,
    payload: bytes | memoryview,
    *,
    limits: Limits | None = None,
    dictionaries: Mapping[str, bytes] | None = None,
) -> dict[str, Array]:
    """Return what ``payload`` makes of ``base``: bit for bit ``Delta.received`` of the sender.

    Raises:
        SyncFailure: the payload is damaged, over a limit, or made for another base.
    """
    return unpack(payload, base, limits or Limits(), dictionaries)


def full_payload(
    new: Weights, settings: DeltaSettings | None = None, *, base: Weights | None = None
) -> Delta:
    """Return all of ``new`` as a lossless payload that needs no base."""
    settings = settings or DeltaSettings()
    compressor = Compressor(settings.level, settings.dictionary, off=not settings.compress)
    rows, bodies, reports = [], [], []
    for name in sorted(new):
        row, body, _ = _encode(compressor, name, "put", "raw", 0, None, new[name])
        rows.append(row)
        bodies.append(body)
        action = "sent" if base and name in base else "added"
        reports.append(
            TensorReport(
                name=name,
                action=action,
                codec="raw",
                change=float("inf"),
                error=0.0,
                bytes=row.stored,
            )
        )
    reports += [_removed(name) for name in sorted(set(base or {}) - set(new))]
    table = Table(kind="full", rows=tuple(rows), dictionary=compressor.dictionary)
    return Delta(
        payload=pack(table, bodies, compressor),
        kind="full",
        base_hash="",
        new_hash=weights_hash(new),
        received=dict(new),
        tensors=tuple(reports),
        fp32_bytes=fp32_bytes(new),
        error=0.0,
    )


def _changes(base: Weights, new: Weights) -> dict[str, float]:
    return {
        name: relative_change(base[name], array)
        for name, array in new.items()
        if name in base and _alike(base[name], array)
    }


def _alike(base: Array, new: Array) -> bool:
    return base.shape == new.shape and base.dtype == new.dtype


def _fit(
    base: Weights,
    new: Weights,
    changes: Mapping[str, float],
    due: set[str],
    settings: DeltaSettings,
) -> Delta:
    """Return the most exact delta within ``max_bytes``; what does not fit waits for later."""
    assert settings.max_bytes is not None
    best: Delta | None = None
    for codec, levels in reversed(candidates(settings)):
        fractions = (settings.topk, 0.02, 0.005) if codec == "topk" else (settings.topk,)
        for fraction in fractions:
            trial = replace(settings, codec=codec, levels=levels, topk=fraction)
            delta = _build(base, new, changes, due, trial)
            if len(delta.payload) <= settings.max_bytes:
                return delta
            best = delta
    assert best is not None
    # The last, smallest form still does not fit: keep the tensors that changed most for their size.
    costs = {t.name: t.bytes for t in best.tensors if t.action == "sent"}
    codec = "topk" if settings.codec == "auto" else settings.codec
    trial = replace(settings, codec=codec, topk=min(settings.topk, 0.005))
    kept = sorted(costs, key=lambda n: (-changes[n] / max(costs[n], 1), n))
    while kept:
        delta = _build(base, new, changes, set(kept), trial)
        if len(delta.payload) <= settings.max_bytes:
            return delta
        kept = kept[: len(kept) * 3 // 4]
    delta = _build(base, new, changes, set(), trial)
    if len(delta.payload) <= settings.max_bytes and delta.sent:
        return delta
    raise SyncError(
        f"not even one tensor fits into {settings.max_bytes} bytes",
        fix=f"raise max_bytes over {len(delta.payload)}, or take codec topk",
    )


def _build(
    base: Weights,
    new: Weights,
    changes: Mapping[str, float],
    due: set[str],
    settings: DeltaSettings,
) -> Delta:
    compressor = Compressor(settings.level, settings.dictionary, off=not settings.compress)
    rows: list[Row] = []
    bodies: list[bytes] = []
    reports: list[TensorReport] = []
    received = {name: base[name] for name in base if name in new}
    for name in sorted(set(base) - set(new)):
        rows.append(Row(name=name, operation="drop"))
        bodies.append(b"")
        reports.append(_removed(name))
    for name in sorted(new):
        array = new[name]
        if name not in changes:
            row, body, got = _encode(compressor, name, "put", "raw", 0, None, array)
            action, error = ("replaced" if name in base else "added"), 0.0
        elif name in due:
            row, body, got, error = _change(compressor, name, base[name], array, settings)
            action = "sent"
        else:
            if changes[name] > 0:
                reports.append(_skipped(name, changes[name]))
            continue
        rows.append(row)
        bodies.append(body)
        received[name] = got
        reports.append(
            TensorReport(
                name=name,
                action=action,
                codec=_codec_name(row),
                error=error,
                change=changes.get(name, float("inf")),
                bytes=row.stored,
            )
        )
    table = Table(kind="delta", rows=tuple(rows), dictionary=compressor.dictionary)
    return Delta(
        payload=pack(table, bodies, compressor),
        kind="delta",
        base_hash=weights_hash(base),
        new_hash=weights_hash(received),
        received=received,
        tensors=tuple(sorted(reports, key=lambda t: t.name)),
        fp32_bytes=fp32_bytes(new),
        error=update_error(base, new, received),
    )


def update_error(base: Weights, new: Weights, received: Weights) -> float:
    """Return |new - received| / |new - base| over all float tensors that both sides know."""
    wanted = missed = 0.0
    for name, array in new.items():
        if name not in base or not _alike(base[name], array) or dtype_name(array) not in FLOATS:
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            step = difference(base[name], array).astype("<f8")
            gap = difference(received[name], array).astype("<f8")
        finite = np.isfinite(step) & np.isfinite(gap)
        wanted += float(np.dot(step[finite], step[finite]))
        missed += float(np.dot(gap[finite], gap[finite]))
    return (missed / wanted) ** 0.5 if wanted > 0 else 0.0


def _change(
    compressor: Compressor, name: str, base: Array, new: Array, settings: DeltaSettings
) -> tuple[Row, bytes, Array, float]:
    """Encode one changed tensor with the chosen codec, or the smallest one within max_error."""
    for codec, levels in candidates(settings) if dtype_name(new) in FLOATS else ():
        if codec == "lossless":
            break
        param = _param(BY_NAME[codec][1], base, new, settings)
        if param is None:
            continue
        row, body, got = _encode(compressor, name, "change", codec, param, base, new, levels)
        # NaN, infinity and overflow only travel bit by bit.
        if not np.all(np.isfinite(got.astype("<f8"))):
            continue
        error = update_error({name: base}, {name: new}, {name: got})
        if settings.max_error is None or error <= settings.max_error:
            return row, body, got, error
    row, body, got = _encode(compressor, name, "change", "lossless", 0, base, new)
    return row, body, got, 0.0


def _param(codec: Codec, base: Array, new: Array, settings: DeltaSettings) -> int | None:
    delta = difference(base, new)
    if not np.all(np.isfinite(delta)):
        return None
    if codec.name == "fp16":
        return fp16_exponent(delta)
    if codec.name == "topk":
        return min(delta.size, max(1, int(np.ceil(delta.size * settings.topk))))
    return settings.block or (INT8_BLOCK if codec.name == "int8" else INT4_BLOCK)


def _encode(
    compressor: Compressor,
    name: str,
    operation: str,
    codec: str,
    param: int,
    base: Array | None,
    new: Array,
    levels: int = INT8_LEVELS,
) -> tuple[Row, bytes, Array]:
    number, how = BY_NAME[codec]
    plain = how.encode(base, new, param, levels)
    body, compressed = compressor.body(plain, noise=how.noise)
    row = Row(
        name=name,
        operation=operation,
        dtype=dtype_name(new),
        codec=number,
        shape=tuple(new.shape),
        stored=len(body),
        compressed=compressed,
        param=param,
    )
    return row, body, new if how.exact else decode_row(row, plain, base)


def _codec_name(row: Row) -> str:
    return next(name for name, (number, _) in BY_NAME.items() if number == row.codec)


def _removed(name: str) -> TensorReport:
    return TensorReport(name=name, action="removed", codec="-", change=1.0, error=0.0, bytes=0)


def _skipped(name: str, change: float) -> TensorReport:
    return TensorReport(name=name, action="skipped", codec="-", change=change, error=1.0, bytes=0)
