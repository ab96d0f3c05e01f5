"""ONNX export: right answers, whole files, stable bytes, clear refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from memopt.bundle import Bundle, open_bundle
from memopt.errors import ConfigurationError, ExportError
from memopt.exporters import check
from memopt.exporters.base import export
from memopt.exporters.half import to_half
from memopt.exporters.onnx import save_onnx
from memopt.files import sha256_file
from memopt.runtimes.torch_model import load_model


@pytest.fixture
def copy(tiny: Bundle, tmp_path: Path) -> Bundle:
    """A private copy of the tiny BERT bundle."""
    return open_bundle(shutil.copytree(tiny.path, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def exported(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny BERT with its ONNX variants; do not change it."""
    folder = shutil.copytree(tiny.path, tmp_path_factory.mktemp("exported") / "bundle")
    export(open_bundle(folder))
    return open_bundle(folder)


def files_below(folder: Path) -> list[str]:
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != ".memopt.lock")
    return sorted(str(p.relative_to(folder)) for p in found)


def test_the_manifest_records_files_checks_and_versions(exported: Bundle) -> None:
    """Both variants are there with hash, shapes and tolerance; the event names the versions."""
    portable, fused = exported.variant("onnx-fp32"), exported.variant("onnx-fp32-fused")
    assert exported.verify() == []
    for variant in (portable, fused):
        assert variant.check is not None
        assert len({(s["batch"], *s["size"]) for s in variant.check["shapes"]}) >= 4
        assert any(s["padded"] and s["side"] == "left" for s in variant.check["shapes"])
        assert variant.check["tolerance"]["min_cosine"] == 0.99999
        assert variant.check["min_cosine"] >= 0.99999
        assert variant.inputs == ("input_ids", "attention_mask", "token_type_ids")
    assert fused.fused
    assert not portable.fused
    event = exported.manifest.history[-1]
    assert event["event"] == "export"
    assert event["versions"]["torch"] == torch.__version__


def test_one_row_of_one_token_up_to_the_longest_sequence_runs(exported: Bundle) -> None:
    """Batch and sequence are dynamic down to 1 and up to the position table."""
    session = ort.InferenceSession(exported.file(exported.variant("onnx-fp32")))
    for batch, length in ((1, 1), (1, 64), (7, 2)):
        ids = np.full((batch, length), 5, dtype=np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": ids * 0}
        hidden, pooled = session.run(["last_hidden_state", "sentence_embedding"], feeds)
        assert hidden.shape == (batch, length, 32)
        np.testing.assert_allclose(np.linalg.norm(pooled, axis=1), 1.0, atol=1e-5)


def test_exporting_twice_gives_the_same_bytes(exported: Bundle, copy: Bundle) -> None:
    """The same weights give byte-identical graphs, portable and fused."""
    export(copy)
    for name in ("onnx/model.onnx", "onnx/model_fused.onnx"):
        assert sha256_file(copy.path / name) == sha256_file(exported.path / name)


@pytest.mark.slow
def test_weights_past_the_limit_go_beside_the_graph(copy: Bundle) -> None:
    """With a small limit the weights are a plain file that the variant lists and ORT reads."""
    portable, fused = export(copy, external_data_bytes=10_000)
    assert portable.companions == ("onnx/model.onnx.data",)
    data = copy.path / "onnx/model.onnx.data"
    assert not data.is_symlink()
    assert data.stat().st_nlink == 1
    assert data.stat().st_size > 30_000 > (copy.path / portable.file).stat().st_size
    assert fused.companions == ("onnx/model_fused.onnx.data",)
    assert open_bundle(copy.path).verify() == []
    ort.InferenceSession(copy.path / portable.file)


def test_fp16_keeps_float32_inputs_outputs_and_names(copy: Bundle) -> None:
    """The half-precision graph halves the weights under their names and passes its check."""
    (variant,) = export(copy, precision="fp16")
    model = onnx.load(copy.path / variant.file)
    weights = {t.name: t.data_type for t in model.graph.initializer}
    assert weights["encoder.layer.0.attention.self.query.weight"] == TensorProto.FLOAT16
    assert weights["embeddings.word_embeddings.weight"] == TensorProto.FLOAT16
    kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.output}
    assert set(kinds.values()) == {TensorProto.FLOAT}
    assert variant.check is not None
    assert variant.check["min_cosine"] > 0.9995


