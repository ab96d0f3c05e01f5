"""``optimize``: build every candidate, prove it, measure it beside the others, keep the best."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from memopt.benchmark.peers import Contender
from memopt.benchmark.runner import BenchmarkMetrics, hardware, run, versions
from memopt.bundle import Bundle, Manifest, Variant, open_bundle, stamp
from memopt.errors import ConfigurationError, InputError, MemoptError
from memopt.exporters.base import export
from memopt.files import sha256_file
from memopt.optimize.candidates import candidates
from memopt.optimize.plan import TARGETS, Candidate, Plan
from memopt.quantization.calibration import CalibrationSet, split
from memopt.quantization.quantize import Samples, quantize
from memopt.quantization.recipe import Recipe
from memopt.quantization.validate import Gate
from memopt.runtimes.cpu import cpu_features, machine_key
from memopt.runtimes.providers import canonical, missing
from memopt.runtimes.tune import tune_streams
from memopt.weights.convert import resolve

Step = Callable[[str], None]
PLAN_FILE, REPORT_FILE = "plan.json", "optimize.html"
# Building may use this share of the budget; the rest is for measuring what was built.
BUILD_SHARE = 0.7
# Speeds closer than this are the same on a noisy machine: the better answers win then.
SAME_SPEED = 1.03
VALIDATION_SAMPLES = 512
TUNING_SAMPLES = 256
# The float graphs that quantization starts from and that quality is measured against.
BASES = (("onnx", "fp32", "onnx-fp32"), ("openvino", "fp32", "openvino-fp32"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one candidate, and why."""

    candidate: Candidate
    status: str  # chosen | kept | dropped | skipped
    reason: str
    reused: bool = False
    bytes: int = 0
    cosine_min: float | None = None
    cosine_mean: float | None = None
    items_per_second: float | None = None
    latency_ms_p50: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimized:
    """The result: the plan that was carried out and one outcome per candidate."""

    bundle: Path
    plan: Plan
    outcomes: tuple[Outcome, ...]
    inputs: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "bundle": str(self.bundle),
            "chosen": self.plan.chosen,
            "seconds": self.seconds,
            "inputs": self.inputs,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }


def optimize(
    source: str | Path,
    calibration: Path,
    *,
    min_cosine: float = 0.98,
    targets: Sequence[str] | None = None,
    budget: float = 900.0,
    samples: int = 300,
    seed: int = 0,
    rounds: int = 5,
    plan: Plan | None = None,
    step: Step | None = None,
) -> Optimized:
    """Find the fastest variant whose answers stay right, and make it the bundle's ``auto``.

    Candidates are built one after the other; one that exists already, made from the same weights
    with the same recipe and calibration, is taken as it is, so an interrupted call goes on where
    it stopped. Quality is the cosine of each embedding to float32's on inputs that were not used
    for calibration; speed is measured in one run, each candidate a process, rounds in turn.

    Args:
        source: a bundle, or anything ``memopt convert`` takes.
        calibration: inputs of the model's modality; split by ``seed`` into calibration and proof.
        min_cosine: the worst cosine a variant may have.
        targets: what to build for; None takes what is usable here of cpu, openvino, cuda, ...
        budget: seconds for all; what does not fit is skipped and said so.
        samples: calibration inputs.
        rounds: timed passes per candidate.
        plan: candidates of an earlier call, to be replayed instead of this machine's own list.
        step: called with a line before each step.

    Raises:
        InputError: the calibration data cannot be used.
        ConfigurationError: a value out of range, or a model that is no encoder.
        MemoptError: the float model itself cannot be exported.
    """
    if not -1 <= min_cosine <= 1:
        raise ConfigurationError(f"min_cosine {min_cosine} is not in [-1, 1]", fix="use 0.98")
    begin = time.monotonic()
    say = step or (lambda line: None)
    calibration = Path(calibration)
    if not calibration.exists():
        raise InputError(f"no calibration data at {str(calibration)!r}", fix="check the path")
    say("resolve the model")
    bundle = resolve(source)
    manifest = bundle.manifest
    if manifest.task == "text-generation":
        raise ConfigurationError(
            f"{bundle.path} is a language model; optimize chooses among encoders",
            fix="use memopt quantize, which proves perplexity",
        )
    calibration_set, held_out = split(
        calibration,
        modality=manifest.modality,
        samples=samples,
        validation=VALIDATION_SAMPLES,
        seed=seed,
    )
    wanted = plan.candidates if plan else _wanted(manifest, targets)
    bundle = _bases(bundle, wanted, say)
    outcomes: list[Outcome] = []
    source_samples = Samples(calibration=calibration, samples=samples, seed=seed)
    for number, candidate in enumerate(wanted, start=1):
        say(f"candidate {number} of {len(wanted)}: {candidate.name}")
        if time.monotonic() - begin > budget * BUILD_SHARE:
            outcomes.append(_skip(candidate, f"the budget of {budget:.0f} s was used up"))
            continue
        absent = missing(canonical(candidate.device))
        if absent is not None:
            outcomes.append(_skip(candidate, str(absent)))
            continue
        outcomes.append(_build(bundle.path, candidate, source_samples, calibration_set, min_cosine))
    outcomes = _measure(bundle.path, outcomes, held_out, min_cosine, rounds, say)
    chosen = next((o.candidate for o in outcomes if o.status == "chosen"), None)
    made = Plan(
        source=str(source),
        min_cosine=min_cosine,
        samples=samples,
        seed=seed,
        candidates=tuple(wanted),
        chosen=chosen.name if chosen else None,
        calibration=str(calibration),
        calibration_sha256=_digest(calibration),
        machine={"key": machine_key(), **hardware(), **versions()},
    )
    result = Optimized(
        bundle=bundle.path,
        plan=made,
        outcomes=tuple(outcomes),
        inputs=len(held_out),
        seconds=time.monotonic() - begin,
    )
    _record(result)
    if chosen is not None:
        say("choose the number of streams")
        tune_streams(
            open_bundle(bundle.path),
            held_out.items[:TUNING_SAMPLES],
            device=canonical(chosen.device),
            variant=chosen.name,
        )
    return result


