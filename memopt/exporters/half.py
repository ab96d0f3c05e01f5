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
from memopt.graphs.ir import add_initializer, constant, new_node

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
    wide = _wide_nodes(target.graph, head)
    values = _Values(target.graph)
    for node in list(target.graph):
        kinds = {attribute.type for attribute in node.attributes.values()}
        if kinds & {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}:
            raise ExportError(
                f"operator {node.op_type} has subgraphs: no float16 form", fix="use fp32"
            )
        _convert(node, values, ir.DataType.FLOAT if node in wide else ir.DataType.FLOAT16)
    for index, value in enumerate(target.graph.outputs):
        if value.dtype == ir.DataType.FLOAT16:
            name = value.name
            value.name = f"{name}.fp16"
            node = _cast_node(value, ir.DataType.FLOAT, name, f"{name}.cast")
            target.graph.append(node)
            target.graph.outputs[index] = node.outputs[0]
    values.drop_replaced()
    return ir.to_proto(target)


def _convert(node: Any, values: _Values, dtype: Any) -> None:
    """Let one node compute in ``dtype``."""
    import onnx_ir as ir

    float_type, half_type = ir.DataType.FLOAT, ir.DataType.FLOAT16
    for index, value in enumerate(node.inputs):
        if value is None or value.dtype not in (float_type, half_type):
            continue
        if value.is_initializer():
            if dtype == half_type:
                node.replace_input_with(index, values.half(value))
        elif value.dtype != dtype:
            node.replace_input_with(index, values.cast(value, dtype, node))
    if dtype == half_type and node.op_type == "Cast" and node.attributes["to"].value == 1:
        node.attributes["to"] = ir.AttrInt64("to", int(half_type))
    for value in node.outputs:
        if value.dtype == float_type:
            value.type = ir.TensorType(dtype)


class _Values:
    """The values of a graph in the other type, each made once."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._casts: dict[tuple[Any, Any], Any] = {}
        self._halves: dict[Any, Any] = {}

    def cast(self, value: Any, dtype: Any, before: Any) -> Any:
        """Return a value cast by a node that stands before its first reader."""
        if (value, dtype) not in self._casts:
            name = f"{value.name}.{'fp16' if dtype.name == 'FLOAT16' else 'fp32'}"
            node = _cast_node(value, dtype, name, f"{name}.cast")
            self._graph.insert_before(before, node)
            self._casts[value, dtype] = node.outputs[0]
        return self._casts[value, dtype]

    def half(self, value: Any) -> Any:
        """Return an initializer's float16 form."""
        if value not in self._halves:
            array = np.clip(np.asarray(constant(value)), -_LARGEST, _LARGEST).astype(np.float16)
            self._halves[value] = add_initializer(self._graph, f"{value.name}.fp16", array)
        return self._halves[value]

    def drop_replaced(self) -> None:
        """Give what stands for a weight that nothing reads any more the weight's own name."""
        import onnx_ir as ir

        for value, half in self._halves.items():
            if not value.uses():
                name = value.name
                del self._graph.initializers[name]
                ir.convenience.rename_values([half], [name])


def _cast_node(value: Any, dtype: Any, output: str, name: str) -> Any:
    import onnx_ir as ir

    node = new_node("Cast", [value], output, name=name, to=int(dtype))
    node.outputs[0].shape, node.outputs[0].type = value.shape, ir.TensorType(dtype)
    return node


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
