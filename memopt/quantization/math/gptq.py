"""GPTQ: round weights so that the layer's *output* changes least.

Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", 2022 (arXiv:2210.17323), Algorithm 1, with its damping,
activation order and lazy block updates.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memopt.errors import QuantizationError
from memopt.quantization.math.rounding import check_weight, rtn_quantize, scales_for
from memopt.weights.packing import RANGES
from memopt.weights.quantized import QuantizedWeight

# Columns updated together before the rest of the matrix sees them; the paper's B.
BLOCK = 128
# Share of the mean diagonal added to the diagonal; the paper's 1 %.
DAMPING = 0.01
_ATTEMPTS = 4
# Shares of the seen range that a scale may cover: a clipped outlier can cost less than coarse steps
# for all others. Two bits have four steps, so the best range is far inside the extremes.
RANGE_SHARES = {8: (1.0,), 4: tuple(np.linspace(1, 0.5, 21)), 2: tuple(np.linspace(1, 0.2, 33))}


class HessianAccumulator:
    """The mean of x x^T over calibration activations, in float64, whatever their number.

    >>> accumulator = HessianAccumulator(2)
    >>> accumulator.add(np.float32([[1, 0], [0, 2]]))
    >>> accumulator.hessian.tolist(), accumulator.rows
    ([[0.5, 0.0], [0.0, 2.0]], 2)
    """

    def __init__(self, features: int) -> None:
        self._sum = np.zeros((features, features))
        self.rows = 0

    def add(self, activations: np.ndarray) -> None:
        """Add inputs of the layer, float (n, features).

        Raises:
            QuantizationError: another width, or NaN or infinite activations.
        """
        if activations.ndim != 2 or activations.shape[1] != len(self._sum):
            raise QuantizationError(
                f"activations have shape {list(activations.shape)}, not (n, {len(self._sum)})"
            )
        # A float32 product per batch, added in float64: the error does not grow with samples.
        batch = activations.astype(np.float32, copy=False)
        product = batch.T @ batch
        if not np.isfinite(product).all():
            raise QuantizationError("calibration activations hold NaN or infinite values")
        self._sum += product
        self.rows += len(activations)

    @property
    def hessian(self) -> NDArray[np.float64]:
        """The mean of x x^T, float64 (features, features)."""
        if not self.rows:
            raise QuantizationError("no activations were seen", fix="give calibration inputs")
        return self._sum / self.rows


def gptq_quantize(
    weight: np.ndarray,
    hessian: np.ndarray,
    *,
    bits: int = 4,
    group_size: int = 0,
    symmetric: bool = True,
    act_order: bool = True,
    fit_scales: bool = True,
    damping: float = DAMPING,
    block_size: int = BLOCK,
    name: str = "weight",
) -> QuantizedWeight:
    """Quantize a linear layer's weight against the second moment of its inputs.

    Args:
        weight: float (out, in); the layer computes ``x @ weight.T``.
        hessian: (in, in), the mean of x x^T (:class:`HessianAccumulator`); its scale is irrelevant.
        bits: 8, 4 or 2.
        group_size: 0 for one scale per output channel, else inputs per group.
        symmetric: no zero points.
        act_order: quantize the inputs with the largest activations first. Group scales are then
            fixed beforehand, so that groups stay contiguous in the file.
        fit_scales: choose each scale by least squared error, inputs weighted by their power, rather
            than by the extremes (below eight bits; RANGE_SHARES).
        damping: share of the mean diagonal that is added to it.
        block_size: columns per lazy update; speed only.
        name: for messages.

    Returns:
        Axis 0 without groups, axis 1 with groups of ``group_size``.

    Raises:
        QuantizationError: NaN or infinite values, shapes that do not fit, or a Hessian that is not
            positive definite even with a thousand times the damping.

    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((256, 16)).astype(np.float32) @ rng.standard_normal((16, 16))
    >>> w = rng.standard_normal((8, 16)).astype(np.float32)
    >>> q = gptq_quantize(w, x.T @ x, bits=4)
    >>> q.integers.shape, q.scales.shape
    ((8, 16), (8,))
    """
    axis = 1 if group_size else 0
    check_weight(weight, bits=bits, axis=axis, group_size=group_size, name=name)
    _check_hessian(weight, hessian, name)
    if weight.size == 0:
        return rtn_quantize(weight, bits=bits, axis=axis, group_size=group_size)
    columns = weight.shape[1]
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(columns)
    factor = _inverse_factor(hessian[np.ix_(order, order)].astype(np.float64), damping, name)
    # (in, out): one input's weights are contiguous, which the inner loop walks over.
    left = np.ascontiguousarray(weight.T[order], np.float64)
    groups = order // (group_size or columns)
    power = np.diag(hessian) if fit_scales else None
    grids = _Grids(weight, group_size, bits, symmetric, power, static=act_order)
    integers = np.empty_like(left, np.int8)
    integers[order] = _round_columns(left, factor, grids, groups, RANGES[bits], block_size)
    scales, points = grids.stored(group_size)
    return QuantizedWeight(np.ascontiguousarray(integers.T), scales, points, axis, group_size, bits)


def _check_hessian(weight: np.ndarray, hessian: np.ndarray, name: str) -> None:
    if weight.ndim != 2:
        raise QuantizationError(f"{name!r} has shape {list(weight.shape)}, GPTQ needs a matrix")
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise QuantizationError(
            f"{name!r} has {columns} inputs, its Hessian is {list(hessian.shape)}"
        )
    if not np.isfinite(hessian).all():
        raise QuantizationError(f"the Hessian of {name!r} holds NaN or infinite values")


def _round_columns(
    left: np.ndarray,
    factor: np.ndarray,
    grids: _Grids,
    groups: np.ndarray,
    limits: tuple[int, int],
    block_size: int,
) -> NDArray[np.int8]:
    """Round one input (a row of ``left``) after the other; those after it take up its error."""
    columns, rows = left.shape
    integers = np.empty((columns, rows), np.int8)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        errors = np.empty((end - start, rows))
        for i in range(start, end):
            group = int(groups[i])
            grids.prepare(group, i, left)
            scale, point = grids.scales[group], grids.points[group]
            steps = np.clip(np.rint(left[i] / scale) + point, *limits)
            integers[i] = steps
            error = (left[i] - (steps - point) * scale) / factor[i, i]
            left[i + 1 : end] -= factor[i, i + 1 : end, None] * error
            errors[i - start] = error
        left[end:] -= factor[start:end, end:].T @ errors
    return integers


class _Grids:
    """Scale and zero point of every (group, output)."""

    def __init__(
        self,
        weight: np.ndarray,
        group_size: int,
        bits: int,
        symmetric: bool,
        power: np.ndarray | None,
        *,
        static: bool,
    ) -> None:
        rows, columns = weight.shape
        self._size = group_size or columns
        self._ready = -(-columns // self._size) * [False]
        self._bits, self._symmetric, self._power = bits, symmetric, power
        self.scales = np.ones((len(self._ready), rows))
        self.points = np.zeros((len(self._ready), rows))
        if static or not group_size:
            original = weight.T.astype(np.float64)
            for group in range(len(self._ready)):
                self._fit(group, original[group * self._size : (group + 1) * self._size])

    def prepare(self, group: int, at: int, left: np.ndarray) -> None:
        """Fit a group to its weights as they are when its first column comes, errors included."""
        if not self._ready[group]:
            self._fit(group, left[at : at + self._size])

    def stored(self, group_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scales and zero points as a QuantizedWeight has them."""
        scales, points = self.scales.astype(np.float32), self.points.astype(np.int8)
        if group_size:
            scales, points = np.ascontiguousarray(scales.T), points.T.copy()
        else:
            scales, points = scales[0], points[0]
        return scales, np.zeros(0, np.int8) if self._symmetric else points

    def _fit(self, group: int, values: np.ndarray) -> None:
        """Choose scale and zero point for ``values`` (inputs of the group, outputs)."""
        low, high = values.min(0), values.max(0)
        bottom, top = RANGES[self._bits]
        shares = RANGE_SHARES[self._bits] if self._power is not None else (1.0,)
        # Inputs never seen weigh nothing: a group of such keeps its whole range, the first share.
        power = None if self._power is None else self._power[group * self._size :][: len(values)]
        least = np.full(values.shape[1], np.inf)
        for share in shares:
            scales, points = scales_for(
                low * share, high * share, bits=self._bits, symmetric=self._symmetric
            )
            error = np.zeros_like(least)
            if power is not None:
                steps = np.clip(np.rint(values / scales) + points, bottom, top)
                error = power @ ((steps - points) * scales - values) ** 2
            better = error < least
            least[better] = error[better]
            self.scales[group, better] = scales[better]
            self.points[group, better] = points[better]
        self._ready[group] = True


