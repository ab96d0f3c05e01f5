"""Products with a quantized matrix, and its rows, by ONNX Runtime's packed operators."""

from __future__ import annotations

from typing import Any

import numpy as np

from memopt.graphs.blocks import Blocks
from memopt.graphs.ir import MICROSOFT, new_node, store


def block_product(
    graph: Any,
    source: Any,
    name: str,
    blocks: Blocks,
    output: str,
    accuracy_level: int = 0,
) -> list[Any]:
    """Return nodes, not in the graph yet, that compute ``source @ weight.T`` into ``output``.

    MatMulNBits has only whole zero points; minima are exact as a product of the sums that blocks
    of inputs have. Products of one input share its sums; rows and a product of one table its bytes.

    Args:
        graph: gets the constants.
        source: the value that is multiplied, (..., width).
        name: of the weight; its constants are named after it.
        blocks: the weight.
        output: the name of what comes out, (..., rows).
        accuracy_level: 0 computes in float32, 4 rounds inputs to int8.
    """
    packed, nodes = store(graph, f"{name}_packed", blocks.packed()), []
    if len(packed.shape) == 2:
        # A constant of constants: ONNX Runtime computes it once, and packs what comes out.
        cut = store(graph, f"{name}_blocks", np.array([*blocks.scales.shape, -1], np.int64))
        nodes = [new_node("Reshape", [packed, cut], f"{output}_cut")]
        packed = nodes[0].outputs[0]
    inputs = [source, packed, *_steps(graph, name, blocks)]
    options = {"domain": MICROSOFT, **blocks.matmul_attributes(accuracy_level)}
    if blocks.minima is None:
        return [*nodes, new_node("MatMulNBits", inputs, output, **options)]
    product = new_node("MatMulNBits", inputs, f"{output}_scaled", **options)
    nodes, summed = [*nodes, product], f"{source.name}_sums_{blocks.size}"
    direct = [value for use in source.uses() for value in use.node.outputs]
    behind = [value for part in direct for use in part.uses() for value in use.node.outputs]
    sums = next((value for value in (*direct, *behind) if value.name == summed), None)
    if sums is None:
        adding = _add_up(graph, source, blocks, summed)
        nodes += adding
        sums = adding[-1].outputs[0]
    minima = new_node("Transpose", [_minima(graph, name, blocks)], f"{output}_minima", perm=[1, 0])
    raised = new_node("MatMul", [sums, minima.outputs[0]], f"{output}_minimum")
    total = new_node("Add", [product.outputs[0], raised.outputs[0]], output)
    return [*nodes, minima, raised, total]


def block_rows(graph: Any, ids: Any, name: str, blocks: Blocks, output: str) -> list[Any]:
    """Return nodes, not in the graph yet, that take the rows ``ids`` (...) out of a table."""
    packed = store(graph, f"{name}_packed", blocks.packed(whole_blocks=False))
    options = {"block_size": blocks.size, "bits": blocks.bits, "domain": MICROSOFT}
    options |= {"gather_axis": 0, "quantize_axis": 1}
    inputs = [packed, ids, *_steps(graph, name, blocks)]
    if blocks.minima is None:
        return [new_node("GatherBlockQuantized", inputs, output, **options)]
    rows = new_node("GatherBlockQuantized", inputs, f"{output}_scaled", **options)
    minima = new_node("Gather", [_minima(graph, name, blocks), ids], f"{output}_minima")
    spread = new_node("Transpose", [_sums(graph, blocks)], f"{output}_spread", perm=[1, 0])
    raised = new_node("MatMul", [minima.outputs[0], spread.outputs[0]], f"{output}_minimum")
    total = new_node("Add", [rows.outputs[0], raised.outputs[0]], output)
    return [rows, minima, spread, raised, total]


def _add_up(graph: Any, source: Any, blocks: Blocks, output: str) -> list[Any]:
    """Return the nodes that add up inputs block by block; where it may be, without a product."""
    count = blocks.scales.shape[1]
    if source.shape is None or blocks.width != count * blocks.size:
        return [new_node("MatMul", [source, _sums(graph, blocks)], output)]
    rank = len(source.shape)
    cut = [*[0] * (rank - 1), count, blocks.size]
    shape = store(graph, "cut_" + "_".join(map(str, cut)), np.array(cut, np.int64))
    axis = store(graph, f"axis_{rank}", np.array([rank], np.int64))
    parts = new_node("Reshape", [source, shape], f"{output}_parts")
    return [parts, new_node("ReduceSum", [parts.outputs[0], axis], output, keepdims=0)]


def _sums(graph: Any, blocks: Blocks) -> Any:
    return store(graph, f"sums_{blocks.width}_{blocks.size}", blocks.block_sums())


def _minima(graph: Any, name: str, blocks: Blocks) -> Any:
    assert blocks.minima is not None
    return store(graph, f"{name}_minimum", blocks.minima)


def _steps(graph: Any, name: str, blocks: Blocks) -> list[Any]:
    """Return the scales, and the zero points where there are some."""
    steps = [store(graph, f"{name}_scale", blocks.scales)]
    if blocks.points is not None:
        steps.append(store(graph, f"{name}_zero_point", blocks.packed_points()))
    return steps
