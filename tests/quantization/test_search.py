"""The search for layers to keep in float."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest

from memopt.bundle import Bundle, open_bundle
from memopt.errors import QuantizationError
from memopt.quantization.quantize import Samples, quantize
from memopt.quantization.recipe import Recipe
from memopt.quantization.search import _fewest
from memopt.quantization.validate import Gate


def test_fewest_finds_the_shortest_prefix() -> None:
    """Bisection finds the least number of layers for every threshold, in few tries."""
    names = [f"layer{i}" for i in range(37)]
    for needed in range(1, 38):
        tries: list[int] = []

        def attempt(kept: Collection[str], needed: int = needed, tries: list[int] = tries) -> bool:
            tries.append(len(kept))
            return len(kept) >= needed

        assert len(_fewest(names, attempt)) == needed
        assert len(tries) <= 6


def test_search_reaches_a_gate_that_plain_int2_misses(tiny_copy: Bundle, texts: Path) -> None:
    """The search keeps some layers, not all, and the recorded variant passes its gate."""
    samples = Samples(calibration=texts, samples=16, validation_samples=24)
    recipe = Recipe(method="weight-only", weight_type="int2", group_size=16)
    plain = quantize(tiny_copy, samples, recipe, keep_failing=True).validation.cosine_min
    assert plain is not None
    gate = Gate(min_cosine=plain + (1 - plain) / 2)
    found = [quantize(tiny_copy, samples, recipe, gate=gate, budget=600) for _ in range(2)]
    assert found[0].variant.passed
    assert found[0].validation.cosine_min >= gate.min_cosine
    kept = found[0].variant.recipe["keep_float"]
    assert 0 < len(kept) < len(found[0].layers)
    assert {layer.name for layer in found[0].layers if layer.kind == "float"} == set(kept)
    assert not found[0].tradeoff[0].passed
    assert found[0].tradeoff == found[1].tradeoff
    assert open_bundle(tiny_copy.path).variant("onnx-int2-weight-only").passed


def test_search_says_when_nothing_helps(tiny_copy: Bundle, texts: Path) -> None:
    """A gate that even the float graph's own rounding misses is an error, not an endless search."""
    samples = Samples(calibration=texts, samples=16, validation_samples=16)
    recipe = Recipe(method="static", target="cpu", keep_float=("*layer*",), embeddings=False)
    with pytest.raises(QuantizationError, match="nothing is quantized"):
        quantize(tiny_copy, samples, recipe, gate=Gate(min_cosine=1.0), budget=60)
