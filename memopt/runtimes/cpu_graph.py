"""Operators that ONNX Runtime's CPU kernels run faster apart than fused.

Only graphs in the cache are rewritten: the model's own file stays as it was exported, for GPUs and
other tools. ``onnx`` is not there on the edge, so the few fields that matter are described here;
protobuf keeps all others as they are.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

# Part of the cache's key: a cached graph of another revision is made anew.
REVISION = "skip-layer-norm apart"
_FUSED = "SkipLayerNormalization"
# name, number, type, repeated; types as in google.protobuf.FieldDescriptorProto.
_STRING, _FLOAT, _MESSAGE, _INT32, _INT64 = 9, 2, 11, 5, 3
_FIELDS = {
    "Attribute": (
        ("name", 1, _STRING, False),
        ("f", 2, _FLOAT, False),
        ("type", 20, _INT32, False),
    ),
    "Node": (
        ("input", 1, _STRING, True),
        ("output", 2, _STRING, True),
        ("name", 3, _STRING, False),
        ("op_type", 4, _STRING, False),
        ("attribute", 5, "Attribute", True),
        ("domain", 7, _STRING, False),
    ),
    "Graph": (("node", 1, "Node", True),),
    "Opset": (("domain", 1, _STRING, False), ("version", 2, _INT64, False)),
    "Model": (("graph", 7, "Graph", False), ("opset_import", 8, "Opset", True)),
}
# LayerNormalization is a standard operator from here on.
_FIRST_OPSET = 17


def split_skip_layer_norm(path: Path) -> int:
    """Write each SkipLayerNormalization of a graph as Add and LayerNormalization.

    The fused kernel of onnxruntime 1.32 is not vectorised: 0.40 ms for 512 rows of 384 against
    0.06 ms for the operators it stands for, 14 % of a MiniLM in float32 and 22 % in int8.

    Args:
        path: an ONNX file, its weights inside or beside; rewritten in place.

    Returns:
        How many there were.

    Raises:
        google.protobuf.message.DecodeError: not an ONNX file.
    """
    model = _messages()["Model"]()
    model.ParseFromString(path.read_bytes())
    standard = [item.version for item in model.opset_import if not item.domain]
    found = [node.op_type for node in model.graph.node].count(_FUSED)
    if not found or max(standard, default=0) < _FIRST_OPSET:
        return 0
    nodes = []
    for number, node in enumerate(model.graph.node):
        nodes += _apart(node, number) if node.op_type == _FUSED else [node]
    # Copied first: clearing a repeated field invalidates its elements.
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return found


def _apart(node: Any, number: int) -> list[Any]:
    """Return the nodes that compute what one SkipLayerNormalization does."""
    make = _messages()["Node"]
    source, skip, gamma, beta, bias = [*node.input, "", ""][:5]
    name = node.name or f"skip_layer_norm_{number}"
    # The fourth output is the sum itself, which a pre-norm model carries on.
    total = (node.output[3] if len(node.output) > 3 else "") or f"{name}/sum"
    parts = []
    if bias:
        parts.append(make(op_type="Add", input=[source, bias], output=[f"{name}/biased"]))
        source = f"{name}/biased"
    parts.append(make(op_type="Add", input=[source, skip], output=[total]))
    norm = make(op_type="LayerNormalization", output=[node.output[0]])
    norm.input.extend([total, gamma, beta] if beta else [total, gamma])
    norm.attribute.extend(item for item in node.attribute if item.name == "epsilon")
    parts.append(norm)
    for part in parts:
        part.name = f"{name}/{part.op_type}_{part.output[0]}"
    return parts


@cache
def _messages() -> dict[str, Any]:
    """Return the protobuf classes of ``_FIELDS``, numbered as in onnx.proto3."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(
        name="memopt/onnx.proto", package="memopt", syntax="proto3"
    )
    for message, fields in _FIELDS.items():
        described = file.message_type.add(name=message)
        for label, number, kind, repeated in fields:
            field = described.field.add(name=label, number=number, label=3 if repeated else 1)
            if isinstance(kind, str):
                field.type, field.type_name = _MESSAGE, f".memopt.{kind}"
            else:
                field.type = kind
    # A pool of its own: the onnx package describes the same messages in the default one.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = {name: pool.FindMessageTypeByName(f"memopt.{name}") for name in _FIELDS}
    return {name: message_factory.GetMessageClass(found) for name, found in names.items()}
