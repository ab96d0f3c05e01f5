"""A quantized matrix as ONNX Runtime's packed kernels store it: rows of unsigned blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memopt.weights.packing import pack
from memopt.weights.quantized import QuantizedWeight


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix as rows of blocks: what MatMulNBits and GatherBlockQuantized store."""

    integers: np.ndarray  # int8 (rows, width)
    scales: np.ndarray  # float32 (rows, blocks)
    points: np.ndarray | None  # int8 (rows, blocks)
    size: int
    bits: int

    @property
    def width(self) -> int:
        """Values per row."""
        return int(self.integers.shape[1])

    def packed(self, *, whole_blocks: bool = True) -> np.ndarray:
        """Return unsigned integers, lowest bits first: (rows, blocks, bytes) or (rows, bytes)."""
        rows = len(self.integers)
        blocks = self.scales.shape[1]
        if not whole_blocks:
            return _unsigned(self.integers, self.bits).reshape(rows, -1)
        padded = np.zeros((rows, blocks * self.size), np.int8)
        padded[:, : self.width] = self.integers
        return _unsigned(padded, self.bits).reshape(rows, blocks, -1)

    def packed_points(self) -> np.ndarray:
        """Return unsigned zero points, each row padded to whole bytes."""
        assert self.points is not None
        per_byte = 8 // self.bits
        rows, blocks = self.points.shape
        padded = np.zeros((rows, -(-blocks // per_byte) * per_byte), np.int8)
        padded[:, :blocks] = self.points
        return _unsigned(padded, self.bits).reshape(rows, -1)


def _unsigned(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack signed integers as unsigned ones, offset by half the range: only top bits flip."""
    flip = {8: 0x80, 4: 0x88, 2: 0xAA}[bits]
    return pack(values, bits).view(np.uint8) ^ np.uint8(flip)


def to_blocks(weight: QuantizedWeight, *, rows: int) -> Blocks | None:
    """Return a matrix as blocks along the other axis than ``rows``, None where it does not fit.

    The kernels want blocks of a power of two from 16 on; a scale that covers more than a block is
    repeated, which changes no number.
    """
    if weight.integers.ndim != 2:
        return None
    made = weight if rows == 0 else weight.transposed()
    count, width = made.shape
    per_byte = 8 // made.bits
    if made.group_size:
        size = made.group_size
        if made.axis != 1 or size < 16 or size & (size - 1):
            return None
    elif made.axis == 1:
        return None  # a scale per column of the row: no block has one scale
    else:
        # The largest block that still divides typical widths: fewest repeated scales.
        size = next((s for s in (128, 64, 32) if width % s == 0), 32)
    if rows == 0 and width % (size if made.group_size else per_byte):
        return None
    pieces = -(-width // size)

    def wide(values: np.ndarray) -> np.ndarray:
        if made.group_size:
            return values
        return np.repeat(np.broadcast_to(values, (count,))[:, None], pieces, axis=1)

    # GatherBlockQuantized takes no default for unsigned 8-bit tables; an explicit point is exact.
    explicit = not made.symmetric or rows == 0
    points = made.zero_points if made.zero_points.size else np.zeros(made.scales.shape, np.int8)
    return Blocks(
        made.integers,
        np.ascontiguousarray(wide(made.scales)),
        np.ascontiguousarray(wide(points)) if explicit else None,
        size,
        made.bits,
    )
