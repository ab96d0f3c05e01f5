"""Weight-only quantization for ONNX Runtime: MatMulNBits with 8, 4 or 2 bits.

MatMulNBits keeps a weight (out, in) as unsigned integers in blocks along ``in``, one scale and one
zero point a block, packed low bits first. Activations stay float in the graph. A table that is also
the last product's weight, as language models tie them, is one array for both:
GatherBlockQuantized reads the bytes that MatMulNBits multiplies with. Algorithm ``stored`` rounds
nothing: it takes the integers that a GGUF file came with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from memopt.errors import ConfigurationError
from memopt.graphs.block_product import block_product, block_rows
from memopt.graphs.blocks import Blocks, to_blocks
from memopt.graphs.ir import (
    MICROSOFT,
    drop_unused,
    new_node,
    read_onnx,
    replace_node,
    replace_nodes,
    split_node,
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
from memopt.quantization.methods.static import share_of_power
from memopt.quantization.methods.tables import (
    find_tables,
    quantize_tables,
    tied_table,
)
from memopt.weights.convert import GGUF_WEIGHTS
from memopt.weights.quantized import QuantizedWeight, stacked
from memopt.weights.reader import WeightLoader
from memopt.weights.schema import QUANT_BITS

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
    algorithm: Literal["rtn", "k-quant", "gptq", "stored"] = "rtn"
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
    if recipe.algorithm == "stored":
        rounded = _stored(context, rounding)
        patterns |= {item.name for item in rounding if item.label not in rounded}
    elif recipe.algorithm == "gptq":
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


def _stored(
    context: Context[WeightOnlyRecipe], linears: Sequence[Linear]
) -> dict[str, tuple[QuantizedWeight, float]]:
    """Return the integers that the model came with; what it has in float is left out.

    Raises:
        ConfigurationError: it came without, or most of them are of another width.
    """
    file, found = context.bundle.path / GGUF_WEIGHTS, {}
    if not file.is_file():
        raise ConfigurationError(
            f"{context.bundle.path} has no integers of its own: it was not made of a GGUF file",
            fix="use algorithm rtn, k-quant or gptq",
        )
    with WeightLoader(file) as loader:
        for linear in linears:
            if linear.name in loader and loader.info(linear.name).quant_type in QUANT_BITS:
                weight = loader.load_quantized(linear.name)
                exact = linear.weight
                found[linear.label] = weight, share_of_power(weight.dequantize() - exact, exact)
    sizes: Counter[str] = Counter()
    for weight, _ in found.values():
        sizes[f"int{weight.bits}"] += weight.integers.size
    most = sizes.most_common(1)[0][0] if sizes else "no layer in integers"
    if most != context.recipe.weight_type:
        raise ConfigurationError(
            f"{file.name} holds {most}, not {context.recipe.weight_type}",
            fix=f"use --weight-type {most}" if sizes else "use algorithm rtn, k-quant or gptq",
        )
    return found


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
    together: dict[Any, list[Linear]] = {}
    for linear in onnx_linears(model):
        if linear.name in kept:
            layers.append(float_layer(linear))
            continue
        weight, error = rounded[linear.label]
        table = tied_table(linear) if context.recipe.embeddings else None
        blocks = to_blocks(weight, table=True) if table is not None else None
        if table is not None and blocks is not None:
            ids, output = table.inputs[1], table.outputs[0].name
            rows = block_rows(model.graph, ids, linear.name, blocks, output)
            replace_node(model.graph, table, rows)
        if table is None and linear.bias is None:
            counts = len(weight.zero_points), len(weight.minima)
            alike = (linear.source, weight.bits, *(count > 0 for count in counts))
            together.setdefault(alike, []).append(linear)
        else:
            product = _product(model.graph, linear, blocks or to_blocks(weight))
            replace_node(model.graph, linear.node, product)
        layers.append(
            Layer(name=linear.name, kind=f"int{weight.bits}", error=error, macs=linear.size)
        )
    for linears in together.values():
        _multiply(model.graph, linears, [rounded[linear.label][0] for linear in linears])
    drop_unused(model)  # a table's transpose too, so that the table has one reader left
    if context.recipe.embeddings:
        layers += quantize_tables(model, kept)
    drop_unused(model)
    return Quantized(model=to_proto(model), layers=tuple(layers))


def _multiply(graph: Any, linears: Sequence[Linear], weights: Sequence[QuantizedWeight]) -> None:
    """Replace products of one input by one product, cut into theirs: fewer and larger operators.

    Each row of a weight is multiplied as it was: the numbers stay the same.
    """
    nodes, blocks = [linear.node for linear in linears], to_blocks(stacked(weights))
    if len(linears) == 1:
        replace_node(graph, nodes[0], _product(graph, linears[0], blocks))
        return
    assert blocks is not None, "a recipe takes only group sizes that are blocks"
    name, output = "+".join(linear.name for linear in linears), f"{linears[0].output}/joined"
    source = nodes[0].inputs[0]
    made = block_product(graph, source, name, blocks, output, ACCURACY_LEVEL)
    cut = split_node(graph, made[-1].outputs[0], [linear.shape[0] for linear in linears])
    replace_nodes(graph, nodes, [*made, cut])


def _product(graph: Any, linear: Linear, blocks: Blocks | None) -> list[Any]:
    """Return the nodes of a product, and of its bias."""
    assert blocks is not None, "a recipe takes only group sizes that are blocks"
    output = linear.output
    label = f"{output}/product" if linear.bias is not None else output
    source = linear.node.inputs[0]
    nodes = block_product(graph, source, linear.name, blocks, label, ACCURACY_LEVEL)
    if linear.bias is None:
        return nodes
    names = {"name": f"quantized/{output}/bias"}
    nodes[-1].name = f"quantized/{output}"
    return [*nodes, new_node("Add", [nodes[-1].outputs[0], linear.bias], output, **names)]
