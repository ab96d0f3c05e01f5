"""A quantized matrix as ONNX Runtime's packed kernels store it: rows of unsigned blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memopt.weights.packing import RANGES
from memopt.weights.quantized import QuantizedWeight


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix as rows of blocks: what MatMulNBits and GatherBlockQuantized store."""

    integers: np.ndarray  # int8 (rows, width)
    scales: np.ndarray  # float32 (rows, blocks)
    points: np.ndarray | None  # int8 (rows, blocks)
    size: int
    bits: int
    minima: np.ndarray | None = None  # float32 (rows, blocks): added to what the rest stands for

    @property
    def width(self) -> int:
        """Values per row."""
        return int(self.integers.shape[1])

    def matmul_attributes(self, accuracy_level: int) -> dict[str, int]:
        """Return the attributes of MatMulNBits.

        ``accuracy_level`` 0 computes in float32, 4 rounds activations to int8.
        """
        return {
            "K": self.width,
            "N": len(self.integers),
            "bits": self.bits,
            "block_size": self.size,
            "accuracy_level": accuracy_level,
        }

    def packed(self, *, whole_blocks: bool = True) -> np.ndarray:
        """Return unsigned integers, lowest bits first: (rows, blocks, bytes) or (rows, bytes)."""
        if not whole_blocks:
            return pack_unsigned(self.integers, self.bits)
        rows, blocks = self.scales.shape
        padded = np.zeros((rows, blocks * self.size), np.int8)
        if self.points is not None:
            # The last block of a row that does not fill it holds zeros: its own zero point.
            padded[:] = np.repeat(self.points, self.size, axis=1)
        padded[:, : self.width] = self.integers
        return pack_unsigned(padded.reshape(rows, blocks, self.size), self.bits)

    def block_sums(self) -> np.ndarray:
        """Return the matrix (width, blocks) that adds up a row of inputs block by block.

        With it ``x @ weight.T`` is the product of the rest plus ``(x @ block_sums) @ minima.T``:
        exact minima beside a kernel that has only whole zero points.
        """
        columns = np.arange(self.width) // self.size
        return np.asarray(columns[:, None] == np.arange(self.scales.shape[1]), np.float32)

    def packed_points(self) -> np.ndarray:
        """Return unsigned zero points, each row padded to whole bytes."""
        assert self.points is not None
        return pack_unsigned(self.points, self.bits)


def pack_unsigned(integers: np.ndarray, bits: int) -> np.ndarray:
    """Pack signed integers (..., count), moved up by half their range, lowest bits first.

    >>> pack_unsigned(np.array([[-7, -6, -5]], np.int8), 4).tolist()
    [[33, 3]]
    """
    per_byte = 8 // bits
    unsigned = (integers.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    padding = [(0, 0)] * (integers.ndim - 1) + [(0, -integers.shape[-1] % per_byte)]
    columns = np.pad(unsigned, padding).reshape(*integers.shape[:-1], -1, per_byte)
    shifts = (np.arange(per_byte) * bits).astype(np.uint8)
    return np.asarray(np.bitwise_or.reduce(columns << shifts, axis=-1), np.uint8)


def to_blocks(weight: QuantizedWeight, *, table: bool = False) -> Blocks | None:
    """Return a matrix (rows, width) as blocks along its rows, None where it does not fit.

    The kernels want blocks of a power of two from 16 on; a scale that covers more than a block is
    repeated, which changes no number. A ``table`` is for
    GatherBlockQuantized, which takes whole blocks.
    """
    if weight.integers.ndim != 2:
        return None
    count, width = weight.shape
    if weight.group_size:
        size = weight.group_size
        if weight.axis != 1 or size < 16 or size & (size - 1):
            return None
    elif weight.axis == 1:
        return None  # a scale per column of the row: no block has one scale
    else:
        # The largest block that still divides typical widths: fewest repeated scales.
        size = next((s for s in (128, 64, 32) if width % s == 0), 32)
    if table and width % (size if weight.group_size else 8 // weight.bits):
        return None
    pieces = -(-width // size)

    def wide(values: np.ndarray) -> np.ndarray:
        if weight.group_size:
            return np.ascontiguousarray(values)
        return np.repeat(np.broadcast_to(values, (count,))[:, None], pieces, axis=1)

    points, minima = weight.zero_points, weight.minima
    if not points.size:
        points = np.zeros(weight.scales.shape, np.int8)
    if weight.has_minima:
        points, minima = nearest_points(weight, points)
    # GatherBlockQuantized takes no default for unsigned 8-bit tables; an explicit point is exact.
    explicit = points.any() or table
    return Blocks(
        weight.integers,
        wide(weight.scales),
        wide(points) if explicit else None,
        size,
        weight.bits,
        wide(minima) if weight.has_minima else None,
    )


def nearest_points(weight: QuantizedWeight, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return zero points that are as near to 0 as whole steps go, and what of the minima is left.

    The weights stay what they are. A kernel that rounds its inputs errs by the size of what it
    multiplies them with: the steps from the point, which now are nearly the weights themselves (on
    SmolLM2 the divergence is a quarter of what it was).
    """
    least, most = RANGES[weight.bits]
    safe = np.where(weight.scales == 0, 1, weight.scales)
    found = np.clip(np.rint(points - weight.minima / safe), least, most).astype(np.int8)
    moved = (found.astype(np.float32) - points) * weight.scales
    return found, weight.minima + moved
