"""OpenVINO graphs: read, and what every change of one asks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memopt.extras import require
from memopt.runtimes.openvino_file import is_segmented

Array = NDArray[np.floating[Any]]

# Between a constant and its use: what a converter puts there and constant folding removes.
_PASSIVE = frozenset({"Convert", "Transpose", "Reshape", "Unsqueeze", "Squeeze"})


def read_openvino(path: Path) -> Any:
    """Return the ``openvino.Model`` of a file."""
    openvino = require("openvino", extra="openvino", why="read OpenVINO graphs")
    return openvino.Core().read_model(path)


def takes_segments(path: Path, format: str) -> bool:
    """Return whether a graph's file says that it takes several texts a row."""
    return format == "openvino" and is_segmented(read_openvino(path))


def value_name(output: Any) -> str:
    """Return ``node:port``, which the same value has in every copy of a graph."""
    return f"{output.get_node().get_friendly_name()}:{output.get_index()}"


def nodes_of(model: Any, kind: str) -> list[Any]:
    """Return the nodes of one type, in order."""
    return [node for node in model.get_ordered_ops() if node.get_type_name() == kind]


def varying(model: Any) -> set[str]:
    """Return the names of the nodes whose values differ from input to input.

    Not among them: what depends on an input's shape alone, such as rows of learned queries, one for
    each picture.
    """
    found: set[str] = set()
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        read = (value.get_node().get_name() for value in node.input_values())
        if kind == "Parameter" or (kind != "ShapeOf" and any(name in found for name in read)):
            found.add(node.get_name())
    return found


def constant_of(output: Any) -> Any:
    """Return the Constant node behind converts, transposes and reshapes, None for another value."""
    node = output.get_node()
    while node.get_type_name() in _PASSIVE:
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def folded(output: Any) -> Array:
    """Return the value of a constant behind converts, transposes and reshapes."""
    node = output.get_node()
    if node.get_type_name() == "Constant":
        return np.array(node.get_data(), np.float32)
    value = folded(node.input_value(0))
    if node.get_type_name() == "Transpose":
        order = node.input_value(1).get_node().get_data()
        return value.transpose([int(axis) for axis in order])
    return value.reshape(list(node.output(0).get_shape()))


def users_of(node: Any) -> list[Any]:
    """Return the inputs that read a node's first output."""
    return list(node.output(0).get_target_inputs())


def feed_from(users: Iterable[Any], output: Any) -> None:
    """Let inputs read another output."""
    for user in users:
        user.replace_source_output(output)
