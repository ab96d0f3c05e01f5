"""Dynamic int8 for ONNX Runtime: weights in int8, activations rounded as they come.

The fused graph is used, so that attention becomes QAttention. One scale per activation tensor is
found at run time, over the whole batch: a row's result depends a little on its neighbours. The
validator compares batches as they come.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from memopt.extras import require, root_log_kept
from memopt.graphs.ir import drop_unused, new_node, read_onnx, replace_node, store, to_proto
from memopt.quantization.method import Context, Layer, Make, MethodRecipe, Quantized, match_layers
from memopt.quantization.methods.tables import find_tables, quantize_tables


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicRecipe(MethodRecipe):
    """Settings of method ``dynamic``."""

    target: Literal["auto", "cpu"] = "auto"
    weight_type: Literal["int8"] = "int8"
    granularity: Literal["auto", "per-channel", "per-tensor"] = "auto"
    embeddings: bool = True


def prepare(context: Context[DynamicRecipe]) -> Make:
    """Return a function that builds the dynamic int8 graph.

    Raises:
        ConfigurationError: a pattern of ``recipe.keep_float`` matches no layer.
    """
    tools = require("onnxruntime.quantization", extra="cpu", why="quantize ONNX graphs")
    original = read_onnx(context.graph)
    if context.recipe.embeddings:
        expand_embeddings(original)
    products = _products(original)
    names = [*products, *(name for name, _ in find_tables(original))]
    patterns = match_layers(context.recipe.keep_float, names)

    def make(keep: Collection[str]) -> Quantized:
        kept = patterns | set(keep)
        # onnxruntime warns about preprocessing on every call, through the root logger.
        with (
            root_log_kept(),
            tempfile.TemporaryDirectory(prefix="memopt-dynamic-") as folder,
        ):
            target = Path(folder) / "model.onnx"
            tools.quantize_dynamic(
                to_proto(original),
                str(target),
                op_types_to_quantize=["MatMul", "Attention", "Gemm"],
                per_channel=context.recipe.grain == "per-channel",
                weight_type=tools.QuantType.QInt8,
                nodes_to_exclude=[products[name].name for name in sorted(kept & set(products))],
                extra_options={"MatMulConstBOnly": True, "WeightSymmetric": True},
            )
            quantized = read_onnx(target)
        layers = [
            Layer(
                name=name,
                kind="float" if name in kept else "int8",
                macs=math.prod(node.inputs[1].shape),
                value=node.outputs[0].name,
            )
            for name, node in products.items()
        ]
        if context.recipe.embeddings:
            layers += quantize_tables(quantized, kept)
        drop_unused(quantized)
        return Quantized(model=to_proto(quantized), layers=tuple(layers))

    return make


def expand_embeddings(model: Any) -> int:
    """Write EmbedLayerNormalization as Gathers, so that its tables can be int8; return how many.

    Its quantized twin has one scale for a whole table, where a row each costs nothing.
    """
    done = 0
    for node in [n for n in model.graph if n.op_type == "EmbedLayerNormalization"]:
        unread = not any(value.uses() for value in node.outputs[1:])
        if unread and all(value is None for value in node.inputs[7:]):
            _expand(model.graph, node)
            done += 1
    return done


def _expand(graph: Any, node: Any) -> None:
    ids, types, words, positions, kinds, gamma, beta = node.inputs[:7]
    out = node.outputs[0].name
    nodes: list[Any] = []

    def add(kind: str, inputs: list[Any], name: str) -> Any:
        nodes.append(new_node(kind, inputs, f"{out}/{name}"))
        return nodes[-1].outputs[0]

    numbers = (("zero", 0), ("one", 1), ("at", 1))
    zero, one, at = (store(graph, f"{out}/{name}", np.int64(value)) for name, value in numbers)
    rows = add("Gather", [words, ids], "words")
    length = add("Gather", [add("Shape", [ids], "shape"), at], "length")
    places = add("Range", [zero, length, one], "range")
    total = add("Add", [rows, add("Gather", [positions, places], "positions")], "placed")
    if types is not None:
        total = add("Add", [total, add("Gather", [kinds, types], "types")], "typed")
    given = node.attributes.get("epsilon")
    epsilon = 1e-12 if given is None else given.as_float()
    norm = new_node("LayerNormalization", [total, gamma, beta], out, epsilon=epsilon)
    replace_node(graph, node, [*nodes, norm])


def _products(model: Any) -> dict[str, Any]:
    """Return weight name -> node of what can be quantized."""
    return {
        node.inputs[1].name: node
        for node in model.graph
        if node.op_type in ("MatMul", "Attention", "Gemm")
        and node.inputs[1].is_initializer()
        and len(node.inputs[1].shape) == 2
    }
