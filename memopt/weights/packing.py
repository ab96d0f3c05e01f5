"""int8, int4 and int2 integers to bytes and back."""

from __future__ import annotations

import numpy as np

from memopt.errors import WeightsError

RANGES = {8: (-128, 127), 4: (-8, 7), 2: (-2, 1)}


def packed_length(count: int, bits: int) -> int:
    """Return how many bytes ``count`` integers of ``bits`` bits take.

    >>> packed_length(5, 4), packed_length(5, 2), packed_length(0, 4)
    (3, 2, 0)
    """
    return -(-count * bits // 8)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack integers of any shape into a flat int8 array, lowest bits first, zero padded.

    Args:
        values: integers in the signed range of ``bits``.
        bits: 8, 4 or 2.

    Raises:
        WeightsError: another width, or a value out of range.

    >>> pack(np.array([1, -1, 7]), 4).tolist()
    [-15, 7]
    """
    if bits not in RANGES:
        raise WeightsError(f"{bits} bits cannot be packed", fix="use 8, 4 or 2")
    low, high = RANGES[bits]
    flat = np.asarray(values).reshape(-1)
    if flat.size and (flat.min() < low or flat.max() > high):
        raise WeightsError(
            f"integers from {flat.min()} to {flat.max()} do not fit in int{bits} ({low}..{high})"
        )
    flat = np.ascontiguousarray(flat, np.int8).view(np.uint8)
    if bits == 8:
        return flat.view(np.int8)
    per_byte = 8 // bits
    padded = np.zeros(packed_length(flat.size, bits) * per_byte, np.uint8)
    padded[: flat.size] = flat & ((1 << bits) - 1)
    columns = padded.reshape(-1, per_byte)
    out = columns[:, 0].copy()
    for index in range(1, per_byte):
        out |= columns[:, index] << np.uint8(index * bits)
    return out.view(np.int8)


def unpack(data: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Return the ``count`` signed integers in ``data`` as a flat int8 array (a view for 8 bits).

    >>> unpack(pack(np.array([1, -1, 7]), 4), 3, 4).tolist()
    [1, -1, 7]
    """
    if bits not in RANGES:
        raise WeightsError(f"{bits} bits cannot be unpacked", fix="use 8, 4 or 2")
    if data.size != packed_length(count, bits):
        raise WeightsError(
            f"{data.size} bytes do not hold {count} int{bits} values "
            f"({packed_length(count, bits)} bytes)"
        )
    if bits == 8:
        return data.view(np.int8)
    raw = data.view(np.uint8)
    per_byte = 8 // bits
    out = np.empty((raw.size, per_byte), np.uint8)
    for index in range(per_byte):
        out[:, index] = raw >> np.uint8(index * bits)
    # Shift the field to the top and back down as signed: this extends the sign bit.
    signed = (out << np.uint8(8 - bits)).view(np.int8) >> np.int8(8 - bits)
    return signed.reshape(-1)[:count]


def one_a_byte(data: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Return integers that were stored one a byte although they have fewer bits.

    Raises:
        WeightsError: one is out of the range of ``bits``.

    >>> one_a_byte(np.array([-2, 1], np.int8), 2, 2).tolist()
    [-2, 1]
    """
    low, high = RANGES[bits]
    if data.size and (data.min() < low or data.max() > high):
        raise WeightsError(
            f"{data.size} bytes from {data.min()} to {data.max()} are not {count} int{bits} values "
            f"({low}..{high}), one a byte"
        )
    return data.view(np.int8)
