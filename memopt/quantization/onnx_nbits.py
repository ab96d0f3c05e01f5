"""Weight-only quantization for ONNX Runtime: MatMulNBits with 8, 4 or 2 bits, RTN or GPTQ.

MatMulNBits keeps a weight (out, in) as unsigned integers in blocks along ``in``, one scale and one
zero point a block, packed low bits first. Activations stay float in the graph.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import QuantizationError
from memopt.quantization.gptq import HessianAccumulator, gptq_quantize, output_error
from memopt.quantization.onnx_graph import (
    Linear,
    add_domain,
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
from memopt.quantization.recipe import Recipe, match_layers
from memopt.quantization.rounding import rtn_quantize
from memopt.quantization.static import Context, Layer, Make, Quantized
from memopt.quantization.statistics import valid_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memopt.weights.quantized import QuantizedWeight

_BITS = {"int8": 8, "int4": 4, "int2": 2}
# accuracy_level 4 lets the kernel round activations to int8 per block and multiply integers: on
# MiniLM 8 bits keep min cosine .998 and run about twice as fast as with float activations.
ACCURACY_LEVEL = 4
# Memory for Hessians of one pass over the data; more layers take more passes.
HESSIAN_BYTES = 512 << 20


def prepare(context: Context) -> Make:
    """Round every weight once; return a function that builds graphs with them.

    Raises:
        QuantizationError: no weighted product, or NaN in a weight (named).
        ConfigurationError: a pattern of ``recipe.keep_float`` matches no layer.
    """
    recipe = context.recipe
    model = read_onnx(context.graph)
    linears = find_linears(model)
    if not linears:
        raise QuantizationError("this graph has no matrix product with a constant weight")
    names = [item.name for item in linears] + [name for name, _ in find_tables(model)]
    patterns = match_layers(recipe.keep_float, names)
    rounded: dict[str, tuple[QuantizedWeight, float]] = {}
    if recipe.algorithm == "gptq":
        wanted = [item for item in linears if item.name not in patterns]
        for batch in _batches(wanted):
            hessians = _hessians(context, model, batch)
            for linear in batch:
                context.step(f"GPTQ {linear.name}")
                rounded[linear.node.name] = _round(linear, recipe, hessians[linear.source])
    else:
        for linear in linears:
            context.step(f"rounding {linear.name}")
            if linear.name not in patterns:
                rounded[linear.node.name] = _round(linear, recipe, None)

    def make(keep: Collection[str]) -> Quantized:
        return _build(context, rounded, patterns | set(keep))

    return make


def pack_blocks(integers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack unsigned integers (..., count) low bits first into (..., ceil(count * bits / 8)) bytes.

    >>> pack_blocks(np.array([[1, 2, 3]], np.uint8), 4).tolist()
    [[33, 3]]
    """
    per_byte = 8 // bits
    count = integers.shape[-1]
    padding = [(0, 0)] * (integers.ndim - 1) + [(0, -count % per_byte)]
    padded = np.pad(integers, padding).reshape(*integers.shape[:-1], -1, per_byte)
    shifts = (np.arange(per_byte) * bits).astype(np.uint8)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(padded << shifts, axis=-1).astype(np.uint8)
    return packed


def _round(
    linear: Linear, recipe: Recipe, hessian: NDArray[Any] | None
) -> tuple[QuantizedWeight, float]:
    """Return a rounded weight and its error: of the layer's output where its inputs are known."""
    bits = _BITS[recipe.weight_type]
    options: dict[str, Any] = {
        "bits": bits,
        "group_size": recipe.group,
        "symmetric": recipe.symmetric,
        "name": linear.name,
    }
    if hessian is None:
        made = rtn_quantize(linear.weight, axis=1, **options)
        # With inputs that do not depend on each other the output's error is the weight's.
        hessian = np.eye(linear.weight.shape[1])
    else:
        made = gptq_quantize(linear.weight, hessian, **options)
    return made, output_error(linear.weight, made.dequantize(), hessian) ** 2


def _batches(linears: Sequence[Linear]) -> list[list[Linear]]:
    """Cut layers into runs whose Hessians fit in memory; layers of one input stay together."""
    batches: list[list[Linear]] = []
    seen: set[str] = set()
    room = 0
    for linear in linears:
        size = linear.weight.shape[1] ** 2 * 8
        if linear.source not in seen:
            if not batches or size > room:
                batches.append([])
                room = HESSIAN_BYTES
            room -= size
            seen.add(linear.source)
            batches[-1].append(linear)
        else:
            home = next(b for b in batches if any(x.source == linear.source for x in b))
            home.append(linear)
    return batches


def _hessians(
    context: Context, model: Any, linears: Sequence[Linear]
) -> Mapping[str, NDArray[np.float64]]:
    sources = list(dict.fromkeys(item.source for item in linears))
    widths = {item.source: item.weight.shape[1] for item in linears}
    context.step(f"Hessians of {len(sources)} activations")
    sums = {source: HessianAccumulator(widths[source]) for source in sources}
    run = observer(model, sources)
    for feed in context.feeds():
        for source, values in zip(sources, run(feed), strict=True):
            sums[source].add(valid_rows(values, feed))
    return {source: accumulated.hessian for source, accumulated in sums.items()}


def _build(
    context: Context, rounded: Mapping[str, tuple[QuantizedWeight, float]], kept: set[str]
) -> Quantized:
    model = read_onnx(context.graph)
    add_domain(model, "com.microsoft")
    layers: list[Layer] = []
    for linear in find_linears(model):
        size = linear.weight.size
        if linear.name in kept:
            layers.append(Layer(name=linear.name, kind="float", macs=size))
            continue
        weight, error = rounded[linear.node.name]
        replace_node(model, linear.node, _product(model, linear, weight))
        layers.append(
            Layer(name=linear.name, kind=context.recipe.weight_type, error=error, macs=size)
        )
    if context.recipe.embeddings:
        layers += [
            Layer(name=name, kind="int8-table", error=error)
            for name, error in quantize_tables(model, kept)
        ]
    drop_unused(model)
    return Quantized(model=model, layers=tuple(layers))


def _product(model: Any, linear: Linear, weight: QuantizedWeight) -> list[Any]:
    from onnx import helper

    rows, columns = linear.weight.shape
    bits, size = weight.bits, weight.group_size
    middle = 1 << (bits - 1)
    blocks = -(-columns // size)
    points = np.full((rows, blocks), middle, np.int16)
    if weight.zero_points.size:
        points += weight.zero_points
    unsigned = weight.integers.astype(np.int16) + middle
    # The last block of a row that does not fill it holds zeros: its own zero point.
    padded = np.repeat(points, size, axis=1)
    padded[:, :columns] = unsigned
    stored = padded.reshape(rows, blocks, size).astype(np.uint8)
    name, node = linear.name, linear.node
    arrays = {
        f"{name}_packed": pack_blocks(stored, bits),
        f"{name}_scale": weight.scales.astype(np.float32).reshape(rows, blocks),
    }
    if weight.zero_points.size:
        arrays[f"{name}_zero"] = pack_blocks(points.astype(np.uint8), bits)
    add_initializers(model, arrays)
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    output = node.output[0]
    product = helper.make_node(
        "MatMulNBits",
        [linear.source, *arrays],
        [f"{output}/product" if bias else output],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=bits,
        block_size=size,
        accuracy_level=ACCURACY_LEVEL,
    )
    nodes = [named(product, output)]
    if bias:
        added = helper.make_node("Add", [f"{output}/product", bias], [output])
        nodes.append(named(added, f"{output}/bias"))
    return nodes