def test_squares_past_the_range_of_float16_stay_finite() -> None:
    """A root-mean-square norm of values whose squares overflow float16 is still right."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])
    constants = {"two": 2.0, "eps": 1e-6, "scale": 0.5}
    nodes = [
        helper.make_node("Pow", ["x", "two"], ["squares"]),
        helper.make_node("ReduceMean", ["squares", "axes"], ["mean"]),
        helper.make_node("Add", ["mean", "eps"], ["safe"]),
        helper.make_node("Sqrt", ["safe"], ["root"]),
        helper.make_node("Reciprocal", ["root"], ["inverse"]),
        helper.make_node("Mul", ["x", "inverse"], ["normal"]),
        helper.make_node("Mul", ["normal", "scale"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(np.float32(v), n) for n, v in constants.items()]
    tensors.append(numpy_helper.from_array(np.array([-1]), "axes"))
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    half = to_half(model)
    values = np.full((1, 8), 3_000.0, dtype=np.float32)  # squares of 9e6, past 65,504
    feeds = {"x": values}
    (wanted,) = ort.InferenceSession(model.SerializeToString()).run(None, feeds)
    (got,) = ort.InferenceSession(half.SerializeToString()).run(None, feeds)
    np.testing.assert_allclose(got, wanted, rtol=2e-3)


def _rewrite(
    bundle: Bundle, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
) -> Bundle:
    table = pq.read_table(bundle.weights)
    rows = change(table.to_pylist())
    changed = pa.Table.from_pylist(rows, schema=table.schema)
    staged = bundle.path / "staged.parquet"
    pq.write_table(changed, staged, row_group_size=1)
    return bundle.add_files({bundle.weights.name: staged}, event={"event": "rewritten"})


def test_a_missing_weight_is_named(copy: Bundle) -> None:
    """A weight the architecture needs and the file lacks is an error, never a random tensor."""

    def drop(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        name = ("encoder.layer.1.attention.self.key", "weight")
        return [r for r in rows if (r["layer_name"], r["weight_name"]) != name]

    copy = _rewrite(copy, drop)
    with pytest.raises(ExportError, match=r"encoder\.layer\.1\.attention\.self\.key\.weight"):
        export(copy)
    assert not (copy.path / "onnx").exists()


def test_a_weight_the_architecture_has_no_place_for_is_named(copy: Bundle) -> None:
    """A config with fewer layers than the weights does not silently drop the last layer."""
    config = json.loads((copy.path / "config.json").read_text())
    (copy.path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(ExportError, match=r"no place for .*encoder\.layer\.1\."):
        export(copy)


def test_code_that_came_with_a_model_is_never_run(copy: Bundle) -> None:
    """A config that names Python files is refused at once, without a question to the terminal."""
    config = json.loads((copy.path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (copy.path / "config.json").write_text(json.dumps(config))
    (copy.path / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ExportError, match=r"config\.json .* code of its own"):
        export(copy)


def test_a_weight_of_another_shape_is_named(copy: Bundle) -> None:
    """A config of another width is refused with both shapes."""
    config = json.loads((copy.path / "config.json").read_text())
    (copy.path / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(ExportError, match=r"intermediate\.dense\.weight is \(64, 32\), not"):
        export(copy)


def test_a_pooler_is_only_optional_where_it_is_not_used(tiny: Bundle, tmp_path: Path) -> None:
    """Without pooler weights mean pooling loads, the model's own pooling is refused."""
    import dataclasses

    bundle = open_bundle(shutil.copytree(tiny.path, tmp_path / "bundle"))
    _rewrite(bundle, lambda rows: [r for r in rows if "pooler" not in r["layer_name"]])
    load_model(bundle, "embedding")
    manifest = dataclasses.replace(bundle.manifest, pooling="model")
    with pytest.raises(ExportError, match=r"missing pooler\.dense"):
        load_model(Bundle(bundle.path, manifest), "embedding")


