"""What cannot be exported is refused in one clear line, whoever it is that fails."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import TensorProto, helper

from memopt.bundle import Bundle, open_bundle
from memopt.errors import ExportError
from memopt.exporters import base, encoder, openvino
from memopt.exporters import onnx as exporter
from memopt.weights.convert import convert

_TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}


def _bundle(folder: Path, name: str, **settings: Any) -> Bundle:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    getattr(transformers, f"{name}Model")(config).save_pretrained(folder / "source")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no tokenizer.json
        return convert(folder / "source", folder / "bundle")


def _refused(bundle: Bundle, **arguments: Any) -> str:
    before = sorted(bundle.path.rglob("*"))
    with pytest.raises(ExportError) as refused:
        base.export(bundle, **arguments)
    line = str(refused.value)
    assert "\n" not in line
    assert bundle.manifest.model_type in line
    assert sorted(bundle.path.rglob("*")) == before
    return line


def test_what_a_model_needs_besides_is_named(tmp_path: Path) -> None:
    """SigLIP 2 of any size of picture asks for a mask and shapes of patches."""
    sizes = {key: value for key, value in _TEXT.items() if "vocab" not in key and "max" not in key}
    line = _refused(_bundle(tmp_path, "Siglip2Vision", **sizes, patch_size=8, num_patches=16))
    assert "needs pixel_attention_mask and needs spatial_shapes" in line


def test_what_a_model_has_no_place_for_is_named(tmp_path: Path) -> None:
    """xLSTM runs over padding as over words: without a mask it would change every vector."""
    sizes = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 1, "num_heads": 2}
    line = _refused(_bundle(tmp_path, "xLSTM", **sizes))
    assert "takes no attention_mask" in line


def _graph(path: Path, *nodes: Any) -> Path:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in "xy")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("no.such", 1)]
    graph = helper.make_graph(list(nodes), "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=opsets), path)
    return path


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_graph_that_a_runtime_does_not_take_is_one_line(tmp_path: Path, runtime: str) -> None:
    """It names the operator; what the runtime says, which is about its own files, is logged."""
    node = helper.make_node("Wishful", ["x"], ["y"], domain="no.such")
    path = _graph(tmp_path / "model.onnx", node)

    def take() -> object:
        if runtime == "onnxruntime":
            return exporter.runner(path, ("y",))
        return openvino.to_openvino(path, tmp_path / "model.xml", half=False)

    level = logging.getLogger().level
    with pytest.raises(ExportError) as refused:
        take()
    assert logging.getLogger().level == level  # OpenVINO sets it to errors only
    line = str(refused.value)
    assert "\n" not in line
    assert len(line) < 250
    assert "Wishful" in line


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_shape_that_a_graph_does_not_take_is_one_line(tmp_path: Path, runtime: str) -> None:
    """A graph traced for one batch fails on another when it runs, not when it is opened."""
    fixed = helper.make_tensor("s", TensorProto.INT64, [2], [2, 4])
    nodes = [
        helper.make_node("Constant", [], ["s"], value=fixed),
        helper.make_node("Reshape", ["x", "s"], ["y"]),
    ]
    path = _graph(tmp_path / "model.onnx", *nodes)
    if runtime == "onnxruntime":
        run = exporter.runner(path, ("y",))
    else:
        openvino.to_openvino(path, tmp_path / "model.xml", half=False)
        run = openvino.runner(tmp_path / "model.xml", ("y",), {})
    assert run({"x": np.ones((2, 4), np.float32)})["y"].shape == (2, 4)
    with pytest.raises(ExportError) as refused:
        run({"x": np.ones((3, 4), np.float32)})
    line = str(refused.value)
    assert "x (3, 4)" in line
    assert "\n" not in line


def test_without_a_fused_graph_the_bundle_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Fusing only makes a right graph faster: where it fails, the log says so and that is all."""

    def stumble(*arguments: Any) -> Any:
        raise IndexError("a pattern met a graph\nthat nobody has seen")

    monkeypatch.setattr(encoder, "fuse", stumble)
    bundle = _bundle(tmp_path, "Bert", **_TEXT)
    made = base.export(bundle)
    assert [variant.name for variant in made] == ["onnx-fp32"]
    assert set(open_bundle(bundle.path).manifest.variants) == {"onnx-fp32"}
    assert "bert gets no fused graph for ONNX Runtime: a pattern met a graph that" in caplog.text


def test_what_nobody_has_foreseen_names_the_model_and_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception of any kind out of any step is a line, and no graph is begun."""

    def stumble(*arguments: Any) -> Any:
        raise IndexError("list index out of range")

    bundle = _bundle(tmp_path, "Bert", **_TEXT)
    monkeypatch.setattr(exporter, "_name_weights", stumble)
    line = _refused(bundle)
    assert "IndexError at the step 'trace and translate to ONNX'" in line
    assert "list index" not in line


def test_the_manifest_learns_the_dimension_from_the_graph(tmp_path: Path) -> None:
    """What convert reads in a config is a guess; of some models no key says it."""
    settings = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1]}
    bundle = _bundle(tmp_path, "Swin", **settings, num_heads=[1, 2], window_size=4)
    bundle = bundle.update(lambda manifest: replace(manifest, dimension=99))
    base.export(bundle)
    assert open_bundle(bundle.path).manifest.dimension == 16
