"""Add to an OpenVINO graph what memopt needs of it: names, types, lengths, and a vector's head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from memopt.errors import ExportError, brief
from memopt.importers.changes import Changes
from memopt.importers.roles import AddedHead
from memopt.importers.xml_file import port_name, read_model

_MASK_BIAS = -10_000.0


def adapt_xml(path: Path, changes: Changes) -> Any:
    """Return the ``openvino.Model`` of a graph with what it needs added.

    Raises:
        ExportError: its length is fixed and OpenVINO cannot make it free, or the task's head is
            not made for OpenVINO graphs.
    """
    from openvino import Type
    from openvino.preprocess import PrePostProcessor

    model = name_ports(read_model(path))
    steps = PrePostProcessor(model)
    for number, change in enumerate(changes.inputs):
        if change.port.dtype != change.dtype:
            wanted = Type.i64 if change.dtype == "int64" else Type.f32
            steps.input(number).tensor().set_element_type(wanted)
    model = steps.build()
    for port, change in zip(model.inputs, changes.inputs, strict=True):
        port.get_tensor().set_names({change.name})
        port.get_node().set_friendly_name(change.name)
    if changes.length:
        _free_length(model, changes, path)
    if changes.head is not None:
        model = _with_head(model, changes.head, path)
    return model


def name_ports(model: Any) -> Any:
    """Give each input and output that has no name the one that it is told by."""
    for side, ports in (("input", model.inputs), ("output", model.outputs)):
        for number, port in enumerate(ports):
            if not port.get_names():
                port.get_tensor().set_names({port_name(port, number, side)})
    return model


def _free_length(model: Any, changes: Changes, path: Path) -> None:
    from openvino import Dimension, PartialShape

    shapes = {}
    for change in changes.inputs:
        sizes = change.port.shape or ()
        batch = sizes[0] if isinstance(sizes[0], int) else -1
        shapes[change.name] = PartialShape([Dimension(batch), Dimension(-1)])
    try:
        model.reshape(shapes)
    except RuntimeError as error:
        raise ExportError(
            f"{path} was made for exactly {changes.length} tokens, and OpenVINO cannot make it of "
            f"any length: {brief(error, 120)}",
            fix="export it with a dynamic length",
        ) from error


def _with_head(model: Any, head: AddedHead, path: Path) -> Any:
    import openvino as ov
    from openvino import opset13 as ops

    if head.kind != "vector":
        raise ExportError(
            f"{path} has no output {head.output!r}, and that is added to ONNX graphs only",
            fix="import the ONNX graph that it was made of",
        )
    value = model.output(head.sources[0]).get_node().input_value(0)
    if value.get_element_type() != ov.Type.f32:
        value = ops.convert(value, "f32").output(0)
    masks = [port for port in model.inputs if "attention_mask" in port.get_names()]
    weights = ops.unsqueeze(ops.convert(masks[0], "f32"), [2]) if masks else None
    if head.pooling == "cls":
        value = ops.gather(value, np.int64(0), np.int64(1)).output(0)
    elif head.pooling == "max":
        if weights is not None:
            bias = ops.multiply(ops.subtract(np.float32(1), weights), np.float32(_MASK_BIAS))
            value = ops.add(value, bias)
        value = ops.reduce_max(value, [1], False).output(0)
    elif head.pooling == "mean" and weights is None:
        value = ops.reduce_mean(value, [1], False).output(0)
    elif head.pooling == "mean":
        count = ops.maximum(ops.reduce_sum(weights, [1], False), np.float32(1e-9))
        total = ops.reduce_sum(ops.multiply(value, weights), [1], False)
        value = ops.divide(total, count).output(0)
    if head.normalize:
        squares = ops.reduce_sum(ops.multiply(value, value), [-1], True)
        length = ops.maximum(ops.sqrt(squares), np.float32(1e-12))
        value = ops.divide(value, length).output(0)
    if head.keep is not None:
        value = ops.slice(value, [0], [head.keep], [1], [1]).output(0)
    own = [port for port in model.outputs if head.output not in port.get_names()]
    for port in model.outputs:
        port.get_tensor().set_names(port.get_names() - {head.output})
    # A node of its own: a value that is an output already would lose its name.
    value = ops.convert(value, "f32").output(0) if head.keep is None else value
    value.get_tensor().set_names({head.output})
    results = [port.get_node() for port in own] + [ops.result(value)]
    return ov.Model(results, model.get_parameters())
