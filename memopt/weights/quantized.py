"""A quantized weight: integers, scales, zero points, minima; the arithmetic that turns it back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from memopt.errors import WeightsError
from memopt.weights.packing import RANGES


def scale_shape(shape: tuple[int, ...], axis: int, group_size: int) -> tuple[int, ...]:
    """Return the shape of the scales of a weight (see ``memopt.weights.schema``).

    >>> scale_shape((4, 10), -1, 0), scale_shape((4, 10), 0, 0), scale_shape((4, 10), 1, 8)
    ((), (4,), (4, 2))
    """
    if axis == -1:
        return ()
    if group_size == 0:
        return (shape[axis],)
    return (*shape[:axis], math.ceil(shape[axis] / group_size), *shape[axis + 1 :])


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """One weight as ``scale * (integer - zero_point)``, plus a minimum where it has minima.

    Attributes:
        integers: int8, in the weight's shape, in the signed range of ``bits`` (not packed).
        scales: float32, in :func:`scale_shape`.
        zero_points: int8, in the scales' shape, or empty for a symmetric weight.
        axis: -1 for one scale per tensor, else the quantized axis (0 <= axis < ndim).
        group_size: 0 for one scale per index of ``axis``, else the length of a block along it.
        bits: 8, 4 or 2.
        minima: float32, in the scales' shape, or empty: what is added to the product. GGUF's types
            that count up from a minimum (Q4_1) need it: it is no whole number of steps.
    """

    integers: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    axis: int
    group_size: int
    bits: int
    minima: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))

    def __post_init__(self) -> None:
        if self.bits not in RANGES:
            raise WeightsError(f"{self.bits} bits is not a quantized width", fix="use 8, 4 or 2")
        if not -1 <= self.axis < max(self.integers.ndim, 1):
            raise WeightsError(
                f"quantization axis {self.axis} does not exist in shape {list(self.shape)}"
            )
        if self.group_size < 0 or (self.group_size and self.axis == -1):
            raise WeightsError(f"group size {self.group_size} with axis {self.axis}")
        if self.axis >= 0 and self.integers.ndim == 0:
            raise WeightsError(f"a scalar has no axis {self.axis}")
        expected = scale_shape(self.shape, self.axis, self.group_size)
        if self.scales.shape != expected:
            raise WeightsError(
                f"{self.scales.size} scales, shape {list(self.shape)} with axis {self.axis} and "
                f"group size {self.group_size} needs {math.prod(expected)}"
            )
        if self.zero_points.size and self.zero_points.shape != expected:
            raise WeightsError(f"{self.zero_points.size} zero points for {self.scales.size} scales")
        if self.minima.size and self.minima.shape != expected:
            raise WeightsError(f"{self.minima.size} minima for {self.scales.size} scales")
        for what, values in (("scale", self.scales), ("minimum", self.minima)):
            if not np.isfinite(values).all():
                raise WeightsError(f"a {what} is {values[~np.isfinite(values)].reshape(-1)[0]}")

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return self.integers.shape

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is 0."""
        return not self.zero_points.any()

    @property
    def has_minima(self) -> bool:
        """Whether something is added behind the product."""
        return self.minima.size > 0

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Broadcast one value per scale over the weight's shape."""
        if self.axis == -1:
            return values.reshape((1,) * self.integers.ndim)
        if self.group_size:
            wide = np.repeat(values, self.group_size, axis=self.axis)
            return np.take(wide, np.arange(self.shape[self.axis]), axis=self.axis)
        sizes = [1] * self.integers.ndim
        sizes[self.axis] = -1
        return values.reshape(sizes)

    def dequantize(self) -> np.ndarray:
        """Return what the integers stand for as float32, by the arithmetic of DequantizeLinear.

        >>> q = QuantizedWeight(np.array([[-2, 4]], np.int8), np.array([0.5], np.float32),
        ...                     np.zeros(0, np.int8), 0, 0, 8)
        >>> q.dequantize().tolist()
        [[-1.0, 2.0]]
        """
        out = self.integers.astype(np.float32)
        if self.zero_points.size:
            out -= self.spread(self.zero_points).astype(np.float32)
        out *= self.spread(self.scales)
        if self.has_minima:
            out += self.spread(self.minima)
        return out

    def transposed(self) -> QuantizedWeight:
        """Return the transpose of a matrix, the same integers and scales.

        Raises:
            WeightsError: not a matrix.
        """
        if self.integers.ndim != 2:
            raise WeightsError(f"shape {list(self.shape)} has no transpose", fix="give a matrix")
        return QuantizedWeight(
            self.integers.T.copy(),
            self.scales.T.copy(),
            self.zero_points.T.copy(),
            self.axis if self.axis == -1 else 1 - self.axis,
            self.group_size,
            self.bits,
            self.minima.T.copy(),
        )

    def rows(self, order: np.ndarray) -> QuantizedWeight:
        """Return the weight with its rows in another order, the same integers and scales.

        Raises:
            WeightsError: the rows are what is quantized together.

        >>> q = QuantizedWeight(np.array([[1], [2]], np.int8), np.array([1, 1], np.float32),
        ...                     np.zeros(0, np.int8), 0, 0, 8)
        >>> q.rows(np.array([1, 0])).integers.tolist()
        [[2], [1]]
        """
        if self.axis == 0 and self.group_size:
            raise WeightsError(
                f"rows of {self.group_size} share a scale", fix="give a weight quantized by columns"
            )

        def moved(values: np.ndarray) -> np.ndarray:
            return values if self.axis == -1 or not values.size else values[order]

        return QuantizedWeight(
            self.integers[order],
            moved(self.scales),
            moved(self.zero_points),
            self.axis,
            self.group_size,
            self.bits,
            moved(self.minima),
        )


def stacked(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Return matrices of one width, quantized alike along it, as one: rows below rows.

    >>> q = QuantizedWeight(np.array([[1, 2]], np.int8), np.array([[1.0]], np.float32),
    ...                     np.zeros(0, np.int8), 1, 2, 8)
    >>> stacked([q, q]).dequantize().tolist()
    [[1.0, 2.0], [1.0, 2.0]]
    """
    first = weights[0]
    return QuantizedWeight(
        np.concatenate([weight.integers for weight in weights]),
        np.concatenate([weight.scales for weight in weights]),
        np.concatenate([weight.zero_points for weight in weights]),
        first.axis,
        first.group_size,
        first.bits,
        np.concatenate([weight.minima for weight in weights]),
    )
