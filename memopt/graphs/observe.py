"""Look inside a graph: run it and return values that are not its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memopt.extras import require
from memopt.graphs.openvino import read_openvino, value_name
from memopt.graphs.session import THREADS, Feed, Observe, open_onnx, open_openvino
from memopt.runtimes.onnx import session_options

Array = NDArray[np.floating[Any]]

_FLOAT = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": THREADS}


def observer(graph: Path, format: str, names: Sequence[str]) -> Observe:
    """Return a function that runs a graph's file in float32 and returns the values ``names``.

    Values of an OpenVINO graph are called ``node:port``.
    """
    return _openvino(graph, names) if format == "openvino" else _onnx(graph, names)


def present(graph: Path, format: str, names: Sequence[str]) -> list[str]:
    """Return those of ``names`` that are values of the graph."""
    if format == "openvino":
        ops = read_openvino(graph).get_ordered_ops()
        there = {value_name(port) for node in ops for port in node.outputs()}
    else:
        there = {name for node in _light(graph).graph.node for name in node.output}
    return [name for name in names if name in there]


def valid_rows(values: NDArray[Any], feed: Feed) -> Array:
    """Return an activation as (rows, channels) float32, rows of padding left out."""
    array: Array = np.asarray(values, np.float32)
    flat: Array = array.reshape(-1, array.shape[-1])
    mask = feed.get("attention_mask")
    if mask is not None and array.shape[:-1] == mask.shape:
        kept: Array = flat[np.asarray(mask).ravel().astype(bool)]
        return kept
    return flat


def _light(graph: Path) -> Any:
    onnx = require("onnx", extra="export", why="read the graph's layers")
    return onnx.load(str(graph), load_external_data=False)


def _onnx(graph: Path, names: Sequence[str]) -> Observe:
    import onnx

    model = _light(graph)
    outputs = {item.name for item in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in outputs)
    options = session_options(THREADS)
    # Weights beside the file are found from here, for the changed graph is in memory.
    folder = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(folder, str(graph.parent))
    return open_onnx(model.SerializeToString(), names, options)


def _openvino(graph: Path, names: Sequence[str]) -> Observe:
    model = read_openvino(graph)
    ports = {value_name(port): port for node in model.get_ordered_ops() for port in node.outputs()}
    model.add_outputs([ports[name] for name in names if name not in _results(model)])
    places = _results(model)
    return open_openvino(model, [places[name] for name in names], _FLOAT)


def _results(model: Any) -> dict[str, int]:
    """Return the values that are outputs of a model, and at which position."""
    ports = enumerate(model.outputs)
    return {value_name(port.get_node().input_value(0)): place for place, port in ports}
