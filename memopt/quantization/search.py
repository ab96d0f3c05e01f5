"""Search: which layers cost the quality, and the fewest of them to keep in float.

One layer at a time is quantized alone and the graph compared with the float one on validation
inputs; layers are then returned to float, worst first, until the gate passes, and each of those is
tried back in int8. Every number comes from a run of the real graph.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from memopt.errors import QuantizationError
from memopt.graphs.session import open_graph
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
class Trail:
    """How a search went.

    Attributes:
        tried: every choice of layers that was compared on the whole validation set, in order.
        sensitivity: layer -> 1 - min cosine, or the perplexity increase, when it alone is
            quantized.
        complete: False when the budget ended the search: the kept layers pass, fewer might do.
        seconds: how long it took.
    """

    tried: tuple[Tradeoff, ...]
    sensitivity: Mapping[str, float] = field(default_factory=dict)
    complete: bool = True
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {**asdict(self), "seconds": round(self.seconds, 1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The graph the search ended with, and how it got there."""

    made: Quantized
    kept: tuple[str, ...]
    trail: Trail


def search(
    make: Make,
    validator: PrecisionValidator,
    gate: Gate,
    format: str,
    folder: Path,
    *,
    budget: float,
    step: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda done, whole: None,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Keep the fewest layers in float so that the gate passes.

    With the same inputs, seed and a budget that suffices the answer is the same; a search cut short
    by its budget says so, and has looked at the layers with the largest calibration error first. No
    try starts that, by the longest one so far, would end after the budget.

    Args:
        make: builds the graph with these layers in float.
        validator: compares a graph with the float one.
        gate: what must be reached.
        format: "onnx" or "openvino".
        folder: for graphs that are tried; they are removed.
        budget: seconds.
        step: called with a line before each try.
        progress: called with (tries done, tries in all as far as that is known).
        clock: seconds; only differences count.

    Raises:
        QuantizationError: no layers, the gate fails with every layer in float, or the budget ended
            before any choice of layers passed.
    """
    time_left = _Budget(budget, clock)
    trial = _Trial(make, validator, format, folder)
    whole = make(())
    layers = [layer for layer in whole.layers if layer.kind != "float"]
    if not layers:
        raise QuantizationError("nothing is quantized, so there is nothing to search")
    tried: list[Tradeoff] = []
    # No layer kept, each layer alone, a bisection; tries that put layers back come on top.
    planned = 2 + len(layers) + math.ceil(math.log2(len(layers)))
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(done, max(planned, done))

    def attempt(kept: Collection[str]) -> bool:
        step(f"{len(kept)} of {len(layers)} layers in float")
        with time_left.timed("whole"):
            result = trial.run(sorted(kept), limit=None)
        passed = not result.failures(gate)
        tried.append(_point(kept, result, layers, passed))
        tick()
        return passed

    if attempt(()):
        return Found(made=whole, kept=(), trail=Trail(tried=tuple(tried), seconds=time_left.spent))
    sensitivity = _sensitivity(trial, layers, step, tick, time_left)
    names = _worst_first(layers, sensitivity)
    kept, complete = _fewest(names, attempt, time_left.allows)
    planned = done + len(kept) - 1
    for name in reversed(kept.copy()):
        if len(kept) == 1:
            break  # keeping none was the first try, and failed
        if not time_left.allows():
            complete = False
            break
        rest = [other for other in kept if other != name]
        if attempt(rest):
            kept = rest
    trail = Trail(
        tried=tuple(tried),
        sensitivity=sensitivity,
        complete=complete and len(sensitivity) == len(layers),
        seconds=time_left.spent,
    )
    return Found(made=make(kept), kept=tuple(kept), trail=trail)


def _fewest(
    names: Sequence[str],
    attempt: Callable[[Collection[str]], bool],
    allows: Callable[[], bool] = lambda: True,
) -> tuple[list[str], bool]:
    """Return the shortest prefix that passes, by bisection, and whether time sufficed for that.

    Raises:
        QuantizationError: the whole list does not pass, or time ended before anything did.
    """
    low, high, passes = 1, len(names), False
    while low < high and allows():
        middle = (low + high) // 2
        if attempt(names[:middle]):
            high, passes = middle, True
        else:
            low = middle + 1
    if passes:
        return list(names[:high]), low == high
    if low < high or not allows():
        raise QuantizationError(
            "the budget ended before any choice of layers passed the gate",
            fix="give a larger --budget, or a lower --min-cosine",
        )
    if not attempt(names):
        raise QuantizationError(
            f"the gate fails even with all {len(names)} layers in float",
            fix="lower --min-cosine; the runtime's own float kernels differ by this much",
        )
    return list(names), True


def _sensitivity(
    trial: _Trial,
    layers: Sequence[Layer],
    step: Callable[[str], None],
    tick: Callable[[], None],
    time_left: _Budget,
) -> dict[str, float]:
    """Return layer -> how much quality is lost when it alone is quantized."""
    everything = {layer.name for layer in layers}
    lost: dict[str, float] = {}
    for number, layer in enumerate(sorted(layers, key=lambda item: -(item.error or 0.0)), 1):
        if not time_left.allows("single", SENSITIVITY_SHARE):
            break
        step(f"sensitivity {number}/{len(layers)}: {layer.name}")
        with time_left.timed("single"):
            result = trial.run(sorted(everything - {layer.name}), limit=SENSITIVITY_SAMPLES)
        quality = _quality(result)
        lost[layer.name] = 1 - quality if result.perplexity_increase is None else -quality
        tick()
    return lost


def _worst_first(layers: Sequence[Layer], sensitivity: Mapping[str, float]) -> list[str]:
    """Return layer names by sensitivity; those not looked at come last, by calibration error."""

    def cost(layer: Layer) -> tuple[float, float]:
        return -sensitivity.get(layer.name, -math.inf), -(layer.error or 0.0)

    return [layer.name for layer in sorted(layers, key=cost)]


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


class _Budget:
    """Seconds to spend, and how long tries took."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds, self._clock, self._start = seconds, clock, clock()
        self._longest: dict[str, float] = {}

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Remember how long a try of this kind takes."""
        start = self._clock()
        yield
        self._longest[kind] = max(self._longest.get(kind, 0.0), self._clock() - start)

    def allows(self, kind: str = "whole", share: float = 1.0) -> bool:
        """Say whether one more try of this kind ends within a share of the budget."""
        return self.spent + self._longest.get(kind, 0.0) <= self._seconds * share


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
