"""Graphs of others become bundles whose answers are the graphs' own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from memopt.bundle import Bundle, open_bundle
from memopt.importers.base import import_graph
from memopt.runtimes.engine import ArrowEngine
from memopt.runtimes.text import TextFrontEnd
from tests.importers.conftest import INPUTS, encoder

TEXTS = ["the cat", "a", "the dog and a cat and a dog", "cat dog cat dog cat", "zebra"]
PROVIDERS = ("cpu", "openvino")


def own_answers(graph: Path, bundle: Bundle, pooling: str, **names: str) -> np.ndarray:
    """Return what a graph gives for TEXTS one by one, pooled in numpy."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(graph))
    front = TextFrontEnd(bundle, ["input_ids", "attention_mask", "token_type_ids"])
    rows = []
    for text in TEXTS:
        [batch] = front.prepare([text])
        feed = {names.get(name, name): value for name, value in batch.feed.items()}
        [tokens] = session.run(["last_hidden_state"], feed)
        kept = tokens[0][batch.feed["attention_mask"][0] == 1]
        rows.append({"mean": kept.mean(0), "cls": kept[0], "max": kept.max(0)}[pooling])
    return np.stack(rows)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_a_graph_of_token_vectors_is_pooled_as_numpy_does(
    theirs: Path, tmp_path: Path, pooling: str
) -> None:
    """Pooling is added in a second file, and every batch gives what each text alone gives."""
    bundle = import_graph(theirs, tmp_path / "b", pooling=pooling)
    wanted = own_answers(theirs / "onnx" / "model.onnx", bundle, pooling)
    for device in PROVIDERS:
        with ArrowEngine(bundle, device, strict=True) as engine:
            got = engine.encode(TEXTS, normalize=False)
        assert np.abs(got - wanted).max() < 2e-6, device
    kept = bundle.path / "onnx" / "model.onnx"
    assert kept.read_bytes() == (theirs / "onnx" / "model.onnx").read_bytes()
    assert bundle.manifest.dimension == 32
    assert bundle.verify() == []


def test_a_pipeline_beside_the_graph_says_how_it_is_pooled(
    theirs: Path, tiny_source: Path, tmp_path: Path
) -> None:
    """modules.json, 1_Pooling and 2_Normalize are honoured as sentence-transformers does."""
    folder = tmp_path / "pipeline"
    shutil.copytree(theirs, folder)
    for name in ("modules.json", "sentence_bert_config.json"):
        shutil.copy(tiny_source / name, folder / name)
    shutil.copytree(tiny_source / "1_Pooling", folder / "1_Pooling")
    bundle = import_graph(folder, tmp_path / "b")
    wanted = own_answers(theirs / "onnx" / "model.onnx", bundle, "mean")
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    with ArrowEngine(bundle, "cpu") as engine:
        got = engine.encode(TEXTS, normalize=False)
    assert np.abs(got - wanted).max() < 1e-6
    assert (bundle.manifest.pooling, bundle.manifest.normalize) == ("mean", True)


def test_weights_become_parquet(theirs: Path, tmp_path: Path) -> None:
    """The graph's constants are in weights.parquet under their own names, bit for bit."""
    import onnx
    from onnx import numpy_helper

    from memopt.weights.reader import WeightLoader

    bundle = import_graph(theirs, tmp_path / "b", pooling="mean")
    model = onnx.load(str(theirs / "onnx" / "model.onnx"))
    with WeightLoader(bundle.weights) as loader:
        for tensor in model.graph.initializer:
            found = loader.load(tensor.name)
            assert np.array_equal(found, numpy_helper.to_array(tensor)), tensor.name


