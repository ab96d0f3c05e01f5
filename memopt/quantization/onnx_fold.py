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
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.quantization.onnx_graph import Linear, initializers, named
from memopt.quantization.static import Rounded

if TYPE_CHECKING:
    from memopt.quantization.smooth import Plan
    from memopt.quantization.statistics import Array

# What splits a projection into heads, and joins heads again: (batch, length, heads, width).
_HEADS = [0, 2, 1, 3]


def fold_smoothing(
    model: Any,
    linears: Collection[Linear],
    plans: Mapping[str, Plan],
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
    graph = _Graph(model)
    changed = dict(rounded)
    done: set[str] = set()
    by_output = {linear.node.output[0]: linear for linear in linears}
    readers: dict[str, set[str]] = {}
    for linear in linears:
        readers.setdefault(linear.source, set()).add(linear.node.name)
    for source, names in readers.items():
        plan = plans[source]
        node = graph.makers.get(source)
        if node is None or source in graph.outputs:
            continue
        others = [user for user in graph.users[source] if user.name not in names]
        if node.op_type == "LayerNormalization":
            if _into_norm(graph, node, plan, others):
                done.add(source)
            continue
        value = None if others else _value_projection(graph, node, by_output)
        if value is not None:
            before = changed[value.linear.node.name]
            changed[value.linear.node.name] = replace(
                before,
                scales=(before.scales / plan.divisor).astype(np.float32),
                bias=((before.bias - plan.low) / plan.divisor).astype(np.float32),
            )
            graph.scale(*value.bias, 1 / plan.divisor)
            done.add(source)
    return done, changed


class _Graph:
    """Who makes and who reads each value of a model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.constants = initializers(model)
        self.outputs = {item.name for item in model.graph.output}
        self.makers = {name: node for node in model.graph.node for name in node.output}
        self.users: dict[str, list[Any]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)

    def is_vector(self, name: str) -> bool:
        """Say whether a value is a constant of one axis."""
        item = self.constants.get(name)
        return item is not None and len(item.dims) == 1

    def scale(self, node: Any, place: int, factor: Array, extra: Array | float = 0.0) -> None:
        """Give a node ``constant * factor + extra`` as input; what it reads may be shared."""
        from onnx import numpy_helper

        name = node.input[place]
        item = self.constants[name]
        value = (numpy_helper.to_array(item).astype(np.float64) * factor + extra).astype(np.float32)
        if len(self.users[name]) == 1:
            item.CopyFrom(numpy_helper.from_array(value, name))
            return
        # Exporters store equal constants, such as the ones of an untrained norm, once.
        self.users[name] = [user for user in self.users[name] if user is not node]
        own = f"{node.output[0]}/{place}"
        self.add(own, value)
        self.users[own] = [node]
        node.input[place] = own

    def add(self, name: str, value: Array) -> None:
        """Append a float32 constant."""
        from onnx import numpy_helper

        self.model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
        self.constants[name] = self.model.graph.initializer[-1]

    def before(self, name: str, kind: str) -> Any | None:
        """Return the node of this kind that makes a value nobody else reads."""
        node = self.makers.get(name)
        alone = len(self.users.get(name, ())) == 1 and name not in self.outputs
        return node if node is not None and node.op_type == kind and alone else None

    def biased(self, name: str) -> tuple[Any, int] | None:
        """Return the Add of a bias that makes ``name``, and which of its inputs the bias is."""
        node = self.before(name, "Add")
        if node is None:
            return None
        place = next((i for i, value in enumerate(node.input) if self.is_vector(value)), None)
        return None if place is None else (node, place)


def _into_norm(graph: _Graph, node: Any, plan: Plan, others: list[Any]) -> bool:
    """Let a LayerNormalization make the smoothed activation; say whether that was possible."""
    source = node.output[0]
    names = list(node.input[1:])
    if len(node.output) > 1 or not names or not all(map(graph.is_vector, names)):
        return False
    partner = None
    if others:
        # One residual connection can be served with a Mul; more readers would each cost something.
        if len(others) != 1 or others[0].op_type != "Add":
            return False
        place = 1 - list(others[0].input).index(source)
        partner = graph.biased(others[0].input[place])
        if partner is None:
            return False
    if len(names) == 1:
        graph.add(f"{source}/bias", np.zeros_like(plan.low))
        graph.users[f"{source}/bias"] = [node]
        node.input.append(f"{source}/bias")
    graph.scale(node, 1, 1 / plan.divisor)
    graph.scale(node, 2, 1 / plan.divisor, -plan.low / plan.divisor)
    if partner is not None:
        from onnx import helper

        graph.add(f"{source}/divisor", plan.divisor)
        back = f"{source}/restored"
        restore = named(helper.make_node("Mul", [source, f"{source}/divisor"], [back]), back)
        nodes = list(graph.model.graph.node)
        graph.model.graph.node.insert(nodes.index(node) + 1, restore)
        others[0].input[list(others[0].input).index(source)] = back
        graph.scale(*partner, np.ones_like(plan.low), plan.low)
    return True


@dataclass(frozen=True, slots=True)
class _Value:
    """A value projection: its product, and the Add of its bias with the bias's place."""

    linear: Linear
    bias: tuple[Any, int]


def _value_projection(graph: _Graph, node: Any, by_output: Mapping[str, Linear]) -> _Value | None:
    """Follow joined heads back, through softmax times values, to the projection of the values."""
    if node.op_type != "Reshape":
        return None
    joined = graph.before(node.input[0], "Transpose")
    if joined is None or _perm(joined) != _HEADS:
        return None
    product = graph.before(joined.input[0], "MatMul")
    if product is None or graph.before(product.input[0], "Softmax") is None:
        return None
    split = graph.before(product.input[1], "Transpose")
    if split is None or _perm(split) != _HEADS:
        return None
    reshape = graph.before(split.input[0], "Reshape")
    if reshape is None:
        return None
    added = graph.before(reshape.input[0], "Add")
    if added is None:
        return None
    bias = graph.biased(reshape.input[0])
    linear = next((by_output[name] for name in added.input if name in by_output), None)
    if bias is None or linear is None or graph.users[linear.node.output[0]] != [added]:
        return None
    return _Value(linear, bias)


def _perm(node: Any) -> list[int]:
    return next((list(item.ints) for item in node.attribute if item.name == "perm"), [])
