"""Fuse the sum of word, position and type rows and its layer norm into one operator.

Operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.EmbedLayerNormalization
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memopt.exporters.fuse_norm import epsilon, is_last_axis_norm
from memopt.exporters.fuse_probe import Probe
from memopt.graphs.ir import (
    MICROSOFT,
    add_initializer,
    constant,
    dims,
    insert,
    is_constant,
    made_by,
    replace,
)


def _table(value: Any) -> tuple[Any, Any] | None:
    """``(table, indices)`` of a lookup in a constant (rows, width) table."""
    node = made_by(value, "Gather")
    if node is None or not is_constant(node.inputs[0]) or len(dims(node.inputs[0]) or ()) != 2:
        return None
    axis = node.attributes.get("axis")
    return None if axis is not None and axis.as_int() != 0 else (node.inputs[0], node.inputs[1])


def _addends(value: Any) -> list[Any]:
    add = made_by(value, "Add")
    if add is None:
        return [value]
    return [leaf for v in add.inputs for leaf in _addends(v)]


def fuse_embeddings(graph: Any, probe: Probe, inputs: dict[str, Any], problems: list[str]) -> int:
    """Put EmbedLayerNormalization in place of the sum of word, position and type rows + norm.

    Returns:
        1 when fused, else 0.
    """
    ids, types = inputs.get("input_ids"), inputs.get("token_type_ids")
    if ids is None:
        return 0
    for norm in list(graph):
        if norm.op_type != "LayerNormalization" or norm.domain or not is_last_axis_norm(norm):
            continue
        leaves = _addends(norm.inputs[0])
        if not any(t is not None and t[1] is ids for t in map(_table, leaves)):
            continue
        tables = [t for t in map(_table, leaves) if t is not None]
        roles = _roles(tables, ids, types, probe)
        if roles is None or len(tables) != len(leaves) or len(norm.inputs) < 3:
            problems.append(f"embedding {norm.name}: not a sum of word, position and type rows")
            return 0
        _emit_embeddings(graph, probe, norm, ids, types, roles)
        return 1
    return 0


@dataclass(slots=True)
class EmbeddingTables:
    """The constant tables of a text embedding and the value that looks up positions.

    ``fixed`` is a type table of which every token takes row 0.
    """

    word: Any = None
    position: Any = None
    where: Any = None
    segment: Any = None
    fixed: Any = None


def _roles(
    tables: list[tuple[Any, Any]], ids: Any, types: Any, probe: Probe
) -> EmbeddingTables | None:
    roles = EmbeddingTables()
    for table, index in tables:
        if index is ids and roles.word is None:
            roles.word = table
        elif types is not None and index is types and roles.segment is None:
            roles.segment = table
        elif roles.fixed is None and probe.is_zero(index):
            roles.fixed = table
        elif roles.position is None:
            roles.position, roles.where = table, index
        else:
            return None
    return roles if roles.word is not None and roles.position is not None else None


def _emit_embeddings(
    graph: Any, probe: Probe, norm: Any, ids: Any, types: Any, roles: EmbeddingTables
) -> None:
    position, segment = roles.position, roles.segment
    rows, fixed = constant(position), constant(roles.fixed)
    if rows is not None and fixed is not None:
        name = f"{roles.position.name}.with_type_0"
        position = add_initializer(graph, name, rows + fixed[0])
    args = [
        _int32(graph, norm, ids),
        _int32(graph, norm, types) if segment is not None else None,
        roles.word,
        position,
        segment,
        norm.inputs[1],
        norm.inputs[2],
    ]
    if not probe.is_range(roles.where):
        args += [None, _int32(graph, norm, roles.where)]
    node = insert(
        graph,
        norm,
        "EmbedLayerNormalization",
        args,
        outputs=2,
        domain=MICROSOFT,
        name=f"embed_{norm.name}",
        epsilon=epsilon(norm),
    )
    node.outputs[1].name = f"embed_{norm.name}.mask_index"
    replace(norm.outputs[0], node.outputs[0])


def _int32(graph: Any, before: Any, value: Any) -> Any:
    import onnx_ir as ir

    cast = insert(
        graph, before, "Cast", [value], name=f"{value.name}_int32", to=int(ir.DataType.INT32)
    )
    cast.outputs[0].shape = value.shape
    cast.outputs[0].type = ir.TensorType(ir.DataType.INT32)
    return cast.outputs[0]
