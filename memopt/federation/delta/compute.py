"""What changed between two sets of weights, as a payload, and the payload applied.

Pure functions. The base is what the receiver holds (the sender's own record of it), so what a
lossy codec or the threshold left out is part of the next difference by itself: error feedback
(Seide et al. 2014, "1-bit stochastic gradient descent"; Karimireddy et al. 2019, arXiv:1901.09847).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

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
    CODECS,
    INT4_BLOCK,
    INT8_BLOCK,
    INT8_LEVELS,
    Codec,
    difference,
    fp16_exponent,
)
from memopt.federation.delta.payload import Compressor, Table, TensorRow, decode_row, pack, unpack
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
    changes = {
        name: relative_change(base[name], array)
        for name, array in new.items()
        if name in base and _alike(base[name], array)
    }
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
    return _fit(base, new, changes, due, settings, settings.max_bytes)


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
    draft = _Draft(settings or DeltaSettings(), {})
    for name in sorted(new):
        draft.put(name, new[name], "sent" if base and name in base else "added")
    for name in sorted(set(base or {}) - set(new)):
        draft.report(name, "removed", change=1.0)
    return draft.delta("full", new)


def update_error(base: Weights, new: Weights, received: Weights) -> float:
    """Return |new - received| / |new - base| over all float tensors that both sides know."""
    whole = missed = 0.0
    for name, array in new.items():
        if name not in base or not _alike(base[name], array) or dtype_name(array) not in FLOATS:
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            step = difference(base[name], array).astype("<f8")
            gap = difference(received[name], array).astype("<f8")
        finite = np.isfinite(step) & np.isfinite(gap)
        whole += float(np.dot(step[finite], step[finite]))
        missed += float(np.dot(gap[finite], gap[finite]))
    return (missed / whole) ** 0.5 if whole > 0 else 0.0


def _alike(base: Array, new: Array) -> bool:
    return base.shape == new.shape and base.dtype == new.dtype


def _fit(
    base: Weights,
    new: Weights,
    changes: Mapping[str, float],
    due: set[str],
    settings: DeltaSettings,
    most: int,
) -> Delta:
    """Return the most exact delta within ``most`` bytes; what does not fit waits for later."""
    for codec, levels in reversed(candidates(settings)):
        for share in (settings.topk, 0.02, 0.005) if codec == "topk" else (settings.topk,):
            trial = replace(settings, codec=codec, levels=levels, topk=share)
            delta = _build(base, new, changes, due, trial)
            if len(delta.payload) <= most:
                return delta
    # The last, smallest form still does not fit: keep the tensors that changed most for their size.
    costs = {t.name: t.bytes for t in delta.tensors if t.action == "sent"}
    codec = "topk" if settings.codec == "auto" else settings.codec
    trial = replace(settings, codec=codec, topk=min(settings.topk, 0.005))
    rest = sorted(costs, key=lambda n: (-changes[n] / max(costs[n], 1), n))
    while rest:
        delta = _build(base, new, changes, set(rest), trial)
        if len(delta.payload) <= most:
            return delta
        rest = rest[: len(rest) * 3 // 4]
    delta = _build(base, new, changes, set(), trial)
    if len(delta.payload) <= most and delta.sent:
        return delta
    raise SyncError(
        f"not even one tensor fits into {most} bytes",
        fix=f"raise max_bytes over {len(delta.payload)}, or take codec topk",
    )


def _build(
    base: Weights,
    new: Weights,
    changes: Mapping[str, float],
    due: set[str],
    settings: DeltaSettings,
) -> Delta:
    draft = _Draft(settings, {name: base[name] for name in base if name in new})
    for name in sorted(set(base) - set(new)):
        draft.drop(name)
    for name in sorted(new):
        if name not in changes:
            draft.put(name, new[name], "replaced" if name in base else "added")
        elif name in due:
            draft.change(name, base[name], new[name], changes[name])
        elif changes[name] > 0:
            draft.report(name, "skipped", change=changes[name], error=1.0)
    return draft.delta("delta", new, base)


class _Draft:
    """A payload under construction: rows, their bodies, what the receiver gets, what to report."""

    def __init__(self, settings: DeltaSettings, received: dict[str, Array]) -> None:
        self._settings = settings
        self._compressor = Compressor(
            settings.level, settings.dictionary, off=not settings.compress
        )
        self._rows: list[TensorRow] = []
        self._bodies: list[bytes] = []
        self._received = received
        self._reports: list[TensorReport] = []

    def drop(self, name: str) -> None:
        """Take a tensor away."""
        self._rows.append(TensorRow(name=name, operation="drop"))
        self._bodies.append(b"")
        self.report(name, "removed", change=1.0)

    def put(self, name: str, array: Array, action: str) -> None:
        """Send all of a tensor, bit for bit."""
        self._add(*self._encode(name, "put", "raw", 0, None, array), action, float("inf"))

    def change(self, name: str, base: Array, new: Array, change: float) -> None:
        """Send a tensor's change with the chosen codec, or the smallest one within max_error."""
        most = self._settings.max_error
        for codec, levels in candidates(self._settings) if dtype_name(new) in FLOATS else ():
            if codec == "lossless":
                break
            param = _param(BY_NAME[codec][1], base, new, self._settings)
            if param is None:
                continue
            row, body, got = self._encode(name, "change", codec, param, base, new, levels)
            # NaN, infinity and overflow only travel bit by bit.
            if not np.all(np.isfinite(got.astype("<f8"))):
                continue
            error = update_error({name: base}, {name: new}, {name: got})
            if most is None or error <= most:
                self._add(row, body, got, "sent", change, error)
                return
        self._add(*self._encode(name, "change", "lossless", 0, base, new), "sent", change)

    def report(self, name: str, action: str, **numbers: Any) -> None:
        """Say what became of a tensor."""
        values = {"codec": "-", "error": 0.0, "bytes": 0, **numbers}
        self._reports.append(TensorReport(name=name, action=action, **values))

    def delta(self, kind: str, new: Weights, base: Weights | None = None) -> Delta:
        """Return the whole; without a base it needs none."""
        table = Table(kind=kind, rows=tuple(self._rows), dictionary=self._compressor.dictionary)
        return Delta(
            payload=pack(table, self._bodies, self._compressor),
            kind=kind,
            base_hash="" if base is None else weights_hash(base),
            new_hash=weights_hash(self._received),
            received=self._received,
            tensors=tuple(sorted(self._reports, key=lambda t: t.name)),
            fp32_bytes=fp32_bytes(new),
            error=0.0 if base is None else update_error(base, new, self._received),
        )

    def _encode(
        self,
        name: str,
        operation: str,
        codec: str,
        param: int,
        base: Array | None,
        new: Array,
        levels: int = INT8_LEVELS,
    ) -> tuple[TensorRow, bytes, Array]:
        number, how = BY_NAME[codec]
        plain = how.encode(new if base is None else base, new, param, levels)
        body, compressed = self._compressor.body(plain, noise=how.noise)
        row = TensorRow(
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

    def _add(
        self,
        row: TensorRow,
        body: bytes,
        got: Array,
        action: str,
        change: float,
        error: float = 0.0,
    ) -> None:
        self._rows.append(row)
        self._bodies.append(body)
        self._received[row.name] = got
        codec = CODECS[row.codec].name
        self.report(row.name, action, codec=codec, change=change, error=error, bytes=row.stored)


def _param(codec: Codec, base: Array, new: Array, settings: DeltaSettings) -> int | None:
    delta = difference(base, new)
    if not np.all(np.isfinite(delta)):
        return None
    if codec.name == "fp16":
        return fp16_exponent(delta)
    if codec.name == "topk":
        return min(delta.size, max(1, int(np.ceil(delta.size * settings.topk))))
    return settings.block or (INT8_BLOCK if codec.name == "int8" else INT4_BLOCK)
