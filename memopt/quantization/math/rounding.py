"""Round-to-nearest quantization of one array: per tensor, per channel of any axis, per group."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memopt.errors import QuantizationError
from memopt.weights.packing import RANGES
from memopt.weights.quantized import QuantizedWeight, scale_shape

Array = NDArray[np.float32]


def rtn_quantize(
    weight: np.ndarray,
    *,
    bits: int = 8,
    axis: int = 0,
    group_size: int = 0,
    symmetric: bool = True,
    name: str = "weight",
) -> QuantizedWeight:
    """Quantize by rounding to nearest; every value is off by at most half its scale.

    Args:
        weight: floats of any shape, empty and scalar included.
        bits: 8, 4 or 2.
        axis: the axis with one scale per index, or, with ``group_size``, the axis cut into groups;
            -1 for one scale per tensor. (Negative axes other than -1 are not allowed.)
        group_size: 0, or the length of a group along ``axis``.
        symmetric: no zero points; else zero points inside the integers' range.
        name: for the message.

    Raises:
        QuantizationError: NaN or infinite values, an axis the array does not have, other bits.

    >>> q = rtn_quantize(np.float32([[3, -7], [0, 0]]), bits=4)
    >>> q.integers.tolist(), q.dequantize().round(2).tolist()
    ([[3, -7], [0, 0]], [[3.0, -7.0], [0.0, 0.0]])
    """
    check_weight(weight, bits=bits, axis=axis, group_size=group_size, name=name)
    exact = weight.astype(np.float64)
    low, high = _extent(exact, axis, group_size)
    scales, zeros = scales_for(low, high, bits=bits, symmetric=symmetric)
    # A QuantizedWeight of zeros knows how its scales spread over the shape.
    points = np.zeros(0, np.int8) if symmetric else zeros
    blank = QuantizedWeight(np.zeros(weight.shape, np.int8), scales, points, axis, group_size, bits)
    with np.errstate(over="ignore"):
        steps = np.rint(exact / blank.spread(scales).astype(np.float64))
    if not symmetric:
        steps += blank.spread(zeros)
    integers = np.clip(steps, *RANGES[bits]).astype(np.int8).reshape(weight.shape)
    return QuantizedWeight(integers, scales, points, axis, group_size, bits)


def scales_for(
    low: np.ndarray, high: np.ndarray, *, bits: int, symmetric: bool
) -> tuple[Array, NDArray[np.int8]]:
    """Return float32 scales and int8 zero points that cover [low, high] without clipping.

    An all-zero range gets scale 1. A scale is rounded up to float32, so that the largest value
    still fits, denormals included; the zero point is clipped into the integers' range.
    """
    bottom, top = RANGES[bits]
    if symmetric:
        exact = np.maximum(np.abs(low), np.abs(high)) / top
        low = np.zeros_like(exact)
    else:
        # Zero must be representable: padding and pruned weights stay exactly zero.
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
        exact = (high - low) / (top - bottom)
    scales = np.asarray(exact, np.float32)
    up = np.nextafter(scales, np.float32(np.inf))
    scales = np.where(scales < exact, up, scales)
    scales = np.where(exact == 0, np.float32(1), scales)
    points = np.zeros(scales.shape) if symmetric else np.rint(bottom - low / scales)
    return scales.astype(np.float32), np.clip(points, bottom, top).astype(np.int8)


def check_weight(weight: np.ndarray, *, bits: int, axis: int, group_size: int, name: str) -> None:
    """Refuse what cannot be quantized, by name.

    Raises:
        QuantizationError: see :func:`rtn_quantize`.
    """
    if bits not in RANGES:
        raise QuantizationError(f"{bits} bits is not a weight width", fix="use 8, 4 or 2")
    if not -1 <= axis < weight.ndim:
        raise QuantizationError(
            f"{name!r} has shape {list(weight.shape)} and no axis {axis}",
            fix="use -1 or a real axis",
        )
    if group_size < 0 or (group_size and axis == -1):
        raise QuantizationError(
            f"group size {group_size} with axis {axis}", fix="groups need an axis to run along"
        )
    finite = np.isfinite(weight)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise QuantizationError(
            f"{name!r} holds {int((~finite).sum())} NaN or infinite values, the first at {where}",
            fix="repair the checkpoint, or keep this weight in float",
        )


def _extent(values: np.ndarray, axis: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    if axis == -1:
        return np.min(values, initial=0.0), np.max(values, initial=0.0)
    if not group_size:
        others = tuple(i for i in range(values.ndim) if i != axis)
        return values.min(others, initial=0.0), values.max(others, initial=0.0)
    places = scale_shape(values.shape, axis, group_size)
    if values.size == 0:
        return np.zeros(places), np.zeros(places)
    starts = np.arange(0, values.shape[axis], group_size)
    return (
        np.minimum.reduceat(values, starts, axis=axis),
        np.maximum.reduceat(values, starts, axis=axis),
    )
