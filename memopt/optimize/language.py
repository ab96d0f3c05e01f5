"""Judge a language model's candidates: KL to the float model, and tokens per second by threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from memopt.benchmark.writing import Typist, WritingSpeed, measure_writers
from memopt.bundle import Bundle, Variant, open_bundle
from memopt.optimize.judge import Judged, choose
from memopt.optimize.plan import Outcome
from memopt.progress import Step
from memopt.quantization.accuracy.calibration import CalibrationSet
from memopt.quantization.accuracy.gate import Gate, Validation
from memopt.quantization.accuracy.language import validator_of
from memopt.quantization.quantize import float_variant
from memopt.quantization.recipe import Recipe
from memopt.runtimes.cpu import usable_cpus

MEASURED = ("kl_mean", "kl_p99", "top1_agreement", "greedy_prefix", "perplexity_increase")
# A float graph was compared with torch when it was exported: it is what the others are told by.
EXACT = {"kl_mean": 0.0, "perplexity_increase": 0.0}
REFERENCES = ("onnx-fp32-fused", "onnx-fp32", "openvino-fp32")


def judge_writers(
    path: Path,
    outcomes: Sequence[Outcome],
    held_out: CalibrationSet,
    gate: Gate,
    *,
    rounds: int,
    deadline: float | None,
    prefer: str,
    say: Step,
) -> Judged:
    """Drop what misses the gate, measure the rest with each number of threads, choose the fastest.

    Args:
        path: the bundle.
        held_out: texts that were not used for calibration; the prompt is made of them.
        rounds: timed passes; fewer when ``deadline`` (of ``time.monotonic``) comes first.
        prefer: ``decode``, ``prefill`` or ``mix``.
    """
    bundle = open_bundle(path)
    proven = [_proven(bundle, outcome, held_out, gate, say) for outcome in outcomes]
    writers = [
        Typist(outcome.candidate.name, outcome.candidate.device, threads)
        for outcome in proven
        if outcome.status == "kept"
        for threads in thread_counts(usable_cpus())
    ]
    failed: dict[int, str] = {}
    # Not the validation texts alone: a short set is repeated until the prompt is long enough.
    text = "\n".join(str(item) for item in held_out.items)
    options: dict[str, Any] = {"text": text, "prefer": prefer, "deadline": deadline}
    speeds = measure_writers(bundle, writers, rounds=rounds, failures=failed, step=say, **options)
    reasons = {writers[n].variant: reason for n, reason in failed.items()}
    measured = [
        _timed(o, [s for s in speeds if s.variant == o.candidate.name], prefer, reasons)
        for o in proven
    ]
    known = {o.candidate.name: o.items_per_second for o in measured if o.items_per_second}
    reference = next((known[name] for name in REFERENCES if name in known), None)
    return Judged(tuple(choose(measured)), reference)


def thread_counts(cores: int) -> tuple[int, ...]:
    """Return the numbers of threads to try: every one of a few, else powers of two and all.

    >>> thread_counts(3), thread_counts(12)
    ((1, 2, 3), (1, 2, 4, 8, 12))
    """
    if cores <= 4:
        return tuple(range(1, cores + 1))
    return tuple(sorted({1 << power for power in range(cores.bit_length())} | {cores}))


def _proven(
    bundle: Bundle, outcome: Outcome, held_out: CalibrationSet, gate: Gate, say: Step
) -> Outcome:
    """Return an outcome with what is measured of its texts, dropped where that misses the gate."""
    if outcome.status != "kept":
        return outcome
    variant = bundle.variant(outcome.candidate.name)
    measures = dict(EXACT)
    if outcome.candidate.kind == "quantize":
        told = variant.validation or {}
        if told.get("set_sha256") != held_out.digest:
            say(f"validate {variant.name}")
            told = _validated(bundle, variant, held_out)
        measures = {name: float(told[name]) for name in MEASURED if told.get(name) is not None}
    rise = measures.get("perplexity_increase")
    others = {name: value for name, value in measures.items() if name != "perplexity_increase"}
    seen = Validation(samples=len(held_out), measures=others, perplexity_increase=rise)
    failures = seen.failures(gate)
    status = "dropped" if failures else "kept"
    return replace(outcome, status=status, reason="; ".join(failures), measures=measures)


def _validated(bundle: Bundle, variant: Variant, held_out: CalibrationSet) -> Mapping[str, Any]:
    base = float_variant(bundle, Recipe.from_dict(variant.recipe or {}))
    validator = validator_of(bundle, base, held_out)
    run = validator.open(bundle.file(variant), variant.format, variant.options)
    found = validator.validate(run, timed=False)
    return {**found.measures, "perplexity_increase": found.perplexity_increase}


def _timed(
    outcome: Outcome, speeds: Sequence[WritingSpeed], prefer: str, reasons: Mapping[str, str]
) -> Outcome:
    """Return an outcome with the speed of its best number of threads."""
    if outcome.status != "kept":
        return outcome
    if not speeds:
        reason = reasons.get(outcome.candidate.name, "it could not be measured")
        return replace(outcome, status="dropped", reason=reason)
    best = max(speeds, key=lambda speed: speed.speed(prefer))
    return replace(
        outcome,
        items_per_second=best.speed(prefer),
        latency_ms_p50=1000 / best.decode_tokens_per_second,
        rounds_seconds=best.rounds_seconds,
        threads=best.threads,
    )
