"""Quantize and dequantize: the error bound for any array, axis, group and width."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from memopt.quantization.math.rounding import rtn_quantize
from memopt.weights.packing import RANGES
from memopt.weights.quantized import QuantizedWeight
from memopt.weights.reader import WeightLoader
from memopt.weights.writer import write_quantized

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9)
# Denormals, zeros, outliers; up to where scale * integer cannot overflow.
VALUES = st.floats(-(2.0**120), 2.0**120, width=32, allow_nan=False)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, int, int, int, bool]:
    """(array, bits, axis, group size, symmetric)."""
    array = draw(hnp.arrays(np.float32, SHAPES, elements=VALUES))
    axis = draw(st.integers(-1, array.ndim - 1))
    group = draw(st.sampled_from([0, 1, 2, 3, 8])) if axis >= 0 else 0
    return array, draw(st.sampled_from([8, 4, 2])), axis, group, draw(st.booleans())


def check(array: np.ndarray, q: QuantizedWeight) -> None:
    """Half a scale, plus what float32 arithmetic adds; integers and zero points in range."""
    low, high = RANGES[q.bits]
    assert q.integers.shape == array.shape
    assert (q.scales > 0).all()
    for part in (q.integers, q.zero_points):
        assert not part.size or (part.min() >= low and part.max() <= high)
    back = q.dequantize().astype(np.float64)
    scale = q.spread(q.scales).astype(np.float64)
    exact = array.astype(np.float64)
    rounding = np.abs(exact) * 2.0**-22 + 2.0**-149
    assert (np.abs(back - exact) <= scale / 2 * (1 + 1e-6) + rounding).all()
    assert (back[exact == 0] == 0).all()


@settings(max_examples=300, deadline=None)
@given(cases())
def test_the_error_is_at_most_half_a_scale(
    case: tuple[np.ndarray, int, int, int, bool],
) -> None:
    """Round to nearest never clips: every value is within half its scale, zero stays zero."""
    array, bits, axis, group, symmetric = case
    q = rtn_quantize(array, bits=bits, axis=axis, group_size=group, symmetric=symmetric)
    check(array, q)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_any_recipe_is_read_back(
    tmp_path_factory: object, case: tuple[np.ndarray, int, int, int, bool]
) -> None:
    """A V2 file of any width, axis and group dequantizes to the numbers it was made of."""
    array, bits, axis, group, symmetric = case
    q = rtn_quantize(array, bits=bits, axis=axis, group_size=group, symmetric=symmetric)
    path = tmp_path_factory.mktemp("v2") / "w.parquet"  # type: ignore[attr-defined]
    write_quantized(path, [("layer.weight", q)])
    with WeightLoader(path) as loader:
        assert loader.version == 2
        assert loader.load("layer.weight").tobytes() == q.dequantize().tobytes()
