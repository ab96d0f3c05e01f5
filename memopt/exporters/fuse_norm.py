"""Fuse what stands around attention: residual + layer norm, bias + GELU, mean pooling.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from memopt.graphs.ir import (
    MICROSOFT,
    add_initializer,
    constant,
    dims,
    insert,
    is_constant,
    made_by,
    only_use,
    replace,
    scalar,
    with_constant,
)

# 1.702 is the constant of QuickGELU (Hendrycks and Gimpel 2016, section 2), 1/sqrt(2) that of GELU.
GELU_CONSTANT_TOLERANCE = 1e-5


def epsilon(node: Any, default: float = 1e-5) -> float:
    """Return what a normalisation adds to the variance."""
    attribute = node.attributes.get("epsilon")
    return default if attribute is None else float(attribute.as_float())


def is_last_axis_norm(node: Any) -> bool:
    """Return whether a LayerNormalization is over the last axis, with a constant scale."""
    axis = node.attributes.get("axis")
    shape = dims(node.inputs[0])
    last = axis is None or axis.as_int() == -1 or (shape and axis.as_int() == len(shape) - 1)
    scale = dims(node.inputs[1])
    return bool(last) and scale is not None and len(scale) == 1 and is_constant(node.inputs[1])


def _same_shape(a: Any, b: Any) -> bool:
    left, right = dims(a), dims(b)
    return left is not None and left == right and len(left) in {2, 3}


def _take_bias(value: Any) -> tuple[Any, Any]:
    """Split ``product + bias`` of a linear layer that only this reader uses; bias may be None."""
    return _split_bias(value) if only_use(value) is not None else (value, None)


def _split_bias(value: Any) -> tuple[Any, Any]:
    add = made_by(value, "Add")
    pair = with_constant(add) if add is not None else None
    if pair is None or len(dims(pair[1]) or ()) != 1 or made_by(pair[0], "MatMul") is None:
        return value, None
    return pair


def fuse_skip_layer_norm(graph: Any, problems: list[str]) -> int:
    """Put SkipLayerNormalization in place of residual add (and linear bias) + LayerNormalization.

    A sum that is read again later (pre-norm models) is the fourth output of the operator.

    Returns:
        how many were fused.
    """
    fused = 0
    for norm in list(graph):
        if norm.op_type != "LayerNormalization" or norm.domain or not is_last_axis_norm(norm):
            continue
        total = norm.inputs[0]
        add = made_by(total, "Add")
        if add is None:
            continue
        if any(is_constant(v) for v in add.inputs):
            problems.append(f"skip layer norm {norm.name}: adds a constant, not a residual")
            continue
        a, b = add.inputs
        if not _same_shape(a, b):
            problems.append(f"skip layer norm {norm.name}: adds {dims(a)} to {dims(b)}")
            continue
        if total.is_graph_output():
            problems.append(f"skip layer norm {norm.name}: the sum is an output of the graph")
            continue
        (first, bias), skip = _take_bias(a), b
        if bias is None:
            (first, bias), skip = _take_bias(b), a
        if bias is None:
            first, skip = a, b
        inputs = [first, skip, norm.inputs[1], norm.inputs[2] if len(norm.inputs) > 2 else None]
        if bias is not None:
            inputs.append(bias)
        read_again = len(total.uses()) > 1
        node = insert(
            graph,
            add if read_again else norm,
            "SkipLayerNormalization",
            inputs,
            outputs=4 if read_again else 1,
            domain=MICROSOFT,
            name=f"skip_{norm.name}",
            epsilon=epsilon(norm),
        )
        replace(norm.outputs[0], node.outputs[0])
        if read_again:
            for unused in node.outputs[1:3]:
                unused.name = ""
            replace(total, node.outputs[3])
        fused += 1
    return fused


def _erf_gelu(node: Any) -> tuple[Any, Any] | None:
    """``(input, result)`` of x * 0.5 * (1 + erf(x / sqrt(2))) around an Erf node, in any order."""
    scaled = made_by(node.inputs[0], "Mul", "Div")
    pair = with_constant(scaled) if scaled is not None else None
    number = scalar(pair[1]) if pair is not None else None
    if scaled is None or pair is None or not number:
        return None
    factor = number if scaled.op_type == "Mul" else 1 / number
    if abs(factor - math.sqrt(0.5)) > GELU_CONSTANT_TOLERANCE:
        return None
    x, value, half, times_x = pair[0], node.outputs[0], False, False
    one = only_use(value)
    if one is None or one.op_type != "Add" or (pair := with_constant(one)) is None:
        return None
    if scalar(pair[1]) != 1.0:
        return None
    value = one.outputs[0]
    for _ in range(2):
        step = only_use(value)
        if step is None or step.op_type not in {"Mul", "Div"}:
            return None
        other = step.inputs[1] if step.inputs[0] is value else step.inputs[0]
        number = scalar(other)
        if other is x and not times_x:
            times_x = True
        elif number is not None and not half and (number == 0.5 or step.op_type == "Div"):
            half = True
        else:
            inner = made_by(other, "Mul")
            pair = with_constant(inner) if inner is not None else None
            if pair is None or pair[0] is not x or scalar(pair[1]) != 0.5:
                return None
            half = times_x = True
        value = step.outputs[0]
        if half and times_x:
            return x, value
    return None


def _emit_gelu(graph: Any, x: Any, result: Any, approximate: bool) -> str:
    before = result.producer()
    readers = {use.node for use in x.uses()}
    # x is read once by a Gelu node, two or three times by the nodes of a decomposed one.
    mine = all(reader is before or _leads_to(reader, before) for reader in readers)
    product, bias = _split_bias(x) if mine and not x.is_graph_output() else (x, None)
    if approximate:
        op, inputs = "FastGelu", [product] if bias is None else [product, bias]
    elif bias is not None:
        op, inputs = "BiasGelu", [product, bias]
    else:
        op, inputs = "Gelu", [x]
    node = insert(graph, before, op, inputs, domain=MICROSOFT, name=f"{op}_{before.name}")
    replace(result, node.outputs[0])
    return op


def _leads_to(node: Any, target: Any) -> bool:
    """Whether every path from ``node`` within GELU's few steps ends in ``target``."""
    for _ in range(5):
        if node is target:
            return True
        following = only_use(node.outputs[0])
        if following is None:
            return False
        node = following
    return False


