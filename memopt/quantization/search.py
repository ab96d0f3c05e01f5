"""Search: which layers cost the quality, and the fewest of them to keep in float.

One layer at a time is quantized alone and the graph compared with the float one on validation
inputs; layers are then returned to float, worst first, until the gate passes, and each of those is
tried back in int8. Every number comes from a run of the real graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from memopt.errors import QuantizationError
from memopt.quantization.graph_runner import open_graph
from memopt.quantization.static import Layer, Make, Quantized
from memopt.quantization.validate import Gate, PrecisionValidator, Validation

# Inputs of a sensitivity run: it orders layers, the decision itself uses the whole set.
SENSITIVITY_SAMPLES = 96
# Share of the budget for sensitivity; the rest is for the decision.
SENSITIVITY_SHARE = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Tradeoff:
    """One point of the search: what is in float, and the quality on the whole validation set."""

    kept: tuple[str, ...]
    quality: float  # min cosine, or minus the perplexity increase
    float_macs: float  # share of the weighted work that stays float
    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The graph the search ended with."""

    made: Quantized
    kept: tuple[str, ...]
    tradeoff: tuple[Tradeoff, ...]
    sensitivity: dict[str, float]
    complete: bool  # False when the budget ended before every layer was looked at


def search(
    make: Make,
    validator: PrecisionValidator,
    gate: Gate,
    format: str,
    folder: Path,
    *,
    budget: float,
    step: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Keep the fewest layers in float so that the gate passes.

    With the same inputs, seed and a budget that suffices the answer is the same; a search cut short
    by its budget says so, and has looked at the layers with the largest calibration error first.

    Args:
        make: builds the graph with these layers in float.
        validator: compares a graph with the float one.
        gate: what must be reached.
        format: "onnx" or "openvino".
        folder: for graphs that are tried; they are removed.
        budget: seconds.
        step: called with a line before each try.
        clock: seconds; only differences count.

    Raises:
        QuantizationError: no layers, or the gate fails with every layer in float.
    """
    start = clock()
    trial = _Trial(make, validator, format, folder)
    whole = make(())
    layers = [layer for layer in whole.layers if layer.kind != "float"]
    if not layers:
        raise QuantizationError("nothing is quantized, so there is nothing to search")
    tried: list[Tradeoff] = []

    def attempt(kept: Collection[str]) -> bool:
        step(f"{len(kept)} of {len(layers)} layers in float")
        result = trial.run(sorted(kept), limit=None)
        passed = not result.failures(gate)
        tried.append(_point(kept, result, layers, passed))
        return passed

    if attempt(()):
        return Found(made=whole, kept=(), tradeoff=tuple(tried), sensitivity={}, complete=True)
    sensitivity = _sensitivity(trial, layers, step, lambda: clock() - start, budget)
    order = sorted(layers, key=lambda layer: -sensitivity.get(layer.name, 0.0))
    names = [layer.name for layer in order]
    if not attempt(names):
        raise QuantizationError(
            f"the gate fails even with all {len(names)} layers in float",
            fix="lower --min-cosine; the runtime's own float kernels differ by this much",
        )
    kept = _fewest(names, attempt)
    for name in reversed(kept.copy()):
        if clock() - start > budget:
            break
        rest = [other for other in kept if other != name]
        if attempt(rest):
            kept = rest
    complete = len(sensitivity) == len(layers) and clock() - start <= budget
    return Found(
        made=make(kept),
        kept=tuple(kept),
        tradeoff=tuple(tried),
        sensitivity=sensitivity,
        complete=complete,
    )


def _fewest(names: Sequence[str], attempt: Callable[[Collection[str]], bool]) -> list[str]:
    """Return the shortest prefix that passes, by bisection; the whole list is known to pass."""
    low, high = 1, len(names)
    while low < high:
        middle = (low + high) // 2
        if attempt(names[:middle]):
            high = middle
        else:
            low = middle + 1
    return list(names[:high])


def _sensitivity(
    trial: _Trial,
    layers: Sequence[Layer],
    step: Callable[[str], None],
    elapsed: Callable[[], float],
    budget: float,
) -> dict[str, float]:
    """Return layer -> how much quality is lost when it alone is quantized."""
    everything = {layer.name for layer in layers}
    lost: dict[str, float] = {}
    for number, layer in enumerate(sorted(layers, key=lambda item: -(item.error or 0.0)), 1):
        if elapsed() > budget * SENSITIVITY_SHARE:
            break
        step(f"sensitivity {number}/{len(layers)}: {layer.name}")
        result = trial.run(sorted(everything - {layer.name}), limit=SENSITIVITY_SAMPLES)
        lost[layer.name] = -_quality(result)
    return lost


class _Trial:
    """Builds, opens and validates one graph after the other."""

    def __init__(
        self, make: Make, validator: PrecisionValidator, format: str, folder: Path
    ) -> None:
        self._make = make
        self._validator = validator
        self._format = format
        self._folder = folder

    def run(self, kept: Sequence[str], limit: int | None) -> Validation:
        from memopt.quantization.quantize import write_graph

        made = self._make(kept)
        files = write_graph(made, self._format, self._folder, "trial")
        try:
            run = open_graph(files[0], self._format, self._validator.output, made.options)
            return self._validator.validate(run, limit=limit, timed=False)
        finally:
            for file in files:
                file.unlink(missing_ok=True)


def _point(
    kept: Collection[str], result: Validation, layers: Sequence[Layer], passed: bool
) -> Tradeoff:
    whole = sum(layer.macs for layer in layers) or 1
    left = sum(layer.macs for layer in layers if layer.name in kept)
    return Tradeoff(
        kept=tuple(sorted(kept)), quality=_quality(result), float_macs=left / whole, passed=passed
    )


def _quality(result: Validation) -> float:
    if result.perplexity_increase is not None:
        return -result.perplexity_increase
    assert result.cosine_min is not None
    return result.cosine_min
