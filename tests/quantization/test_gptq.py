"""Rounding at its edges, and GPTQ against rounding."""

from __future__ import annotations

import numpy as np
import pytest

from memopt.errors import QuantizationError
from memopt.quantization.math.gptq import HessianAccumulator, gptq_quantize, output_error
from memopt.quantization.math.rounding import rtn_quantize


def correlated(rows: int = 2048, features: int = 128, rank: int = 24) -> np.ndarray:
    """Activations as layers have them: a few strong directions, a little noise."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((rank, features))
    noise = 0.1 * rng.standard_normal((rows, features))
    return (rng.standard_normal((rows, rank)) @ mix + noise).astype(np.float32)


def weight(out: int = 96, features: int = 128) -> np.ndarray:
    """A weight with channels of different size."""
    rng = np.random.default_rng(1)
    return (rng.standard_normal((out, features)) * rng.uniform(0.2, 3, (out, 1))).astype(np.float32)


def hessian(activations: np.ndarray) -> np.ndarray:
    """The mean of x x^T, fed in uneven batches."""
    accumulator = HessianAccumulator(activations.shape[1])
    for start in range(0, len(activations), 300):
        accumulator.add(activations[start : start + 300])
    assert accumulator.rows == len(activations)
    return accumulator.hessian


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [4, 2])
def test_gptq_beats_rounding(bits: int, group: int, act_order: bool, symmetric: bool) -> None:
    """On correlated inputs the layer's output error is under 60 % of plain rounding's."""
    x, w = correlated(), weight()
    h = hessian(x)
    options = {"bits": bits, "group_size": group, "symmetric": symmetric}
    plain = rtn_quantize(w, axis=1 if group else 0, **options)  # type: ignore[arg-type]
    better = gptq_quantize(w, h, act_order=act_order, **options)  # type: ignore[arg-type]
    assert better.integers.shape == plain.integers.shape
    assert better.scales.shape == plain.scales.shape
    exact = x @ w.T
    errors = [np.linalg.norm(x @ q.dequantize().T - exact) for q in (better, plain)]
    assert errors[0] < 0.6 * errors[1]
    assert output_error(w, better.dequantize(), h) == pytest.approx(
        errors[0] / np.linalg.norm(exact), rel=1e-3
    )


def test_block_size_changes_speed_only() -> None:
    """Lazy block updates give the same integers as one column at a time."""
    h, w = hessian(correlated()), weight()
    one = gptq_quantize(w, h, bits=4, group_size=32, block_size=1)
    many = gptq_quantize(w, h, bits=4, group_size=32, block_size=128)
    assert (one.integers == many.integers).mean() > 0.999


def test_uncorrelated_inputs_make_gptq_plain_rounding() -> None:
    """With a diagonal Hessian no error can be moved: the result is round to nearest."""
    w = weight()
    diagonal = np.diag(np.linspace(1, 5, w.shape[1]))
    assert np.array_equal(
        gptq_quantize(w, diagonal, bits=4, fit_scales=False).integers,
        rtn_quantize(w, bits=4).integers,
    )


def test_dead_and_few_inputs() -> None:
    """Inputs that were never on, and fewer samples than inputs, stay near the weight."""
    x = correlated(rows=20)
    x[:, 5:60] = 0
    q = gptq_quantize(weight(), hessian(x), bits=8)
    assert np.abs(q.dequantize() - weight())[:, 5:60].max() <= q.scales.max()
    dead = gptq_quantize(weight(), np.zeros((128, 128)), bits=4)
    assert np.array_equal(dead.integers, rtn_quantize(weight(), bits=4).integers)


def test_gptq_refuses_what_does_not_fit() -> None:
    """Wrong shapes and NaN are named."""
    w = weight()
    with pytest.raises(QuantizationError, match=r"'q\.weight' has 128 inputs"):
        gptq_quantize(w, np.eye(4), name="q.weight")
    bad = w.copy()
    bad[3, 7] = np.nan
    with pytest.raises(QuantizationError, match=r"'q\.weight' holds 1 NaN.*\(3, 7\)"):
        gptq_quantize(bad, np.eye(128), name="q.weight")
    with pytest.raises(QuantizationError, match="GPTQ needs a matrix"):
        gptq_quantize(np.ones((2, 3, 4), np.float32), np.eye(3))
    with pytest.raises(QuantizationError, match="activations hold NaN"):
        HessianAccumulator(2).add(np.float32([[np.inf, 1]]))
    with pytest.raises(QuantizationError, match="no activations were seen"):
        _ = HessianAccumulator(2).hessian


def test_edges_of_rounding() -> None:
    """Zero, constant, denormal and outlier channels, and empty tensors, are all exact enough."""
    tiny = np.float32(1e-44)
    rows = np.float32([[0, 0, 0], [5, 5, 5], [-5, -5, -5], [tiny, -tiny, 0], [1e30, 1e-3, -1]])
    for symmetric in (True, False):
        for bits in (8, 4, 2):
            q = rtn_quantize(rows, bits=bits, symmetric=symmetric)
            error = np.abs(q.dequantize().astype(np.float64) - rows)
            assert (error <= q.scales[:, None].astype(np.float64) * 0.5000001).all()
            assert (q.dequantize()[0] == 0).all()
    for shape in ((0,), (0, 4), (4, 0)):
        assert rtn_quantize(np.zeros(shape, np.float32)).dequantize().shape == shape


def test_the_zero_point_of_asymmetric_int8_never_overflows() -> None:
    """Channels far from zero, where lo / scale passes the int8 range, keep a representable zero."""
    rows = np.float32([[1000, 1001], [-1001, -1000], [1e-3, 1e30], [-1e30, -1e-3]])
    q = rtn_quantize(rows, bits=8, symmetric=False)
    assert q.zero_points.tolist() == [-128, 127, -128, 127]
    assert (np.abs(q.dequantize().astype(np.float64) - rows) <= q.scales[:, None] * 0.51).all()
