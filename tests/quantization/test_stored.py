"""A GGUF file's own integers in the graph of its language model: nothing is rounded again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from gguf import GGMLQuantizationType as Type
from onnx import numpy_helper

from memopt import Generator
from memopt.bundle import Bundle, open_bundle
from memopt.errors import ConfigurationError
from memopt.exporters.base import export
from memopt.exporters.from_v2 import export_v2
from memopt.graphs.blocks import pack_unsigned
from memopt.quantization.quantize import Samples, quantize
from memopt.quantization.recipe import Recipe
from memopt.weights.convert import GGUF_WEIGHTS, convert
from memopt.weights.reader import WeightLoader
from tests.weights.gguf.kit import CASES, make_model, write_case


def talking(home: Path, kind: Type) -> Bundle:
    """Return a Llama of a GGUF file, whose table is its last product too, with its graphs."""
    plain = next(case for case in CASES if case.name == "llama")
    case = replace(plain, config={"tie_word_embeddings": True})
    file = write_case(home / "m.gguf", case, make_model(case), kind)
    bundle = convert(file, home / "bundle", on_warning=str)
    export(bundle)
    return open_bundle(bundle.path)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of Q4_1: four bits, a scale and a minimum a block."""
    return talking(tmp_path_factory.mktemp("stored"), Type.Q4_1)


@pytest.fixture(scope="module")
def samples(texts: Path) -> Samples:
    return Samples(calibration=texts, samples=4, validation_samples=8, max_length=48)


def same_integers(bundle: Bundle, file: str) -> int:
    """Return how many weights of a graph hold exactly the file's integers."""
    inside = {t.name: t for t in onnx.load(bundle.path / file).graph.initializer}
    found = 0
    places: dict[str, tuple[str, int]] = {}  # weight -> the constant that holds it, from which row
    with WeightLoader(bundle.weights) as floats:
        for stored in (n.removesuffix("_packed") for n in inside if n.endswith("_packed")):
            row = 0
            for name in stored.split("+"):
                places[name] = stored, row
                row += floats.info(name).shape[0]
    with WeightLoader(bundle.path / GGUF_WEIGHTS) as loader:
        for name in loader.names():
            if loader.info(name).quant_type != "int4":
                continue
            weight = loader.load_quantized(name)
            stored, rows = places[name]
            part = slice(rows, rows + len(weight.scales))
            held = {
                what: numpy_helper.to_array(inside[f"{stored}_{what}"])
                for what in ("packed", "scale", "zero_point", "minimum")
            }
            packed = held["packed"].reshape(len(held["packed"]), -1)[part]
            np.testing.assert_array_equal(packed, pack_unsigned(weight.integers, 4))
            np.testing.assert_array_equal(held["scale"][part], weight.scales)
            # A whole number of each minimum's steps went to the zero point.
            points = held["zero_point"].reshape(len(held["packed"]), -1)[part]
            steps = np.stack([points & 15, points >> 4], -1).reshape(len(points), -1)
            steps = steps[:, : weight.scales.shape[1]].astype(np.float32) - 8
            least = held["minimum"][part] - steps * weight.scales
            own = weight.minima - weight.zero_points.astype(np.float32) * weight.scales
            np.testing.assert_allclose(least, own, rtol=1e-5, atol=1e-6)
            found += 1
    return found


def test_a_graph_of_the_files_integers_writes_as_its_float_graph(bundle: Bundle) -> None:
    """Every weight is the file's; greedily it writes what the dequantized weights write."""
    variant = export_v2(bundle, GGUF_WEIGHTS)
    assert variant.fused
    assert (variant.check or {})["greedy_tokens"] > 0
    assert same_integers(bundle, variant.file) == 15
    answers = []
    for name in ("onnx-fp32-fused", variant.name):
        with Generator(bundle.path, "cpu", name, strict=True) as engine:
            answers.append(engine.generate(["A man is", "reading"], max_new_tokens=12))
    assert [a.tokens for a in answers[0]] == [a.tokens for a in answers[1]]
    for one, other in zip(*answers, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_stored_integers_pass_the_gate_with_rounded_inputs(
    bundle: Bundle, samples: Samples
) -> None:
    """Only inputs are rounded: the gate sees next to nothing, and layers have no error."""
    recipe = Recipe(method="weight-only", weight_type="int4", algorithm="stored")
    made = quantize(bundle, samples, recipe)
    assert made.name == "onnx-int4-weight-only-stored"
    assert made.passed
    assert made.validation.record(made.gate)["kl_mean"] < 0.005
    assert {layer.error for layer in made.layers if layer.kind == "int4"} == {0.0}
    assert same_integers(open_bundle(bundle.path), made.file) == 15
    with Generator(bundle.path, "cpu", made.name, strict=True) as engine:
        # Its kernel for one token is not that for several: no text may depend on the last one.
        first = engine.generate("A man is reading", max_new_tokens=16)[0]
        again = engine.generate("A man is reading", max_new_tokens=16)[0]
        assert again.tokens == first.tokens
        quick = engine.generate("A man is reading", max_new_tokens=16, exact=False)[0]
        assert quick.reused_tokens > 0


def test_another_width_than_the_files_is_refused(bundle: Bundle, samples: Samples) -> None:
    """The file says how many bits there are."""
    recipe = Recipe(method="weight-only", weight_type="int8", algorithm="stored")
    with pytest.raises(ConfigurationError, match="holds int4, not int8"):
        quantize(bundle, samples, recipe)


def test_a_model_without_integers_of_its_own_is_refused(
    talker: tuple[Bundle, object], samples: Samples
) -> None:
    """Only a GGUF file brings integers."""
    recipe = Recipe(method="weight-only", weight_type="int4", algorithm="stored")
    with pytest.raises(ConfigurationError, match="not made of a GGUF file"):
        quantize(talker[0], samples, recipe)
