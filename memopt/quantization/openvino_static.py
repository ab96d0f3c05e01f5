"""Full int8 for OpenVINO: every weighted product in integers, attention products in float.

The graph keeps its structure. Each activation that feeds weighted products gets a multiply and add
(fused by the plugin into the LayerNorm or GELU before it) and one per-tensor FakeQuantize; each
weight becomes an int8 constant with a scale per output channel; each large embedding table becomes
int8 with a scale per row. Attention scores and their softmax stay float: they are 2 % of the work
of a short text and the part that outliers hurt most.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import QuantizationError
from memopt.extras import require
from memopt.quantization.graph_runner import THREADS
from memopt.quantization.recipe import match_layers
from memopt.quantization.static import (
    Context,
    Layer,
    Make,
    Quantized,
    Rounded,
    plan_activations,
    round_layer,
    round_table,
)

if TYPE_CHECKING:
    from memopt.quantization.smooth import Plan
    from memopt.quantization.statistics import Array, Feed, Observe, Observed

# Between a constant and its use: what a converter puts there and constant folding removes.
_PASSIVE = frozenset({"Convert", "Transpose", "Reshape", "Unsqueeze", "Squeeze"})
# Tables below this many bytes stay float: token types are not worth a second Gather.
SMALLEST_TABLE = 1 << 18
# The plugin's fused attention kernel is slower on short texts than the nodes it replaces: 3.1 ms of
# 17.6 against 2.2 (32 x 14 tokens); without it MiniLM encodes 1.12x as many sentences a second.
SHORT = MappingProxyType({"INFERENCE_PRECISION_HINT": "f32", "SNIPPETS_MODE": "DISABLE"})
# On images (197 or 50 patches) and sounds (1,500 frames) that kernel is the faster one, and the
# attention it computes is what costs: in bf16, where the processor has it, Whisper-tiny takes 186
# instead of 267 ms for two sounds. What that does to the answers is part of the gate.
LONG = MappingProxyType({"INFERENCE_PRECISION_HINT": "bf16"})
_FLOAT = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": THREADS}


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix product with a constant weight (out, in)."""

    name: str
    node: Any
    weight: Array

    @property
    def source(self) -> str:
        """The activation it multiplies, as one string."""
        output = self.node.input_value(0)
        return f"{output.get_node().get_friendly_name()}:{output.get_index()}"


def find_linears(model: Any, name_of: Callable[[Array], str | None]) -> list[Linear]:
    """Return the products of an OpenVINO model whose right side is a constant matrix, in order.

    A layer is named after its weight in the checkpoint where ``name_of`` knows it, else after its
    node.
    """
    found = []
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        constant = _constant(node.input_value(1))
        if constant is None or len(constant.get_output_shape(0)) != 2:
            continue
        weight = _folded(node.input_value(1))
        if not node.get_attributes()["transpose_b"]:
            weight = weight.T
        values = np.ascontiguousarray(weight, np.float32)
        found.append(Linear(name_of(values) or node.get_friendly_name(), node, values))
    return found


def prepare(context: Context) -> Make:
    """Calibrate an OpenVINO float model; return a function that builds int8 copies of it.

    Raises:
        QuantizationError: the graph has no weighted product.
        ConfigurationError: a pattern of ``recipe.keep_float`` matches no layer.
    """
    recipe = context.recipe
    model = read_openvino(context.graph)
    linears = find_linears(model, context.name_of)
    tables = _tables(model)
    if not linears:
        raise QuantizationError("this graph has no matrix product with a constant weight")
    patterns = match_layers(
        recipe.keep_float, [item.name for item in linears] + [name for name, _, _ in tables]
    )
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
    rounded: dict[str, Rounded] = {}
    for source, group in groups.items():
        context.step(f"rounding {group[0].name}")
        for linear in group:
            rounded[linear.name] = round_layer(linear.weight, *plans[source], recipe)

    def make(keep: Collection[str]) -> Quantized:
        return _build(model, context, plans, rounded, patterns | set(keep))

    return make


def read_openvino(path: Path) -> Any:
    """Return the ``openvino.Model`` of a file."""
    return (
        require("openvino", extra="openvino", why="quantize for OpenVINO").Core().read_model(path)
    )


def _build(
    model: Any,
    context: Context,
    plans: Mapping[str, tuple[Plan, Observed]],
    rounded: Mapping[str, Rounded],
    kept: Collection[str],
) -> Quantized:
    made = model.clone()
    layers: list[Layer] = []
    activations: dict[str, Any] = {}
    for linear in find_linears(made, context.name_of):
        size = linear.weight.size
        if linear.name in kept:
            layers.append(Layer(name=linear.name, kind="float", macs=size))
            continue
        chosen = plans[linear.source][0]
        if linear.source not in activations:
            activations[linear.source] = _fake_quantize(linear.node.input_value(0), chosen)
        weight = rounded[linear.name]
        _replace(linear.node, activations[linear.source], weight)
        layers.append(
            Layer(name=linear.name, kind="int8", error=weight.error, alpha=chosen.alpha, macs=size)
        )
    if context.recipe.embeddings:
        layers += [_quantize_table(*table) for table in _tables(made) if table[0] not in kept]
        layers += _store_constants(made, kept)
    _fold_scalars(made)
    made.validate_nodes_and_infer_types()
    options = SHORT if context.bundle.manifest.modality == "text" else LONG
    return Quantized(model=made, layers=tuple(layers), options=options)