@pytest.mark.slow
def test_an_operator_that_does_not_export_is_named(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator without an ONNX form gives an ExportError with its name, and no file."""
    from transformers.models.bert.modeling_bert import BertEmbeddings

    original = BertEmbeddings.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = original(self, *args, **kwargs)
        return hidden + torch.special.bessel_j0(hidden)

    monkeypatch.setattr(BertEmbeddings, "forward", forward)
    with pytest.raises(ExportError, match="bessel_j0"):
        export(copy)
    assert files_below(copy.path) == sorted([*copy.manifest.files, "memopt.json"])


def test_a_wrong_graph_is_refused_and_nothing_is_written(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that pools differently from the reference fails its check: no file, no variant."""
    from memopt.runtimes import chain

    monkeypatch.setattr(chain, "_pool", lambda result, hidden, mask, kept, mode: hidden[:, 0])
    with pytest.raises(ExportError, match="does not give the answers of torch"):
        export(copy)
    assert files_below(copy.path) == sorted([*copy.manifest.files, "memopt.json"])
    assert open_bundle(copy.path).manifest.variants == {}


def test_an_interrupt_leaves_no_file(copy: Bundle) -> None:
    """Ctrl-C at the last step, when every file is staged, leaves the bundle as it was."""

    def interrupt(line: str) -> None:
        if "model_fused.onnx" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(copy, on_step=interrupt)
    assert files_below(copy.path) == sorted([*copy.manifest.files, "memopt.json"])


def test_unknown_choices_are_answered_with_what_there_is(copy: Bundle) -> None:
    """Typos in format, task, precision and opset are usage errors; bf16 has another way out."""
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"format": "onyx"}, "onnx"),
        ({"task": "embeding"}, "embedding"),
        ({"precision": "fp8"}, "fp"),
        ({"opset": 24}, "18 to 23"),
    )
    for arguments, hint in wrong:
        with pytest.raises(ConfigurationError, match=hint):
            export(copy, **arguments)
    with pytest.raises(ExportError, match="openvino"):
        export(copy, precision="bf16")


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.slow
def test_the_oldest_and_newest_opset_export(copy: Bundle, opset: int) -> None:
    """The ends of the opset range pass the same check."""
    portable = export(copy, opset=opset, fused=False)[0]
    model = onnx.load(copy.path / portable.file)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": opset}


def test_a_damaged_graph_is_refused_by_the_checker(tmp_path: Path) -> None:
    """save_onnx runs the ONNX checker on the file it wrote."""
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Abs", ["nowhere"], ["y"])], "g", [], [y])
    with pytest.raises(ExportError, match="checker"):
        save_onnx(helper.make_model(graph), tmp_path / "bad.onnx")


def test_bf16_kernels_are_missing_in_onnx_runtime() -> None:
    """The reason for refusing bf16 on ONNX still holds; when this fails, offer it."""
    a, b = (helper.make_tensor_value_info(n, TensorProto.BFLOAT16, [2, 2]) for n in "ab")
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "a"], ["b"])], "g", [a], [b])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(Exception, match=r"NOT_IMPLEMENTED|Could not find an implementation"):
        ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_the_check_names_the_shape_that_fails() -> None:
    """compare() reports which batch and size went past the tolerance."""
    feeds = {"pixel_values": np.ones((2, 3), np.float32)}
    wanted = {"sentence_embedding": np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)}
    with pytest.raises(ExportError, match=r"'batch': 2"):
        check.compare(
            lambda f: {"sentence_embedding": wanted["sentence_embedding"][:, ::-1]},
            [(feeds, wanted)],
            check.TOLERANCES["fp32"],
            name="x",
        )


def test_a_pool_wider_than_the_picture_is_a_pool_of_all_of_it() -> None:
    """EfficientNet's kernel is as wide as its channels, which OpenVINO refuses."""
    import onnx
    import onnx_ir

    from memopt.exporters.onnx import _pool_all

    def pool(kernel: int) -> str:
        value = onnx.helper.make_tensor_value_info
        node = onnx.helper.make_node(
            "AveragePool", ["x"], ["y"], kernel_shape=[kernel, kernel], ceil_mode=1
        )
        ends = (value(name, onnx.TensorProto.FLOAT, ["b", 8, 2, 2]) for name in ("x", "y"))
        graph = onnx.helper.make_graph([node], "g", *([end] for end in ends))
        model = onnx_ir.from_proto(onnx.helper.make_model(graph))
        _pool_all(model.graph)
        return str(next(iter(model.graph)).op_type)

    assert (pool(320), pool(1)) == ("GlobalAveragePool", "AveragePool")
