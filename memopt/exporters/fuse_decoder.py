"""What a decoder computes beside its attention, as ONNX Runtime has it in one kernel.

Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864) go into the attention as tables
of cosines and sines; a residual and the RMS norm behind it (Zhang and Sennrich 2019,
https://arxiv.org/abs/1910.07467) become one node. What does not match stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from memopt.graphs.ir import (
    MICROSOFT,
    add_initializer,
    constant,
    insert,
    integers,
    is_constant,
    made_by,
    only_use,
    replace,
    scalar,
    to_proto,
    with_constant,
)
from memopt.runtimes.keys_values import KEEP

# Tables of more positions would weigh more than the model is worth.
MOST_POSITIONS = 32_768
ALL = 1 << 40
HEADS_OUT = [0, 2, 1, 3]


@dataclass(frozen=True, slots=True)
class Rotation:
    """``source * cos + half_turned(source) * sin``."""

    source: Any
    cos: Any
    sin: Any


def find_rotation(value: Any) -> Rotation | None:
    """Return what a query or key was before the whole of each head was turned, or None."""
    added = made_by(value, "Add")
    if added is None:
        return None
    for straight, turned in (added.inputs, reversed(added.inputs)):
        first, second = made_by(straight, "Mul"), made_by(turned, "Mul")
        if first is None or second is None:
            continue
        for swapped, sin in (second.inputs, reversed(second.inputs)):
            source = _half_turned(swapped)
            if source is not None and source in first.inputs:
                cos = next(v for v in first.inputs if v is not source)
                return Rotation(source, cos, sin)
    return None


def _half_turned(value: Any) -> Any | None:
    """Return x of ``concat(-x[half:], x[:half])`` along the last axis."""
    joined = made_by(value, "Concat")
    if joined is None or len(joined.inputs) != 2:
        return None
    negated = made_by(joined.inputs[0], "Neg")
    upper = made_by(negated.inputs[0], "Slice") if negated is not None else None
    lower = made_by(joined.inputs[1], "Slice")
    if upper is None or lower is None or upper.inputs[0] is not lower.inputs[0]:
        return None
    source = upper.inputs[0]
    size = source.shape[-1] if source.shape is not None else None
    if not isinstance(size, int) or size % 2:
        return None
    begins = [constant(cut.inputs[1]) for cut in (lower, upper)]
    ends = [constant(cut.inputs[2]) for cut in (lower, upper)]
    if any(v is None or v.size != 1 for v in (*begins, *ends)):
        return None
    places = [int(v.reshape(-1)[0]) for v in (*begins, *ends) if v is not None]
    return source if places[:3] == [0, size // 2, size // 2] and places[3] >= size else None


def tables(model: Any, rotation: Rotation, positions: int) -> tuple[Any, Any] | None:
    """Return cosines and sines (positions, size / 2) as constants of the graph, or None.

    The model's own arithmetic computes them, so that every scaling of positions is in them; it must
    need nothing but ``position_ids``.
    """
    if not 0 < positions <= MOST_POSITIONS:
        return None
    values = _evaluated(model, (rotation.cos, rotation.sin), positions)
    if values is None:
        return None
    made = []
    for name, value in zip(("cos", "sin"), values, strict=True):
        table = value.reshape(positions, -1) if value.shape[-2] == positions else None
        if table is None or table.shape[1] % 2:
            return None
        left, right = np.split(table, 2, axis=1)
        if not np.array_equal(left, right):
            return None
        made.append(add_initializer(model.graph, f"rotary.{name}", np.ascontiguousarray(left)))
    return made[0], made[1]


def _evaluated(model: Any, values: tuple[Any, ...], positions: int) -> list[np.ndarray] | None:
    """Return values that depend on the positions alone, of positions 0 to ``positions`` - 1."""
    import onnx

    from memopt.graphs.session import open_onnx

    needed = _ancestors(values)
    if needed is None:
        return None
    graph = to_proto(model).graph
    wanted = {node.name for node in needed}
    nodes = [node for node in graph.node if node.name in wanted]
    read = {name for node in nodes for name in node.input}
    given = [v for v in graph.input if v.name == "position_ids"]
    outputs = [onnx.helper.make_empty_tensor_value_info(v.name) for v in values]
    weights = [w for w in graph.initializer if w.name in read]
    part = onnx.helper.make_graph(nodes, "positions", given, outputs, weights)
    opsets = [onnx.helper.make_opsetid("", model.graph.opset_imports[""])]
    whole = onnx.helper.make_model(part, opset_imports=opsets, ir_version=model.ir_version)
    run = open_onnx(whole.SerializeToString(), [v.name for v in values])
    return [np.asarray(v) for v in run({"position_ids": np.arange(positions)[None]})]


def _ancestors(values: tuple[Any, ...]) -> list[Any] | None:
    """Return the nodes behind values; None where another input than the positions is needed."""
    found: dict[Any, None] = {}
    waiting = [*values]
    while waiting:
        value = waiting.pop()
        if value is None or is_constant(value):
            continue
        node = value.producer()
        if node is None:
            if value.name != "position_ids":
                return None
            continue
        if node not in found:
            found[node] = None
            waiting += node.inputs
    return list(found)


def rows_of(states: Any) -> Any | None:
    """Return the (batch, new, heads x size) that (batch, heads, new, size) was split from."""
    turned = made_by(states, "Transpose")
    split = made_by(turned.inputs[0], "Reshape") if turned is not None else None
    if split is None or list(integers(turned, "perm")) != HEADS_OUT:
        return None
    flat = split.inputs[0]
    shape, wide = flat.shape, states.shape
    if shape is None or len(shape) != 3 or shape[2] != int(wide[1]) * int(wide[3]):
        return None
    return flat


def drop_round_trip(value: Any) -> None:
    """Take out a split of (batch, new, width) into heads that is undone at once."""
    split = only_use(value)
    if split is None or split.op_type != "Reshape":
        return
    joined = only_use(split.outputs[0])
    if joined is None or joined.op_type != "Reshape" or joined.outputs[0].shape is None:
        return
    shape = joined.outputs[0].shape
    if len(shape) == 3 and value.shape is not None and shape[2] == value.shape[2]:
        replace(joined.outputs[0], value)


def keep_last(model: Any) -> bool:
    """Let a caller say of how many last tokens it wants logits; all of them by default.

    ``logits_to_keep`` is an input with a default, which others need not know. A prompt's logits are
    a fifth of its arithmetic and nearly all of its memory, and one row of them is read.
    """
    import onnx_ir as ir

    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == "logits")
    product = _head(logits)
    if product is None:
        return False
    keep = add_initializer(graph, KEEP, np.array([-ALL], np.int64))
    graph.inputs.append(keep)
    ends, axes = (
        add_initializer(graph, f"{KEEP}.{name}", np.array([value], np.int64))
        for name, value in (("end", ALL), ("axis", 1))
    )
    hidden = product.inputs[0]
    last = insert(graph, product, "Slice", [hidden, keep, ends, axes], name="last_tokens")
    last.outputs[0].type = hidden.type
    last.outputs[0].shape = ir.Shape([hidden.shape[0], None, hidden.shape[2]])
    product.replace_input_with(0, last.outputs[0])
    node: Any = product
    while True:
        made = node.outputs[0]
        made.shape = ir.Shape([made.shape[0], None, *list(made.shape)[2:]])
        if made is logits:
            return True
        node = only_use(made)


def _head(logits: Any) -> Any | None:
    """Return the product with a constant that logits come from, behind what bends each alone."""
    value = logits
    for _ in range(8):
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "MatMul" and is_constant(node.inputs[1]):
            hidden = node.inputs[0]
            return node if hidden.shape is not None and len(hidden.shape) == 3 else None
        computed = [v for v in node.inputs if v is not None and not is_constant(v)]
        if node.op_type not in ("Add", "Mul", "Div", "Tanh", "Cast") or len(computed) != 1:
            return None
        value = computed[0]
    return None


def fuse_norms(model: Any) -> int:
    """Write each residual with the RMS norm behind it as one node; return how many.

    ``SkipSimplifiedLayerNormalization`` gives the norm and the sum, which the next residual takes.
    """
    graph, count = model.graph, 0
    for node in [node for node in graph if node.op_type == "ReduceMean"]:
        found = _norm(node)
        if found is None:
            continue
        last, source, weight, epsilon = found
        added = made_by(source, "Add")
        if added is None or not _alike(added):
            continue
        fused = insert(
            graph,
            added,
            "SkipSimplifiedLayerNormalization",
            [*added.inputs, weight],
            outputs=4,
            domain=MICROSOFT,
            name="skip_norm",
            epsilon=epsilon,
        )
        for old, new in ((last.outputs[0], fused.outputs[0]), (source, fused.outputs[3])):
            new.shape, new.type = old.shape, old.type
            replace(old, new)
        for unused in fused.outputs[1:3]:
            unused.name = ""
        count += 1
    if count:
        graph.opset_imports[MICROSOFT] = 1
    return count


def _norm(mean: Any) -> tuple[Any, Any, Any, float] | None:
    """Return (last node, input, weight, epsilon) of an RMS norm, by its mean of squares."""
    square = made_by(mean.inputs[0], "Pow")
    if square is None or scalar(square.inputs[1]) != 2.0:
        return None
    source = square.inputs[0]
    added = _used_by(mean, "Add")
    parts = with_constant(added) if added is not None else None
    root = _used_by(added, "Sqrt") if parts is not None else None
    turned = _used_by(root, "Reciprocal") if root is not None else None
    scaled = _used_by(turned, "Mul") if turned is not None else None
    if parts is None or scaled is None or source not in scaled.inputs:
        return None
    last = _used_by(scaled, "Mul")
    weighed = with_constant(last) if last is not None else None
    epsilon = scalar(parts[1])
    if last is None or weighed is None or epsilon is None or len(weighed[1].shape) != 1:
        return None
    return last, source, weighed[1], epsilon


def _used_by(node: Any, op_type: str) -> Any | None:
    reader = only_use(node.outputs[0])
    return reader if reader is not None and reader.op_type == op_type else None


def _alike(added: Any) -> bool:
    """Whether both sides of a sum are computed and of one shape, so that nothing is repeated."""
    shapes = [value.shape for value in added.inputs]
    if any(is_constant(v) for v in added.inputs) or any(s is None or len(s) != 3 for s in shapes):
        return False
    return list(shapes[0]) == list(shapes[1])
