"""Fused operators that the CPU runs faster apart are written apart, with the same answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from memopt.runtimes.cpu_graph import split_skip_layer_norm

WIDTH = 24
RANDOM = np.random.default_rng(0)
FEED = {name: RANDOM.normal(2, 3, (2, 3, WIDTH)).astype(np.float32) for name in ("x", "skip")}


def graph(path: Path, inputs: list[str], outputs: list[str], opset: int = 20) -> Path:
    node = helper.make_node(
        "SkipLayerNormalization", inputs, outputs, domain="com.microsoft", epsilon=1e-3
    )
    constants = [
        numpy_helper.from_array(RANDOM.normal(size=WIDTH).astype(np.float32), name)
        for name in ("gamma", "beta", "bias")
        if name in inputs
    ]
    shape = ["batch", "sequence", WIDTH]
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name in ("x", "skip", *filter(None, outputs))
    }
    made = helper.make_graph(
        [node, *(helper.make_node("Neg", [name], [f"{name}_used"]) for name in outputs if name)],
        "g",
        [values["x"], values["skip"]],
        [values[name] for name in outputs if name],
        constants,
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=10), str(path))
    return path


def answers(path: Path) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, FEED)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        (["x", "skip", "gamma", "beta", "bias"], ["y"]),
        (["x", "skip", "gamma", "beta"], ["y"]),
        (["x", "skip", "gamma", "", "bias"], ["y"]),
        (["x", "skip", "gamma"], ["y", "", "", "sum"]),
        (["x", "skip", "gamma", "beta", "bias"], ["y", "", "", "sum"]),
    ],
)
def test_the_parts_give_the_same_answer(
    inputs: list[str], outputs: list[str], tmp_path: Path
) -> None:
    """With and without bias, beta and the sum that a pre-norm model carries on."""
    path = graph(tmp_path / "m.onnx", inputs, outputs)
    expected = answers(path)
    assert split_skip_layer_norm(path) == 1
    model = onnx.load(path)
    onnx.checker.check_model(model)
    kinds = [node.op_type for node in model.graph.node]
    assert "SkipLayerNormalization" not in kinds
    assert "LayerNormalization" in kinds
    assert model.ir_version == 10, "what is not described here stays as it was"
    for mine, theirs in zip(answers(path), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-6)


def test_what_cannot_be_written_apart_is_left_alone(tmp_path: Path) -> None:
    """Before opset 17 LayerNormalization is no standard operator; a graph without any is kept."""
    old = graph(tmp_path / "old.onnx", ["x", "skip", "gamma", "beta"], ["y"], opset=16)
    done = graph(tmp_path / "done.onnx", ["x", "skip", "gamma", "beta"], ["y"])
    split_skip_layer_norm(done)
    for path in (old, done):
        before = path.read_bytes()
        assert split_skip_layer_norm(path) == 0
        assert path.read_bytes() == before


def test_a_file_that_is_no_graph_is_an_error(tmp_path: Path) -> None:
    """The cache then opens the model itself."""
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(DecodeError):
        split_skip_layer_norm(path)
