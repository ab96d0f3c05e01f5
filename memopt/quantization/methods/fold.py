"""Smoothing at no run-time cost: shift and divisor move into what makes the activation.

A smoothed activation is ``(x - low) / divisor``, per channel. Where ``x`` is the output of a
LayerNormalization, its scale and bias make that instead (Xiao et al. 2023); a residual connection
that reads ``x`` too gets ``x - low`` back with one Mul, and ``low`` through the bias of what it is
added to. Where ``x`` is what attention gathered, the value projection makes it: each row of a
softmax adds up to one, so that a shift of every value is the same shift of their mean. Behind other
operators, such as GELU, the multiply and add stay.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from memopt.graphs.ir import constant, integers, made_by, new_node, only_use, set_constant, store
from memopt.graphs.linears import Linear
from memopt.graphs.observe import Array
from memopt.quantization.math.smooth import Smoothing
from memopt.quantization.methods.static import Rounded

# What splits a projection into heads, and joins heads again: (batch, length, heads, width).
_HEADS = (0, 2, 1, 3)


def fold_smoothing(
    model: Any,
    linears: Collection[Linear],
    plans: Mapping[str, Smoothing],
    rounded: Mapping[str, Rounded],
) -> tuple[set[str], dict[str, Rounded]]:
    """Change a float graph so that activations come out smoothed where that is free.

    Args:
        model: the float graph; changed in place.
        linears: its products that will be quantized; those kept in float are left out.
        plans: activation -> how it is smoothed.
        rounded: node name -> rounded weight of each of ``linears``.

    Returns:
        The activations that the graph now makes smoothed under their own name, and the rounded
        weights, those of value projections changed.
    """
    changed = dict(rounded)
    done: set[str] = set()
    by_output = {linear.output: linear for linear in linears}
    readers: dict[str, list[Linear]] = {}
    for linear in linears:
        readers.setdefault(linear.source, []).append(linear)
    for source, group in readers.items():
        plan, value = plans[source], group[0].node.inputs[0]
        node = value.producer()
        if node is None or value.is_graph_output():
            continue
        products = [linear.node for linear in group]
        others = [use.node for use in value.uses() if use.node not in products]
        if node.op_type == "LayerNormalization":
            if _into_norm(model.graph, node, plan, others):
                done.add(source)
            continue
        projection = None if others else _value_projection(node, by_output)
        if projection is not None:
            before = changed[projection.linear.label]
            changed[projection.linear.label] = replace(
                before,
                scales=(before.scales / plan.divisor).astype(np.float32),
                bias=((before.bias - plan.low) / plan.divisor).astype(np.float32),
            )
            _scale(model.graph, *projection.bias, 1 / plan.divisor)
            done.add(source)
    return done, changed


def _is_vector(value: Any) -> bool:
    return value is not None and value.is_initializer() and len(value.shape) == 1


def _scale(graph: Any, node: Any, place: int, factor: Array, extra: Array | float = 0.0) -> None:
    """Give a node ``constant * factor + extra`` as input; what it reads may be shared."""
    value = node.inputs[place]
    before = np.asarray(constant(value), np.float64)
    after = (before * factor + extra).astype(np.float32)
    if len(value.uses()) == 1:
        set_constant(value, after)
        return
    # Exporters store equal constants, such as the ones of an untrained norm, once.
    own = store(graph, f"{node.outputs[0].name}/{place}", after)
    node.replace_input_with(place, own)


def _before(value: Any, kind: str) -> Any | None:
    """Return the node of this kind that makes a value nobody else reads."""
    return made_by(value, kind) if only_use(value) is not None else None


def _biased(value: Any) -> tuple[Any, int] | None:
    """Return the Add of a bias that makes ``value``, and which of its inputs the bias is."""
    node = _before(value, "Add")
    places = [] if node is None else [i for i, v in enumerate(node.inputs) if _is_vector(v)]
    return (node, places[0]) if places else None


def _into_norm(graph: Any, node: Any, plan: Smoothing, others: list[Any]) -> bool:
    """Let a LayerNormalization make the smoothed activation; say whether that was possible."""
    value = node.outputs[0]
    if len(node.outputs) > 1 or len(node.inputs) < 2 or not all(map(_is_vector, node.inputs[1:])):
        return False
    partner = None
    if others:
        # One residual connection can be served with a Mul; more readers would each cost something.
        if len(others) != 1 or others[0].op_type != "Add":
            return False
        partner = _biased(others[0].inputs[1 - list(others[0].inputs).index(value)])
        if partner is None:
            return False
    if len(node.inputs) == 2:
        node.resize_inputs(3)
        node.replace_input_with(2, store(graph, f"{value.name}/bias", np.zeros_like(plan.low)))
    _scale(graph, node, 1, 1 / plan.divisor)
    _scale(graph, node, 2, 1 / plan.divisor, -plan.low / plan.divisor)
    if partner is not None:
        divisor = store(graph, f"{value.name}/divisor", plan.divisor)
        restore = new_node("Mul", [value, divisor], f"{value.name}/restored")
        graph.insert_after(node, restore)
        place = list(others[0].inputs).index(value)
        others[0].replace_input_with(place, restore.outputs[0])
        _scale(graph, *partner, np.ones_like(plan.low), plan.low)
    return True


@dataclass(frozen=True, slots=True)
class _Value:
    """A value projection: its product, and the Add of its bias with the bias's place."""

    linear: Linear
    bias: tuple[Any, int]


def _value_projection(node: Any, by_output: Mapping[str, Linear]) -> _Value | None:
    """Follow joined heads back, through softmax times values, to the projection of the values."""
    if node.op_type != "Reshape":
        return None
    joined = _before(node.inputs[0], "Transpose")
    if joined is None or integers(joined, "perm") != _HEADS:
        return None
    product = _before(joined.inputs[0], "MatMul")
    if product is None or _before(product.inputs[0], "Softmax") is None:
        return None
    split = _before(product.inputs[1], "Transpose")
    if split is None or integers(split, "perm") != _HEADS:
        return None
    reshape = _before(split.inputs[0], "Reshape")
    bias = None if reshape is None else _biased(reshape.inputs[0])
    if bias is None:
        return None
    added = bias[0]
    linear = next((by_output[v.name] for v in added.inputs if v.name in by_output), None)
    if linear is None or only_use(linear.node.outputs[0]) is not added:
        return None
    return _Value(linear, bias)
