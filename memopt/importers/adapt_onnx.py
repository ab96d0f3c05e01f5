"""Add to an ONNX graph what memopt needs of it, in standard operators of the graph's own opset.

What there is stays as it is: inputs get a cast, padding and another name in front, and the head
comes behind the outputs, which stay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from memopt.errors import ExportError
from memopt.graphs.ir import add_initializer, new_node, read_onnx, to_proto
from memopt.importers.changes import Changes, InputChange
from memopt.importers.roles import AddedHead

# Where ReduceSum, and ReduceMax and ReduceMean, take their axes as an input.
_SUM_AXES, _MAX_AXES = 13, 18
# Reshape, Pad and the broadcasting of the others mean what they mean today since then.
OLDEST_OPSET = 11
# As in memopt.runtimes.heads: exactly 0 in a softmax, and still a float16.
_MASK_BIAS = -10_000.0


def adapt_onnx(path: Path, changes: Changes, opset: int) -> Any:
    """Return the ``onnx.ModelProto`` of a graph with what it needs added, weights in memory.

    Raises:
        ExportError: the graph is of an opset that is too old to be added to.
    """
    if opset < OLDEST_OPSET:
        raise ExportError(
            f"{path} is of opset {opset}, and what it needs is added from {OLDEST_OPSET} on",
            fix="convert it with onnx.version_converter first, or use --task graph",
        )
    model = read_onnx(path)
    builder = _Builder(model.graph, opset)
    for change in changes.inputs:
        builder.feed(change)
    if changes.head is not None:
        builder.answer(changes.head)
    builder.finish()
    return to_proto(model)


class _Builder:
    """Nodes before and behind a graph's own."""

    def __init__(self, graph: Any, opset: int) -> None:
        self.graph = graph
        self.opset = opset
        self.number = 0
        self.before: list[Any] = []
        self.behind: list[Any] = []
        self.masked: Any = None  # the mask that the graph itself gets
        self.width: Any = None  # tokens of an input that is padded, int64 (1,)
        self.length: int | None = None  # what it is padded to

    def add(self, where: list[Any], op_type: str, inputs: list[Any], **attributes: Any) -> Any:
        """Append a node; return its output."""
        self.number += 1
        node = new_node(op_type, inputs, f"memopt_{self.number}", **attributes)
        where.append(node)
        return node.outputs[0]

    def constant(self, values: Any, dtype: Any = np.int64) -> Any:
        """Return an initializer of these values."""
        return add_initializer(self.graph, "memopt_constant", np.asarray(values, dtype))

    def feed(self, change: InputChange) -> None:
        """Make one input what the front end gives."""
        import onnx_ir as ir

        place = next(i for i, v in enumerate(self.graph.inputs) if v.name == change.port.name)
        old = self.graph.inputs[place]
        self._step_aside(change.name, old)
        if (change.port.dtype, change.length) == (change.dtype, None):
            old.name = change.name
            value = old
        else:
            shape = list(change.port.shape or ())
            if change.length is not None:
                shape[1] = "sequence"
            old.name = f"{change.port.name}__inner"
            new = ir.Value(
                name=change.name,
                shape=ir.Shape(shape),
                type=ir.TensorType(ir.DataType.from_numpy(np.dtype(change.dtype))),
            )
            value = new
            if change.length is not None:
                value = self._padded(value, change.length)
            if change.port.dtype != change.dtype:
                value = self.add(self.before, "Cast", [value], to=int(old.dtype))
            ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
            self.graph.inputs[place] = new
        if change.name == "attention_mask":
            self.masked = value

    def _padded(self, value: Any, length: int) -> Any:
        width = self.add(self.before, "Shape", [value])
        width = self.add(self.before, "Gather", [width, self.constant([1])], axis=0)
        missing = self.add(self.before, "Sub", [self.constant([length]), width])
        pads = [self.constant([0, 0, 0]), missing]
        self.width, self.length = width, length
        return self.add(self.before, "Pad", [value, self.add(self.before, "Concat", pads, axis=0)])

    def answer(self, head: AddedHead) -> None:
        """Add the head; its output is the last."""
        sources = [next(v for v in self.graph.outputs if v.name == n) for n in head.sources]
        value = getattr(self, f"_{head.kind}")(head, *sources)
        for old in list(self.graph.outputs):
            if old.name == head.output:
                self.graph.outputs.remove(old)
        self._step_aside(head.output, value)
        value.name = head.output
        self.graph.outputs.append(value)

    def _vector(self, head: AddedHead, source: Any) -> Any:
        import onnx_ir as ir

        value = source
        if source.dtype != ir.DataType.FLOAT:
            value = self.add(self.behind, "Cast", [value], to=int(ir.DataType.FLOAT))
        if head.pooling:
            value = getattr(self, f"_{head.pooling}")(value)
        if head.normalize:
            squares = self._sum(self.add(self.behind, "Mul", [value, value]), -1)
            length = self.add(self.behind, "Sqrt", [squares])
            floor = self.constant(1e-12, np.float32)
            length = self.add(self.behind, "Max", [length, floor])
            value = self.add(self.behind, "Div", [value, length])
        if head.keep is not None:
            ends = [self.constant([n]) for n in (0, head.keep, 1)]
            value = self.add(self.behind, "Slice", [value, *ends])
        value = self.add(self.behind, "Identity", [value])
        width = source.shape[-1] if source.shape is not None else "width"
        size = width if head.keep is None else head.keep
        value.shape = ir.Shape([source.shape[0] if source.shape is not None else "batch", size])
        value.type = ir.TensorType(ir.DataType.FLOAT)
        return value

    def _mean(self, tokens: Any) -> Any:
        if self.masked is None:
            return self._mean_of_all(tokens)
        weights = self._mask(tokens)
        total = self._sum(self.add(self.behind, "Mul", [tokens, weights]), 1, keep=False)
        count = self._sum(weights, 1, keep=False)
        floor = self.constant(1e-9, np.float32)
        count = self.add(self.behind, "Max", [count, floor])
        return self.add(self.behind, "Div", [total, count])

    def _mean_of_all(self, tokens: Any) -> Any:
        return self._reduced("ReduceMean", tokens)

    def _cls(self, tokens: Any) -> Any:
        # memopt pads on the right: the first token is the first that counts.
        return self.add(self.behind, "Gather", [tokens, self.constant(0)], axis=1)

    def _max(self, tokens: Any) -> Any:
        if self.masked is not None:
            hidden = self.add(
                self.behind, "Sub", [self.constant(1.0, np.float32), self._mask(tokens)]
            )
            bias = self.add(self.behind, "Mul", [hidden, self.constant(_MASK_BIAS, np.float32)])
            tokens = self.add(self.behind, "Add", [tokens, bias])
        return self._reduced("ReduceMax", tokens)

    def _reduced(self, op_type: str, tokens: Any) -> Any:
        if self.opset < _MAX_AXES:
            return self.add(self.behind, op_type, [tokens], axes=[1], keepdims=0)
        return self.add(self.behind, op_type, [tokens, self.constant([1])], keepdims=0)

    def _mask(self, tokens: Any) -> Any:
        """Return the mask as float32 (batch, tokens, 1)."""
        mask = self.add(self.behind, "Cast", [self.masked], to=1)
        return self.add(self.behind, "Reshape", [mask, self.constant([0, -1, 1])])

    def _sum(self, value: Any, axis: int, *, keep: bool = True) -> Any:
        if self.opset < _SUM_AXES:
            return self.add(self.behind, "ReduceSum", [value], axes=[axis], keepdims=int(keep))
        axes = self.constant([axis])
        return self.add(self.behind, "ReduceSum", [value, axes], keepdims=int(keep))

    def _spans(self, head: AddedHead, start: Any, end: Any) -> Any:
        last = [
            self.add(self.behind, "Reshape", [side, self.constant([0, -1, 1])])
            for side in (start, end)
        ]
        return self._tokens_of(self.add(self.behind, "Concat", last, axis=2), start, 2)

    def _boxes(self, head: AddedHead, logits: Any, boxes: Any) -> Any:
        value = self.add(self.behind, "Concat", [logits, boxes], axis=2)
        sizes = [side.shape[-1] for side in (logits, boxes) if side.shape is not None]
        known = len(sizes) == 2 and all(isinstance(size, int) for size in sizes)
        return self._tokens_of(value, logits, sum(sizes) if known else "width")

    def _tokens_of(self, value: Any, like: Any, width: Any) -> Any:
        import onnx_ir as ir

        first = list(like.shape[:2]) if like.shape is not None else ["batch", "tokens"]
        value.shape = ir.Shape([*first, width])
        value.type = ir.TensorType(like.dtype)
        return value

    def _step_aside(self, name: str, value: Any) -> None:
        """Let no other value be called like an input or output of ours."""
        inner = [out for node in self.graph for out in node.outputs]
        for other in (*self.graph.inputs, *self.graph.initializers.values(), *inner):
            if other is not value and other.name == name:
                other.name = f"{name}__inner"

    def finish(self) -> None:
        """Put the new nodes into the graph; outputs of padded tokens get their own length."""
        if self.width is not None:
            self._cut_outputs()
        first = next(iter(self.graph))
        for node in self.before:
            self.graph.insert_before(first, node)
        for node in self.behind:
            self.graph.append(node)

    def _cut_outputs(self) -> None:
        import onnx_ir as ir

        for place, old in enumerate(list(self.graph.outputs)):
            if old.shape is None or len(old.shape) < 2 or old.name == "sentence_embedding":
                continue
            if old.shape[1] != self.length:
                continue
            ends = [self.constant([0]), self.width, self.constant([1])]
            new = self.add(self.behind, "Slice", [old, *ends])
            name, old.name = old.name, f"{old.name}__inner"
            new.name, new.type = name, old.type
            new.shape = ir.Shape([old.shape[0], "sequence", *old.shape[2:]])
            self.graph.outputs[place] = new
