"""Hessians of a bundle's linear layers: its own graph, run on calibration inputs.

The portable graph gets the inputs of its weight MatMuls and Gemms as extra outputs and is run in
ONNX Runtime; each batch is folded into X^T X and dropped. Layers are done in groups that fit a
memory limit, so memory grows neither with samples nor with the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memopt.bundle import Bundle
from memopt.errors import QuantizationError
from memopt.extras import require
from memopt.quantization.arrow import Calibrated
from memopt.quantization.gptq import HessianAccumulator
from memopt.weights.layout import is_transposed
from memopt.weights.reader import WeightLoader

Feeds = Callable[[], Iterable[Mapping[str, np.ndarray]]]

# Room for the Hessians of one group of layers; a group is one pass over the calibration inputs.
GROUP_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class LinearInput:
    """Where a weight's layer takes its input in the graph."""

    weight: str
    activation: str  # the value's name
    features: int
    input_axis: int  # which axis of the checkpoint's weight the features are


class GraphCalibration:
    """Weight name -> Hessian and input axis, computed group by group when first asked for.

    Args:
        bundle: with ``onnx/model.onnx`` and the float weights it was made of.
        feeds: called once per group of layers; yields graph inputs by name, batch first. Rows where
            ``attention_mask`` is 0 are padding and are left out.
        group_bytes: how much memory the Hessians of one group may take.

    Raises:
        QuantizationError: no portable graph, no calibration inputs, NaN activations.
        WeightsError: the graph was not made of these weights.
    """

    def __init__(self, bundle: Bundle, feeds: Feeds, *, group_bytes: int = GROUP_BYTES) -> None:
        self._graph = portable_graph(bundle)
        self._feeds = feeds
        self._inputs = {item.weight: item for item in find_linears(self._graph, bundle.weights)}
        self._groups = _grouped(self._inputs.values(), group_bytes)
        self._ready: dict[str, np.ndarray] = {}
        self.passes = 0

    @property
    def names(self) -> list[str]:
        """The weights that have a linear layer in the graph."""
        return list(self._inputs)

    def __call__(self, name: str) -> Calibrated | None:
        """Return what calibration saw of ``name``, None for a weight without a linear layer."""
        place = self._inputs.get(name)
        if place is None:
            return None
        if place.activation not in self._ready:
            group = next(g for g in self._groups if place.activation in g)
            self._ready = self._run(group)  # the group before is dropped here
        return Calibrated(self._ready[place.activation], place.input_axis)

    def _run(self, group: Mapping[str, int]) -> dict[str, np.ndarray]:
        made = {value: HessianAccumulator(features) for value, features in group.items()}
        self.passes += 1
        with _session(self._graph, list(group)) as session:
            wanted = [value.name for value in session.get_inputs()]
            for feed in self._feeds():
                given = {name: feed[name] for name in wanted if name in feed}
                found = session.run(list(group), given)
                for accumulator, activations in zip(made.values(), found, strict=True):
                    accumulator.add(_rows(activations, feed.get("attention_mask")))
        return {value: accumulator.hessian for value, accumulator in made.items()}


def portable_graph(bundle: Bundle) -> Path:
    """Return the bundle's portable fp32 graph.

    Raises:
        QuantizationError: it was not exported yet.
    """
    for variant in bundle.manifest.variants.values():
        plain = variant.format == "onnx" and variant.precision == "fp32" and not variant.fused
        if plain and variant.method == "export":
            return bundle.file(variant)
    raise QuantizationError(
        f"{bundle.path} has no portable ONNX graph", fix=f"run: memopt export {bundle.path}"
    )


def find_linears(graph: Path, weights: Path) -> list[LinearInput]:
    """Find the MatMul and Gemm nodes whose right side is a weight of the file, in graph order."""
    onnx = require("onnx", extra="export", why="read the graph's layers")
    model = onnx.load(str(graph))
    stored = {item.name: item for item in model.graph.initializer}
    turned = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "Transpose" and node.input[0] in stored
    }
    found: dict[str, LinearInput] = {}
    with WeightLoader(weights) as loader:
        for node in model.graph.node:
            if node.op_type not in ("MatMul", "Gemm"):
                continue
            # A weight used as it is has its inputs first; behind a Transpose, or with transB, last.
            name = turned.get(node.input[1], node.input[1])
            flipped = name != node.input[1]
            if node.op_type == "Gemm":
                attributes = {a.name: a.i for a in node.attribute}
                if attributes.get("transA"):
                    continue
                flipped ^= bool(attributes.get("transB"))
            if name not in stored or name not in loader or len(stored[name].dims) != 2:
                continue
            if name in found:
                raise QuantizationError(
                    f"weight {name!r} is used by two layers, which GPTQ cannot serve at once",
                    fix=f"keep it in float, or use rtn: --keep-float '{name}'",
                )
            array = onnx.numpy_helper.to_array(stored[name], base_dir=str(graph.parent))
            graph_axis = 1 if flipped else 0
            transposed = is_transposed(array, loader.load(name), name=name)
            features = int(array.shape[graph_axis])
            axis = 1 - graph_axis if transposed else graph_axis
            found[name] = LinearInput(name, node.input[0], features, axis)
    return list(found.values())


def _grouped(inputs: Iterable[LinearInput], group_bytes: int) -> list[dict[str, int]]:
    """Cut the activations, in graph order, into groups whose Hessians fit; q, k and v share one."""
    groups: list[dict[str, int]] = []
    room = 0
    for item in inputs:
        if any(item.activation in group for group in groups):
            continue
        size = item.features**2 * 8
        if not groups or size > room:
            groups.append({})
            room = group_bytes
        groups[-1][item.activation] = item.features
        room -= size
    return groups


def _rows(activations: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    if mask is not None and activations.ndim == 3 and activations.shape[:2] == mask.shape:
        kept: np.ndarray = activations[mask.astype(bool)]
        return kept
    return activations.reshape(-1, activations.shape[-1])


@contextmanager
def _session(graph: Path, values: list[str]) -> Iterator[Any]:
    """Open the graph in ONNX Runtime with more outputs; the file itself is not touched."""
    ort = require("onnxruntime", extra="cpu", why="run calibration inputs")
    onnx = require("onnx", extra="export", why="read the graph's layers")
    model = onnx.load(str(graph), load_external_data=False)
    have = {value.name for value in model.graph.output}
    for name in values:
        if name not in have:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    external = any(item.data_location == 1 for item in model.graph.initializer)
    if not external:
        yield ort.InferenceSession(model.SerializeToString(), options, providers=providers)
        return
    # External data is found relative to the graph file, so the changed graph stands beside it.
    with tempfile.NamedTemporaryFile(
        dir=graph.parent, prefix=".calibrate-", suffix=".onnx"
    ) as file:
        file.write(model.SerializeToString())
        file.flush()
        yield ort.InferenceSession(file.name, options, providers=providers)
