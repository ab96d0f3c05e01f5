"""OpenVINO files of others: what is in them, and whether they are whole."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from memopt.errors import ExportError, brief
from memopt.extras import require
from memopt.importers.graph_file import FEWEST_VALUES, GraphFile, main_precision
from memopt.runtimes.engines.graph import Port

_VERSION = re.compile(rb'<net [^>]*version="(\d+)"')
# OpenVINO's names of types -> numpy's.
_TYPES = {"f32": "float32", "f16": "float16", "f64": "float64", "bf16": "bfloat16"} | {
    f"{kind}{bits}": f"{name}{bits}"
    for kind, name in (("i", "int"), ("u", "uint"))
    for bits in (2, 4, 8, 16, 32, 64)
}
_TYPES |= {"boolean": "bool", "string": "str", "nf4": "nf4"}


def read_xml(path: Path) -> GraphFile:
    """Read an OpenVINO file.

    Raises:
        ExportError: as of :func:`memopt.importers.dialects.read_graph`.
    """
    weights = path.with_suffix(".bin")
    model = read_model(path)
    sizes: Counter[str] = Counter()
    operators = set()
    rows = []
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        operators.add(kind)
        if kind == "Constant":
            dtype = _TYPES.get(node.get_element_type().get_type_name(), "unknown")
            sizes[dtype] += int(np.prod(list(node.get_output_shape(0))))
        if kind == "Gather" and (table := _table(node)):
            rows.append(table)
    precision = main_precision(sizes)
    narrow = precision in ("int8", "int4", "int2", "nf4")
    version = _VERSION.search(path.read_bytes()[:4096])
    return GraphFile(
        path=path,
        format="openvino",
        inputs=tuple(_port(port, n, "input") for n, port in enumerate(model.inputs)),
        outputs=tuple(_port(port, n, "output") for n, port in enumerate(model.outputs)),
        precision=precision,
        quantization="FakeQuantize" if "FakeQuantize" in operators else "weights only" * narrow,
        version=int(version[1]) if version else 0,
        opset=None,
        producer="openvino",
        beside=(weights.name,),
        rows=min(rows, default=None),
    )


def read_model(path: Path) -> Any:
    """Return the ``openvino.Model`` of a file.

    Raises:
        ExportError: it is none, or its .bin is missing.
    """
    ov = require("openvino", extra="openvino", why="read OpenVINO files")
    if not path.with_suffix(".bin").is_file():
        raise ExportError(
            f"{path.with_suffix('.bin')} is missing: {path.name} has its weights there",
            fix="copy it beside the graph",
        )
    try:
        return ov.Core().read_model(path)
    except RuntimeError as error:
        raise ExportError(
            f"{path} is not a file that OpenVINO reads: {brief(str(error).split('failed:')[-1])}",
            fix="give the .xml that openvino.save_model wrote",
        ) from error


def port_name(port: Any, number: int, side: str) -> str:
    """Return the name of an input or output; one that has none is called by its place."""
    names = port.get_names()
    return min(names) if names else f"{side}_{number}"


def constants(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and values of each constant of some size."""
    for node in read_model(path).get_ordered_ops():
        if node.get_type_name() == "Constant":
            values = np.asarray(node.data)
            if values.size >= FEWEST_VALUES:
                yield node.get_friendly_name(), values


def _port(port: Any, number: int, side: str) -> Port:
    shape = port.get_partial_shape()
    dtype = _TYPES.get(port.get_element_type().get_type_name(), "unknown")
    name = port_name(port, number, side)
    if shape.rank.is_dynamic:
        return Port(name, dtype, None)
    sizes = tuple(d.get_length() if d.is_static else f"axis{n}" for n, d in enumerate(shape))
    return Port(name, dtype, sizes)


def _table(gather: Any) -> int | None:
    """Return the rows of the table that token ids are looked up in, if this is that look-up."""
    ids, table = gather.input_value(1).get_node(), gather.input_value(0).get_node()
    while ids.get_type_name() in ("Convert", "Reshape", "Unsqueeze", "Squeeze"):
        ids = ids.input_value(0).get_node()
    while table.get_type_name() in ("Convert", "Multiply", "Subtract"):
        table = table.input_value(0).get_node()
    if ids.get_type_name() != "Parameter" or table.get_type_name() != "Constant":
        return None
    if "input_ids" not in ids.output(0).get_names():
        return None
    shape = list(table.get_output_shape(0))
    return int(shape[0]) if len(shape) == 2 else None
