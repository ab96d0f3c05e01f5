"""Static int8 for ONNX Runtime on a CPU: QDQ pairs placed so that every weighted product lowers.

Only the inputs of weighted products are quantized, not their outputs: ONNX Runtime then merges
DequantizeLinear x 2 -> MatMul into MatMulIntegerToFloat, an integer product with a float result.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import QuantizationError
from memopt.quantization.onnx_fold import fold_smoothing
from memopt.quantization.onnx_graph import (
    Linear,
    add_initializers,
    drop_unused,
    find_linears,
    find_tables,
    named,
    observer,
    quantize_tables,
    read_onnx,
    replace_node,
)
from memopt.quantization.recipe import match_layers
from memopt.quantization.static import (
    Context,
    Layer,
    Make,
    Quantized,
    Rounded,
    plan_activations,
    round_layer,
)

if TYPE_CHECKING:
    from memopt.quantization.smooth import Plan


def prepare(context: Context) -> Make:
    """Calibrate a portable ONNX graph; return a function that builds int8 copies of it.

    Raises:
        QuantizationError: the graph has no weighted product.
        ConfigurationError: a pattern of ``recipe.keep_float`` matches no layer.
    """
    model = read_onnx(context.graph)
    linears = find_linears(model)
    if not linears:
        raise QuantizationError("this graph has no matrix product with a constant weight")
    recipe = context.recipe
    names = [item.name for item in linears] + [name for name, _ in find_tables(model)]
    patterns = match_layers(recipe.keep_float, names)
    groups: dict[str, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(linear.source, []).append(linear)
    plans = plan_activations(
        {source: [item.weight for item in group] for source, group in groups.items()},
        observer(model, list(groups)),
        context.feeds,
        context.probes,
        recipe,
        seed=context.seed,
        step=context.step,
    )
    chosen = {source: plans[source][0] for source in groups}
    rounded: dict[str, Rounded] = {}
    for source, group in groups.items():
        context.step(f"rounding {group[0].name}")
        for linear in group:
            rounded[linear.node.name] = round_layer(linear.weight, *plans[source], recipe)

    def make(keep: Collection[str]) -> Quantized:
        return _build(context, chosen, rounded, patterns | set(keep))

    return make


def _build(
    context: Context, plans: Mapping[str, Plan], rounded: Mapping[str, Rounded], kept: set[str]
) -> Quantized:
    model = read_onnx(context.graph)
    layers: list[Layer] = []
    found = find_linears(model)
    # A layer that stays in float reads its activation as it is: nothing is folded beside it.
    float_sources = {linear.source for linear in found if linear.name in kept}
    free, rounded = fold_smoothing(
        model,
        [item for item in found if item.name not in kept and item.source not in float_sources],
        plans,
        rounded,
    )
    ready: set[str] = set()
    for linear in found:
        size = linear.weight.size
        if linear.name in kept:
            layers.append(Layer(name=linear.name, kind="float", macs=size))
            continue
        made, source = plans[linear.source], linear.source
        nodes = []
        if source not in ready:
            nodes = _activation(model, source, made, smoothed=source in free)
        ready.add(source)
        weight = rounded[linear.node.name]
        nodes += _product(model, linear, weight)
        replace_node(model, linear.node, nodes)
        layers.append(
            Layer(name=linear.name, kind="int8", error=weight.error, alpha=made.alpha, macs=size)
        )
    _fold_biases(model)
    if context.recipe.embeddings:
        layers += [
            Layer(name=name, kind="int8-table", error=error)
            for name, error in quantize_tables(model, kept)
        ]
    drop_unused(model)
    return Quantized(model=model, layers=tuple(layers))


def _activation(model: Any, source: str, made: Plan, *, smoothed: bool) -> list[Any]:
    """Return the nodes from a float activation to ``<source>/uint8_float``.

    ``smoothed`` says that the graph makes the activation shifted and divided already.
    """
    from onnx import helper

    add_initializers(
        model,
        {
            f"{source}/factor": (1 / made.divisor).astype(np.float32),
            f"{source}/shift": (-made.low / made.divisor).astype(np.float32),
            f"{source}/step": np.float32(made.scale),
            "memopt/zero_uint8": np.uint8(0),
        },
    )
    nodes = []
    value = source
    for operator, constant, needed in (
        ("Mul", "factor", bool(np.any(made.divisor != 1))),
        ("Add", "shift", bool(np.any(made.low != 0))),
    ):
        if needed and not smoothed:
            output = f"{source}/{constant}ed"
            nodes.append(helper.make_node(operator, [value, f"{source}/{constant}"], [output]))
            value = output
    scale = [f"{source}/step", "memopt/zero_uint8"]
    nodes += [
        helper.make_node("QuantizeLinear", [value, *scale], [f"{source}/uint8"]),
        helper.make_node(
            "DequantizeLinear", [f"{source}/uint8", *scale], [f"{source}/uint8_float"]
        ),
    ]
    return [named(node, node.output[0]) for node in nodes]


def _product(model: Any, linear: Linear, weight: Rounded) -> list[Any]:
    from onnx import helper

    name, node = linear.name, linear.node
    output = node.output[0]
    extra = weight.bias
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    add_initializers(
        model,
        {
            f"{name}_quantized": weight.integers.T,
            f"{name}_scale": weight.scales,
            f"{name}_zero": np.zeros(len(weight.scales), np.int8),
            f"{output}/bias": extra,
        },
    )
    weights = [f"{name}_quantized", f"{name}_scale", f"{name}_zero"]
    nodes = [
        helper.make_node("DequantizeLinear", weights, [f"{output}/weight"], axis=1),
        helper.make_node(
            "MatMul", [f"{linear.source}/uint8_float", f"{output}/weight"], [f"{output}/product"]
        ),
        helper.make_node(
            "Add", [f"{output}/product", f"{output}/bias"], [f"{output}/sum" if bias else output]
        ),
    ]
    if bias:
        nodes.append(helper.make_node("Add", [f"{output}/sum", bias], [output]))
    return [named(made, made.output[0]) for made in nodes]


def _fold_biases(model: Any) -> None:
    """Merge the Add of a new bias into the Add of the layer's own bias that follows it."""
    from onnx import numpy_helper

    constants = {item.name: item for item in model.graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {item.name for item in model.graph.output}
    for first in [
        n for n in model.graph.node if n.op_type == "Add" and n.input[1].endswith("/bias")
    ]:
        after = readers.get(first.output[0], [])
        if len(after) != 1 or after[0].op_type != "Add" or first.output[0] in outputs:
            continue
        second = after[0]
        place = 1 - list(second.input).index(first.output[0])
        own = constants.get(second.input[place])
        if own is None or len(own.dims) != 1:
            continue
        both = numpy_helper.to_array(own) + numpy_helper.to_array(constants[first.input[1]])
        constants[first.input[1]].CopyFrom(
            numpy_helper.from_array(both.astype(np.float32), first.input[1])
        )
        first.output[0] = second.output[0]
        model.graph.node.remove(second)
