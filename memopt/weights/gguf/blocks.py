"""Blocks of GGUF tensors taken apart: their integers, scales and minima, nothing rounded.

Every type here means ``scale * integer + minimum`` with float32 scales, so a file's own integers
can be kept and what they stand for is, bit for bit, what llama.cpp's ``gguf`` package gives.
Source: ggml-quants.c and gguf-py's ``gguf/quants.py`` (MIT).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from memopt.weights.gguf.file import GgufTensor
from memopt.weights.quantized import QuantizedWeight


@dataclass(frozen=True, slots=True)
class Integers:
    """A tensor as ``scale * integer + minimum``, a scale for each group along its last axis.

    Attributes:
        values: int8, in the tensor's shape; signed for types without minima, else 0 and above.
        scales: float32, in the tensor's shape with the last axis divided by ``group``.
        minima: float32, in the scales' shape; None where the type has none.
        group: values under one scale.
        bits: of an integer: 8, 4 or 2.
    """

    values: np.ndarray
    scales: np.ndarray
    minima: np.ndarray | None
    group: int
    bits: int

    def dequantize(self) -> np.ndarray:
        """Return the values that the integers stand for, as float32."""
        groups = self.values.reshape(*self.scales.shape, self.group).astype(np.float32)
        groups *= self.scales[..., None]
        if self.minima is not None:
            groups += self.minima[..., None]
        return groups.reshape(self.values.shape)

    def weight(self) -> QuantizedWeight:
        """Return them as a row of schema V2, which stores signed integers.

        Raises:
            WeightsError: a scale or a minimum is not finite.
        """
        values, points = self.values, np.zeros(0, np.int8)
        if self.minima is not None and self.bits < 8:
            half = 1 << (self.bits - 1)
            values = values - np.int8(half)
            points = np.full(self.scales.shape, -half, np.int8)
        minima = np.zeros(0, np.float32) if self.minima is None else self.minima
        axis = self.values.ndim - 1
        return QuantizedWeight(values, self.scales, points, axis, self.group, self.bits, minima)


def integers(tensor: GgufTensor, part: int | None = None) -> Integers:
    """Return the integers of a quantized tensor, or of one part along its first axis.

    A graph of MatMulNBits wants exactly these: see :class:`Integers` for shapes and types.

    >>> from pathlib import Path
    >>> from memopt.weights.gguf.kinds import KINDS
    >>> file = Path(getfixture("tmp_path")) / "x"
    >>> _ = file.write_bytes(np.float16(0.5).tobytes() + bytes(range(32)))
    >>> q = integers(GgufTensor("w", KINDS[8], (1, 32), file, 0))
    >>> q.values[0, :3].tolist(), q.scales.tolist(), q.dequantize()[0, :3].tolist()
    ([0, 1, 2], [[0.5]], [0.0, 0.5, 1.0])
    """
    kind, shape = tensor.kind, tensor.shape if part is None else tensor.shape[1:]
    # A type's odd bits may be infinite scales, whose products are what they are.
    with np.errstate(invalid="ignore", over="ignore"):
        values, scales, minima = _READERS[kind.name](tensor.read(part))
    grouped = (*shape[:-1], shape[-1] // kind.group)
    return Integers(
        values.reshape(shape).view(np.int8),
        scales.reshape(grouped).astype(np.float32, copy=False),
        None if minima is None else minima.reshape(grouped).astype(np.float32, copy=False),
        kind.group,
        kind.bits,
    )


def values(tensor: GgufTensor, part: int | None = None) -> np.ndarray:
    """Return a tensor's values: floats as they are stored, quantized ones as float32."""
    if not tensor.kind.quantized:
        return tensor.read(part)
    with np.errstate(invalid="ignore", over="ignore"):
        return integers(tensor, part).dequantize()


_Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """Read the float16 at byte ``at`` of each block, as float32 (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _fields(data: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Return the bit fields of bytes: of every ``width`` bytes the lowest fields, then the next."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    rows = data.reshape(len(data), -1, 1, width) >> shifts & np.uint8((1 << bits) - 1)
    return rows.reshape(len(data), -1)


def _q4_0(blocks: np.ndarray) -> _Parts:
    return _fields(blocks[:, 2:], 4, 16) - np.uint8(8), _half(blocks, 0), None


def _q4_1(blocks: np.ndarray) -> _Parts:
    return _fields(blocks[:, 4:], 4, 16), _half(blocks, 0), _half(blocks, 2)


def _fifth(blocks: np.ndarray) -> np.ndarray:
    """Return the fifth bits of 32 values, bit j of a little-endian uint32 for value j."""
    return np.unpackbits(blocks, axis=1, bitorder="little") << np.uint8(4)


def _q5_0(blocks: np.ndarray) -> _Parts:
    values = _fields(blocks[:, 6:], 4, 16) | _fifth(blocks[:, 2:6])
    return values - np.uint8(16), _half(blocks, 0), None


def _q5_1(blocks: np.ndarray) -> _Parts:
    values = _fields(blocks[:, 8:], 4, 16) | _fifth(blocks[:, 4:8])
    return values, _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: np.ndarray) -> _Parts:
    return np.ascontiguousarray(blocks[:, 2:]), _half(blocks, 0), None


def _q2_k(blocks: np.ndarray) -> _Parts:
    packed = blocks[:, :16]
    scales = _half(blocks, 80) * (packed & 15).astype(np.float32)
    minima = _half(blocks, 82) * (packed >> 4).astype(np.float32)
    return _fields(blocks[:, 16:80], 2, 32), scales, -minima


def _q3_k(blocks: np.ndarray) -> _Parts:
    low, high = _fields(blocks[:, 96:104], 4, 8), _fields(blocks[:, 104:108], 2, 4)
    scales = (low | high << np.uint8(4)).astype(np.float32) - np.float32(32)
    # The third bit counts the other way round: where it is missing, 4 is taken off.
    third = _fields(blocks[:, :32], 1, 32) << np.uint8(2)
    values = (_fields(blocks[:, 32:96], 2, 32) | third) - np.uint8(4)
    return values, _half(blocks, 108) * scales, None


def _six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 8 scales and 8 minima, six bits each, of a block's 12 bytes."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, rest & 15 | (first >> 6) << np.uint8(4)], axis=1)
    minima = np.concatenate([second & 63, rest >> 4 | (second >> 6) << np.uint8(4)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _q4_k(blocks: np.ndarray) -> _Parts:
    scales, minima = _six_bits(blocks[:, 4:16])
    values = _fields(blocks[:, 16:], 4, 32)
    return values, _half(blocks, 0) * scales, -(_half(blocks, 2) * minima)


def _q5_k(blocks: np.ndarray) -> _Parts:
    scales, minima = _six_bits(blocks[:, 4:16])
    values = _fields(blocks[:, 48:], 4, 32) | _fields(blocks[:, 16:48], 1, 32) << np.uint8(4)
    return values, _half(blocks, 0) * scales, -(_half(blocks, 2) * minima)


def _q6_k(blocks: np.ndarray) -> _Parts:
    low, high = _fields(blocks[:, :128], 4, 64), _fields(blocks[:, 128:192], 2, 32)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return (low | high << np.uint8(4)) - np.uint8(32), _half(blocks, 208) * scales, None


_READERS: dict[str, Callable[[np.ndarray], _Parts]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
