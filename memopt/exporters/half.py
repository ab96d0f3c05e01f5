"""A float32 graph to float16: weights and arithmetic, with float32 inputs and outputs.

What squares or sums activations stays in float32, because its results pass float16's 65,504 long
before the activations do: root-mean-square norms, sums, and the pooling head behind
``last_hidden_state``. LayerNormalization needs no such care, as ONNX computes its mean and variance
in float32 whatever the input (attribute ``stash_type``).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from memopt.errors import ExportError
from memopt.extras import require

# Sums and squares, and operators that have a dtype or value of their own.
WIDE = frozenset(
    {"InstanceNormalization", "Pow", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2"}
    | {"CumSum", "Range", "Constant", "ConstantOfShape", "RandomNormalLike", "Resize"}
)
# From a mean of squares to the value it normalises: x * 1 / sqrt(mean + epsilon).
_MEANS = frozenset({"ReduceMean", "ReduceSum"})
_ON_THE_WAY = frozenset({"Add", "Sqrt", "Reciprocal", "Clip"})
_ENDS = frozenset({"Mul", "Div"})
_LARGEST = float(np.finfo(np.float16).max)


def to_half(model: Any, *, head: str = "last_hidden_state") -> Any:
    """Return a float16 copy of an ``onnx.ModelProto`` of standard operators.

    Graph inputs and outputs keep float32. A weight keeps its name; one that float16 and float32
    nodes share exists twice, the float16 one as ``<name>.fp16``. Constants past float16's range
    (a mask's -3.4e38) become its largest value.

    Args:
        model: the float32 graph; not modified.
        head: everything that is computed from this output stays in float32.

    Raises:
        ExportError: the graph has control flow (If, Loop, Scan).
    """
    ir = require("onnx_ir", extra="export", why="convert a graph to float16")
    from onnx_ir.passes import common

    target = ir.from_proto(model)
    common.ShapeInferencePass()(target)
    graph = target.graph
    float_type, half_type = ir.DataType.FLOAT, ir.DataType.FLOAT16
    wide = _wide_nodes(graph, head)
    casts: dict[tuple[Any, Any], Any] = {}
    halves: dict[Any, Any] = {}

    def cast(value: Any, dtype: Any, before: Any) -> Any:
        if (value, dtype) not in casts:
            suffix = "fp16" if dtype == half_type else "fp32"
            node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{value.name}.{suffix}.cast")
            made = node.outputs[0]
            made.name, made.shape = f"{value.name}.{suffix}", value.shape
            made.type = ir.TensorType(dtype)
            graph.insert_before(before, node)
            casts[value, dtype] = made
        return casts[value, dtype]

    for node in list(graph):
        if any(
            a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in _attributes(node)
        ):
            raise ExportError(
                f"operator {node.op_type} has subgraphs: no float16 form", fix="use fp32"
            )
        dtype = float_type if node in wide else half_type
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in (float_type, half_type):
                continue
            if value.is_initializer():
                if dtype == half_type:
                    if value not in halves:
                        halves[value] = _half(graph, value, ir)
                    node.replace_input_with(index, halves[value])
            elif value.dtype != dtype:
                node.replace_input_with(index, cast(value, dtype, node))
        if dtype == half_type and node.op_type == "Cast" and node.attributes["to"].value == 1:
            node.attributes["to"] = ir.AttrInt64("to", int(half_type))
        for value in node.outputs:
            if value.dtype == float_type:
                value.type = ir.TensorType(dtype)
    for index, value in enumerate(graph.outputs):
        if value.dtype == half_type:
            name = value.name
            value.name = f"{name}.fp16"
            node = ir.node("Cast", [value], {"to": int(float_type)}, name=f"{name}.cast")
            node.outputs[0].name, node.outputs[0].shape = name, value.shape
            node.outputs[0].type = ir.TensorType(float_type)
            graph.append(node)
            graph.outputs[index] = node.outputs[0]
    for value, half in halves.items():
        if not value.uses():
            name = value.name
            del graph.initializers[name]
            ir.convenience.rename_values([half], [name])
    return ir.to_proto(target)


def _attributes(node: Any) -> Any:
    return node.attributes.values()


def _half(graph: Any, value: Any, ir: Any) -> Any:
    array = np.asarray(value.const_value.numpy())
    name = f"{value.name}.fp16"
    made = ir.Value(
        name=name,
        shape=value.shape,
        type=ir.TensorType(ir.DataType.FLOAT16),
        const_value=ir.tensor(np.clip(array, -_LARGEST, _LARGEST).astype(np.float16), name=name),
    )
    graph.initializers[name] = made
    return made


def _wide_nodes(graph: Any, head: str) -> set[Any]:
    behind = {value for value in graph.outputs if value.name == head}
    means: set[Any] = set()
    wide = set()
    for node in graph:
        inputs, outputs = set(node.inputs), set(node.outputs)
        on_the_way = bool(means & inputs)
        if behind & inputs:
            behind |= outputs
            wide.add(node)
        elif node.op_type in WIDE or (on_the_way and node.op_type in _ON_THE_WAY | _ENDS):
            wide.add(node)
            if node.op_type in _MEANS or (on_the_way and node.op_type in _ON_THE_WAY):
                means |= outputs
    return wide