def observer(model: Any, sources: Sequence[str]) -> Observe:
    """Return a function that runs the graph in float32 and returns the values ``node:port``."""
    ov = require("openvino", extra="openvino", why="calibrate an OpenVINO model")
    watched = model.clone()
    ports = {}
    for node in watched.get_ordered_ops():
        for index, port in enumerate(node.outputs()):
            ports[f"{node.get_friendly_name()}:{index}"] = port
    before = len(watched.outputs)
    watched.add_outputs([ports[source] for source in sources])
    compiled = ov.Core().compile_model(watched, "CPU", _FLOAT)
    wanted = {name for port in compiled.inputs for name in port.get_names()}
    # One activation may be a result already; ask by position, which add_outputs keeps.
    places = range(before, len(watched.outputs))
    if len(places) != len(sources):
        raise QuantizationError("an activation could not be observed", fix="report this graph")

    def run(feed: Feed) -> list[Any]:
        results = compiled({key: value for key, value in feed.items() if key in wanted})
        return [results[place] for place in places]

    return run


def _constant(output: Any) -> Any:
    node = output.get_node()
    while node.get_type_name() in _PASSIVE:
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def _folded(output: Any) -> Array:
    """Return the value of a constant behind converts, transposes and reshapes."""
    node = output.get_node()
    if node.get_type_name() == "Constant":
        return np.array(node.get_data(), np.float32)
    value = _folded(node.input_value(0))
    if node.get_type_name() == "Transpose":
        order = node.input_value(1).get_node().get_data()
        return value.transpose([int(axis) for axis in order])
    return value.reshape(list(node.output(0).get_shape()))


def _tables(model: Any) -> list[tuple[str, Any, Any]]:
    """Return (name, Gather, constant) of every large float embedding table."""
    found = []
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Gather":
            continue
        constant = _constant(node.input_value(0))
        if constant is None or len(constant.get_output_shape(0)) != 2:
            continue
        size = int(np.prod(constant.get_output_shape(0))) * 4
        is_float = constant.get_output_element_type(0).get_type_name() in ("f32", "f16", "bf16")
        if size >= SMALLEST_TABLE and is_float:
            label = constant.get_friendly_name()
            found.append((label if "." in label else node.get_friendly_name(), node, constant))
    return found


def _quantize_table(name: str, gather: Any, constant: Any) -> Layer:
    import openvino.opset13 as op

    values = np.array(constant.get_data(), np.float32)
    integers, scales = round_table(values)
    stored = op.constant(integers)
    stored.set_friendly_name(constant.get_friendly_name())
    # Scaled after the look-up: before it, the plugin would fold the table back to float32.
    index, axis = gather.input_value(1), gather.input_value(2)
    users = list(gather.output(0).get_target_inputs())
    rows = op.convert(op.gather(stored, index, axis), "f32")
    scaled = op.multiply(rows, op.gather(op.constant(scales), index, axis))
    scaled.set_friendly_name(gather.get_friendly_name())
    for user in users:
        user.replace_source_output(scaled.output(0))
    error = float(((integers * scales - values) ** 2).sum() / max(float((values**2).sum()), 1e-12))
    return Layer(name=name, kind="int8-table", error=error)


def _store_constants(model: Any, kept: Collection[str]) -> list[Layer]:
    """Store convolution kernels and position tables as int8 with a scale per first axis.

    They are computed with in float: the plugin unfolds them once, when it compiles the graph.
    """
    import openvino.opset13 as op

    layers = []
    for node in list(model.get_ordered_ops()):
        if node.get_type_name() != "Constant" or node.get_friendly_name() in kept:
            continue
        shape = list(node.get_output_shape(0))
        is_float = node.get_output_element_type(0).get_type_name() == "f32"
        if not is_float or len(shape) < 2 or int(np.prod(shape)) * 4 < SMALLEST_TABLE:
            continue
        users = list(node.output(0).get_target_inputs())
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
        for user in users:
            user.replace_source_output(whole.output(0))
        power = max(float((rows**2).sum()), 1e-12)
        error = float(((integers * scales - rows) ** 2).sum()) / power
        layers.append(Layer(name=node.get_friendly_name(), kind="int8-stored", error=error))
    return layers


def _fake_quantize(source: Any, chosen: Plan) -> Any:
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
    made = op.fake_quantize(value, edges[0], edges[1], edges[0], edges[1], 256)
    made.set_friendly_name(f"{source.get_node().get_friendly_name()}/uint8")
    return made


