"""Measure what was built in one run, apply the gate, choose, and say why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memopt.benchmark.peers import Contender
from memopt.benchmark.record import BenchmarkMetrics
from memopt.benchmark.runner import run
from memopt.bundle import open_bundle
from memopt.optimize.plan import Outcome
from memopt.progress import Step
from memopt.quantization.accuracy.gate import Gate, Validation
from memopt.runtimes.base import usual_streams
from memopt.runtimes.cpu import usable_cpus
from memopt.runtimes.providers import canonical

# Speeds closer than this are the same on a noisy machine: the better answers win then.
SAME_SPEED = 1.03
# Up to here the paired rounds are asked: one that was slower in each of them is slower (five of
# five by chance: 3 %), one that won a round is not.
DOUBTFUL_SPEED = 1.15
# Cosines this near to 1 differ by float32's own rounding.
_NO_ERROR = 1e-5
# Inputs timed one by one per candidate: enough for a median.
SINGLES = 50
# A candidate's round takes what the float reference needs this long for: some fifty batches.
ROUND_SECONDS = 1.2
# What cosines are against and speed is told in multiples of: the portable float graph.
REFERENCE = "onnx-fp32"


@dataclass(frozen=True, slots=True)
class Goal:
    """A measure of speed: what less is better of, and the same by paired round."""

    cost: Callable[[Outcome], float]
    rounds: Callable[[Outcome], Sequence[float]]

    def as_fast(self, outcome: Outcome, fastest: Outcome) -> bool:
        """Whether one is as fast as the fastest within the noise."""
        least = self.cost(fastest)
        lag = self.cost(outcome) / least if least else math.inf
        pairs = zip(self.rounds(outcome), self.rounds(fastest), strict=False)
        won = any(mine < other for mine, other in pairs)
        return outcome is fastest or lag <= SAME_SPEED or (lag <= DOUBTFUL_SPEED and won)


def _seconds_an_input(outcome: Outcome) -> float:
    return 1 / outcome.items_per_second if outcome.items_per_second else math.inf


BATCHES = Goal(_seconds_an_input, lambda outcome: outcome.rounds_seconds)
SINGLE = Goal(lambda o: o.latency_ms_p50 or math.inf, lambda outcome: outcome.rounds_latency_ms)


@dataclass(frozen=True, slots=True)
class Judged:
    """Every outcome with its numbers, and the float reference's inputs per second."""

    outcomes: tuple[Outcome, ...]
    reference: float | None


def judge(
    path: Path,
    outcomes: Sequence[Outcome],
    inputs: Sequence[Any],
    gate: Gate,
    *,
    rounds: int,
    deadline: float | None,
    say: Step,
    prefer: str = "both",
) -> Judged:
    """Measure every outcome that was built, drop what misses the gate, choose among the rest.

    Args:
        path: the bundle.
        inputs: not used for calibration.
        rounds: timed passes; fewer when ``deadline`` (of ``time.monotonic``) comes first.
        prefer: of :func:`choose`.

    Raises:
        MemoptError: the float reference itself cannot run.
    """
    built = [outcome for outcome in outcomes if outcome.status == "kept"]
    if not built:
        return Judged(tuple(outcomes), None)
    bundle = open_bundle(path)
    contenders = [contender(path, "reference", REFERENCE, "cpu")]
    contenders += [
        contender(path, o.candidate.label, o.candidate.name, o.candidate.device) for o in built
    ]
    failed: dict[str, str] = {}
    records = run(
        contenders,
        inputs,
        rounds=rounds,
        singles=SINGLES,
        round_seconds=ROUND_SECONDS,
        on_step=say,
        failures=failed,
        deadline=deadline,
        task=bundle.manifest.task,
        config=bundle.config(),
    )
    found = {record.label: record for record in records}
    measured: list[Outcome] = []
    for outcome in outcomes:
        label = outcome.candidate.label
        if outcome.status != "kept":
            measured.append(outcome)
        elif label in failed:
            measured.append(replace(outcome, status="dropped", reason=failed[label]))
        else:
            measured.append(gated(outcome, found[label], gate))
    return Judged(tuple(choose(_as_at_home(measured), prefer)), records[0].items_per_second)


