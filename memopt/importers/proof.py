"""Run an imported graph on inputs of several lengths, and what was added to it beside numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memopt.bundle import Bundle, Variant
from memopt.errors import ExportError, brief
from memopt.graphs.samples import samples
from memopt.graphs.session import Observe, feeds, open_onnx, open_openvino
from memopt.importers.changes import Changes
from memopt.importers.graph_file import GraphFile
from memopt.importers.roles import AddedHead
from memopt.runtimes.vectors import row_cosines

Array = NDArray[Any]
# What is added computes in float32 what numpy does: only the order of sums differs. Of half floats
# and integers a runtime may round otherwise where it fuses what was added with what was there.
TOLERANCES = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 1e-2}
QUANTIZED_TOLERANCE = 1e-2


def open_source(graph: GraphFile, outputs: Sequence[str]) -> Observe:
    """Open a graph as it is.

    Raises:
        ExportError: its runtime cannot open it.
    """
    try:
        if graph.format == "openvino":
            names = [port.name for port in graph.outputs]
            places = [names.index(name) for name in outputs]
            return open_openvino(graph.path, places, {"INFERENCE_PRECISION_HINT": "f32"})
        return open_onnx(graph.path, outputs)
    except Exception as error:
        runtime = "OpenVINO" if graph.format == "openvino" else "ONNX Runtime"
        raise ExportError(
            f"{runtime} cannot open {graph.path}: {brief(error)}",
            fix="export it again, with operators of a version that the runtime has",
        ) from error


def prove(bundle: Bundle, variant: Variant, graph: GraphFile, changes: Changes) -> dict[str, Any]:
    """Return the record of a check: the bundle's graph beside the one it was made of.

    Args:
        bundle: of the task, with its front end's files; its graphs lie in its folder.
        variant: that engines will run.
        graph: as somebody made it.
        changes: what was added.

    Raises:
        ExportError: it cannot be run on what the front end gives, its answer is not finite or of
            another shape than its task's, or what was added computes something else than numpy.
    """
    sources = changes.head.sources if changes.head else (variant.output,)
    before = open_source(graph, sources)
    path = bundle.file(variant)
    if variant.format == "openvino":
        after = open_openvino(path, [variant.output], {"INFERENCE_PRECISION_HINT": "f32"})
    else:
        after = open_onnx(path, [variant.output])
    items = samples(bundle)
    inputs = variant.inputs
    record: list[dict[str, Any]] = []
    alone: dict[int, Array] = {}
    errors, cosines, invariance = [0.0], [1.0], [0.0]
    for size in (1, 3):
        for rows, feed in feeds(bundle, items, inputs, batch=size):
            got = np.asarray(_run(after, feed, graph)[0], np.float32)
            wanted = _expected(before, feed, changes, graph)
            _check_answer(got, wanted, bundle, graph)
            errors.append(_relative(got, wanted))
            cosines.append(_cosine(got, wanted))
            record.append({"batch": len(rows), "size": [int(n) for n in feed[inputs[0]].shape[1:]]})
            for line, row in enumerate(rows):
                if size == 1:
                    alone[row] = got[line]
                elif got.ndim == 2:
                    invariance.append(_relative(got[line], alone[row]))
    if max(errors) > TOLERANCES.get(graph.precision, QUANTIZED_TOLERANCE):
        raise ExportError(
            f"what was added to {graph.path.name} gives other answers than numpy (relative error "
            f"{max(errors):.1e})",
            fix="this is memopt's fault: report the graph",
        )
    return {
        "reference": "the imported graph",
        "shapes": record,
        "max_abs_error": max(errors),
        "min_cosine": min(cosines),
        "batch_invariance": max(invariance),
    }


def _run(observe: Observe, feed: Mapping[str, Array], graph: GraphFile) -> Sequence[Array]:
    try:
        return observe(feed)
    except Exception as error:
        shapes = ", ".join(f"{name} {value.shape}" for name, value in feed.items())
        raise ExportError(
            f"{graph.path} cannot be run on {shapes}: {brief(error)}",
            fix="say --max-length where it takes fewer tokens, or give the tokenizer or "
            "preprocessor_config.json that it was made with",
        ) from error


def _expected(
    before: Observe, feed: Mapping[str, Array], changes: Changes, graph: GraphFile
) -> Array:
    """Return what the answer should be: the graph's own outputs, with the head in numpy."""
    fed: dict[str, Array] = {}
    for change in changes.inputs:
        value = feed[change.name]
        if change.length is not None:
            value = np.pad(value, ((0, 0), (0, change.length - value.shape[1])))
        fed[change.port.name] = value.astype(change.port.dtype)
    values = [np.asarray(value, np.float32) for value in _run(before, fed, graph)]
    width = feed["input_ids"].shape[1] if "input_ids" in feed else None
    if width and changes.length:
        values = [v[:, :width] if v.ndim > 2 or _per_token(v, changes) else v for v in values]
    head = changes.head
    if head is None:
        return values[0]
    if head.kind == "spans":
        return np.stack(values, axis=-1)
    if head.kind == "boxes":
        return np.concatenate(values, axis=-1)
    return pooled(head, values[0], feed.get("attention_mask"))


