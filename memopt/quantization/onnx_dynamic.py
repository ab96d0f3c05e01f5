"""Dynamic int8 for ONNX Runtime: weights in int8, activations rounded as they come.

The fused graph is used, so that attention becomes QAttention. One scale per activation tensor is
found at run time, over the whole batch: a row's result depends a little on its neighbours. The
validator compares batches as they come.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from memopt.extras import require
from memopt.quantization.onnx_graph import drop_unused, find_tables, quantize_tables, read_onnx
from memopt.quantization.recipe import match_layers
from memopt.quantization.static import Context, Layer, Make, Quantized


def prepare(context: Context) -> Make:
    """Return a function that builds the dynamic int8 graph.

    Raises:
        ConfigurationError: a pattern of ``recipe.keep_float`` matches no layer.
    """
    tools = require("onnxruntime.quantization", extra="cpu", why="quantize ONNX graphs")
    original = read_onnx(context.graph)
    layers = _layers(original)
    names = [*layers, *(name for name, _ in find_tables(original))]
    patterns = match_layers(context.recipe.keep_float, names)

    def make(keep: Collection[str]) -> Quantized:
        kept = patterns | set(keep)
        model = read_onnx(context.graph)
        # onnxruntime warns about preprocessing on every call, through the root logger.
        logging.disable(logging.WARNING)
        try:
            with tempfile.TemporaryDirectory(prefix="memopt-dynamic-") as folder:
                target = Path(folder) / "model.onnx"
                tools.quantize_dynamic(
                    model,
                    str(target),
                    op_types_to_quantize=["MatMul", "Attention", "Gemm"],
                    per_channel=context.recipe.grain == "per-channel",
                    weight_type=tools.QuantType.QInt8,
                    nodes_to_exclude=[layers[name] for name in sorted(kept & set(layers))],
                    extra_options={"MatMulConstBOnly": True, "WeightSymmetric": True},
                )
                made = read_onnx(target)
        finally:
            logging.disable(logging.NOTSET)
        found = [Layer(name=n, kind="float" if n in kept else "int8") for n in layers]
        if context.recipe.embeddings:
            found += [
                Layer(name=name, kind="int8-table", error=error)
                for name, error in quantize_tables(made, kept)
            ]
        drop_unused(made)
        return Quantized(model=made, layers=tuple(found))

    return make


def _layers(model: Any) -> dict[str, str]:
    """Return weight name -> node name of what can be quantized."""
    constants = {item.name for item in model.graph.initializer if len(item.dims) == 2}
    return {
        node.input[1]: node.name
        for node in model.graph.node
        if node.op_type in ("MatMul", "Attention", "Gemm") and node.input[1] in constants
    }