def _wanted(manifest: Manifest, targets: Sequence[str] | None) -> tuple[Candidate, ...]:
    here = [name for name in TARGETS if missing(canonical(name)) is None]
    return candidates(manifest, targets or here, cpu_features())


def _bases(bundle: Bundle, wanted: Sequence[Candidate], say: Step) -> Bundle:
    """Export the float graphs the candidates start from, where they are not there yet."""
    formats = {"onnx"} | {"openvino" for c in wanted if c.device == "openvino"}
    for format_, precision, name in BASES:
        if format_ in formats and not _fresh(open_bundle(bundle.path), name):
            say(f"export {name}")
            export(open_bundle(bundle.path), format=format_, precision=precision)
    return open_bundle(bundle.path)


def _fresh(bundle: Bundle, name: str) -> bool:
    """Say whether a float variant is there and of the bundle's present weights."""
    variant = bundle.manifest.variants.get(name)
    if variant is None or variant.check is None:
        return False
    weights = bundle.manifest.files["weights.parquet"]["sha256"]
    made_of = variant.check.get("made_of") or {}
    return made_of.get("weights") == weights and bundle.file(variant).is_file()


def _build(
    path: Path,
    candidate: Candidate,
    samples: Samples,
    calibration: CalibrationSet,
    min_cosine: float,
) -> Outcome:
    bundle = open_bundle(path)
    try:
        if candidate.kind == "export":
            reused = _fresh(bundle, candidate.name)
            if not reused:
                export(bundle, **candidate.settings)
        else:
            recipe = Recipe.from_dict(candidate.settings)
            reused = _same_recipe(bundle, candidate, recipe, calibration)
            if not reused:
                quantize(bundle, samples, recipe, gate=Gate(min_cosine=min_cosine))
    except ConfigurationError:
        raise
    except MemoptError as error:
        return Outcome(candidate=candidate, status="dropped", reason=str(error))
    bundle = open_bundle(path)
    if candidate.name not in bundle.manifest.variants:
        reason = "the exporter made no such variant for this architecture"
        return Outcome(candidate=candidate, status="dropped", reason=reason)
    size = _bytes(bundle, bundle.variant(candidate.name))
    return Outcome(candidate=candidate, status="kept", reason="", reused=reused, bytes=size)


def _same_recipe(
    bundle: Bundle, candidate: Candidate, recipe: Recipe, calibration: CalibrationSet
) -> bool:
    variant = bundle.manifest.variants.get(candidate.name)
    if variant is None or not variant.passed or dict(variant.recipe or {}) != recipe.to_dict():
        return False
    events = [e for e in bundle.manifest.history if e.get("variant") == candidate.name]
    converted = [e for e in bundle.manifest.history if e.get("event") == "convert"]
    made = bool(events) and events[-1].get("calibration_sha256") == calibration.digest
    newer = not converted or not events or converted[-1]["at"] <= events[-1]["at"]
    return made and newer and bundle.file(variant).is_file()


