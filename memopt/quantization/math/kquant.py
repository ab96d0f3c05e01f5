"""K-quant rounding: each block's scale is searched, then fitted by weighted least squares.

Source: ``make_qkx2_quants`` of llama.cpp (ggml-quants.c), which tries ranges about a level wider
and narrower than the block's own and weighs large values more; here zero points are whole numbers,
as MatMulNBits stores them. It needs no calibration inputs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memopt.quantization.math.rounding import check_weight, rtn_quantize, scales_for
from memopt.weights.packing import RANGES
from memopt.weights.quantized import QuantizedWeight

# Levels more or fewer that the range is cut into; llama.cpp's -1 to 1.
WIDENED = tuple(np.linspace(-1.2, 1.2, 13))
# Values of one pass: the search holds some ten arrays of them.
CHUNK = 1 << 22

Array = NDArray[np.float32]


def k_quantize(
    weight: np.ndarray,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    name: str = "weight",
) -> QuantizedWeight:
    """Quantize a matrix in groups along its rows so that the weighted squared error is least.

    Args:
        weight: float (out, in).
        bits: 8, 4 or 2.
        group_size: inputs per scale.
        symmetric: no zero points.
        name: for messages.

    Returns:
        Axis 1 with groups of ``group_size``; never worse than :func:`rtn_quantize` by the weighted
        error.

    Raises:
        QuantizationError: NaN or infinite values.

    >>> w = np.float32([[0.1, 0.9, 1.1, 2.05] * 8])
    >>> error = lambda q: float(((q.dequantize() - w) ** 2).sum())
    >>> options = {"bits": 2, "group_size": 32, "symmetric": False}
    >>> error(k_quantize(w, **options)) < error(rtn_quantize(w, axis=1, **options))
    True
    """
    check_weight(weight, bits=bits, axis=1, group_size=group_size, name=name)
    if weight.size == 0:
        return rtn_quantize(
            weight, bits=bits, axis=1, group_size=group_size, symmetric=symmetric, name=name
        )
    rows, columns = weight.shape
    groups = -(-columns // group_size)
    integers = np.empty((rows, columns), np.int8)
    scales = np.empty((rows, groups), np.float32)
    points = np.empty((rows, groups), np.int8)
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        values = np.zeros((len(weight[part]), groups * group_size), np.float32)
        values[:, :columns] = weight[part]
        values = values.reshape(-1, groups, group_size)
        scales[part], points[part] = _searched(values, bits, symmetric)
        steps = _steps(values, scales[part], points[part], bits)
        integers[part] = steps.reshape(len(values), -1)[:, :columns]
    points = np.zeros(0, np.int8) if symmetric else points
    return QuantizedWeight(integers, scales, points, 1, group_size, bits)


def _searched(values: Array, bits: int, symmetric: bool) -> tuple[Array, NDArray[np.int8]]:
    """Return the scales and zero points (rows, groups) of the least weighted error."""
    bottom, top = RANGES[bits]
    levels = top if symmetric else top - bottom
    low, high = values.min(axis=-1), values.max(axis=-1)
    power = np.sqrt(np.mean(values**2, axis=-1, keepdims=True)) + np.abs(values)
    scales, points = scales_for(low, high, bits=bits, symmetric=symmetric)
    least = _error(values, scales, points, power, bits)
    for more in WIDENED:
        share = levels / (levels + more * min(1.0, levels / 4))
        tried, zeros = scales_for(low * share, high * share, bits=bits, symmetric=symmetric)
        apart = _steps(values, tried, zeros, bits) - zeros[..., None].astype(np.float32)
        square = np.sum(power * apart * apart, axis=-1)
        fitted = np.sum(power * values * apart, axis=-1) / np.where(square > 0, square, 1)
        # A scale that is not positive would turn the block round: it keeps the range's own.
        fitted = np.where(fitted > np.finfo(np.float32).tiny, fitted, tried)
        error = _error(values, fitted, zeros, power, bits)
        better = error < least
        least = np.where(better, error, least)
        scales = np.where(better, fitted, scales)
        points = np.where(better, zeros, points)
    return scales.astype(np.float32), points.astype(np.int8)


def _steps(values: Array, scales: Array, points: NDArray[np.int8], bits: int) -> Array:
    steps = np.rint(values / scales[..., None]) + points[..., None].astype(np.float32)
    return np.asarray(np.clip(steps, *RANGES[bits]), np.float32)


def _error(
    values: Array, scales: Array, points: NDArray[np.int8], power: Array, bits: int
) -> Array:
    apart = _steps(values, scales, points, bits) - points[..., None].astype(np.float32)
    return np.asarray(np.sum(power * (apart * scales[..., None] - values) ** 2, axis=-1))