def _inverse_factor(hessian: np.ndarray, damping: float, name: str) -> NDArray[np.float64]:
    """Return the upper Cholesky factor of the damped Hessian's inverse."""
    mean = float(np.mean(np.diag(hessian)))
    if mean <= 0:
        return np.eye(len(hessian))  # no input was ever non-zero: plain rounding
    extra = damping or np.finfo(np.float64).eps
    for _ in range(_ATTEMPTS):
        damped = hessian + extra * mean * np.eye(len(hessian))
        try:
            root = np.linalg.inv(np.linalg.cholesky(damped))
            return np.ascontiguousarray(np.linalg.cholesky(root.T @ root).T)
        except np.linalg.LinAlgError:
            extra *= 10
    raise QuantizationError(
        f"the Hessian of {name!r} is not positive definite, even with damping {extra / 10:g}",
        fix="give more calibration inputs",
    )


def output_error(weight: np.ndarray, quantized: np.ndarray, hessian: np.ndarray) -> float:
    """Return the relative error of the layer's outputs: |x (W - Q)^T| / |x W^T|, root mean square.

    >>> output_error(np.eye(2), np.eye(2), np.eye(2))
    0.0
    """
    difference = weight.astype(np.float64) - quantized
    noise = float(np.sum((difference @ hessian) * difference))
    signal = float(np.sum((weight.astype(np.float64) @ hessian) * weight))
    return float(np.sqrt(max(noise, 0.0) / signal)) if signal > 0 else 0.0