def fuse_gelu(graph: Any) -> dict[str, int]:
    """Fuse bias + GELU (BiasGelu), tanh GELU (FastGelu, the same formula) and x*sigmoid(1.702x).

    An exact GELU never becomes an approximate one.

    Returns:
        how many of each operator were made.
    """
    counts: dict[str, int] = {}
    for node in list(graph):
        if node.domain or node.graph is None:
            continue
        op = None
        if node.op_type == "Gelu":
            kind = node.attributes.get("approximate")
            tanh = kind is not None and kind.as_string() == "tanh"
            op = _emit_gelu(graph, node.inputs[0], node.outputs[0], tanh)
        elif node.op_type == "Erf":
            gelu = _erf_gelu(node)
            if gelu is not None:
                op = _emit_gelu(graph, *gelu, False)
        elif node.op_type == "Sigmoid":
            op = _quick_gelu(graph, node)
        if op is not None:
            counts[op] = counts.get(op, 0) + 1
    return counts


def _quick_gelu(graph: Any, sigmoid: Any) -> str | None:
    scaled = made_by(sigmoid.inputs[0], "Mul")
    pair = with_constant(scaled) if scaled is not None else None
    alpha = scalar(pair[1]) if pair is not None else None
    product = only_use(sigmoid.outputs[0])
    if pair is None or alpha is None or product is None or product.op_type != "Mul":
        return None
    other = [v for v in product.inputs if v is not sigmoid.outputs[0]]
    if other != [pair[0]]:
        return None
    node = insert(
        graph,
        product,
        "QuickGelu",
        [pair[0]],
        domain=MICROSOFT,
        name=f"QuickGelu_{product.name}",
        alpha=alpha,
    )
    replace(product.outputs[0], node.outputs[0])
    return "QuickGelu"


def fuse_mean_pooling(graph: Any) -> int:
    """Turn ``ReduceSum(hidden * mask, sequence)`` into one batched product ``mask @ hidden``.

    The product reads the hidden states once and writes nothing of their size.

    Returns:
        how many sums were rewritten.
    """
    fused = 0
    for node in list(graph):
        if node.op_type != "ReduceSum" or node.domain or len(node.inputs) < 2:
            continue
        axes, product = constant(node.inputs[1]), made_by(node.inputs[0], "Mul")
        keep = node.attributes.get("keepdims")
        if axes is None or product is None or only_use(node.inputs[0]) is None:
            continue
        shapes = [dims(v) for v in product.inputs]
        if any(s is None or len(s) != 3 for s in shapes) or axes.tolist() not in ([1], [-2]):
            continue
        columns = [v for v, s in zip(product.inputs, shapes, strict=True) if s and s[2] == 1]
        hidden = [v for v, s in zip(product.inputs, shapes, strict=True) if s and s[2] != 1]
        if len(columns) != 1 or len(hidden) != 1 or dims(columns[0])[:2] != dims(hidden[0])[:2]:  # type: ignore[index]
            continue
        name = f"mean_pooling_{node.name}"
        row = insert(graph, node, "Transpose", columns, name=f"{name}.mask", perm=[0, 2, 1])
        total = insert(graph, node, "MatMul", [row.outputs[0], hidden[0]], name=f"{name}.sum")
        result = total.outputs[0]
        if keep is not None and keep.as_int() == 0:
            axis = add_initializer(graph, f"{name}.axis", np.array([1], np.int64))
            result = insert(graph, node, "Squeeze", [result, axis], name=name).outputs[0]
        replace(node.outputs[0], result)
        fused += 1
    return fused
