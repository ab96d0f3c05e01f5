"""Full int8 for OpenVINO: every weighted product in integers, attention products in float.

The graph keeps its structure. Each activation that feeds weighted products gets a multiply and add
(fused by the plugin into the LayerNorm or GELU before it) and one per-tensor FakeQuantize; each
weight becomes an int8 constant with a scale per output channel; each large embedding table becomes
int8 with a scale per row. Attention scores and their softmax stay float: they are 2 % of the work
of a short text and the part that outliers hurt most.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from memopt.graphs.linears import openvino_linears
from memopt.graphs.observe import Array
from memopt.graphs.openvino import (
    constant_of,
    feed_from,
    folded,
    nodes_of,
    read_openvino,
    users_of,
)
from memopt.quantization.math.smooth import Smoothing
from memopt.quantization.method import Context, Layer, Make, Quantized, float_layer, kept_layers
from memopt.quantization.methods.static import (
    Rounded,
    StaticRecipe,
    int8_layer,
    round_layers,
    round_table,
    share_of_power,
)

# Tables below this many bytes stay float: token types are not worth a second Gather.
SMALLEST_TABLE = 1 << 18
# The plugin's fused attention kernel is slower on short texts than the nodes it replaces: 3.1 ms of
# 17.6 against 2.2 (32 x 14 tokens); without it MiniLM encodes 1.12x as many sentences a second.
SHORT = MappingProxyType({"INFERENCE_PRECISION_HINT": "f32", "SNIPPETS_MODE": "DISABLE"})
# On images (197 or 50 patches) and sounds (1,500 frames) that kernel is the faster one, and the
# attention it computes is what costs: in bf16, where the processor has it, Whisper-tiny takes 186
# instead of 267 ms for two sounds. What that does to the answers is part of the gate.
LONG = MappingProxyType({"INFERENCE_PRECISION_HINT": "bf16"})


def prepare(context: Context[StaticRecipe]) -> Make:
    """Calibrate an OpenVINO float model; return a function that builds int8 copies of it.

    Raises:
        QuantizationError: the graph has no weighted product.
        ConfigurationError: a pattern of ``recipe.keep_float`` matches no layer.
    """
    model = read_openvino(context.graph)
    linears = openvino_linears(model, context.name_of)
    patterns = kept_layers(context.recipe, linears, [name for name, _, _ in _tables(model)])
    plans, rounded = round_layers(context, linears)

    def make(keep: Collection[str]) -> Quantized:
        return _build(model, context, plans, rounded, patterns | set(keep))

    return make


def _build(
    model: Any,
    context: Context[StaticRecipe],
    plans: Mapping[str, Smoothing],
    rounded: Mapping[str, Rounded],
    kept: Collection[str],
) -> Quantized:
    copy = model.clone()
    layers: list[Layer] = []
    activations: dict[str, Any] = {}
    for linear in openvino_linears(copy, context.name_of):
        if linear.name in kept:
            layers.append(float_layer(linear))
            continue
        chosen = plans[linear.source]
        if linear.source not in activations:
            activations[linear.source] = _fake_quantize(linear.node.input_value(0), chosen)
        weight = rounded[linear.label]
        _replace(linear.node, activations[linear.source], weight)
        layers.append(int8_layer(linear, weight, chosen))
    if context.recipe.embeddings:
        layers += [_quantize_table(*table) for table in _tables(copy) if table[0] not in kept]
        layers += _store_constants(copy, kept)
    _fold_scalars(copy)
    copy.validate_nodes_and_infer_types()
    options = SHORT if context.bundle.manifest.modality == "text" else LONG
    return Quantized(model=copy, layers=tuple(layers), options=options)


def _tables(model: Any) -> list[tuple[str, Any, Any]]:
    """Return (name, Gather, constant) of every large float embedding table."""
    tables = []
    for node in nodes_of(model, "Gather"):
        constant = constant_of(node.input_value(0))
        if constant is None or len(constant.get_output_shape(0)) != 2:
            continue
        size = int(np.prod(constant.get_output_shape(0))) * 4
        is_float = constant.get_output_element_type(0).get_type_name() in ("f32", "f16", "bf16")
        if size >= SMALLEST_TABLE and is_float:
            label = constant.get_friendly_name()
            tables.append((label if "." in label else node.get_friendly_name(), node, constant))
    return tables


def _quantize_table(name: str, gather: Any, constant: Any) -> Layer:
    import openvino.opset13 as op

    values = np.array(constant.get_data(), np.float32)
    integers, scales = round_table(values)
    stored = op.constant(integers)
    stored.set_friendly_name(constant.get_friendly_name())
    # Scaled after the look-up: before it, the plugin would fold the table back to float32.
    index, axis = gather.input_value(1), gather.input_value(2)
    users = users_of(gather)
    rows = op.convert(op.gather(stored, index, axis), "f32")
    scaled = op.multiply(rows, op.gather(op.constant(scales), index, axis))
    scaled.set_friendly_name(gather.get_friendly_name())
    feed_from(users, scaled.output(0))
    error = share_of_power(integers * scales - values, values)
    return Layer(name=name, kind="int8-table", error=error)


def _store_constants(model: Any, kept: Collection[str]) -> list[Layer]:
    """Store convolution kernels and position tables as int8 with a scale per first axis.

    They are computed with in float: the plugin unfolds them once, when it compiles the graph.
    """
    import openvino.opset13 as op

    layers = []
    for node in nodes_of(model, "Constant"):
        if node.get_friendly_name() in kept:
            continue
        shape = list(node.get_output_shape(0))
        is_float = node.get_output_element_type(0).get_type_name() == "f32"
        if not is_float or len(shape) < 2 or int(np.prod(shape)) * 4 < SMALLEST_TABLE:
            continue
        users = users_of(node)
        if any(user.get_node().get_type_name() == "MatMul" for user in users):
            continue
        values = np.array(node.get_data(), np.float32)
        # A leading axis of one is a batch to broadcast over: the rows are behind it.
        axis = next((i for i, side in enumerate(shape) if side > 1), 0)
        rows = values.reshape(int(np.prod(shape[: axis + 1])), -1)
        integers, scales = round_table(rows)
        stored = op.constant(integers.reshape(shape))
        stored.set_friendly_name(f"{node.get_friendly_name()}/int8")
        spread = scales.reshape([*shape[: axis + 1], *[1] * (len(shape) - axis - 1)])
        whole = op.multiply(op.convert(stored, "f32"), op.constant(spread))
        feed_from(users, whole.output(0))
        error = share_of_power(integers * scales - rows, rows)
        layers.append(Layer(name=node.get_friendly_name(), kind="int8-stored", error=error))
    return layers


def _fake_quantize(source: Any, chosen: Smoothing) -> Any:
    import openvino.opset13 as op

    rank = source.get_partial_shape().rank.get_length()
    shape = [1] * (rank - 1) + [-1]
    value = source
    if np.any(chosen.divisor != 1):
        value = op.multiply(value, op.constant((1 / chosen.divisor).reshape(shape))).output(0)
    if np.any(chosen.low != 0):
        shift = (-chosen.low / chosen.divisor).astype(np.float32)
        value = op.add(value, op.constant(shift.reshape(shape))).output(0)
    edges = [op.constant(np.full([1] * rank, e * chosen.scale, np.float32)) for e in (0, 255)]
    node = op.fake_quantize(value, edges[0], edges[1], edges[0], edges[1], 256)
    node.set_friendly_name(f"{source.get_node().get_friendly_name()}/uint8")
    return node


def _replace(node: Any, activation: Any, rounded: Rounded) -> None:
    import openvino.opset13 as op

    stored = op.constant(rounded.integers)
    old = constant_of(node.input_value(1))
    stored.set_friendly_name(old.get_friendly_name())
    weight = op.multiply(op.convert(stored, "f32"), op.constant(rounded.scales[:, None]))
    product = op.matmul(activation, weight, False, True)
    product.set_friendly_name(node.get_friendly_name())
    users = users_of(node)
    bias = _bias_of(users)
    if bias is not None:
        add, place, value = bias
        moved = value + rounded.bias.reshape([1] * (value.ndim - 1) + [-1])
        add.input(place).replace_source_output(op.constant(moved.astype(np.float32)).output(0))
        users[0].replace_source_output(product.output(0))
        return
    rank = node.output(0).get_partial_shape().rank.get_length()
    added = op.add(product, op.constant(rounded.bias.reshape([1] * (rank - 1) + [-1])))
    feed_from(users, added.output(0))


def _bias_of(users: Sequence[Any]) -> tuple[Any, int, Array] | None:
    """Return (Add, input position of the bias, its value) when that is a product's only use."""
    if len(users) != 1 or users[0].get_node().get_type_name() != "Add":
        return None
    add, place = users[0].get_node(), 1 - users[0].get_index()
    constant = constant_of(add.input_value(place))
    if constant is None:
        return None
    value = folded(add.input_value(place))
    return add, place, value.reshape(1) if value.ndim == 0 else value