def _measure(
    path: Path,
    outcomes: list[Outcome],
    held_out: CalibrationSet,
    min_cosine: float,
    rounds: int,
    say: Step,
) -> list[Outcome]:
    """Measure what was built in one run, apply the gate, choose."""
    built = [outcome for outcome in outcomes if outcome.status == "kept"]
    if not built:
        return outcomes
    # The first contender is what cosines are against: the portable float graph.
    contenders = [_contender(path, "onnx-fp32", "cpu")]
    contenders += [_contender(path, o.candidate.name, o.candidate.device) for o in built]
    records: list[BenchmarkMetrics] = []
    failed: dict[str, str] = {}
    while len(contenders) > 1:
        try:
            records = run(contenders, held_out.items, rounds=rounds, singles=50, on_step=say)
            break
        except MemoptError as error:
            # One that cannot run here is dropped, with its reason, and the rest is measured anew.
            label = str(error).partition(":")[0]
            if label not in {c.label for c in contenders[1:]}:
                raise
            failed[label] = str(error).partition(": ")[2]
            contenders = [c for c in contenders if c.label != label]
    found = {record.label: record for record in records[1:]}
    measured = []
    for outcome in outcomes:
        name = outcome.candidate.name
        if outcome.status != "kept":
            measured.append(outcome)
        elif name in failed:
            measured.append(replace(outcome, status="dropped", reason=failed[name]))
        else:
            measured.append(_judge(outcome, found[name], min_cosine))
    return _choose(measured)


def _judge(outcome: Outcome, record: BenchmarkMetrics, min_cosine: float) -> Outcome:
    cosine = record.cosine_min if record.cosine_min is not None else -1.0
    passed = cosine >= min_cosine
    return replace(
        outcome,
        status="kept" if passed else "dropped",
        reason="" if passed else f"min cosine {cosine:.4f} is below {min_cosine}",
        cosine_min=record.cosine_min,
        cosine_mean=record.cosine_mean,
        items_per_second=record.items_per_second,
        latency_ms_p50=record.latency_ms_p50,
    )


def _choose(outcomes: list[Outcome]) -> list[Outcome]:
    def speed(outcome: Outcome) -> float:
        return outcome.items_per_second or 0.0

    passing = [o for o in outcomes if o.status == "kept"]
    if not passing:
        return outcomes
    fastest = max(passing, key=speed)
    near = [o for o in passing if speed(o) * SAME_SPEED >= speed(fastest)]
    best = max(near, key=lambda o: (o.cosine_min or 0.0, -o.bytes))
    decided = []
    for outcome in outcomes:
        if outcome is best:
            outcome = replace(outcome, status="chosen", reason="the fastest that passes the gate")
        elif outcome.status == "kept":
            share = speed(outcome) / speed(best)
            outcome = replace(outcome, reason=f"right, at {share:.2f}x the speed of the choice")
        decided.append(outcome)
    return decided


def _contender(path: Path, variant: str, device: str) -> Contender:
    # Two contenders of one name cannot be told apart: the reference gets a label of its own.
    label = "reference" if variant == "onnx-fp32" and device == "cpu" else variant
    spec = {"kind": "memopt", "path": str(path.absolute()), "variant": variant, "device": device}
    return Contender(label=label, spec=spec)


def _record(result: Optimized) -> None:
    """Write plan and report into the bundle, and the choice into its manifest."""
    from memopt.optimize.report import write_html

    bundle = open_bundle(result.bundle)
    result.plan.save(bundle.path / PLAN_FILE)
    write_html(result, bundle.path / REPORT_FILE)
    key = machine_key()
    best = next((o for o in result.outcomes if o.status == "chosen"), None)

    def change(manifest: Manifest) -> Manifest:
        variants = dict(manifest.variants)
        for outcome in result.outcomes:
            name = outcome.candidate.name
            if name in variants and outcome.items_per_second is not None:
                record = {
                    "items_per_second": round(outcome.items_per_second, 1),
                    "latency_ms_p50": round(outcome.latency_ms_p50 or 0.0, 3),
                    "cosine_min": outcome.cosine_min,
                    "machine": key,
                }
                variants[name] = replace(variants[name], benchmark=record)
        chosen = dict(manifest.chosen)
        if best is not None:
            before = chosen.get(key)
            kept = before if isinstance(before, dict) else {}
            chosen[key] = {
                **kept,
                "variant": best.candidate.name,
                "device": canonical(best.candidate.device),
            }
        event = {
            "event": "optimize",
            "chosen": best.candidate.name if best else None,
            "min_cosine": result.plan.min_cosine,
            "calibration_sha256": result.plan.calibration_sha256,
        }
        history = (*manifest.history, stamp(event))
        return replace(manifest, variants=variants, chosen=chosen, history=history)

    bundle.update(change)


def _skip(candidate: Candidate, reason: str) -> Outcome:
    return Outcome(candidate=candidate, status="skipped", reason=reason)


def _bytes(bundle: Bundle, variant: Variant) -> int:
    files = bundle.manifest.files
    return sum(files.get(n, {}).get("bytes", 0) for n in (variant.file, *variant.companions))


def _digest(path: Path) -> str:
    if path.is_file():
        return sha256_file(path)
    names = "\0".join(sorted(p.name for p in path.iterdir()))
    return hashlib.sha256(names.encode()).hexdigest()