def test_inputs_of_other_names_and_types_are_taken(theirs: Path, tmp_path: Path) -> None:
    """A rename map and int32 inputs cost a cast in the second file, no other answer."""
    import onnx

    folder = tmp_path / "other"
    shutil.copytree(theirs, folder)
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(str(path))
    renamed = {"input_ids": "numbers", "attention_mask": "input_mask"}
    for value in model.graph.input:
        theirs_now = renamed.get(value.name, value.name)
        wide = onnx.helper.make_node("Cast", [theirs_now], [f"{value.name}__wide"], to=7)
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                if name == value.name:
                    node.input[place] = f"{value.name}__wide"
        model.graph.node.insert(0, wide)
        value.name = theirs_now
        value.type.tensor_type.elem_type = onnx.TensorProto.INT32
    onnx.save(model, str(path))
    bundle = import_graph(folder, tmp_path / "b", pooling="mean", rename={"numbers": "input_ids"})
    wanted = own_answers(theirs / "onnx" / "model.onnx", bundle, "mean")
    with ArrowEngine(bundle, "cpu") as engine:
        assert np.abs(engine.encode(TEXTS, normalize=False) - wanted).max() < 2e-6


def fixed(source: Path, target: Path, batch: int | None, length: int | None) -> None:
    """Save a graph with fixed axes."""
    import onnx

    model = onnx.load(str(source))
    for value in (*model.graph.input, *model.graph.output):
        for axis, size in ((0, batch), (1, length)):
            if size is not None:
                value.type.tensor_type.shape.dim[axis].dim_value = size
    onnx.save(model, str(target))


@pytest.mark.parametrize(("batch", "length"), [(1, None), (None, 16), (1, 16)])
def test_fixed_axes_are_told_and_then_used(
    theirs: Path, tmp_path: Path, batch: int | None, length: int | None
) -> None:
    """A graph of one row or of one length answers batches and texts of every length."""
    folder = tmp_path / "fixed"
    shutil.copytree(theirs, folder)
    path = folder / "onnx" / "model.onnx"
    fixed(theirs / "onnx" / "model.onnx", path, batch, length)
    told: list[str] = []
    bundle = import_graph(folder, tmp_path / "b", pooling="mean", on_warning=told.append)
    lines = " ".join(told)
    assert ("one input at a time" in lines) == (batch is not None)
    assert ("exactly 16 tokens" in lines) == (length is not None)
    assert bundle.manifest.max_length == (length or 64)
    wanted = own_answers(theirs / "onnx" / "model.onnx", bundle, "mean")
    for device in PROVIDERS:
        with ArrowEngine(bundle, device, strict=True) as engine:
            assert np.abs(engine.encode(TEXTS, normalize=False) - wanted).max() < 2e-6, device


def test_external_data_stays_beside_the_graph(theirs: Path, tmp_path: Path) -> None:
    """Weights in a file of their own are copied with the graph, under their own name."""
    import onnx

    folder = tmp_path / "external"
    shutil.copytree(theirs, folder)
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(str(path))
    onnx.save_model(
        model, str(path), save_as_external_data=True, location="w.bin", size_threshold=1024
    )
    bundle = import_graph(folder, tmp_path / "b", pooling="mean")
    assert (bundle.path / "onnx" / "w.bin").read_bytes() == (path.parent / "w.bin").read_bytes()
    wanted = own_answers(theirs / "onnx" / "model.onnx", bundle, "mean")
    with ArrowEngine(bundle, "cpu") as engine:
        assert np.abs(engine.encode(TEXTS, normalize=False) - wanted).max() < 2e-6


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_an_openvino_graph_is_pooled_too(theirs: Path, tmp_path: Path, pooling: str) -> None:
    """An .xml with its .bin gives what the ONNX graph that it was made of gives."""
    import openvino as ov

    folder = tmp_path / "xml"
    shutil.copytree(theirs, folder)
    shutil.rmtree(folder / "onnx")
    model = ov.convert_model(str(theirs / "onnx" / "model.onnx"))
    ov.save_model(model, str(folder / "openvino_model.xml"), compress_to_fp16=False)
    bundle = import_graph(folder, tmp_path / "b", pooling=pooling)
    assert list(bundle.manifest.variants) == ["openvino-fp32"]
    kept = bundle.path / "openvino" / "openvino_model.xml"
    assert kept.read_bytes() == (folder / "openvino_model.xml").read_bytes()
    wanted = own_answers(theirs / "onnx" / "model.onnx", bundle, pooling)
    with ArrowEngine(bundle, "openvino", strict=True) as engine:
        assert np.abs(engine.encode(TEXTS, normalize=False) - wanted).max() < 2e-6


