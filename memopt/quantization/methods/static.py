"""Static int8, the part that no runtime sees: from calibration inputs to a plan per activation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from memopt.graphs.linears import Linear
from memopt.graphs.observe import Array, observer, valid_rows
from memopt.graphs.session import Feed, Observe
from memopt.progress import Step, silent
from memopt.quantization.math.smooth import Smoothing, choose, round_weight, with_range
from memopt.quantization.math.statistics import Histogram, Observed, observe
from memopt.quantization.method import Context, Layer, MethodRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticRecipe(MethodRecipe):
    """Settings of method ``static``."""

    target: Literal["auto", "openvino", "cpu"] = "auto"
    # int8 kernels multiply with weights that have one scale per output channel or tensor.
    weight_type: Literal["int8"] = "int8"
    granularity: Literal["auto", "per-channel", "per-tensor"] = "auto"
    ranges: str = "minmax"
    percentile: float = 99.99
    smooth: str | float = "auto"
    range_margin: float = 1.1
    range_probes: bool = True
    bias_correction: bool = True
    embeddings: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """An int8 weight (out, in) with scales (out,), and the bias that shift and rounding add."""

    integers: NDArray[np.int8]
    scales: Array
    bias: Array
    error: float


def int8_layer(linear: Linear, weight: Rounded, plan: Smoothing) -> Layer:
    """Return what became of a layer whose weight and activation are int8."""
    return Layer(
        name=linear.name, kind="int8", error=weight.error, alpha=plan.alpha, macs=linear.size
    )


def round_layers(
    context: Context[StaticRecipe], linears: Sequence[Linear]
) -> tuple[dict[str, Smoothing], dict[str, Rounded]]:
    """Calibrate the activations of linear layers and round the weights for them.

    Returns:
        The plan of each activation, and the rounded weight of each layer by its node's name.
    """
    groups: dict[str, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(linear.source, []).append(linear)
    plans = plan_activations(
        {source: [item.weight for item in group] for source, group in groups.items()},
        observer(context.graph, context.base.format, list(groups)),
        context.feeds,
        context.probes,
        context.recipe,
        seed=context.seed,
        step=context.step,
    )
    rounded: dict[str, Rounded] = {}
    for source, group in groups.items():
        context.step(f"rounding {group[0].name}")
        for linear in group:
            rounded[linear.label] = round_layer(linear.weight, *plans[source], context.recipe)
    return {source: plan for source, (plan, _) in plans.items()}, rounded


def plan_activations(
    groups: Mapping[str, Sequence[Array]],
    run: Observe,
    feeds: Callable[[], Iterable[Feed]],
    probes: Sequence[Feed],
    recipe: StaticRecipe,
    *,
    seed: int = 0,
    step: Step = silent,
) -> dict[str, tuple[Smoothing, Observed]]:
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
    plans: dict[str, Smoothing] = {}
    for name in names:
        step(f"smoothing {name}")
        plans[name] = choose(
            seen[name], groups[name], smooth=recipe.smooth, margin=recipe.range_margin
        )
    if recipe.ranges != "minmax":
        step("histograms")
        plans = _fit_ranges(plans, run, feeds(), recipe)
    return {name: (plans[name], seen[name]) for name in names}


def round_layer(
    weight: Array, smoothing: Smoothing, seen: Observed, recipe: StaticRecipe
) -> Rounded:
    """Round one weight (out, in) for a plan, with bias correction from the sample rows."""
    smoothed = weight * smoothing.divisor
    if recipe.grain == "per-tensor":
        most = max(float(np.abs(smoothed).max(initial=0)) / 127, 1e-12)
        scales: Array = np.full(len(weight), most, np.float32)
        integers = np.clip(np.rint(smoothed / np.float32(most)), -127, 127).astype(np.int8)
    else:
        integers, scales = round_weight(smoothed)
    bias: Array = weight @ smoothing.low
    reference = seen.rows @ weight.T
    difference = reference - smoothing.quantized(seen.rows) @ (integers * scales[:, None]).T - bias
    if recipe.bias_correction:
        # The mean error of a layer is a constant: the bias can carry it (Nagel et al. 2019).
        bias = bias + difference.mean(axis=0)
        difference -= difference.mean(axis=0)
    error = share_of_power(difference, reference)
    return Rounded(integers=integers, scales=scales, bias=np.asarray(bias, np.float32), error=error)


def share_of_power(difference: Array, reference: Array) -> float:
    """Return the squared error over the power of what is exact."""
    return float((difference**2).sum()) / max(float((reference**2).sum()), 1e-12)


def round_table(table: Array) -> tuple[NDArray[np.int8], Array]:
    """Round an embedding table (entries, width) to int8 with one scale per entry (entries, 1)."""
    integers, scales = round_weight(table)
    return integers, scales[:, None]


def _fit_ranges(
    plans: Mapping[str, Smoothing], run: Observe, feeds: Iterable[Feed], recipe: StaticRecipe
) -> dict[str, Smoothing]:
    histograms = {name: Histogram(0.0, 255 * smoothing.scale) for name, smoothing in plans.items()}
    for feed in feeds:
        for name, values in zip(plans, run(feed), strict=True):
            rows = valid_rows(values, feed)
            histograms[name].add((rows - plans[name].low) / plans[name].divisor)
    return {
        name: with_range(smoothing, histograms[name], recipe.ranges, recipe.percentile)
        for name, smoothing in plans.items()
    }
