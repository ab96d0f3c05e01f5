"""Find softmax attention in an exported graph.

The match starts at each Softmax and walks along the data, so that the order of scaling, transposing
and masking, which differs between models and attention implementations, does not matter. Scores are
``scale * Q @ K^T + biases``; Q, K and V are linear layers of one input, split into heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from memopt.graphs.ir import (
    constant,
    dims,
    integers,
    is_constant,
    made_by,
    scalar,
    with_constant,
)

PASS_THROUGH = ("Identity", "Cast", "Dropout")


@dataclass(frozen=True, slots=True)
class Projection:
    """``source @ weight + bias``, computed by ``product`` first; ``bias`` may be None."""

    product: Any
    weight: Any
    bias: Any

    @property
    def source(self) -> Any:
        """The value that goes into the layer."""
        return self.product.inputs[0]


@dataclass(slots=True)
class Heads:
    """A (batch, heads, sequence, size) value followed back to the 3-D value it was split from."""

    source: Any
    heads: int
    size: int
    scale: float = 1.0
    transposed: bool = False


@dataclass(slots=True)
class Match:
    """Everything that one attention needs, before it is rewritten."""

    output: Any
    query: Heads
    key: Heads
    value: Heads
    scale: float
    biases: list[Any] = field(default_factory=list)


class NoMatch(Exception):
    """Why a softmax is not a fusable attention, in words for the report."""


def _scaled(value: Any) -> tuple[Any, float]:
    """Take multiplications and divisions by one number, and casts, off ``value``."""
    scale = 1.0
    while True:
        node = made_by(value, "Mul", "Div", *PASS_THROUGH)
        if node is None:
            return value, scale
        if node.op_type in PASS_THROUGH:
            value = node.inputs[0]
            continue
        pair = with_constant(node)
        number = scalar(pair[1]) if pair is not None else None
        if (
            pair is None
            or number is None
            or (node.op_type == "Div" and pair[0] is not node.inputs[0])
        ):
            return value, scale
        scale = scale * number if node.op_type == "Mul" else scale / number
        value = pair[0]


def _last_two_swapped(value: Any) -> Any | None:
    """The input of a swap of the last two axes: a 4-D Transpose, or one between two Reshapes."""
    node = made_by(value, "Transpose")
    if node is not None and integers(node, "perm") == (0, 1, 3, 2):
        return node.inputs[0]
    outer = made_by(value, "Reshape")
    middle = made_by(outer.inputs[0], "Transpose") if outer is not None else None
    inner = made_by(middle.inputs[0], "Reshape") if middle is not None else None
    if inner is None or middle is None or integers(middle, "perm") != (0, 2, 1):
        return None
    return inner.inputs[0]


def _heads(value: Any, what: str) -> Heads:
    scale, transposed = 1.0, False
    while True:
        value, factor = _scaled(value)
        scale *= factor
        swapped = _last_two_swapped(value)
        if swapped is None:
            break
        value, transposed = swapped, not transposed
    node = made_by(value, "Transpose")
    perm = integers(node, "perm") if node is not None else ()
    if node is None or perm not in {(0, 2, 1, 3), (0, 2, 3, 1)}:
        raise NoMatch(f"the {what} is {_describe(value)}, not a linear layer split into heads")
    transposed ^= perm == (0, 2, 3, 1)
    split = made_by(node.inputs[0], "Reshape")
    if split is None:
        raise NoMatch(f"the {what} is {_describe(node.inputs[0])} before its heads are transposed")
    shape = _split_shape(split)
    source, factor = _scaled(split.inputs[0])
    return Heads(source, shape[0], shape[1], scale * factor, transposed)


def _split_shape(reshape: Any) -> tuple[int, int]:
    """``(heads, size)`` that a Reshape to (batch, sequence, heads, size) makes."""
    shape = dims(reshape.outputs[0])
    if shape is not None and len(shape) == 4:
        heads, size = shape[2:]
        if isinstance(heads, int) and isinstance(size, int):
            return heads, size
    width = dims(reshape.inputs[0])
    target = reshape.inputs[1]
    array = constant(target)
    parts: list[int | None]
    if array is not None:
        parts = [int(x) for x in array]
    else:
        concat = made_by(target, "Concat")
        values = [constant(v) for v in concat.inputs] if concat is not None else []
        parts = [None if a is None else int(a.item()) for a in values]
    if len(parts) == 4 and width is not None and isinstance(width[-1], int):
        count, per_head = parts[2:]
        if per_head is not None and per_head > 0:
            return width[-1] // per_head, per_head
        if count is not None and count > 0:
            return count, width[-1] // count
    raise NoMatch("the number of heads is not fixed in the graph")


def _describe(value: Any) -> str:
    node = value.producer()
    return f"a {node.op_type}" if node is not None else f"the value {value.name}"


def _scores(value: Any) -> tuple[Any, float, list[Any]]:
    """Split softmax input into ``(MatMul node, scale, biases)``."""
    biases: list[Any] = []
    while True:
        add = made_by(value, "Add")
        if add is not None:
            a, b = add.inputs
            below = [v for v in (a, b) if _is_scores(v)]
            if len(below) != 1:
                raise NoMatch("two products or none are added before the softmax")
            value = below[0]
            biases.append(b if value is a else a)
            continue
        cast = made_by(value, *PASS_THROUGH)
        if cast is None:
            break
        value = cast.inputs[0]
    value, scale = _scaled(value)
    product = made_by(value, "MatMul")
    if product is None or any(is_constant(v) for v in product.inputs):
        raise NoMatch(f"the softmax is of {_describe(value)}, not of a product of query and key")
    return product, scale, biases


def _is_scores(value: Any) -> bool:
    """Whether a walk down through adds and scales ends at a product of two computed values."""
    for _ in range(8):
        value, _scale = _scaled(value)
        add = made_by(value, "Add")
        if add is None:
            product = made_by(value, "MatMul")
            return product is not None and not any(is_constant(v) for v in product.inputs)
        left = [v for v in add.inputs if _is_scores(v)]
        if not left:
            return False
        value = left[0]
    return False


def _weights_use(softmax: Any) -> Any:
    """The ``probabilities @ V`` node that reads ``softmax``, past the guard against NaN rows."""
    value = softmax.outputs[0]
    for _ in range(6):
        if value.is_graph_output():
            raise NoMatch("the attention weights are an output of the graph")
        readers = {use.node for use in value.uses()}
        guard = next((n for n in readers if n.op_type == "Where"), None)
        if guard is not None and all(n.op_type in {"Where", "IsNaN"} for n in readers):
            value = guard.outputs[0]
            continue
        if len(readers) != 1:
            raise NoMatch("the attention weights are read by several nodes")
        (node,) = readers
        if node.op_type in PASS_THROUGH:
            value = node.outputs[0]
            continue
        if node.op_type == "MatMul" and node.inputs[0] is value:
            return node
        raise NoMatch(f"the attention weights go into a {node.op_type}")
    raise NoMatch("the attention weights are not multiplied with a value")


def match(softmax: Any) -> Match:
    """Read the attention around ``softmax``.

    Raises:
        NoMatch: with the reason.
    """
    axis = softmax.attributes.get("axis")
    if axis is not None and axis.as_int() not in {-1, 3}:
        raise NoMatch(f"softmax over axis {axis.as_int()}")
    context = _weights_use(softmax)
    product, scale, biases = _scores(softmax.inputs[0])
    query, key = _heads(product.inputs[0], "query"), _heads(product.inputs[1], "key")
    value = _heads(context.inputs[1], "value")
    if query.transposed or not key.transposed or value.transposed or value.scale != 1.0:
        raise NoMatch("query, key or value has an unusual layout")
    if not query.heads == key.heads == value.heads:
        raise NoMatch(f"{query.heads} query heads share {key.heads} key heads")
    merged = _merged(context.outputs[0])
    return Match(merged, query, key, value, scale * query.scale * key.scale, biases)


def _merged(context: Any) -> Any:
    """The (batch, sequence, heads * size) value made from (batch, heads, sequence, size)."""
    readers = [use.node for use in context.uses()]
    while len(readers) == 1 and readers[0].op_type == "Reshape":
        after_view = readers[0].outputs[0]
        if dims(after_view) is None or dims(after_view) != dims(context):
            break
        context, readers = after_view, [use.node for use in after_view.uses()]
    if len(readers) == 1 and readers[0].op_type == "Transpose":
        transposed = readers[0].outputs[0]
        after = [use.node for use in transposed.uses()]
        if (
            integers(readers[0], "perm") == (0, 2, 1, 3)
            and len(after) == 1
            and after[0].op_type == "Reshape"
            and not transposed.is_graph_output()
        ):
            merged = after[0].outputs[0]
            shape = dims(merged)
            if shape is None or len(shape) == 3:
                return merged
    raise NoMatch("the heads are not merged by transpose and reshape")


def projection(value: Any) -> Projection:
    """Read ``value`` as a linear layer with constant weight and optional constant bias."""
    bias = None
    add = made_by(value, "Add")
    if add is not None:
        pair = with_constant(add)
        if pair is None or len(dims(pair[1]) or ()) != 1:
            raise NoMatch("query, key or value is not a linear layer")
        value, bias = pair
    product = made_by(value, "MatMul")
    if product is None or not is_constant(product.inputs[1]):
        raise NoMatch(f"query, key or value is {_describe(value)}, not a linear layer")
    return Projection(product, product.inputs[1], bias)
