"""The search for layers to keep in float."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest

from memopt.bundle import Bundle, open_bundle
from memopt.errors import QuantizationError
from memopt.graphs.session import open_graph
from memopt.quantization.accuracy.gate import Gate
from memopt.quantization.accuracy.validate import PrecisionValidator
from memopt.quantization.methods.weight_only import prepare
from memopt.quantization.quantize import (
    Samples,
    comparer,
    float_variant,
    make_context,
    quantize,
    read_samples,
    write_graph,
)
from memopt.quantization.recipe import Recipe
from memopt.quantization.search import _fewest, search


def test_fewest_finds_the_shortest_prefix() -> None:
    """Bisection finds the least number of layers for every threshold, in few tries."""
    names = [f"layer{i}" for i in range(37)]
    for needed in range(1, 38):
        tries: list[int] = []

        def attempt(kept: Collection[str], needed: int = needed, tries: list[int] = tries) -> bool:
            tries.append(len(kept))
            return len(kept) >= needed

        kept, complete = _fewest(names, attempt)
        assert len(kept) == needed
        assert complete
        assert len(tries) <= 6


def test_search_reaches_a_gate_that_plain_int2_misses(tiny_copy: Bundle, texts: Path) -> None:
    """The search keeps some layers, not all, and the recorded variant passes its gate."""
    samples = Samples(calibration=texts, samples=16, validation_samples=24)
    recipe = Recipe(method="weight-only", weight_type="int2", group_size=16)
    plain = quantize(tiny_copy, samples, recipe, keep_failing=True).validation.cosine_min
    assert plain is not None
    gate = Gate(min_cosine=plain + (1 - plain) / 2)
    seen: list[tuple[int, int]] = []
    found = [
        quantize(
            tiny_copy, samples, recipe, gate=gate, budget=600,
            progress=lambda done, whole: seen.append((done, whole)),
        )
        for _ in range(2)
    ]  # fmt: skip
    assert found[0].variant.passed
    assert found[0].validation.cosine_min >= gate.min_cosine
    kept = found[0].variant.recipe["keep_float"]
    assert 0 < len(kept) < len(found[0].layers)
    assert {layer.name for layer in found[0].layers if layer.kind == "float"} == set(kept)
    first, second = (result.trail for result in found)
    assert first is not None
    assert second is not None
    assert first.complete
    assert not first.tried[0].passed
    assert (first.tried, first.sensitivity) == (second.tried, second.sensitivity)
    assert set(first.sensitivity) == {layer.name for layer in found[0].layers}
    # The bar runs from one to the end, and knows the end before it is there.
    assert seen[0][0] == 1
    assert seen[0][1] > len(first.sensitivity)
    assert all(done <= whole for done, whole in seen)
    assert open_bundle(tiny_copy.path).variant("onnx-int2-weight-only-g16").passed


class Ticks:
    """Seconds that pass only when somebody looks: one each time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_a_budget_ends_the_search_and_is_said(tiny_copy: Bundle, texts: Path) -> None:
    """No try starts after the budget; what was found passes, or the error asks for more time."""
    samples = Samples(calibration=texts, samples=16, validation_samples=24)
    recipe = Recipe(method="weight-only", weight_type="int2", group_size=16)
    base = float_variant(tiny_copy, recipe)
    calibration, held_out = read_samples(tiny_copy, samples)
    make = prepare(make_context(tiny_copy, base, recipe, calibration, samples))
    validator = PrecisionValidator(tiny_copy, base, held_out)
    graph = write_graph(make(()), "onnx", tiny_copy.path / "onnx", "plain")[0]
    plain = validator.validate(open_graph(graph, "onnx", base.output)).cosine_min
    assert plain is not None
    gate = Gate(min_cosine=plain + (1 - plain) / 2)
    compare = comparer(validator, recipe, tiny_copy.path)
    results = []
    for budget in (50.0, 50.0, 1e9):
        clock = Ticks()
        results.append(search(make, compare, gate, budget=budget, clock=clock))
        assert results[-1].trail.seconds <= budget + 5
    assert not results[0].trail.complete
    assert results[0].kept == results[1].kept
    assert results[2].trail.complete
    assert len(results[2].kept) <= len(results[0].kept)
    assert len(results[2].trail.sensitivity) > len(results[0].trail.sensitivity)
    with pytest.raises(QuantizationError, match="budget ended before any"):
        search(make, compare, gate, budget=2.0, clock=Ticks())
    assert not list(tiny_copy.path.glob("trial*"))


def test_search_says_when_nothing_helps(tiny_copy: Bundle, texts: Path) -> None:
    """A gate that even the float graph's own rounding misses is an error, not an endless search."""
    samples = Samples(calibration=texts, samples=16, validation_samples=16)
    recipe = Recipe(method="static", target="cpu", keep_float=("*layer*",), embeddings=False)
    with pytest.raises(QuantizationError, match="nothing is quantized"):
        quantize(tiny_copy, samples, recipe, gate=Gate(min_cosine=1.0), budget=60)
