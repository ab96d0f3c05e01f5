"""The minimum of a sample is judged with what other inputs would give, not by its luck."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from memopt.quantization.accuracy.extremes import expected_minimum
from memopt.quantization.accuracy.gate import Gate, Validation

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]
TAILS: dict[str, Draw] = {
    "gamma": lambda g, n: g.gamma(2.0, 0.002, n),
    "exponential": lambda g, n: g.exponential(0.003, n),
    "lognormal": lambda g, n: g.lognormal(-6.5, 1.0, n),
    "uniform": lambda g, n: g.uniform(0.0, 0.02, n),
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("count", [60, 512])
def test_other_samples_stay_above_the_bound(tail: str, count: int) -> None:
    """Two thirds and more of fresh samples do; of the plain minimum it is about half."""
    generator = np.random.default_rng(5)
    kept = plain = 0
    for _ in range(200):
        seen, fresh = (1.0 - TAILS[tail](generator, count) for _ in range(2))
        bound = expected_minimum(seen)
        assert bound <= seen.min()
        kept += fresh.min() >= bound
        plain += fresh.min() >= seen.min()
    assert kept >= 0.66 * 200
    assert kept > plain + 20


def test_few_equal_or_missing_values_have_their_minimum() -> None:
    """There is no tail to read below 30 values, in equal ones, or where one is no number."""
    assert expected_minimum([0.9, 0.99]) == pytest.approx(0.9)
    assert expected_minimum([0.99] * 100) == pytest.approx(0.99)
    assert np.isnan(expected_minimum([np.nan, *[0.99] * 99]))


def test_a_variant_near_its_bound_fails_with_both_numbers() -> None:
    """Passing by chance is not passing: the line has what was seen and what is to be expected."""
    gate = Gate(min_cosine=0.98)
    lucky = Validation(samples=512, cosine_min=0.9815, cosine_low=0.976)
    (line,) = lucky.failures(gate)
    assert line == ("min cosine 0.9815 is too near to 0.98: other inputs would give down to 0.9760")
    assert Validation(samples=512, cosine_min=0.99, cosine_low=0.985).failures(gate) == []
    (line,) = Validation(samples=512, cosine_min=0.97, cosine_low=0.96).failures(gate)
    assert line == "min cosine 0.9700 is below 0.98"