def _per_token(value: Array, changes: Changes) -> bool:
    return value.ndim == 2 and changes.head is not None and changes.head.kind == "spans"


def pooled(head: AddedHead, values: Array, mask: Array | None) -> Array:
    """Return the vectors that a head makes of a graph's answer, in float64's precision.

    >>> head = AddedHead(kind="vector", sources=("x",), output="y", pooling="mean")
    >>> pooled(head, np.array([[[1.0], [3.0], [9.0]]]), np.array([[1, 1, 0]])).tolist()
    [[2.0]]
    """
    values = values.astype(np.float64)
    if head.pooling == "cls":
        values = values[:, 0]
    elif head.pooling == "mean":
        weights = np.ones(values.shape[:2]) if mask is None else mask
        values = np.stack(
            [np.average(v, axis=0, weights=w) for v, w in zip(values, weights, strict=True)]
        )
    elif head.pooling == "max":
        keep = np.ones(values.shape[:2]) if mask is None else mask
        values = np.stack([v[k > 0].max(axis=0) for v, k in zip(values, keep, strict=True)])
    if head.normalize:
        values = values / np.linalg.norm(values, axis=-1, keepdims=True).clip(1e-12)
    return values if head.keep is None else values[:, : head.keep]


def _check_answer(got: Array, wanted: Array, bundle: Bundle, graph: GraphFile) -> None:
    if got.shape != wanted.shape:
        raise ExportError(
            f"{graph.path.name} with what was added gives {got.shape}, not {wanted.shape}",
            fix="this is memopt's fault: report the graph",
        )
    if not np.isfinite(got).all():
        raise ExportError(f"{graph.path} gives NaN or infinity", fix="check how it was exported")
    ranks = {"vector": 2, "classes": 2, "tokens": 3, "boxes": 3, "logits": 3}
    rank = ranks.get(bundle.task.answer, got.ndim)
    if got.ndim != rank:
        raise ExportError(
            f"{graph.path}: its answer has shape {got.shape}, and task {bundle.task.name} has one "
            f"of {rank} axes",
            fix="choose another --output or --task",
        )


def _relative(got: Array, wanted: Array) -> float:
    scale = max(1.0, float(np.abs(wanted).max(initial=0.0)))
    return float(np.abs(got - wanted).max(initial=0.0)) / scale


def _cosine(got: Array, wanted: Array) -> float:
    rows = [np.asarray(side, np.float32).reshape(len(side), -1) for side in (got, wanted)]
    return float(row_cosines(rows[0], rows[1]).min(initial=1.0))
