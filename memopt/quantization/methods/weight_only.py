"""Weight-only quantization for ONNX Runtime: MatMulNBits with 8, 4 or 2 bits.

MatMulNBits keeps a weight (out, in) as unsigned integers in blocks along ``in``, one scale and one
zero point a block, packed low bits first. Activations stay float in the graph. A table that is also
the last product's weight, as language models tie them, is one array for both:
GatherBlockQuantized reads the bytes that MatMulNBits multiplies with.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from memopt.graphs.blocks import Blocks, to_blocks
from memopt.graphs.ir import (
    MICROSOFT,
    drop_unused,
    new_node,
    read_onnx,
    replace_node,
    store,
    to_proto,
)
from memopt.graphs.linears import Linear, onnx_linears
from memopt.quantization.math.gptq import gptq_quantize, output_error
from memopt.quantization.math.hessians import Hessians
from memopt.quantization.math.kquant import k_quantize
from memopt.quantization.math.rounding import rtn_quantize
from memopt.quantization.method import (
    BITS,
    Context,
    Layer,
    Make,
    MethodRecipe,
    Quantized,
    float_layer,
    kept_layers,
    match_layers,
)
from memopt.quantization.methods.tables import (
    find_tables,
    quantize_tables,
    shared_rows,
    tied_table,
)
from memopt.weights.quantized import QuantizedWeight

# accuracy_level 4 lets the kernel round activations to int8 per block and multiply integers: on
# MiniLM 8 bits keep min cosine .998 and run about twice as fast as with float activations.
ACCURACY_LEVEL = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightOnlyRecipe(MethodRecipe):
    """Settings of method ``weight-only``."""

    target: Literal["auto", "cpu", "gpu"] = "auto"
    weight_type: Literal["int8", "int4", "int2"] = "int8"
    granularity: Literal["auto", "per-group"] = "auto"
    group_size: int = 0
    symmetric: bool = True
    algorithm: Literal["rtn", "k-quant", "gptq"] = "rtn"
    embeddings: bool = True
    keep_int8: tuple[str, ...] = ()


def prepare(context: Context[WeightOnlyRecipe]) -> Make:
    """Round every weight once; return a function that builds graphs with them.

    Raises:
        QuantizationError: no weighted product, or NaN in a weight (named).
        ConfigurationError: a pattern of ``recipe.keep_float`` matches no layer.
    """
    recipe = context.recipe
    model = read_onnx(context.graph)
    linears = onnx_linears(model)
    patterns = kept_layers(context.recipe, linears, [name for name, _ in find_tables(model)])
    rounding = [item for item in linears if item.name not in patterns]
    eight = match_layers(recipe.keep_int8, [item.name for item in linears])
    rounded: dict[str, tuple[QuantizedWeight, float]] = {}
    if recipe.algorithm == "gptq":
        widths = {item.source: item.shape[1] for item in rounding}
        hessians = Hessians(context.graph, widths, context.feeds, step=context.step)
        # Layers of one group after the other: each group is one pass over the inputs.
        for linear in sorted(rounding, key=lambda item: hessians.group_of(item.source)):
            hessian = hessians.of(linear.source)
            context.step(f"GPTQ {linear.name}")
            rounded[linear.label] = _round(linear, _widened(recipe, linear, eight), hessian)
    else:
        for linear in rounding:
            context.step(f"rounding {linear.name}")
            rounded[linear.label] = _round(linear, _widened(recipe, linear, eight), None)

    def make(keep: Collection[str]) -> Quantized:
        return _build(context, rounded, patterns | set(keep))

    return make


def _widened(recipe: WeightOnlyRecipe, linear: Linear, eight: Collection[str]) -> WeightOnlyRecipe:
    """Return the settings for one layer: of eight bits where it is to keep those."""
    return replace(recipe, weight_type="int8") if linear.name in eight else recipe


def _round(
    linear: Linear, recipe: WeightOnlyRecipe, hessian: NDArray[Any] | None
) -> tuple[QuantizedWeight, float]:
    """Return a rounded weight and its error: of the layer's output where its inputs are known."""
    weight = linear.weight
    options: dict[str, Any] = {
        "bits": BITS[recipe.weight_type],
        "group_size": recipe.group,
        "symmetric": recipe.symmetric,
        "name": linear.name,
    }
    if hessian is None:
        if recipe.algorithm == "k-quant":
            quantized = k_quantize(weight, **options)
        else:
            quantized = rtn_quantize(weight, axis=1, **options)
        # With inputs that do not depend on each other the output's error is the weight's.
        hessian = np.eye(weight.shape[1])
    else:
        quantized = gptq_quantize(weight, hessian, **options)
    return quantized, output_error(weight, quantized.dequantize(), hessian) ** 2


def _build(
    context: Context[WeightOnlyRecipe],
    rounded: Mapping[str, tuple[QuantizedWeight, float]],
    kept: set[str],
) -> Quantized:
    model = read_onnx(context.graph)
    model.graph.opset_imports.setdefault(MICROSOFT, 1)
    layers: list[Layer] = []
    for linear in onnx_linears(model):
        if linear.name in kept:
            layers.append(float_layer(linear))
            continue
        weight, error = rounded[linear.label]
        table = tied_table(linear) if context.recipe.embeddings else None
        blocks = to_blocks(weight, table=True) if table is not None else None
        if table is not None and blocks is not None:
            replace_node(model.graph, table, [shared_rows(model.graph, table, linear.name, blocks)])
        product = _product(model.graph, linear, weight, shared=blocks)
        replace_node(model.graph, linear.node, product)
        layers.append(
            Layer(name=linear.name, kind=f"int{weight.bits}", error=error, macs=linear.size)
        )
    drop_unused(model)  # a table's transpose too, so that the table has one reader left
    if context.recipe.embeddings:
        layers += quantize_tables(model, kept)
    drop_unused(model)
    return Quantized(model=to_proto(model), layers=tuple(layers))


def _product(
    graph: Any, linear: Linear, weight: QuantizedWeight, *, shared: Blocks | None
) -> list[Any]:
    """Return the nodes of a product; of a table that is ``shared`` its rows are cut into blocks."""
    blocks = shared or to_blocks(weight)
    assert blocks is not None, "a recipe takes only group sizes that are blocks"
    name, output = linear.name, linear.output
    nodes = []
    if shared is None:
        packed = store(graph, f"{name}_packed", blocks.packed())
    else:
        # A constant of constants: ONNX Runtime computes it once, and packs what comes out.
        cut = np.array([*blocks.scales.shape, -1], np.int64)
        parts = [graph.initializers[f"{name}_packed"], store(graph, f"{name}_blocks", cut)]
        nodes = [new_node("Reshape", parts, f"{name}_cut", name=f"quantized/{name}/cut")]
        packed = nodes[0].outputs[0]
    inputs = [
        linear.node.inputs[0],
        packed,
        store(graph, f"{name}_scale", blocks.scales),
    ]
    if blocks.points is not None:
        inputs.append(store(graph, f"{name}_zero", blocks.packed_points()))
    label = f"{output}/product" if linear.bias is not None else output
    options = blocks.matmul_attributes(ACCURACY_LEVEL)
    product = new_node("MatMulNBits", inputs, label, domain=MICROSOFT, **options)
    if linear.bias is None:
        return [*nodes, product]
    names = {"name": f"quantized/{output}/bias"}
    product.name = f"quantized/{output}"
    return [*nodes, product, new_node("Add", [product.outputs[0], linear.bias], output, **names)]