def _replace(node: Any, activation: Any, rounded: Rounded) -> None:
    import openvino.opset13 as op

    stored = op.constant(rounded.integers)
    old = _constant(node.input_value(1))
    stored.set_friendly_name(old.get_friendly_name())
    weight = op.multiply(op.convert(stored, "f32"), op.constant(rounded.scales[:, None]))
    product = op.matmul(activation, weight, False, True)
    product.set_friendly_name(node.get_friendly_name())
    users = list(node.output(0).get_target_inputs())
    bias = _bias_of(users)
    if bias is not None:
        add, place, value = bias
        moved = value + rounded.bias.reshape([1] * (value.ndim - 1) + [-1])
        add.input(place).replace_source_output(op.constant(moved.astype(np.float32)).output(0))
        users[0].replace_source_output(product.output(0))
        return
    rank = node.output(0).get_partial_shape().rank.get_length()
    added = op.add(product, op.constant(rounded.bias.reshape([1] * (rank - 1) + [-1])))
    for user in users:
        user.replace_source_output(added.output(0))


def _bias_of(users: Sequence[Any]) -> tuple[Any, int, Array] | None:
    """Return (Add, input position of the bias, its value) when that is a product's only use."""
    if len(users) != 1 or users[0].get_node().get_type_name() != "Add":
        return None
    add, place = users[0].get_node(), 1 - users[0].get_index()
    constant = _constant(add.input_value(place))
    if constant is None:
        return None
    value = _folded(add.input_value(place))
    return add, place, value.reshape(1) if value.ndim == 0 else value


def _fold_scalars(model: Any) -> int:
    """Move a scalar factor behind a quantized product into its scales and bias; return how many.

    Converters scale queries and keys by 1/sqrt(sqrt(d)) in passes of their own (4 % of MiniLM).
    """
    import openvino.opset13 as op

    folded = 0
    for node in list(model.get_ordered_ops()):
        if node.get_type_name() != "Multiply":
            continue
        for place in (0, 1):
            factor = _constant(node.input_value(1 - place))
            if factor is None or int(np.prod(factor.get_output_shape(0))) != 1:
                continue
            found = _product_before(node.input_value(place))
            if found is None:
                continue
            add, bias_place, scale = found
            value = np.float32(np.asarray(factor.get_data()).reshape(-1)[0])
            scales = np.array(scale.input_value(1).get_node().get_data(), np.float32) * value
            scale.input(1).replace_source_output(op.constant(scales).output(0))
            bias = _folded(add.input_value(bias_place)) * value
            add.input(bias_place).replace_source_output(op.constant(bias).output(0))
            before = node.input_value(place)
            for user in list(node.output(0).get_target_inputs()):
                user.replace_source_output(before)
            folded += 1
            break
    return folded


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
        if _constant(node.input_value(place)) is None or product.get_type_name() != "MatMul":
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


def integer_share(path: Path, feed: Feed, options: Mapping[str, str]) -> dict[str, Any]:
    """Compile a graph for one input shape; return the share of its work that runs in integers.

    Returns:
        ``int8_macs`` in [0, 1], read from the kernels of the compiled graph, and ``kernels``: how
        often each multiplying kernel is in it.
    """
    ov = require("openvino", extra="openvino", why="read a compiled graph")
    model = read_openvino(path)
    shapes = {
        port: list(feed[name].shape)
        for port in model.inputs
        for name in port.get_names()
        if name in feed
    }
    model.reshape(shapes)
    whole = sum(_macs(node) for node in model.get_ordered_ops())
    compiled = ov.Core().compile_model(model, "CPU", dict(options))
    kernels: dict[str, int] = {}
    integer = 0
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {key: value.astype(str) for key, value in node.get_rt_info().items()}
        kind, kernel = info.get("layerType", ""), info.get("primitiveType", "")
        if not kind.startswith(("FullyConnected", "MatMul", "Convolution")):
            continue
        label = f"{kind} {kernel}"
        kernels[label] = kernels.get(label, 0) + 1
        if kernel.lower().endswith(("_i8", "_u8")):
            integer += _executed_macs(kind, node)
    return {
        "int8_macs": integer / whole if whole else 0.0,
        "kernels": dict(sorted(kernels.items())),
    }


def _executed_macs(kind: str, node: Any) -> int:
    """Return the multiply-accumulates of a node of a compiled graph."""
    output = int(np.prod(list(node.output(0).get_shape())))
    left, right = (list(node.input(place).get_shape()) for place in (0, 1))
    return output * int(np.prod(right[1:])) if kind.startswith("Conv") else output * int(left[-1])


def _macs(node: Any) -> int:
    """Return the multiply-accumulates of a node of static shape."""
    kind = node.get_type_name()
    if kind not in ("MatMul", "Convolution", "GroupConvolution", "ScaledDotProductAttention"):
        return 0
    output = int(np.prod(list(node.output(0).get_shape())))
    left, right = (list(node.input(place).get_shape()) for place in (0, 1))
    if kind == "MatMul":
        return output * int(left[-2] if node.get_attributes()["transpose_a"] else left[-1])
    if kind == "ScaledDotProductAttention":
        return 2 * output * int(right[-2])
    kernel = right[2:] if kind == "GroupConvolution" else right[1:]
    return output * int(np.prod(kernel))
