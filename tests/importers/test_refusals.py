"""What is wrong with a graph is one clear line, and nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memopt.errors import ConfigurationError, ExportError, InputError, MemoptError, WeightsError
from memopt.importers.base import import_graph
from memopt.runtimes.engines.graph import GraphEngine


def value(name: str, shape: list[Any], kind: int = 1) -> Any:
    """Return an input or output; float32 unless said otherwise."""
    from onnx import helper

    return helper.make_tensor_value_info(name, kind, shape)


def node(kind: str, inputs: list[str], outputs: list[str], **more: Any) -> Any:
    """Return a node."""
    from onnx import helper

    return helper.make_node(kind, inputs, outputs, **more)


def test_what_is_no_graph(tmp_path: Path) -> None:
    """Text, nothing, another model's file and a folder without a graph are named."""
    for name, content in (("a.onnx", b"hello"), ("b.onnx", b""), ("c.onnx", bytes(range(256)))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ExportError, match="is not an ONNX file"):
            import_graph(tmp_path / name, tmp_path / "out")
    (tmp_path / "m.xml").write_text("<a/>")
    with pytest.raises(ExportError, match=r"m\.bin is missing"):
        import_graph(tmp_path / "m.xml", tmp_path / "out")
    (tmp_path / "m.bin").write_bytes(b"")
    with pytest.raises(ExportError, match="is not a file that OpenVINO reads"):
        import_graph(tmp_path / "m.xml", tmp_path / "out")
    (tmp_path / "m.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"is no \.onnx or \.xml file"):
        import_graph(tmp_path / "m.safetensors", tmp_path / "out")
    with pytest.raises(WeightsError, match=r"holds several graphs: a\.onnx, b\.onnx"):
        import_graph(tmp_path, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"holds no \.onnx or \.xml file"):
        import_graph(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_operators_that_no_runtime_has(make_graph: Callable[..., Path], tmp_path: Path) -> None:
    """A custom domain and an unknown operator are named."""
    ports = [value("x", [2])], [value("y", [2])]
    path = make_graph(
        [node("Magic", ["x"], ["y"], domain="com.acme")], *ports, opsets=[("", 17), ("com.acme", 1)]
    )
    with pytest.raises(ExportError, match=r"operator Magic of the domain 'com\.acme'"):
        import_graph(path, tmp_path / "out")
    path = make_graph([node("Sorcery", ["x"], ["y"])], *ports)
    deep = tmp_path.joinpath(*["a-folder-with-a-long-name"] * 8) / path.name
    deep.parent.mkdir(parents=True)
    shutil.copy(path, deep)
    for place in (path, deep):
        with pytest.raises(ExportError, match=r"ONNX Runtime cannot open .*Sorcery"):
            import_graph(place, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_that_is_not_there(theirs: Path, tmp_path: Path) -> None:
    """External data that is missing, cut short or outside the folder is refused."""
    import onnx

    folder = tmp_path / "external"
    shutil.copytree(theirs, folder)
    path = folder / "onnx" / "model.onnx"
    onnx.save_model(
        onnx.load(str(path)), str(path), save_as_external_data=True, location="w.bin",
        size_threshold=1024,
    )  # fmt: skip
    data = path.with_name("w.bin")
    data.write_bytes(data.read_bytes()[:-10])
    with pytest.raises(ExportError, match=r"w\.bin has \d+ bytes"):
        import_graph(folder, tmp_path / "out", pooling="mean")
    data.unlink()
    with pytest.raises(ExportError, match=r"w\.bin is missing"):
        import_graph(folder, tmp_path / "out", pooling="mean")
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../secret.bin"
    onnx.save(model, str(path))
    with pytest.raises(ExportError, match="not below its folder"):
        import_graph(folder, tmp_path / "out", pooling="mean")


def test_a_tokenizer_of_another_model(theirs: Path, tmp_path: Path, minilm_tokenizer: Path) -> None:
    """A vocabulary larger than the graph's table is refused, none at all too."""
    with pytest.raises(ExportError, match=r"ids up to 30521, and .* has a table of \d+"):
        import_graph(theirs, tmp_path / "out", pooling="mean", tokenizer=minilm_tokenizer)
    alone = tmp_path / "alone.onnx"
    shutil.copy(theirs / "onnx" / "model.onnx", alone)
    with pytest.raises(ExportError, match="say --tokenizer DIR"):
        import_graph(alone, tmp_path / "out", pooling="mean")


def test_options_that_do_not_fit(theirs: Path, tmp_path: Path) -> None:
    """Names that are not there, other tasks' kinds of input, and no pooling are named."""
    for error, match, options in (
        (ExportError, "say --pooling mean or cls or max", {}),
        (ConfigurationError, "no output 'vectors'", {"output_name": "vectors"}),
        (ConfigurationError, "no input 'ids'", {"rename": {"ids": "input_ids"}}),
        (ConfigurationError, "'words' is no input", {"rename": {"input_ids": "words"}}),
        (ConfigurationError, "'sum' is not known", {"pooling": "sum"}),
        (ExportError, "which is text, and task image-embedding", {"task": "image-embedding"}),
        (ExportError, "no start_logits", {"task": "question-answering"}),
        (ConfigurationError, "'embeding' is not known", {"task": "embeding"}),
        (ConfigurationError, "max_length is 0", {"pooling": "mean", "max_length": 0}),
    ):
        with pytest.raises(error, match=match):
            import_graph(theirs, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_graph_without_a_mask_or_of_a_fixed_batch(
    make_graph: Callable[..., Path], tmp_path: Path
) -> None:
    """Padding would change its answers, or it cannot be filled: refused with what to do."""
    from onnx import TensorProto

    cast = [node("Cast", ["input_ids"], ["y"], to=1)]
    ids = value("input_ids", ["b", "s"], TensorProto.INT64)
    path = make_graph(cast, [ids], [value("y", ["b", "s"])])
    with pytest.raises(ExportError, match="takes no attention_mask"):
        import_graph(path, tmp_path / "out")
    fixed = [value(n, [4, 8], TensorProto.INT64) for n in ("input_ids", "attention_mask")]
    path = make_graph(cast, fixed, [value("y", [4, 8])])
    with pytest.raises(ExportError, match="batches of exactly 4"):
        import_graph(path, tmp_path / "out")


def test_what_a_graph_engine_is_given(make_graph: Callable[..., Path], tmp_path: Path) -> None:
    """A missing, unknown, misshapen or mistyped input is one line that says what it takes."""
    path = make_graph([node("Neg", ["x"], ["y"])], [value("x", ["n", 2])], [value("y", ["n", 2])])
    bundle = import_graph(path, tmp_path / "b")
    with GraphEngine(bundle, "cpu") as engine:
        for feed, match in (
            ({}, r"also takes x float32 \(n, 2\)"),
            ({"z": 1}, "no input 'z'"),
            ({"x": np.zeros(2, np.float32)}, r"has shape \(2,\), the graph takes \(n, 2\)"),
            ({"x": np.array([["a", "b"]])}, "the graph takes float32"),
            ({"x": [[1.0], [1.0, 2.0]]}, "is no array"),
        ):
            with pytest.raises(InputError, match=match):
                engine.run(feed)
        assert engine.run({"x": [[1, 2]]})["y"].tolist() == [[-1.0, -2.0]]


def test_commands_of_graphs_and_of_encoders_point_at_each_other(
    make_graph: Callable[..., Path], tmp_path: Path
) -> None:
    """Encoding, exporting and quantizing a graph of no task say what it is instead."""
    from memopt.exporters.base import export
    from memopt.runtimes.engine import ArrowEngine

    path = make_graph([node("Neg", ["x"], ["y"])], [value("x", ["n", 2])], [value("y", ["n", 2])])
    bundle = import_graph(path, tmp_path / "b")
    with pytest.raises(MemoptError, match="memopt run"):
        ArrowEngine(bundle)
    with pytest.raises(ExportError, match="was imported: its graph is its source"):
        export(bundle, format="openvino")
