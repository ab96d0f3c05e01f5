"""Marker nodes of cached attention to operators: standard ones, or ONNX Runtime's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from memopt.exporters.cached import DOMAIN, MARKER
from memopt.exporters.fuse_decoder import drop_round_trip, find_rotation, rows_of, tables
from memopt.graphs.ir import MICROSOFT, dims, drop_unused, insert, replace, store
from memopt.runtimes.chain import MASK_BIAS

# The kernel turns heads of such sizes only.
TURNED_SIZE = 16
Shared = dict[str, Any]  # values that the attentions of one graph have in common


@dataclass(frozen=True, slots=True)
class Turned:
    """Query and key before they are turned, and the tables to do it by."""

    query: Any
    key: Any
    cos: Any
    sin: Any


def markers(model: Any) -> list[Any]:
    """Return the marker nodes of an ``onnx_ir.Model``, the first layer first."""
    return [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, MARKER)]


def to_standard(model: Any) -> None:
    """Write every marker as operators of the default domain, in place."""
    _lower(model, _standard)


def to_grouped(model: Any, positions: int) -> int:
    """Write every marker as ``com.microsoft.GroupQueryAttention``, in place.

    Its past and present may be one buffer, longer than the text: the length is the mask's. Where a
    model turns queries and keys by their positions and no more, ``RotaryEmbedding`` does it, not
    the attention itself: that would count padding.

    Args:
        model: an ``onnx_ir.Model`` with markers.
        positions: the most that a text has, the length of the tables.

    Returns:
        How many attentions are turned so.
    """
    turned: dict[Any, Turned] = {}
    made: dict[tuple[Any, Any], tuple[Any, Any] | None] = {}
    for node in markers(model):
        pair = [find_rotation(value) for value in node.inputs[:2]]
        query, key = pair
        if query is None or key is None or (query.cos, query.sin) != (key.cos, key.sin):
            continue
        angles = (query.cos, query.sin)
        if int(node.inputs[0].shape[3]) % TURNED_SIZE == 0:
            if angles not in made:
                made[angles] = tables(model, query, positions)
            found = made[angles]
            if found is not None:
                turned[node] = Turned(query.source, key.source, *found)
    _lower(model, lambda graph, node, shared: _grouped(graph, node, shared, turned.get(node)))
    model.graph.opset_imports[MICROSOFT] = 1
    return len(turned)


def groupable(model: Any) -> bool:
    """Say whether every marker is something that GroupQueryAttention computes."""
    for node in markers(model):
        query, key, value = (dims(v) for v in node.inputs[:3])
        if not query or not key or not value or key[3] != value[3]:
            return False
        if not all(isinstance(d, int) for d in (query[1], query[3], key[1])):
            return False
    return bool(markers(model))


def _lower(model: Any, write: Callable[[Any, Any, Shared], tuple[Any, ...]]) -> None:
    shared: Shared = {}
    for node in markers(model):
        values = write(model.graph, node, shared)
        for old, new in zip(node.outputs, values, strict=True):
            _take_place(model.graph, old, new)
        drop_round_trip(values[0])
        model.graph.remove(node, safe=True)
    model.graph.opset_imports.pop(DOMAIN, None)
    drop_unused(model)


def _take_place(graph: Any, old: Any, new: Any) -> None:
    name, shape, kind = old.name, old.shape, old.type
    for number, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[number] = new
    old.name = f"{name}__marker"
    new.name, new.shape, new.type = name, shape, kind
    replace(old, new)


def _grouped(graph: Any, node: Any, shared: Shared, turned: Turned | None) -> tuple[Any, ...]:
    query, key, value, past_key, past_value, mask = node.inputs
    if turned is not None:
        query, key = turned.query, turned.key
    heads, kept = int(query.shape[1]), int(key.shape[1])
    rows = [_rows(graph, node, v) for v in (query, key, value)]
    lengths = _once(shared, "lengths", lambda: _lengths(graph, node, mask, query))
    bias = _once(shared, "bias", lambda: _bias(graph, node, mask, query))
    if turned is not None:
        rows[:2] = [_turned(graph, node, value, turned) for value in rows[:2]]
    made = insert(
        graph,
        node,
        "GroupQueryAttention",
        [*rows, past_key, past_value, *lengths, None, None, None, bias],
        outputs=3,
        domain=MICROSOFT,
        name="grouped_attention",
        num_heads=heads,
        kv_num_heads=kept,
        scale=node.attributes["scale"].as_float(),
        softcap=node.attributes["softcap"].as_float(),
        local_window_size=node.attributes["window"].as_int() or -1,
    )
    return tuple(made.outputs)


def _turned(graph: Any, node: Any, rows: Any, by: Turned) -> Any:
    positions = next(value for value in graph.inputs if value.name == "position_ids")
    made = insert(
        graph,
        node,
        "RotaryEmbedding",
        [rows, positions, by.cos, by.sin],
        domain=MICROSOFT,
        name="turned",
    )
    return made.outputs[0]


def _rows(graph: Any, node: Any, states: Any) -> Any:
    """Return (batch, new, heads x size) of (batch, heads, new, size)."""
    whole = rows_of(states)
    if whole is not None:
        return whole
    flat = [0, 0, int(states.shape[1]) * int(states.shape[3])]
    turned = insert(graph, node, "Transpose", [states], name="rows", perm=[0, 2, 1, 3]).outputs[0]
    return _reshaped(graph, node, turned, flat)


def _lengths(graph: Any, node: Any, mask: Any, query: Any) -> tuple[Any, Any]:
    """Return (keys of each row but one, keys in all), int32: padding is hidden by the bias."""
    total = insert(graph, node, "Shape", [mask], name="total", start=3, end=4).outputs[0]
    total = _cast(graph, node, total, 6)
    less = insert(graph, node, "Sub", [total, _number(graph, [1], np.int32)], name="last")
    batch = insert(graph, node, "Shape", [query], name="batch", start=0, end=1).outputs[0]
    each = insert(graph, node, "Expand", [less.outputs[0], batch], name="lengths").outputs[0]
    none = store(graph, "memopt.scalar", np.array([], np.int64))
    whole = insert(graph, node, "Reshape", [total, none], name="whole").outputs[0]
    return each, whole


def _bias(graph: Any, node: Any, mask: Any, query: Any) -> Any:
    """Return the mask of padding for every new token: (batch, 1, new, total)."""
    new = insert(graph, node, "Shape", [query], name="new", start=2, end=3).outputs[0]
    ones = _number(graph, [1, 1], np.int64)
    shape = insert(
        graph, node, "Concat", [ones, new, _number(graph, [1], np.int64)], name="wide", axis=0
    ).outputs[0]
    return insert(graph, node, "Expand", [mask, shape], name="padding").outputs[0]


def _standard(graph: Any, node: Any, shared: Shared) -> tuple[Any, ...]:
    query, key, value, past_key, past_value, mask = node.inputs
    heads, kept = int(query.shape[1]), int(key.shape[1])
    keys = insert(graph, node, "Concat", [past_key, key], name="keys", axis=2).outputs[0]
    values = insert(graph, node, "Concat", [past_value, value], name="values", axis=2).outputs[0]
    window = node.attributes["window"].as_int()
    hidden = _once(shared, f"hidden.{window}", lambda: _hidden(graph, node, query, mask, window))
    sizes = {"size": int(query.shape[3]), "width": int(value.shape[3])}
    states, many = keys, values
    if heads != kept:
        states = _repeated(graph, node, keys, heads, kept, sizes["size"])
        many = _repeated(graph, node, values, heads, kept, sizes["width"])
    scale = _number(graph, node.attributes["scale"].as_float(), np.float32)
    scaled = insert(graph, node, "Mul", [query, scale], name="scaled").outputs[0]
    turned = insert(graph, node, "Transpose", [states], name="turned", perm=[0, 1, 3, 2])
    scores = insert(graph, node, "MatMul", [scaled, turned.outputs[0]], name="scores").outputs[0]
    cap = node.attributes["softcap"].as_float()
    if cap:
        limit = _number(graph, cap, np.float32)
        small = insert(graph, node, "Div", [scores, limit], name="small").outputs[0]
        bent = insert(graph, node, "Tanh", [small], name="bent").outputs[0]
        scores = insert(graph, node, "Mul", [bent, limit], name="capped").outputs[0]
    seen = insert(graph, node, "Add", [scores, hidden], name="seen").outputs[0]
    shares = insert(graph, node, "Softmax", [seen], name="shares", axis=-1).outputs[0]
    mixed = insert(graph, node, "MatMul", [shares, many], name="mixed").outputs[0]
    rows = insert(graph, node, "Transpose", [mixed], name="rows", perm=[0, 2, 1, 3]).outputs[0]
    return _reshaped(graph, node, rows, [0, 0, heads * sizes["width"]]), keys, values


def _repeated(graph: Any, node: Any, states: Any, heads: int, kept: int, size: int) -> Any:
    """Return (batch, heads, total, size) of (batch, kept, total, size)."""
    apart = insert(
        graph, node, "Unsqueeze", [states, _number(graph, [2], np.int64)], name="apart"
    ).outputs[0]
    times = _number(graph, [1, 1, heads // kept, 1, 1], np.int64)
    wide = insert(graph, node, "Expand", [apart, times], name="repeated").outputs[0]
    return _reshaped(graph, node, wide, [0, heads, -1, size])


def _hidden(graph: Any, node: Any, query: Any, mask: Any, window: int) -> Any:
    """Return what is added to scores: of padding, of later tokens and of those past the window."""

    def made(op_type: str, *inputs: Any, **attributes: Any) -> Any:
        name = f"hidden/{op_type.lower()}"
        return insert(graph, node, op_type, inputs, name=name, **attributes).outputs[0]

    zero, one = _number(graph, 0, np.int64), _number(graph, 1, np.int64)
    first, second = (_number(graph, [axis], np.int64) for axis in (0, 1))
    total = made("Squeeze", made("Shape", mask, start=3, end=4), first)
    new = made("Squeeze", made("Shape", query, start=2, end=3), first)
    place = made("Unsqueeze", made("Range", made("Sub", total, new), total, one), second)
    other = made("Unsqueeze", made("Range", zero, total, one), first)
    wrong = made("Greater", other, place)
    if window:
        distance = made("Sub", place, other)
        far = made("GreaterOrEqual", distance, _number(graph, window, np.int64))
        wrong = made("Or", wrong, far)
    return made("Where", wrong, _number(graph, MASK_BIAS, np.float32), mask)


def _once(shared: Shared, name: str, make: Callable[[], Any]) -> Any:
    if name not in shared:
        shared[name] = make()
    return shared[name]


def _reshaped(graph: Any, node: Any, states: Any, shape: list[int]) -> Any:
    wanted = _number(graph, shape, np.int64)
    return insert(graph, node, "Reshape", [states, wanted], name="reshaped").outputs[0]


def _cast(graph: Any, node: Any, value: Any, kind: int) -> Any:
    return insert(graph, node, "Cast", [value], name="cast", to=kind).outputs[0]


def _number(graph: Any, value: Any, kind: Any) -> Any:
    array = np.asarray(value, kind)
    name = f"memopt.{array.dtype}.{array.ndim}." + "_".join(map(str, array.reshape(-1).tolist()))
    return store(graph, name, array)
