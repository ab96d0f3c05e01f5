from __future__ import annotations

import numpy as np
import pytest

from memopt.errors import QuantizationError
from memopt.quantization.math.kquant import k_quantize
from memopt.quantization.math.rounding import rtn_quantize


def _weighted_error(weight: np.ndarray, got: np.ndarray, group: int) -> float:
    blocks = weight.reshape(len(weight), -1, group)
    power = np.sqrt((blocks**2).mean(-1, keepdims=True)) + np.abs(blocks)
    return float((power * (blocks - got.reshape(blocks.shape)) ** 2).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_search_is_never_worse_than_rounding(bits: int, symmetric: bool) -> None:
    """Of every width, with zero points or without, the weighted error is at most rounding's."""
    weight = np.random.default_rng(0).standard_t(4, (24, 128)).astype(np.float32)
    options = {"bits": bits, "group_size": 32, "symmetric": symmetric}
    searched, rounded = k_quantize(weight, **options), rtn_quantize(weight, axis=1, **options)
    ours = _weighted_error(weight, searched.dequantize(), 32)
    assert ours <= _weighted_error(weight, rounded.dequantize(), 32)
    assert bits == 8 or ours < 0.98 * _weighted_error(weight, rounded.dequantize(), 32)


def test_weights_on_a_grid_stay_as_they_are() -> None:
    """Weights that four bits can hold come back to the last bits of float32."""
    random = np.random.default_rng(1)
    steps = random.integers(-8, 8, (16, 64))
    steps[:, ::32], steps[:, 1::32] = -8, 7
    weight = (steps * 0.37).astype(np.float32)
    got = k_quantize(weight, bits=4, group_size=32).dequantize()
    np.testing.assert_allclose(got, weight, rtol=1e-5, atol=1e-6)


def test_blocks_that_do_not_fill_a_row_are_of_their_own_values_alone() -> None:
    """A last block shorter than the others is rounded as if it stood alone."""
    weight = np.random.default_rng(2).normal(0, 1, (4, 48)).astype(np.float32)
    got = k_quantize(weight, bits=4, group_size=32).dequantize()
    alone = k_quantize(np.ascontiguousarray(weight[:, :32]), bits=4, group_size=32).dequantize()
    np.testing.assert_array_equal(got[:, :32], alone)
    assert got.shape == weight.shape


def test_a_block_of_zeros_and_a_weight_that_is_no_number() -> None:
    """Zeros stay zeros; NaN is refused by name."""
    assert not k_quantize(np.zeros((2, 32), np.float32)).dequantize().any()
    with pytest.raises(QuantizationError, match="lm_head"):
        k_quantize(np.full((2, 32), np.nan, np.float32), name="lm_head")
