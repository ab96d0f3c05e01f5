"""Find out what a mask or position subgraph computes by running it, not by its shape.

The exporter writes the attention mask in a different way for every model, attention
implementation and release of transformers (20 nodes of Range, GatherND, Where for a plain padding
mask). What matters is the function: so the subgraph is cut out, run on masks chosen to tell the
candidates apart, and compared with each of them exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from memopt.errors import first_line
from memopt.extras import require
from memopt.graphs.ir import constant
from memopt.graphs.session import open_onnx
from memopt.runtimes.onnx import session_options

# Below this a bias means "do not look here": exp(-1e4) is zero in float32 and in float64.
MASKED = -1e4
# A slice that weighs more than this is not a mask (an embedding table, a linear layer).
MAX_SLICE_ELEMENTS = 1 << 22
# A window or bucket constant past this would need a probe too long to run at export.
MAX_WINDOW = 2048
HEAVY_OPS = frozenset(
    {"MatMul", "Gemm", "Conv", "LayerNormalization", "Softmax", "Gelu", "Attention"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskKind:
    """What a bias added to attention scores does.

    Attributes:
        padding: keys where attention_mask is 0 are hidden.
        causal: keys after the query are hidden.
        fill: the finite number added to hidden scores, float32.
        general: anything else: the bias must be kept as a tensor.
        shape: what a general bias came out as on one of the inputs tried, () if it was not run.
        reason: why it is general, empty otherwise.
    """

    padding: bool = False
    causal: bool = False
    fill: float = -10000.0
    general: bool = False
    shape: tuple[int, ...] = ()
    reason: str = ""


def upstream(value: Any) -> tuple[list[Any], set[str]]:
    """The nodes that ``value`` depends on and the names of the graph inputs among them."""
    nodes: dict[Any, None] = {}
    inputs: set[str] = set()
    stack, seen = [value], set()
    while stack:
        v = stack.pop()
        if v is None or id(v) in seen:
            continue
        seen.add(id(v))
        if v.is_graph_input():
            inputs.add(v.name)
        node = v.producer()
        if node is not None and node not in nodes:
            nodes[node] = None
            stack.extend(node.inputs)
    return list(nodes), inputs


class ProbeError(Exception):
    """A subgraph that does not run on the inputs chosen for it: nothing is known about it."""


class Probe:
    """Runs cut-out subgraphs of one model on chosen inputs.

    Args:
        model: an ``onnx_ir.Model`` of the portable graph. It is not modified.
        positions: the longest sequence the model takes.
        vocabulary: token ids are drawn below this number.
        types: token type ids are drawn below this number.
    """

    def __init__(self, model: Any, *, positions: int, vocabulary: int, types: int = 2) -> None:
        self._model = model
        self._positions = positions
        self._vocabulary = max(2, vocabulary)
        self._types = max(1, types)

    def _blocked(self, value: Any) -> str:
        nodes, inputs = upstream(value)
        heavy = sorted({n.op_type for n in nodes} & HEAVY_OPS)
        if heavy:
            return f"depends on activations ({', '.join(heavy)})"
        extra = inputs - {"attention_mask", "input_ids", "token_type_ids"}
        if extra:
            return f"depends on the input {sorted(extra)[0]}"
        size = 0
        for node in nodes:
            for v in node.inputs:
                if v is not None and v.is_initializer() and v.shape is not None:
                    size += int(np.prod([int(d) for d in v.shape]))
        return f"reads {size} constants" if size > MAX_SLICE_ELEMENTS else ""

    def _longest(self, value: Any) -> int | None:
        """A sequence longer than every window or bucket constant in the subgraph, or None."""
        longest = 4
        for node in upstream(value)[0]:
            for v in node.inputs:
                if v is None or v.is_graph_input() or v.dtype is None or v.dtype.name != "INT64":
                    continue
                array = constant(v)
                if array is not None and array.size == 1 and 0 < abs(int(array.item())) < 1 << 31:
                    longest = max(longest, abs(int(array.item())))
        if longest >= self._positions:
            return self._positions
        return None if longest > MAX_WINDOW else min(longest + 3, self._positions)

    def run(self, value: Any, feeds: list[Mapping[str, np.ndarray]]) -> list[np.ndarray]:
        """Compute ``value`` for each of ``feeds`` (graph inputs by name).

        Raises:
            ProbeError: ONNX Runtime cannot run the subgraph on them.
        """
        import onnx_ir as ir

        ort = require("onnxruntime", extra="cpu", why="fuse a graph")
        errors = ort.capi.onnxruntime_pybind11_state
        names = sorted(upstream(value)[1])
        graph = ir.convenience.extract(self._model.graph, names, [value.name])
        cut = ir.Model(graph, ir_version=self._model.ir_version)
        graph.opset_imports.update(self._model.graph.opset_imports)
        options = session_options(1)
        options.log_severity_level = 4
        proto = ir.to_proto(cut).SerializeToString()
        try:
            run = open_onnx(proto, [value.name], options)
            return [np.asarray(run(feed)[0]) for feed in feeds]
        except (errors.Fail, errors.InvalidArgument, errors.RuntimeException) as error:
            raise ProbeError(first_line(error)) from error

    def _feeds(self, longest: int) -> list[dict[str, np.ndarray]]:
        rng = np.random.default_rng(0)
        feeds = []
        for batch, length in ((2, 1), (6, min(5, self._positions)), (3, longest)):
            mask = rng.integers(0, 2, (batch, length))
            mask[0] = 1
            if batch > 3:
                mask[1] = 0
                mask[2, : length // 2] = 0
                mask[2, length // 2 :] = 1
                mask[3] = 1 - mask[2]
            mask[-1, -1] = 0
            feeds.append(
                {
                    "attention_mask": mask.astype(np.int64),
                    "input_ids": rng.integers(0, self._vocabulary, (batch, length)),
                    "token_type_ids": rng.integers(0, self._types, (batch, length)),
                }
            )
        return feeds

    def mask(self, bias: Any) -> MaskKind:
        """Classify the tensor ``bias`` that is added to scores of (batch, heads, query, key)."""
        reason = self._blocked(bias)
        if reason:
            return MaskKind(general=True, reason=reason)
        longest = self._longest(bias)
        if longest is None:
            return MaskKind(general=True, reason=f"has a window wider than {MAX_WINDOW}")
        feeds = self._feeds(longest)
        masks = [feed["attention_mask"] for feed in feeds]
        try:
            results = self.run(bias, list(feeds))
        except ProbeError as error:
            return MaskKind(general=True, reason=f"cannot be tried out ({error})")
        kinds = [_classify(result, mask) for result, mask in zip(results, masks, strict=True)]
        first = max(kinds, key=lambda k: (k.general, k.causal, k.padding))
        if first.general:
            return next(k for k in kinds if k.general)
        fill = min(k.fill for k in kinds)
        for result, mask in zip(results, masks, strict=True):
            if not _agrees(result, mask, first.padding, first.causal):
                return MaskKind(
                    general=True, shape=result.shape, reason="not one mask at all shapes"
                )
        return MaskKind(padding=first.padding, causal=first.causal, fill=fill)

    def is_range(self, value: Any) -> bool:
        """Whether ``value`` counts 0, 1, 2, ... along the sequence, whatever the input."""
        return self._always(value, lambda length: np.arange(length))

    def is_zero(self, value: Any) -> bool:
        """Whether ``value`` is 0 for every token, whatever the input."""
        return self._always(value, lambda length: np.zeros(length, np.int64))

    def _always(self, value: Any, row: Callable[[int], np.ndarray]) -> bool:
        if self._blocked(value):
            return False
        feeds = self._feeds(min(self._positions, MAX_WINDOW))
        try:
            results = self.run(value, list(feeds))
        except ProbeError:
            return False
        for feed, result in zip(feeds, results, strict=True):
            shape = feed["input_ids"].shape
            if result.shape not in {shape, (1, shape[1]), (shape[1],)}:
                return False
            if not np.array_equal(
                np.broadcast_to(result, shape), np.broadcast_to(row(shape[1]), shape)
            ):
                return False
        return True


def _expected(mask: np.ndarray, padding: bool, causal: bool) -> np.ndarray:
    batch, length = mask.shape
    hidden = np.zeros((batch, 1, length, length), bool)
    if padding:
        hidden |= (mask == 0)[:, None, None, :]
    if causal:
        hidden |= np.triu(np.ones((length, length), bool), 1)
    return hidden


def _agrees(bias: np.ndarray, mask: np.ndarray, padding: bool, causal: bool) -> bool:
    expected = _expected(mask, padding, causal)
    hidden = bias <= MASKED
    try:
        shape = np.broadcast_shapes(hidden.shape, expected.shape)
    except ValueError:
        return False  # a mask over something else than the sequence: Swin's shifted windows
    return np.array_equal(np.broadcast_to(hidden, shape), np.broadcast_to(expected, shape))


def _classify(bias: np.ndarray, mask: np.ndarray) -> MaskKind:
    hidden = bias <= MASKED
    if bias.dtype != np.float32 or np.any(bias[~hidden] != 0):
        return MaskKind(general=True, shape=bias.shape, reason="adds values that are not a mask")
    fill = float(np.finfo(np.float32).min)
    if hidden.any():
        fill = max(float(bias[hidden].min()), fill)
    for padding, causal in ((False, False), (True, False), (False, True), (True, True)):
        if _agrees(bias, mask, padding, causal):
            return MaskKind(padding=padding, causal=causal, fill=fill)
    return MaskKind(
        general=True, shape=bias.shape, reason="hides other keys than padding and future"
    )