def test_export_makes_other_forms_of_the_graph_itself(theirs: Path, tmp_path: Path) -> None:
    """OpenVINO's file is translated from the graph and compared with it; torch has no part."""
    from memopt.errors import ExportError
    from memopt.exporters.base import export

    bundle = import_graph(theirs, tmp_path / "b", pooling="mean")
    [variant] = export(bundle, format="openvino")
    assert variant.check is not None
    assert variant.check["reference"] == "the imported graph"
    assert variant.check["min_cosine"] > 0.99999
    wanted = own_answers(theirs / "onnx" / "model.onnx", bundle, "mean")
    with ArrowEngine(open_bundle(bundle.path), "openvino", "openvino-fp32") as engine:
        assert np.abs(engine.encode(TEXTS, normalize=False) - wanted).max() < 1e-5
    with pytest.raises(ExportError, match="was imported: its graph is its source"):
        export(open_bundle(bundle.path), task="text-classification")
    with pytest.raises(Exception, match="was imported: its graph is its source"):
        ArrowEngine(open_bundle(bundle.path), "torch", strict=True)


def test_it_is_quantized_as_any_other(theirs: Path, tmp_path: Path) -> None:
    """quantize starts from the imported graph and proves itself against it."""
    from memopt.quantization.quantize import Samples, quantize
    from memopt.quantization.recipe import Recipe

    words = ["the", "a", "cat", "dog", "ab", "zebra", "and"]
    random = np.random.default_rng(0)
    lines = [" ".join(random.choice(words, random.integers(1, 12))) for _ in range(120)]
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(dict.fromkeys(lines)))
    bundle = import_graph(theirs, tmp_path / "b", pooling="mean")
    given = Samples(calibration=texts, samples=32, validation_samples=32)
    result = quantize(bundle, given, Recipe(method="dynamic"))
    assert result.passed
    with ArrowEngine(open_bundle(bundle.path), "cpu", result.name) as engine:
        assert engine.device_info()["precision"] == "int8"


def test_a_classifier_keeps_its_labels(theirs: Path, tmp_path: Path) -> None:
    """Logits of two axes and a config's labels are a classifier of the graph's own scores."""
    import onnxruntime as ort

    from memopt.runtimes.engines.classifier import Classifier

    folder = tmp_path / "classes"
    shutil.copytree(theirs, folder)
    config = json.loads((folder / "config.json").read_text())
    labels = {"0": "cold", "1": "warm", "2": "hot"}
    config |= {"architectures": ["BertForSequenceClassification"], "id2label": labels}
    (folder / "config.json").write_text(json.dumps(config))
    graph = encoder(folder / "onnx" / "model.onnx", config["vocab_size"], labels=3)
    bundle = import_graph(folder, tmp_path / "b")
    assert bundle.manifest.task == "text-classification"
    assert next(iter(bundle.manifest.variants.values())).file == "onnx/model.onnx"
    front, session = TextFrontEnd(bundle, INPUTS), ort.InferenceSession(str(graph))
    with Classifier(bundle, "cpu") as engine:
        assert engine.labels == ("cold", "warm", "hot")
        got = engine.scores(TEXTS)
    for text, row in zip(TEXTS, got, strict=True):
        [batch] = front.prepare([text])
        [logits] = session.run(None, dict(batch.feed))
        powers = np.exp(logits[0] - logits[0].max())
        assert np.abs(row - powers / powers.sum()).max() < 1e-6


