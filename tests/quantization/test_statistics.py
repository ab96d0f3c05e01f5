"""Activation statistics and smoothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from memopt.errors import QuantizationError
from memopt.quantization.math.smooth import Smoothing, choose, round_weight, with_range
from memopt.quantization.math.statistics import (
    BINS,
    ROWS,
    Histogram,
    Observed,
    observe,
    token_probes,
    valid_rows,
)


def seen_of(values: np.ndarray) -> Observed:
    """Return the statistics of these rows."""
    seen = Observed()
    seen.add(values.astype(np.float32), np.random.default_rng(0))
    return seen


def test_memory_does_not_grow_with_samples() -> None:
    """Ten times the inputs keep the same number of rows, drawn from all of them."""
    generator = np.random.default_rng(0)
    seen = Observed()
    for start in range(0, 10 * ROWS, ROWS):
        seen.add(np.full((ROWS, 4), start, np.float32), generator)
    assert seen.rows.shape == (ROWS, 4)
    shares = np.unique(seen.rows[:, 0], return_counts=True)[1]
    assert len(shares) == 10
    assert shares.min() > ROWS / 20


def test_padding_is_left_out() -> None:
    """Rows that the attention mask hides do not widen ranges."""
    values = np.array([[[1.0], [99.0]], [[2.0], [3.0]]], np.float32)
    rows = valid_rows(values, {"attention_mask": np.array([[1, 0], [1, 1]])})
    assert rows.ravel().tolist() == [1, 2, 3]


def test_nan_is_refused_by_name() -> None:
    """A NaN activation is an error that names the activation."""
    with pytest.raises(QuantizationError, match=r"'layer\.3' is not finite"):
        observe(["layer.3"], lambda _: [np.full((2, 2), np.nan)], [{}])


def test_histogram_percentile_is_numpys() -> None:
    """The histogram's percentile agrees with the exact one to a bin."""
    values = np.random.default_rng(0).standard_t(3, 200_000)
    histogram = Histogram(values.min(), values.max())
    for part in np.array_split(values, 7):
        histogram.add(part)
    low, high = histogram.range("percentile", 99.0)
    width = (values.max() - values.min()) / BINS
    assert abs(low - np.percentile(values, 0.5)) <= width
    assert abs(high - np.percentile(values, 99.5)) <= 2 * width


@pytest.mark.parametrize("method", ["mse", "entropy"])
def test_histogram_clips_an_outlier_that_costs_all_others(method: str) -> None:
    """For a bell of a million values with one far outlier mse and entropy clip, minmax does not."""
    values = np.append(np.random.default_rng(0).normal(size=1_000_000), 30.0)
    histogram = Histogram(values.min(), values.max())
    histogram.add(values)
    assert histogram.range("minmax", 100)[1] == 30
    assert 4 < histogram.range(method, 100)[1] < 25


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    )
)
def test_rounding_error_is_half_a_step(weight: np.ndarray) -> None:
    """Every weight is off by at most half its scale, whatever the magnitudes in its row."""
    integers, scales = round_weight(weight)
    back = integers.astype(np.float64) * scales[:, None]
    assert np.all(np.abs(back - weight) <= scales[:, None].astype(np.float64) * 0.5 * (1 + 1e-5))
    assert np.isfinite(scales).all()


def test_denormal_and_zero_rows() -> None:
    """A row of zeros or denormals becomes zeros with a usable scale, not NaN."""
    integers, scales = round_weight(np.array([[0, 0], [1e-42, -1e-43]], np.float32))
    assert integers.tolist() == [[0, 0], [0, 0]]
    assert np.all(scales == 1)


def test_smoothing_beats_plain_ranges_on_outlier_channels() -> None:
    """With one channel a hundred times the others, smoothing cuts the error by far."""
    generator = np.random.default_rng(0)
    rows = generator.normal(0, 1, (512, 64))
    rows[:, 7] *= 100
    rows[:, 9] += 50
    weight = generator.normal(0, 1, (32, 64)).astype(np.float32)
    plain = choose(seen_of(rows), [weight], smooth="none", margin=1.0)
    smooth = choose(seen_of(rows), [weight], smooth="auto", margin=1.0)
    assert smooth.error < plain.error / 4


def test_the_algebra_of_shift_and_divisor() -> None:
    """scale * q * divisor + low gives the activation back within half a step per channel."""
    rows = np.random.default_rng(0).normal([0, 5, -3], [1, 9, 0.1], (256, 3)).astype(np.float32)
    made = choose(seen_of(rows), [np.eye(3, dtype=np.float32)], smooth=0.7, margin=1.0)
    back = made.quantized(rows) * made.divisor + made.low
    assert np.all(np.abs(back - rows) <= made.scale * made.divisor * 0.501)
    assert made.quantize(rows).min() >= 0
    assert made.quantize(rows).max() <= 255


def test_narrower_range_moves_shift_and_scale_together() -> None:
    """A plan fitted to a histogram still maps values inside the range to themselves."""
    base = Smoothing(
        low=np.zeros(2, np.float32), divisor=np.array([1.0, 2.0], np.float32), scale=1.0,
        alpha=0.5, error=0.0,
    )  # fmt: skip
    histogram = Histogram(0, 255)
    histogram.add(np.linspace(50, 100, 1000))
    fitted = with_range(base, histogram, "percentile", 100)
    x = np.array([[60.0, 140.0]], np.float32)
    back = fitted.quantized(x) * fitted.divisor + fitted.low
    assert np.allclose(back, x, atol=fitted.scale * 1.1)
    assert fitted.scale < 0.25


def test_probes_are_inputs_of_the_model() -> None:
    """Probes keep the real first and last token, fill the mask and stay in the vocabulary."""
    template = {
        "input_ids": np.array([[101, 7, 102, 0]]),
        "attention_mask": np.array([[1, 1, 1, 0]]),
        "token_type_ids": np.zeros((1, 4), np.int64),
    }
    probes = token_probes(200, template, count=20)
    for probe in probes:
        ids = probe["input_ids"]
        assert ids[0, 0] == 101
        assert ids[0, -1] == 102
        assert ids.max() < 200
        assert probe["attention_mask"].all()
        assert probe["token_type_ids"].shape == ids.shape
    again = token_probes(200, template, count=20)
    assert all(
        np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(probes, again, strict=True)
    )
