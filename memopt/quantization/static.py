"""Static int8, the part that no runtime sees: from calibration inputs to a plan per activation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memopt.bundle import Bundle, Variant
from memopt.quantization.recipe import Recipe
from memopt.quantization.smooth import Plan, plan, round_weight, with_range
from memopt.quantization.statistics import Histogram, Observed, observe, valid_rows

if TYPE_CHECKING:
    from memopt.quantization.statistics import Array, Feed, Observe

    Step = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What became of one layer: ``error`` is a squared error over the power of what was exact.

    Of the layer's output where calibration inputs tell it, else of its weight.
    """

    name: str
    kind: str  # int8 | float | embedding | ...
    error: float | None = None
    alpha: float | None = None
    macs: int = 0  # multiply-accumulates per token
    value: str | None = None  # its output in the graph, for errors measured there


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A graph made by a method: the model in the runtime's own type, and its layers."""

    model: Any
    layers: tuple[Layer, ...]
    options: Mapping[str, str] = field(default_factory=dict)  # how the runtime must open it
    notes: Mapping[str, Any] = field(default_factory=dict)


# Builds the quantized graph with these layers, beside the recipe's own, left in float.
Make = Callable[[Collection[str]], Quantized]


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What every method gets: the float graph, calibration inputs and the recipe.

    ``feeds`` starts a new pass over the calibration inputs each time; ``name_of`` gives the
    checkpoint's name of a weight matrix, in either orientation.
    """

    bundle: Bundle
    base: Variant
    recipe: Recipe
    feeds: Callable[[], Iterable[Mapping[str, NDArray[Any]]]]
    probes: Sequence[Mapping[str, NDArray[Any]]] = ()
    name_of: Callable[[NDArray[Any]], str | None] = lambda _: None
    seed: int = 0
    samples: int = 0
    step: Callable[[str], None] = lambda _: None

    @property
    def graph(self) -> Path:
        """The float graph's file."""
        return self.bundle.file(self.base)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """An int8 weight (out, in) with scales (out,), and the bias that shift and rounding add."""

    integers: NDArray[np.int8]
    scales: Array
    bias: Array
    error: float


def plan_activations(
    groups: Mapping[str, Sequence[Array]],
    run: Observe,
    feeds: Callable[[], Iterable[Feed]],
    probes: Sequence[Feed],
    recipe: Recipe,
    *,
    seed: int = 0,
    step: Step = lambda _: None,
) -> dict[str, tuple[Plan, Observed]]:
    """Calibrate each activation and choose its plan.

    Args:
        groups: activation name -> the weights (out, in) it is multiplied with.
        run: runs the float graph and returns the activations in the order of ``groups``.
        feeds: starts a pass over the calibration inputs; a second one is made for histograms.
        probes: inputs that only widen ranges.
        recipe: smooth, ranges, percentile and range_margin are used.
    """
    names = list(groups)
    step("activation ranges")
    seen = observe(names, run, feeds(), probes=probes, seed=seed)
    plans: dict[str, Plan] = {}
    for name in names:
        step(f"smoothing {name}")
        plans[name] = plan(
            seen[name], groups[name], smooth=recipe.smooth, margin=recipe.range_margin
        )
    if recipe.ranges != "minmax":
        step("histograms")
        plans = _fit_ranges(plans, run, feeds(), recipe)
    return {name: (plans[name], seen[name]) for name in names}


def round_layer(weight: Array, made: Plan, seen: Observed, recipe: Recipe) -> Rounded:
    """Round one weight (out, in) for a plan, with bias correction from the sample rows."""
    smoothed = weight * made.divisor
    if recipe.grain == "per-tensor":
        most = max(float(np.abs(smoothed).max(initial=0)) / 127, 1e-12)
        scales: Array = np.full(len(weight), most, np.float32)
        integers = np.clip(np.rint(smoothed / np.float32(most)), -127, 127).astype(np.int8)
    else:
        integers, scales = round_weight(smoothed)
    bias: Array = weight @ made.low
    reference = seen.rows @ weight.T
    difference = reference - made.quantized(seen.rows) @ (integers * scales[:, None]).T - bias
    if recipe.bias_correction:
        # The mean error of a layer is a constant: the bias can carry it (Nagel et al. 2019).
        bias = bias + difference.mean(axis=0)
        difference -= difference.mean(axis=0)
    power = max(float((reference**2).sum()), 1e-12)
    error = float((difference**2).sum()) / power
    return Rounded(integers=integers, scales=scales, bias=np.asarray(bias, np.float32), error=error)


def round_table(table: Array) -> tuple[NDArray[np.int8], Array]:
    """Round an embedding table (entries, width) to int8 with one scale per entry (entries, 1)."""
    integers, scales = round_weight(table)
    return integers, scales[:, None]


def _fit_ranges(
    plans: Mapping[str, Plan], run: Observe, feeds: Iterable[Feed], recipe: Recipe
) -> dict[str, Plan]:
    histograms = {name: Histogram(0.0, 255 * made.scale) for name, made in plans.items()}
    for feed in feeds:
        for name, values in zip(plans, run(feed), strict=True):
            rows = valid_rows(values, feed)
            histograms[name].add((rows - plans[name].low) / plans[name].divisor)
    return {
        name: with_range(made, histograms[name], recipe.ranges, recipe.percentile)
        for name, made in plans.items()
    }