def test_spans_are_joined_for_the_engine(theirs: Path, tmp_path: Path) -> None:
    """start_logits and end_logits become the one answer that QuestionAnswerer asks for."""
    import onnxruntime as ort

    from memopt.runtimes.task_engine import open_task

    folder = tmp_path / "spans"
    shutil.copytree(theirs, folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    path = encoder(folder / "onnx" / "model.onnx", rows, spans=True)
    bundle = import_graph(folder, tmp_path / "b")
    assert bundle.manifest.task == "question-answering"
    session = ort.InferenceSession(str(path))
    pairs = [("the cat", "a dog and a cat"), ("a", "the dog")]
    front = TextFrontEnd(bundle, INPUTS)
    with open_task(bundle, device="cpu") as engine:
        got = engine.answers(pairs)
    for pair, answer in zip(pairs, got, strict=True):
        [batch] = front.prepare([pair])
        kept = int(batch.feed["attention_mask"].sum())
        start, end = session.run(["start_logits", "end_logits"], dict(batch.feed))
        assert np.abs(answer - np.stack([start[0], end[0]], -1)[:kept]).max() < 1e-6


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 18])
def test_pooling_is_of_the_graphs_own_opset(theirs: Path, tmp_path: Path, opset: int) -> None:
    """What is added means the same in every opset from 11 on."""
    folder = tmp_path / "old"
    shutil.copytree(theirs, folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    path = encoder(folder / "onnx" / "model.onnx", rows, opset=opset)
    for pooling in ("mean", "max"):
        bundle = import_graph(folder, tmp_path / pooling, pooling=pooling, normalize=True)
        wanted = own_answers(path, bundle, pooling)
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
        with ArrowEngine(bundle, "cpu") as engine:
            assert np.abs(engine.encode(TEXTS, normalize=False) - wanted).max() < 2e-6


def test_importing_again_replaces_the_bundle(theirs: Path, tmp_path: Path) -> None:
    """The second import's variant takes the place of the first's; the history has both."""
    import_graph(theirs, tmp_path / "b", pooling="mean")
    bundle = import_graph(theirs, tmp_path / "b", pooling="cls")
    assert bundle.manifest.pooling == "cls"
    assert [event["event"] for event in bundle.manifest.history] == ["import", "import"]
    assert open_bundle(bundle.path).verify() == []


def test_a_graph_of_no_known_task_runs_as_it_is(
    make_graph: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two inputs and two outputs of several types go through GraphEngine and memopt run."""
    from onnx import TensorProto, helper

    from memopt.cli import app
    from memopt.runtimes.engines.graph import GraphEngine

    path = make_graph(
        [
            helper.make_node("Add", ["x", "state"], ["y"]),
            helper.make_node("Cast", ["y"], ["state2"], to=TensorProto.INT64),
        ],
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2]),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [1, 2]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2]),
            helper.make_tensor_value_info("state2", TensorProto.INT64, ["n", 2]),
        ],
    )
    bundle = import_graph(path, tmp_path / "b")
    assert bundle.manifest.task == "graph"
    x, state = np.ones((3, 2), np.float32), np.array([[1.0, 2.5]], np.float32)
    for device in PROVIDERS:
        with GraphEngine(bundle, device, strict=True) as engine:
            assert [str(port) for port in engine.inputs] == [
                "x float32 (n, 2)",
                "state float32 (1, 2)",
            ]
            found = engine.run({"x": x, "state": state})
        assert found["y"].tolist() == [[2.0, 3.5]] * 3
        assert found["state2"].dtype == np.int64
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "s.npy", state)
    given = ["--input", f"x={tmp_path / 'x.npy'}", "--input", f"state={tmp_path / 's.npy'}"]
    app(["info", str(bundle.path)], standalone_mode=False)
    assert "the imported graph as it is" in capsys.readouterr().out
    out = tmp_path / "out.npz"
    app(["run", str(bundle.path), *given, "-o", str(out), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["y"] == [[2.0, 3.5]] * 3
    with np.load(out) as saved:
        assert saved["state2"].tolist() == [[2, 3]] * 3