def _fold_scalars(model: Any) -> None:
    """Move a scalar factor behind a quantized product into its scales and bias.

    Converters scale queries and keys by 1/sqrt(sqrt(d)) in passes of their own (4 % of MiniLM).
    """
    for node in nodes_of(model, "Multiply"):
        for place in (0, 1):
            factor = constant_of(node.input_value(1 - place))
            if factor is None or int(np.prod(factor.get_output_shape(0))) != 1:
                continue
            product = _product_before(node.input_value(place))
            if product is not None:
                _multiply(*product, np.float32(np.asarray(factor.get_data()).reshape(-1)[0]))
                feed_from(users_of(node), node.input_value(place))
                break


def _multiply(add: Any, bias_place: int, scale: Any, value: np.float32) -> None:
    """Multiply what a quantized product with bias makes."""
    import openvino.opset13 as op

    scales = np.array(scale.input_value(1).get_node().get_data(), np.float32) * value
    scale.input(1).replace_source_output(op.constant(scales).output(0))
    bias = folded(add.input_value(bias_place)) * value
    add.input(bias_place).replace_source_output(op.constant(bias).output(0))


def _product_before(output: Any) -> tuple[Any, int, Any] | None:
    """Follow reshapes back to a quantized product with bias that has no other use."""
    while True:
        node = output.get_node()
        users = [t for t in output.get_target_inputs() if t.get_node().get_type_name() != "ShapeOf"]
        if len(users) != 1:
            return None
        if node.get_type_name() not in ("Reshape", "Transpose"):
            break
        output = node.input_value(0)
    if node.get_type_name() != "Add":
        return None
    for place in (0, 1):
        product = node.input_value(1 - place).get_node()
        if constant_of(node.input_value(place)) is None or product.get_type_name() != "MatMul":
            continue
        scale = product.input_value(1).get_node()
        alone = len(product.output(0).get_target_inputs()) == 1
        if (
            alone
            and scale.get_type_name() == "Multiply"
            and (scale.input_value(1).get_node().get_type_name() == "Constant")
        ):
            return node, place, scale
    return None
