"""Static int8 for ONNX Runtime on a CPU: QDQ pairs placed so that every weighted product lowers.

Only the inputs of weighted products are quantized, not their outputs: ONNX Runtime then merges
DequantizeLinear x 2 -> MatMul into MatMulIntegerToFloat, an integer product with a float result.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from memopt.graphs.ir import (
    constant,
    drop_unused,
    new_node,
    only_use,
    read_onnx,
    replace_node,
    set_constant,
    store,
    to_proto,
)
from memopt.graphs.linears import Linear, onnx_linears
from memopt.quantization.math.smooth import Smoothing
from memopt.quantization.method import Context, Layer, Make, Quantized, float_layer, kept_layers
from memopt.quantization.methods.fold import fold_smoothing
from memopt.quantization.methods.static import Rounded, StaticRecipe, int8_layer, round_layers
from memopt.quantization.methods.tables import find_tables, quantize_tables


def prepare(context: Context[StaticRecipe]) -> Make:
    """Calibrate a portable ONNX graph; return a function that builds int8 copies of it.

    Raises:
        QuantizationError: the graph has no weighted product.
        ConfigurationError: a pattern of ``recipe.keep_float`` matches no layer.
    """
    model = read_onnx(context.graph)
    linears = onnx_linears(model)
    patterns = kept_layers(context.recipe, linears, [name for name, _ in find_tables(model)])
    plans, rounded = round_layers(context, linears)

    def make(keep: Collection[str]) -> Quantized:
        return _build(context, plans, rounded, patterns | set(keep))

    return make


def _build(
    context: Context[StaticRecipe],
    plans: Mapping[str, Smoothing],
    rounded: Mapping[str, Rounded],
    kept: set[str],
) -> Quantized:
    model = read_onnx(context.graph)
    layers: list[Layer] = []
    linears = onnx_linears(model)
    # A layer that stays in float reads its activation as it is: nothing is folded beside it.
    float_sources = {linear.source for linear in linears if linear.name in kept}
    free, rounded = fold_smoothing(
        model,
        [item for item in linears if item.name not in kept and item.source not in float_sources],
        plans,
        rounded,
    )
    activations: dict[str, Any] = {}
    for linear in linears:
        if linear.name in kept:
            layers.append(float_layer(linear))
            continue
        plan, source = plans[linear.source], linear.source
        nodes = []
        if source not in activations:
            value = linear.node.inputs[0]
            nodes = _activation(model.graph, value, plan, smoothed=source in free)
            activations[source] = nodes[-1].outputs[0]
        weight = rounded[linear.label]
        nodes += _product(model.graph, linear, activations[source], weight)
        replace_node(model.graph, linear.node, nodes)
        layers.append(int8_layer(linear, weight, plan))
    _fold_biases(model.graph)
    if context.recipe.embeddings:
        layers += quantize_tables(model, kept)
    drop_unused(model)
    return Quantized(model=to_proto(model), layers=tuple(layers))


def _activation(graph: Any, value: Any, plan: Smoothing, *, smoothed: bool) -> list[Any]:
    """Return the nodes from a float activation to ``<source>/uint8_float``.

    ``smoothed`` says that the graph makes the activation shifted and divided already.
    """
    source, nodes = value.name, []
    for operator, word, array, idle in (
        ("Mul", "factor", 1 / plan.divisor, np.all(plan.divisor == 1)),
        ("Add", "shift", -plan.low / plan.divisor, np.all(plan.low == 0)),
    ):
        if not smoothed and not idle:
            number = store(graph, f"{source}/{word}", array.astype(np.float32))
            nodes.append(new_node(operator, [value, number], f"{source}/{word}ed"))
            value = nodes[-1].outputs[0]
    step = store(graph, f"{source}/step", np.float32(plan.scale))
    zero = store(graph, "memopt/zero_uint8", np.uint8(0))
    rounded = new_node("QuantizeLinear", [value, step, zero], f"{source}/uint8")
    back = [rounded.outputs[0], step, zero]
    return [*nodes, rounded, new_node("DequantizeLinear", back, f"{source}/uint8_float")]


def _product(graph: Any, linear: Linear, activation: Any, weight: Rounded) -> list[Any]:
    name, output = linear.name, linear.output
    stored = [
        store(graph, f"{name}_quantized", weight.integers.T),
        store(graph, f"{name}_scale", weight.scales),
        store(graph, f"{name}_zero", np.zeros(len(weight.scales), np.int8)),
    ]
    extra = store(graph, f"{output}/bias", weight.bias)
    bias = linear.bias
    matrix = new_node("DequantizeLinear", stored, f"{output}/weight", axis=1)
    product = new_node("MatMul", [activation, matrix.outputs[0]], f"{output}/product")
    total = f"{output}/sum" if bias is not None else output
    nodes = [matrix, product, new_node("Add", [product.outputs[0], extra], total)]
    if bias is not None:
        nodes.append(new_node("Add", [nodes[-1].outputs[0], bias], output))
    return nodes


def _fold_biases(graph: Any) -> None:
    """Merge the Add of a new bias into the Add of the layer's own bias that follows it."""
    import onnx_ir as ir

    for first in list(graph):
        gone = first.graph is None
        if gone or first.op_type != "Add" or not str(first.inputs[1].name).endswith("/bias"):
            continue
        second = only_use(first.outputs[0])
        if second is None or second.op_type != "Add":
            continue
        own = next((v for v in second.inputs if v is not first.outputs[0]), None)
        if own is None or not own.is_initializer() or len(own.shape) != 1:
            continue
        extra = first.inputs[1]
        both = np.asarray(constant(own)) + np.asarray(constant(extra))
        set_constant(extra, both.astype(np.float32))
        ir.convenience.replace_nodes_and_values(
            graph, first, [second], [], second.outputs, first.outputs
        )
