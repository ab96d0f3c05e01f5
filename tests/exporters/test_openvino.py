"""OpenVINO export: full precision on disk, precision chosen on purpose, stable bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import openvino as ov
import pytest

from memopt.bundle import Bundle, open_bundle
from memopt.errors import ExportError
from memopt.exporters.base import export
from memopt.exporters.openvino import to_openvino
from memopt.files import sha256_file

INPUTS = {"input_ids", "attention_mask", "token_type_ids"}


@pytest.fixture(scope="module")
def exported(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny BERT in OpenVINO's fp32, bf16 and fp16; do not change it."""
    folder = shutil.copytree(tiny.path, tmp_path_factory.mktemp("openvino") / "bundle")
    for precision in ("fp32", "bf16", "fp16"):
        export(open_bundle(folder), format="openvino", precision=precision)
    return open_bundle(folder)


def _weight_types(path: Path) -> set[str]:
    model = ov.Core().read_model(path)
    nodes = [n for n in model.get_ops() if n.get_type_name() == "Constant"]
    return {n.get_element_type().get_type_name() for n in nodes if np.prod(n.shape) > 500}


def test_fp32_is_stored_uncompressed_and_fp16_is_half_the_size(exported: Bundle) -> None:
    """save_model's default of half precision is not taken for fp32."""
    full, half = exported.variant("openvino-fp32"), exported.variant("openvino-fp16")
    assert _weight_types(exported.file(full)) == {"f32"}
    assert _weight_types(exported.file(half)) == {"f16"}
    sizes = [(exported.path / v.companions[0]).stat().st_size for v in (full, half)]
    assert sizes[1] < 0.7 * sizes[0]


def test_names_are_those_of_the_onnx_graph(exported: Bundle) -> None:
    """Inputs and outputs keep their names, batch and sequence are dynamic."""
    model = ov.Core().read_model(exported.file(exported.variant("openvino-fp32")))
    assert {port.any_name for port in model.inputs} == INPUTS
    names = [port.get_names() for port in model.outputs]
    assert any("last_hidden_state" in n for n in names)
    assert any("sentence_embedding" in n for n in names)
    assert all(port.partial_shape[0].is_dynamic for port in model.inputs)
    assert all(port.partial_shape[1].is_dynamic for port in model.inputs)


def test_bf16_shares_the_file_and_differs_in_options(exported: Bundle) -> None:
    """The precision hint says what is meant, as processors with bf16 would choose it unasked."""
    full, brain = exported.variant("openvino-fp32"), exported.variant("openvino-bf16")
    assert brain.file == full.file
    assert full.options == {"INFERENCE_PRECISION_HINT": "f32"}
    assert brain.options == {"INFERENCE_PRECISION_HINT": "bf16"}
    assert full.check is not None
    assert full.check["min_cosine"] >= 0.99999
    assert brain.check is not None
    assert brain.check["tolerance"]["min_cosine"] == 0.995
    assert exported.verify() == []


@pytest.mark.slow
def test_exporting_twice_gives_the_same_bytes(exported: Bundle, tmp_path: Path) -> None:
    """Graph and weights are byte-identical; rewriting the shared file renews both variants."""
    copy = open_bundle(shutil.copytree(exported.path, tmp_path / "bundle"))
    variants = export(copy, format="openvino", precision="bf16")
    assert {v.name for v in variants} == {"openvino-bf16", "openvino-fp32"}
    for name in ("openvino/openvino_model.xml", "openvino/openvino_model.bin"):
        assert sha256_file(copy.path / name) == sha256_file(exported.path / name)


@pytest.mark.slow
def test_the_bundles_own_portable_graph_is_the_source(tiny: Bundle, tmp_path: Path) -> None:
    """Where onnx-fp32 is of the same weights it is not traced again; a damaged one is.

    With pooling max: where texts can share rows, OpenVINO's graph is another, traced for itself.
    """
    shutil.copytree(tiny.path, tmp_path / "bundle")
    manifest = tmp_path / "bundle" / "memopt.json"
    told = json.loads(manifest.read_text(encoding="utf-8")) | {"pooling": "max"}
    manifest.write_text(json.dumps(told), encoding="utf-8")
    bundle = open_bundle(tmp_path / "bundle")
    export(bundle, fused=False)
    steps: list[str] = []
    export(open_bundle(bundle.path), format="openvino", on_step=steps.append)
    assert not any("trace" in step for step in steps)
    with (bundle.path / "onnx" / "model.onnx").open("ab") as file:
        file.write(b"x")
    steps.clear()
    export(open_bundle(bundle.path), format="openvino", on_step=steps.append)
    assert any("trace" in step for step in steps)


def test_a_file_openvino_cannot_read_is_an_export_error(tmp_path: Path) -> None:
    """What is not a graph gives one line, not a traceback of the frontend."""
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(ExportError, match="OpenVINO cannot read"):
        to_openvino(tmp_path / "bad.onnx", tmp_path / "bad.xml", half=False)
