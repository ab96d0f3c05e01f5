"""Language models' graphs with a cache, quantized for both runtimes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from memopt import Generator
from memopt.bundle import Bundle, open_bundle
from memopt.errors import ConfigurationError
from memopt.quantization.quantize import Samples, quantize
from memopt.quantization.recipe import Recipe

INT4 = {"weight_type": "int4", "symmetric": False}
ONNX, OPENVINO = {"method": "weight-only"}, {"method": "nncf-weights"}


@pytest.fixture
def bundle(talker: tuple[Bundle, Any], tmp_path: Path) -> Bundle:
    """A private copy."""
    shutil.copytree(talker[0].path, tmp_path / "bundle")
    return open_bundle(tmp_path / "bundle")


@pytest.fixture(scope="module")
def samples(texts: Path) -> Samples:
    return Samples(calibration=texts, samples=12, validation_samples=12, max_length=48)


@pytest.mark.parametrize(
    "fields",
    [
        {**ONNX, "weight_type": "int8"},
        {**ONNX, **INT4},
        {**ONNX, **INT4, "algorithm": "k-quant"},
        {**ONNX, **INT4, "algorithm": "gptq", "keep_int8": ("*embed_tokens*",)},
        OPENVINO,
        {**OPENVINO, **INT4, "algorithm": "awq+scale-estimation"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_a_quantized_model_keeps_its_cache_and_writes(
    bundle: Bundle, samples: Samples, fields: dict[str, object]
) -> None:
    """Inputs, buffer or states stay the float graph's; greedily it writes the same in parts."""
    recipe = Recipe.from_dict(fields)
    made = quantize(bundle, samples, recipe, keep_failing=True).variant
    base = bundle.variant(f"{recipe.format}-fp32" + "-fused" * (recipe.format == "onnx"))
    assert (made.fused, made.inputs, made.output) == (base.fused, base.inputs, base.output)
    assert made.options == base.options
    device = "openvino" if recipe.format == "openvino" else "cpu"
    with Generator(bundle.path, device, made.name, strict=True) as engine:
        whole = engine.generate("A man is reading", max_new_tokens=6)[0]
        first = engine.generate("A man", max_new_tokens=1)[0]
        again = engine.generate("A man is reading", max_new_tokens=6)[0]
    assert len(first.tokens) <= 1
    assert whole.tokens == again.tokens
    assert np.isfinite(whole.logprobs).all()


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_tied_tables_are_one_array(bundle: Bundle, samples: Samples, weights: str) -> None:
    """The table's rows and the last product read the same bytes, and no float table is left."""
    recipe = Recipe(method="weight-only", weight_type=weights, symmetric=False, group_size=32)
    made = quantize(bundle, samples, recipe, keep_failing=True).variant
    graph = onnx.load(bundle.path / made.file).graph
    table = next(node for node in graph.node if node.op_type == "GatherBlockQuantized")
    cut = next(node for node in graph.node if node.input[:1] == table.input[:1] and node != table)
    product = next(node for node in graph.node if cut.output[0] in node.input)
    assert (cut.op_type, product.op_type) == ("Reshape", "MatMulNBits")
    assert list(product.input[2:]) == list(table.input[2:])
    assert "model.embed_tokens.weight" not in {item.name for item in graph.initializer}


def test_a_tied_table_has_the_values_of_its_product(bundle: Bundle, samples: Samples) -> None:
    """Rows out of the shared bytes are the product's weight to the last bit."""
    import onnxruntime as ort

    recipe = Recipe(method="weight-only", **INT4)
    made = quantize(bundle, samples, recipe, keep_failing=True).variant
    model = onnx.load(bundle.path / made.file)
    table = next(node for node in model.graph.node if node.op_type == "GatherBlockQuantized")
    head = next(node for node in model.graph.node if node.output[0] == "logits")
    cut = next(node for node in model.graph.node if node.output[0] == head.input[1])
    levels = next(a for a in head.attribute if a.name == "accuracy_level")
    levels.i = 0  # inputs stay float: what comes out is the weight alone
    states = onnx.helper.make_tensor_value_info("states", onnx.TensorProto.FLOAT, ["n", 64])
    ids = onnx.helper.make_tensor_value_info(table.input[1], onnx.TensorProto.INT64, ["n"])
    head.input[0] = "states"
    outputs = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in (table.output[0], "logits")
    ]
    graph = onnx.helper.make_graph(
        [table, cut, head], "tied", [ids, states], outputs, model.graph.initializer
    )
    alone = onnx.helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version
    )
    session = ort.InferenceSession(alone.SerializeToString())
    every = np.arange(257)
    rows, turned = session.run(None, {ids.name: every, "states": np.eye(64, dtype=np.float32)})
    np.testing.assert_array_equal(rows, turned.T)


def test_what_nncf_cannot_read_is_said(bundle: Bundle, samples: Samples) -> None:
    """nncf's weights for ONNX Runtime are refused with what to take instead."""
    recipe = Recipe(method="nncf-weights", target="cpu", weight_type="int4")
    with pytest.raises(ConfigurationError, match="use target openvino, or method weight-only"):
        quantize(bundle, samples, recipe)


def test_layers_in_int8_belong_to_int4(bundle: Bundle) -> None:
    """keep_int8 is of int4 weights alone, and its patterns must match a layer."""
    with pytest.raises(ConfigurationError, match="keep_int8"):
        Recipe(method="weight-only", keep_int8=("*",))
    with pytest.raises(ConfigurationError, match="keep_int8"):
        Recipe(method="nncf-weights", weight_type="int4", keep_int8=("*",))