def _as_at_home(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Drop a graph on a second device where it missed the gate on the one it was made for.

    The manifest has one verdict per graph, and a fallback may lead from one device to the other.
    """
    verdicts: dict[str, Outcome] = {}
    checked = []
    for outcome in outcomes:
        home = verdicts.setdefault(outcome.candidate.name, outcome)
        if outcome.status == "kept" and home.status == "dropped":
            reason = f"as {home.candidate.label}: {home.reason}"
            outcome = replace(outcome, status="dropped", reason=reason)
        checked.append(outcome)
    return checked


def choose(outcomes: Sequence[Outcome], prefer: str = "throughput") -> list[Outcome]:
    """Mark the fastest passing outcome as chosen and say of each other one how it compares.

    Where speeds are the same within the noise, the better answers win, then the smaller file, then
    the earlier candidate.

    Args:
        prefer: ``latency`` takes the fastest for one input at a time, every other the one with
            most inputs (or tokens) a second; ``both`` marks the one for single inputs beside it.
    """
    passing = [o for o in outcomes if o.status == "kept"]
    if not passing:
        return list(outcomes)
    goal = SINGLE if prefer == "latency" else BATCHES
    best, why = _best(passing, goal)
    alone = best if prefer == "latency" else None
    if prefer == "both" and all(o.latency_ms_p50 for o in passing):
        alone, reason = _best(passing, SINGLE, best)
        if alone is not best:
            reason = f"for one input: {reason}"
    decided = []
    for outcome in outcomes:
        single = outcome is alone
        if outcome is best:
            outcome = replace(outcome, status="chosen", reason=why)
        elif single:
            outcome = replace(outcome, reason=reason)
        elif outcome.status == "kept":
            share = goal.cost(best) / goal.cost(outcome)
            closer = (outcome.quality or 0.0) > (best.quality or 0.0)
            quality = "closer to float32, but" if closer else "no closer to float32, and"
            reason_kept = f"right, {quality} {share:.2f}x as fast as the choice"
            outcome = replace(outcome, reason=reason_kept)
        decided.append(replace(outcome, single=single))
    return decided


def _best(
    passing: Sequence[Outcome], goal: Goal, home: Outcome | None = None
) -> tuple[Outcome, str]:
    """Return the winner by one measure of speed, and why.

    Among equals ``home`` wins, which is in memory for batches already.
    """
    fastest = min(passing, key=goal.cost)
    near = [o for o in passing if goal.as_fast(o, fastest)]
    largest = max(o.bytes for o in near) or 1

    def merit(outcome: Outcome) -> tuple[float, bool, float]:
        # Rounded: a tenth of a nine and a few percent of the size decide nothing.
        error = max(1.0 - (outcome.quality or 0.0), _NO_ERROR)
        size = -round(outcome.bytes / largest, 1)
        return round(-math.log10(error), 1), outcome is home, size

    best = max(near, key=merit)
    if best is fastest:
        return best, "the fastest that passes the gate"
    better = "better answers" if merit(best)[0] > merit(fastest)[0] else "as good answers"
    return best, f"as fast as {fastest.candidate.label} within the noise, {better}"


def gated(outcome: Outcome, record: BenchmarkMetrics, gate: Gate) -> Outcome:
    """Return an outcome with what was measured, dropped where that misses the gate."""
    # The validator of quantize and the engine of this run batch the same inputs otherwise, which
    # changes the answers of some graphs (dynamic int8): the worst that was measured counts.
    cosine = _least(outcome.cosine_min, record.cosine_min)
    low = _least(outcome.cosine_low, record.cosine_low)
    measures = record.measures
    seen = Validation(samples=record.items, cosine_min=cosine, cosine_low=low, measures=measures)
    failures = seen.failures(gate) if measures or cosine is not None else ["no cosine"]
    return replace(
        outcome,
        status="dropped" if failures else "kept",
        reason="; ".join(failures),
        cosine_min=cosine,
        cosine_low=low,
        cosine_mean=record.cosine_mean,
        measures=measures,
        items_per_second=record.items_per_second,
        latency_ms_p50=record.latency_ms_p50,
        rounds_seconds=record.rounds_seconds,
        rounds_latency_ms=record.rounds_latency_ms,
    )


def _least(*measured: float | None) -> float | None:
    return min((value for value in measured if value is not None), default=None)


def contender(path: Path, label: str, variant: str, device: str) -> Contender:
    """Return a placement as it is opened where nothing was tuned."""
    spec: dict[str, Any] = {
        "kind": "memopt",
        "path": str(path.absolute()),
        "variant": variant,
        "device": device,
    }
    if canonical(device) in ("cpu", "openvino"):
        # All alike, whatever an earlier call found best for one of them.
        spec["streams"] = usual_streams(usable_cpus())
        spec |= {"threads": usable_cpus(), "openvino_options": {}}
    return Contender(label=label, spec=spec)
