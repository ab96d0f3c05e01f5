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
from dataclasses import dataclass

from memopt.errors import QuantizationError
from memopt.progress import Progress, Step, silent
from memopt.quantization.accuracy.gate import Gate, Validation
from memopt.quantization.accuracy.result import Tradeoff, Trail
from memopt.quantization.method import Layer, Make, Quantized

# Inputs of a sensitivity run: it orders layers, the decision itself uses the whole set.
SENSITIVITY_SAMPLES = 96
# Share of the budget for sensitivity; the rest is for the decision.
SENSITIVITY_SHARE = 0.6

# Compares a graph with the float one, on the first so many validation inputs or (None) on all.
Compare = Callable[[Quantized, int | None], Validation]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The graph the search ended with, and how it got there."""

    quantized: Quantized
    kept: tuple[str, ...]
    trail: Trail


def search(
    make: Make,
    compare: Compare,
    gate: Gate,
    *,
    budget: float,
    step: Step = silent,
    progress: Progress = silent,
    clock: Callable[[], float] = time.monotonic,
) -> Choice:
    """Keep the fewest layers in float so that the gate passes.

    With the same inputs, seed and a budget that suffices the answer is the same; a search cut short
    by its budget says so, and has looked at the layers with the largest calibration error first. No
    try starts that, by the longest one so far, would end after the budget.

    Args:
        make: builds the graph with these layers in float.
        compare: compares a graph with the float one.
        gate: what must be reached.
        budget: seconds.
        step: called with a line before each try.
        progress: called with (tries done, tries in all as far as that is known).
        clock: seconds; only differences count.

    Raises:
        QuantizationError: no layers, the gate fails with every layer in float, or the budget ended
            before any choice of layers passed.
    """
    whole = make(())
    layers = [layer for layer in whole.layers if layer.kind != "float"]
    if not layers:
        raise QuantizationError("nothing is quantized, so there is nothing to search")
    tries = _Tries(make, compare, gate, layers, _Budget(budget, clock), step, progress)
    if tries.passes(()):
        return Choice(quantized=whole, kept=(), trail=tries.trail({}, complete=True))
    sensitivity = tries.sensitivity()
    names = _worst_first(layers, sensitivity)
    kept, complete = _fewest(names, tries.passes, tries.budget.allows)
    kept, back = tries.returned(kept)
    complete = complete and back and len(sensitivity) == len(layers)
    trail = tries.trail(sensitivity, complete=complete)
    return Choice(quantized=make(kept), kept=tuple(kept), trail=trail)


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


def _worst_first(layers: Sequence[Layer], sensitivity: Mapping[str, float]) -> list[str]:
    """Return layer names by sensitivity; those not looked at come last, by calibration error."""

    def cost(layer: Layer) -> tuple[float, float]:
        return -sensitivity.get(layer.name, -math.inf), -(layer.error or 0.0)

    return [layer.name for layer in sorted(layers, key=cost)]


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


class _Tries:
    """Builds and compares one graph after the other, and remembers what came out."""

    def __init__(
        self,
        make: Make,
        compare: Compare,
        gate: Gate,
        layers: Sequence[Layer],
        budget: _Budget,
        step: Step,
        progress: Progress,
    ) -> None:
        self._make, self._compare, self._gate = make, compare, gate
        self._layers, self.budget = layers, budget
        self._step, self._progress = step, progress
        self._tried: list[Tradeoff] = []
        self._done = 0
        # No layer kept, each layer alone, a bisection; tries that put layers back come on top.
        self._planned = 2 + len(layers) + math.ceil(math.log2(len(layers)))

    def passes(self, kept: Collection[str]) -> bool:
        """Say whether the gate passes on all inputs with these layers in float."""
        self._step(f"{len(kept)} of {len(self._layers)} layers in float")
        with self.budget.timed("whole"):
            result = self._compare(self._make(sorted(kept)), None)
        passed = not result.failures(self._gate)
        whole = sum(layer.macs for layer in self._layers) or 1
        left = sum(layer.macs for layer in self._layers if layer.name in kept)
        self._tried.append(
            Tradeoff(
                kept=tuple(sorted(kept)),
                quality=result.quality,
                float_macs=left / whole,
                passed=passed,
            )
        )
        self._count()
        return passed

    def sensitivity(self) -> dict[str, float]:
        """Return layer -> how much quality is lost when it alone is quantized."""
        everything = {layer.name for layer in self._layers}
        lost: dict[str, float] = {}
        for number, layer in enumerate(sorted(self._layers, key=lambda x: -(x.error or 0.0)), 1):
            if not self.budget.allows("single", SENSITIVITY_SHARE):
                break
            self._step(f"sensitivity {number}/{len(self._layers)}: {layer.name}")
            with self.budget.timed("single"):
                quantized = self._make(sorted(everything - {layer.name}))
                result = self._compare(quantized, SENSITIVITY_SAMPLES)
            best = 0.0 if result.perplexity is not None else 1.0
            lost[layer.name] = best - result.quality
            self._count()
        return lost

    def returned(self, kept: list[str]) -> tuple[list[str], bool]:
        """Try each layer back in integers; return those that stay, and whether time sufficed."""
        self._planned = self._done + len(kept) - 1
        for name in reversed(kept.copy()):
            if len(kept) == 1:
                break  # keeping none was the first try, and failed
            if not self.budget.allows():
                return kept, False
            rest = [other for other in kept if other != name]
            if self.passes(rest):
                kept = rest
        return kept, True

    def trail(self, sensitivity: Mapping[str, float], *, complete: bool) -> Trail:
        """Return how the search went."""
        return Trail(
            tried=tuple(self._tried),
            sensitivity=sensitivity,
            complete=complete,
            seconds=self.budget.spent,
        )

    def _count(self) -> None:
        self._done += 1
        self._progress(self._done, max(self._planned, self._done))
