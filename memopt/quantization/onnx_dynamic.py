"""Dynamic int8 for ONNX Runtime: weights in int8, activations rounded as they come.

The fused graph is used, so that attention becomes QAttention. One scale per activation tensor is
found at run time, over the whole batch: a row's result depends a little on its neighbours. The
validator compares batches as they come.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from memopt.extras import require, root_log_kept
from memopt.quantization.onnx_graph import (
    add_initializers,
    drop_unused,
    find_tables,
    named,
    quantize_tables,
    read_onnx,
    replace_node,
)
from memopt.quantization.recipe import match_layers
from memopt.quantization.static import Context, Layer, Make, Quantized


def prepare(context: Context) -> Make:
    """Return a function that builds the dynamic int8 graph.

    Raises:
        ConfigurationError: a pattern of ``recipe.keep_float`` matches no layer.
    """
    tools = require("onnxruntime.quantization", extra="cpu", why="quantize ONNX graphs")
    original = _read(context)
    layers = _layers(original)
    sizes = {item.name: math.prod(item.dims) for item in original.graph.initializer}
    names = [*layers, *(name for name, _ in find_tables(original))]
    patterns = match_layers(context.recipe.keep_float, names)

    def make(keep: Collection[str]) -> Quantized:
        kept = patterns | set(keep)
        model = _read(context)
        # onnxruntime warns about preprocessing on every call, through the root logger.
        with (
            root_log_kept(),
            tempfile.TemporaryDirectory(prefix="memopt-dynamic-") as folder,
        ):
            target = Path(folder) / "model.onnx"
            tools.quantize_dynamic(
                model,
                str(target),
                op_types_to_quantize=["MatMul", "Attention", "Gemm"],
                per_channel=context.recipe.grain == "per-channel",
                weight_type=tools.QuantType.QInt8,
                nodes_to_exclude=[layers[name].name for name in sorted(kept & set(layers))],
                extra_options={"MatMulConstBOnly": True, "WeightSymmetric": True},
            )
            made = read_onnx(target)
        found = [
            Layer(
                name=name,
                kind="float" if name in kept else "int8",
                macs=sizes[name],
                value=node.output[0],
            )
            for name, node in layers.items()
        ]
        if context.recipe.embeddings:
            found += [
                Layer(name=name, kind="int8-table", error=error)
                for name, error in quantize_tables(made, kept)
            ]
        drop_unused(made)
        return Quantized(model=made, layers=tuple(found))

    return make


def _read(context: Context) -> Any:
    model = read_onnx(context.graph)
    if context.recipe.embeddings:
        expand_embeddings(model)
    return model


def expand_embeddings(model: Any) -> int:
    """Write EmbedLayerNormalization as Gathers, so that its tables can be int8; return how many.

    Its quantized twin has one scale for a whole table, where a row each costs nothing.
    """
    from onnx import helper

    uses = Counter(name for node in model.graph.node for name in node.input)
    done = 0
    for node in [n for n in model.graph.node if n.op_type == "EmbedLayerNormalization"]:
        ids, types, words, positions, kinds, gamma, beta, *rest = node.input
        if any(uses[name] for name in node.output[1:]) or any(rest):
            continue
        out = node.output[0]
        values = {item.name: item.f for item in node.attribute}
        add_initializers(
            model, {f"{out}/zero": np.int64(0), f"{out}/one": np.int64(1), f"{out}/at": np.int64(1)}
        )
        parts = [
            helper.make_node("Gather", [words, ids], [f"{out}/words"]),
            helper.make_node("Shape", [ids], [f"{out}/shape"]),
            helper.make_node("Gather", [f"{out}/shape", f"{out}/at"], [f"{out}/length"]),
            helper.make_node(
                "Range", [f"{out}/zero", f"{out}/length", f"{out}/one"], [f"{out}/range"]
            ),
            helper.make_node("Gather", [positions, f"{out}/range"], [f"{out}/positions"]),
            helper.make_node("Add", [f"{out}/words", f"{out}/positions"], [f"{out}/placed"]),
        ]
        total = f"{out}/placed"
        if types:
            parts += [
                helper.make_node("Gather", [kinds, types], [f"{out}/types"]),
                helper.make_node("Add", [total, f"{out}/types"], [f"{out}/typed"]),
            ]
            total = f"{out}/typed"
        epsilon = values.get("epsilon", 1e-12)
        parts.append(
            helper.make_node("LayerNormalization", [total, gamma, beta], [out], epsilon=epsilon)
        )
        replace_node(model, node, [named(part, part.output[0]) for part in parts])
        done += 1
    return done


def _layers(model: Any) -> dict[str, Any]:
    """Return weight name -> node of what can be quantized."""
    constants = {item.name for item in model.graph.initializer if len(item.dims) == 2}
    return {
        node.input[1]: node
        for node in model.graph.node
        if node.op_type in ("MatMul", "Attention", "Gemm") and node.input[1] in constants
    }
