"""ONNX graphs on onnx_ir: read and changed, and the questions that every change asks of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memopt.extras import require

MICROSOFT = "com.microsoft"
# INT4 tensors and blocked DequantizeLinear came with opset 21 (IR version 10).
_OPSET, _IR = 21, 10
# What changed meaning, not only types, between opset 18 and 21.
_CHANGED = {"GroupNormalization"}


def read_onnx(path: Path) -> Any:
    """Return the ``onnx_ir.Model`` of a file, weights in memory, every node named."""
    onnx = require("onnx", extra="export", why="read ONNX graphs")
    return from_proto(onnx.load(str(path)))


def from_proto(model: Any) -> Any:
    """Return the ``onnx_ir.Model`` of an ``onnx.ModelProto``, every node named."""
    result = require("onnx_ir", extra="export", why="edit ONNX graphs").from_proto(model)
    for number, node in enumerate(result.graph):
        node.name = node.name or f"{node.op_type}_{number}"
    return result


def with_blocks(model: Any) -> Any:
    """Return an ``onnx.ModelProto`` of at least the opset that has weights in blocks."""
    from onnx import version_converter

    entry = next(e for e in model.opset_import if e.domain in ("", "ai.onnx"))
    if entry.version < _OPSET:
        changed = _CHANGED & {node.op_type for node in model.graph.node}
        if changed or entry.version < 18:
            model = version_converter.convert_version(model, _OPSET)
        else:
            entry.version = _OPSET  # the operators in use only gained types
    model.ir_version = max(model.ir_version, _IR)
    return model


def to_proto(model: Any) -> Any:
    """Return a model as an ``onnx.ModelProto`` of its own."""
    import onnx_ir as ir

    proto = ir.to_proto(model)
    # Initializers say their own type and shape.
    told = [value for value in proto.graph.value_info if value.name not in model.graph.initializers]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(told)
    return proto


def drop_unused(model: Any) -> None:
    """Remove nodes and constants that nothing reads any more."""
    from onnx_ir.passes import common

    common.RemoveUnusedNodesPass()(model)


def made_by(value: Any, *op_types: str) -> Any | None:
    """The node that computes ``value`` if it is a standard one of ``op_types``, else None."""
    node = value.producer() if value is not None else None
    if node is not None and node.domain == "" and node.op_type in op_types:
        return node
    return None


def constant(value: Any) -> np.ndarray | None:
    """The array of an initializer or of a Constant node, or None for a computed value."""
    import onnx_ir as ir

    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else np.asarray(tensor.numpy())


def is_constant(value: Any) -> bool:
    """Whether ``value`` is an initializer or a Constant, without reading its bytes."""
    import onnx_ir as ir

    return value is not None and ir.convenience.get_const_tensor(value) is not None


def scalar(value: Any) -> float | None:
    """The number in a constant of one element, or None."""
    if not is_constant(value) or value.shape is None or any(d != 1 for d in value.shape):
        return None
    array = constant(value)
    return None if array is None else float(array.reshape(()).item())


def with_constant(node: Any) -> tuple[Any, Any] | None:
    """``(computed, constant)`` inputs of a commutative binary node in this order, or None."""
    a, b = node.inputs
    if is_constant(b) and not is_constant(a):
        return a, b
    if is_constant(a) and not is_constant(b):
        return b, a
    return None


def dims(value: Any) -> tuple[int | str, ...] | None:
    """The shape as numbers and symbol names; None when the rank or a dimension is unknown."""
    if value is None or value.shape is None:
        return None
    out: list[int | str] = []
    for d in value.shape:
        if isinstance(d, int):
            out.append(d)
        elif d.value is not None:
            out.append(str(d.value))
        else:
            return None
    return tuple(out)


def only_use(value: Any) -> Any | None:
    """The single node that reads ``value``; None when there are more or it is a graph output."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    return next(iter(uses)).node


def integers(node: Any, name: str) -> tuple[int, ...]:
    """The integers of attribute ``name``, empty when absent."""
    attribute = node.attributes.get(name)
    return () if attribute is None else tuple(attribute.as_ints())


