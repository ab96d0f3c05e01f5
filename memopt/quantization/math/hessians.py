"""Hessians of linear layers: a graph run on calibration inputs, the layers in groups.

Each batch of activations is folded into X^T X and dropped. Layers are done in groups that fit a
memory limit, so memory grows neither with samples nor with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memopt.errors import QuantizationError
from memopt.graphs.ir import read_onnx
from memopt.graphs.linears import onnx_linears
from memopt.graphs.observe import observer, valid_rows
from memopt.progress import Step, silent
from memopt.quantization.math.gptq import HessianAccumulator
from memopt.weights.layout import is_transposed
from memopt.weights.reader import WeightLoader

Feeds = Callable[[], Iterable[Mapping[str, np.ndarray]]]

# Room for the Hessians of one group of layers; a group is one pass over the calibration inputs.
GROUP_BYTES = 512 << 20


class Hessians:
    """Activation -> Hessian, computed group by group when first asked for.

    Args:
        graph: the ONNX file.
        widths: activation -> its channels, in graph order.
        feeds: called once per group; yields graph inputs by name, batch first. Rows where
            ``attention_mask`` is 0 are padding and are left out.
        group_bytes: how much memory the Hessians of one group may take.
        step: called with a line before each pass.
    """

    def __init__(
        self,
        graph: Path,
        widths: Mapping[str, int],
        feeds: Feeds,
        *,
        group_bytes: int = GROUP_BYTES,
        step: Step = silent,
    ) -> None:
        self._graph, self._widths, self._feeds, self._step = graph, widths, feeds, step
        self._groups = _grouped(widths, group_bytes)
        self._ready: dict[str, np.ndarray] = {}
        self.passes = 0

    def group_of(self, activation: str) -> int:
        """Return the number of the group that an activation is in."""
        return next(i for i, group in enumerate(self._groups) if activation in group)

    def of(self, activation: str) -> np.ndarray:
        """Return the Hessian of the layers that read an activation."""
        if activation not in self._ready:
            self._ready = {}  # the group before is dropped here
            self._ready = self._run(self._groups[self.group_of(activation)])
        return self._ready[activation]

    def _run(self, group: list[str]) -> dict[str, np.ndarray]:
        self._step(f"Hessians of {len(group)} activations")
        sums = {name: HessianAccumulator(self._widths[name]) for name in group}
        self.passes += 1
        run = observer(self._graph, "onnx", group)
        for feed in self._feeds():
            for accumulator, values in zip(sums.values(), run(feed), strict=True):
                accumulator.add(valid_rows(values, feed))
        return {name: accumulator.hessian for name, accumulator in sums.items()}


def _grouped(widths: Mapping[str, int], group_bytes: int) -> list[list[str]]:
    """Cut the activations, in graph order, into groups whose Hessians fit."""
    groups: list[list[str]] = []
    room = 0
    for name, width in widths.items():
        size = width**2 * 8
        if not groups or size > room:
            groups.append([])
            room = group_bytes
        groups[-1].append(name)
        room -= size
    return groups


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What GPTQ needs of one layer: the Hessian of its inputs, and which weight axis they are."""

    hessian: np.ndarray
    input_axis: int = 1  # 1 for a Linear's (out, in), 0 for GPT-2's Conv1D (in, out)


class GraphCalibration:
    """Weight name -> Hessian and input axis, in the portable graph made of a weight file.

    Args:
        weights: the float weight file.
        graph: the portable fp32 ONNX file that was made of it.
        feeds, group_bytes: see :class:`Hessians`.

    Raises:
        QuantizationError: no calibration inputs, NaN activations.
        WeightsError: the graph was not made of these weights.
    """

    def __init__(
        self, weights: Path, graph: Path, feeds: Feeds, *, group_bytes: int = GROUP_BYTES
    ) -> None:
        self._inputs: dict[str, tuple[str, int]] = {}
        widths: dict[str, int] = {}
        with WeightLoader(weights) as loader:
            for linear in onnx_linears(read_onnx(graph)):
                name = linear.name
                if name not in loader:
                    continue
                if name in self._inputs:
                    raise QuantizationError(
                        f"weight {name!r} is used by two layers, which GPTQ cannot serve at once",
                        fix=f"keep it in float, or use rtn: --keep-float '{name}'",
                    )
                turned = is_transposed(linear.weight, loader.load(name), name=name)
                self._inputs[name] = linear.source, 0 if turned else 1
                widths[linear.source] = linear.shape[1]
        self._hessians = Hessians(graph, widths, feeds, group_bytes=group_bytes)

    @property
    def names(self) -> list[str]:
        """The weights that have a linear layer in the graph."""
        return list(self._inputs)

    @property
    def passes(self) -> int:
        """How often the calibration inputs were run."""
        return self._hessians.passes

    def __call__(self, name: str) -> Calibrated | None:
        """Return what calibration saw of ``name``, None for a weight without a linear layer."""
        if name not in self._inputs:
            return None
        activation, axis = self._inputs[name]
        return Calibrated(self._hessians.of(activation), axis)
