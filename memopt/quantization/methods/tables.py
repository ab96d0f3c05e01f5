"""Embedding tables of ONNX graphs: int8 rows with a scale each, or a product's own blocks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memopt.graphs.ir import constant, made_by, new_node, replace_node, store
from memopt.graphs.linears import Linear
from memopt.graphs.observe import Array
from memopt.quantization.method import Layer
from memopt.quantization.methods.static import round_table, share_of_power

# Tables below this many bytes stay float: token types are not worth a second Gather.
SMALLEST_TABLE = 1 << 18


def find_tables(model: Any) -> list[tuple[str, Any]]:
    """Return (name, Gather node) of every large float embedding table used by one Gather only."""
    tables = []
    for node in model.graph:
        if node.op_type != "Gather" or not node.inputs[0].is_initializer():
            continue
        table = node.inputs[0]
        axis = node.attributes.get("axis")
        first = axis is None or axis.as_int() == 0
        big = len(table.shape) == 2 and int(np.prod(table.shape)) * 4 >= SMALLEST_TABLE
        if big and first and table.dtype.name == "FLOAT" and len(table.uses()) == 1:
            tables.append((table.name, node))
    return tables


def quantize_tables(model: Any, kept: Collection[str]) -> list[Layer]:
    """Turn large embedding tables into int8 rows with a scale each, but for those ``kept``."""
    layers = []
    graph = model.graph
    for name, node in find_tables(model):
        if name in kept:
            continue
        values = constant(node.inputs[0])
        assert values is not None
        integers, scales = _round(values)
        ids, output = node.inputs[1], node.outputs[0].name
        rows = [store(graph, f"{name}_quantized", integers), ids]
        steps = [store(graph, f"{name}_scale", scales), ids]
        gather = new_node("Gather", rows, f"{output}_int8")
        cast = new_node("Cast", gather.outputs, f"{output}_steps", to=1)
        stored = new_node("Gather", steps, f"{output}_stored")
        scale = new_node("Cast", stored.outputs, f"{output}_scale", to=1)
        product = new_node("Mul", [cast.outputs[0], scale.outputs[0]], output)
        replace_node(graph, node, [gather, cast, stored, scale, product])
        del graph.initializers[name]
        error = share_of_power(integers * scales.astype(np.float32) - values, values)
        layers.append(Layer(name=name, kind="int8-table", error=error))
    return layers


def tied_table(linear: Linear) -> Any | None:
    """Return the Gather that reads a product's weight as its table of embeddings, else None."""
    weight = linear.node.inputs[1]
    turned = made_by(weight, "Transpose")
    weight = weight if turned is None else turned.inputs[0]
    for use in weight.uses():
        node = use.node
        axis = node.attributes.get("axis")
        rows = len(weight.shape) == 2 and int(weight.shape[0]) == linear.shape[0]
        if node.op_type == "Gather" and rows and (axis is None or axis.as_int() == 0):
            return node
    return None


def _round(values: Array) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """Round a table; scales are float16 where all of them are normal numbers there, else float32.

    A scale a row in float32 would be half a percent of a small model's file.
    """
    integers, scales = round_table(values)
    half = scales.astype(np.float16)
    if (np.abs(half) < np.finfo(np.float16).smallest_normal).any() or not np.isfinite(half).all():
        return integers, scales
    wide = half.astype(np.float32)
    return np.clip(np.rint(values / wide), -127, 127).astype(np.int8), half