def store(graph: Any, name: str, array: Any) -> Any:
    """Return the value of the initializer ``name``, made of ``array`` where it is not there yet."""
    if name in graph.initializers:
        return graph.initializers[name]
    return add_initializer(graph, name, np.asarray(array, order="C"))


def set_constant(value: Any, array: np.ndarray) -> None:
    """Give an initializer another array of its type and shape."""
    import onnx_ir as ir

    value.const_value = ir.tensor(array, name=value.name)


def add_initializer(graph: Any, name: str, array: np.ndarray) -> Any:
    """Register ``array`` as the initializer ``name`` (made unique) and return its value."""
    import onnx_ir as ir

    unique, n = name, 1
    while unique in graph.initializers:
        unique, n = f"{name}.{n}", n + 1
    value = ir.Value(
        name=unique,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array, name=unique),
    )
    graph.initializers[unique] = value
    return value


def insert(
    graph: Any,
    before: Any,
    op_type: str,
    inputs: Sequence[Any],
    *,
    outputs: int = 1,
    domain: str = "",
    name: str,
    **attributes: Any,
) -> Any:
    """Create a node right before ``before`` and return it; ``name`` is made unique."""
    import onnx_ir as ir

    taken: set[str] = graph.meta.setdefault("memopt.names", set())
    wanted, n = name, 1
    while name in taken:
        name, n = f"{wanted}.{n}", n + 1
    taken.add(name)
    node = ir.node(
        op_type, inputs, attributes or None, domain=domain, num_outputs=outputs, name=name
    )
    for i, output in enumerate(node.outputs):
        output.name = f"{name}.output" if i == 0 else f"{name}.output_{i}"
    graph.insert_before(before, node)
    return node


def new_node(op_type: str, inputs: Sequence[Any], output: str, **attributes: Any) -> Any:
    """Create a node, not in a graph yet, whose one output is called ``output``.

    ``domain`` and ``name`` may be among the attributes; the name is made of the output else.
    """
    import onnx_ir as ir

    domain = attributes.pop("domain", "")
    name = attributes.pop("name", f"quantized/{output}")
    node = ir.node(op_type, inputs, attributes or None, domain=domain, name=name)
    node.outputs[0].name = output
    return node


def replace_node(graph: Any, old: Any, new: Sequence[Any]) -> None:
    """Put nodes in the place of one; the last one's output takes the name of the old one's."""
    replace_nodes(graph, [old], new)


def replace_nodes(graph: Any, old: Sequence[Any], new: Sequence[Any]) -> None:
    """Put nodes in the place of several; the last one's outputs take the names of theirs."""
    import onnx_ir as ir

    values = [node.outputs[0] for node in old], new[-1].outputs[: len(old)]
    ir.convenience.replace_nodes_and_values(graph, old[0], old, new, *values)


def split_node(graph: Any, value: Any, sizes: Sequence[int]) -> Any:
    """Create a node, not in the graph yet, that cuts the last axis of ``value``."""
    import onnx_ir as ir

    cut = store(graph, f"sizes_{'_'.join(map(str, sizes))}", np.array(sizes, np.int64))
    node = ir.node("Split", [value, cut], {"axis": -1}, num_outputs=len(sizes))
    node.name = f"quantized/{value.name}/split"
    for place, output in enumerate(node.outputs):
        output.name = f"{value.name}_{place}"
    return node


def replace(old: Any, new: Any) -> None:
    """Let every reader of ``old`` read ``new``; keeps the name of a graph output."""
    import onnx_ir as ir

    new.shape, new.type = old.shape, old.type
    was_output, name = old.is_graph_output(), old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if was_output:
        old.name, new.name = f"{name}.before_fusion", name


def shared_parent(names: Sequence[str]) -> str | None:
    """The dotted path that ``names`` share, without their last two parts' differences.

    >>> shared_parent(["a.self.query.weight", "a.self.key.weight", "a.self.value.weight"])
    'a.self'
    >>> shared_parent(["x.weight", "y.weight"]) is None
    True
    """
    parts = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for step in zip(*parts, strict=False):
        if len(set(step)) != 1:
            break
        shared.append(step[0])
    return ".".join(shared) or None
