"""Perplexity of a small language model, trained here on the repository's own text, once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# It trains a model first: half a minute on both cores.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def perplexities() -> dict[str, float]:
    """Perplexity by name: float, int8, and int4 and int2 by rounding and by GPTQ."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from language import measure
    finally:
        sys.path.pop(0)
    rows = measure(ROOT / ".cache" / "tests")
    assert not next(row for row in rows if row["weights"] == "int2 rtn")["passed"]
    return {row["weights"]: row["perplexity"] for row in rows}


def test_the_model_learned_something(perplexities: dict[str, float]) -> None:
    """The float model is far better than guessing among 512 tokens."""
    assert perplexities["float"] < 100


def test_int8_costs_less_than_one_percent(perplexities: dict[str, float]) -> None:
    """int8 weights raise perplexity by less than 1 %."""
    assert perplexities["int8 rtn"] < 1.01 * perplexities["float"]


@pytest.mark.parametrize("weights", ["int4", "int2"])
def test_gptq_beats_rounding(perplexities: dict[str, float], weights: str) -> None:
    """GPTQ loses less than rounding to nearest at four and at two bits."""
    assert perplexities[f"{weights} gptq"] < perplexities[f"{weights} rtn"]
