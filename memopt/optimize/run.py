"""``optimize``: build every candidate, prove it, measure it beside the others, keep the best."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from memopt.benchmark.record import hardware, versions
from memopt.bundle import Bundle, Manifest, Variant, open_bundle, stamp
from memopt.charts import altair
from memopt.errors import ConfigurationError, InputError
from memopt.exporters.refusals import need_one_graph
from memopt.files import sha256_file
from memopt.optimize.build import Inputs, build, build_bases
from memopt.optimize.candidates import candidates
from memopt.optimize.judge import Judged, judge
from memopt.optimize.language import judge_writers
from memopt.optimize.options import remember_options
from memopt.optimize.plan import ANSWERING, TARGETS, WRITING, Candidate, Optimized, Outcome, Plan
from memopt.optimize.report import write_html
from memopt.progress import Step, silent
from memopt.quantization.accuracy.calibration import described
from memopt.quantization.accuracy.gate import Gate
from memopt.quantization.method import writes
from memopt.registry import nearest
from memopt.runtimes.cpu import cpu_features, cpu_model, machine_key
from memopt.runtimes.providers import canonical, installed
from memopt.runtimes.tune import tune_streams
from memopt.tasks.quality import check_measured
from memopt.weights.convert import resolve
from memopt.weights.locked import unlocked
from memopt.weights.reader import WeightLoader

PLAN_FILE, REPORT_FILE = "plan.json", "optimize.html"
MIN_COSINE = 0.98
# Building may use this share of the budget; the rest is for measuring what was built.
BUILD_SHARE = 0.7
TUNING_SAMPLES = 256


@dataclass(frozen=True, slots=True)
class TimeBudget:
    """Seconds for all, counted from when it was made."""

    seconds: float
    begin: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        """Seconds gone."""
        return time.monotonic() - self.begin

    def left_to_build(self, built: Sequence[float]) -> float:
        """Seconds left for building, less what another is likely to take after those before it."""
        return self.seconds * BUILD_SHARE - self.spent - (fmean(built) if built else 0.0)


def optimize(
    source: str | Path,
    calibration: Path,
    *,
    min_cosine: float | None = None,
    targets: Sequence[str] | None = None,
    budget: float = 900.0,
    samples: int = 300,
    seed: int = 0,
    rounds: int = 5,
    bounds: Mapping[str, float] | None = None,
    prefer: str | None = None,
    plan: Plan | None = None,
    step: Step = silent,
    on_outcome: Callable[[int, int, Outcome], None] | None = None,
) -> Optimized:
    """Find the fastest variant whose answers stay right, and make it the bundle's ``auto``.

    Candidates are built one after the other; one that exists already, made from the same weights
    with the same recipe and calibration, is taken as it is, so an interrupted call goes on where
    it stopped. Quality is the cosine of each embedding to float32's on inputs that were not used
    for calibration; speed is measured in one run, each candidate a process, rounds in turn.

    Args:
        source: a bundle, or anything ``memopt convert`` takes.
        calibration: inputs of the model's modality; split by ``seed`` into calibration and proof.
        min_cosine: the worst cosine a variant may have; None takes the plan's, or 0.98.
        targets: what to build for; None takes what is usable here of cpu, openvino, cuda, ..., or
            all of the plan's.
        budget: seconds for all; what does not fit is skipped and said so. Past it nothing new is
            begun but one timed pass of what was built.
        samples: calibration inputs.
        rounds: timed passes per candidate.
        bounds: of the measures of a task without vectors, see :mod:`memopt.tasks.quality`.
        prefer: which speed counts. Of a language model ``decode`` (what None takes), ``prefill``
            or ``mix``; of others ``throughput`` (batches), ``latency`` (one input at a time) or
            ``both`` (None), where the engine answers each kind of request with its own choice.
        plan: candidates of an earlier call, to be replayed instead of this machine's own list.
        step: called with a line before each step.
        on_outcome: called with number, count and outcome when a candidate was built, or was not.

    Raises:
        InputError: the calibration data cannot be used.
        ConfigurationError: a value out of range, or a model that is no encoder.
        MemoptError: the float model itself cannot be exported.
    """
    planned = plan.min_cosine if plan else MIN_COSINE
    least = planned if min_cosine is None else min_cosine
    gate = Gate(min_cosine=least, bounds=bounds or {})
    budgeted = TimeBudget(budget)
    plan = plan.only(targets) if plan and targets else plan
    if not Path(calibration).exists():
        raise InputError(f"no calibration data at {str(calibration)!r}", fix="check the path")
    altair()  # not missed at the end
    step("resolve the model")
    resolved = _encoder(source)
    preference = _preference(prefer, resolved)
    named = [*gate.bounds, *(["min_cosine"] if min_cosine is not None else [])]
    check_measured(named, resolved.manifest.task)
    if not os.access(resolved.path, os.W_OK):  # minutes before the choice is written
        raise ConfigurationError(
            f"{resolved.path} cannot be written, and the choice is kept in it",
            fix="copy it to a folder of yours: memopt optimize COPY",
        )
    inputs = Inputs.read(resolved, Path(calibration), samples, seed)
    # Under a key: on a plain copy in memory, and what is new is put back encrypted at the end.
    with unlocked(resolved) as bundle:
        wanted = plan.candidates if plan else _candidates(bundle, targets)
        made = Plan(
            source=str(source),
            min_cosine=least,
            samples=samples,
            seed=seed,
            candidates=tuple(wanted),
            calibration=str(calibration),
            calibration_sha256=_digest(Path(calibration), inputs),
            machine={"key": machine_key(), **hardware(), **versions()},
            gate=bounds or {},
            prefer=preference,
        )
        bundle = build_bases(bundle, wanted, step)
        outcomes = _build_all(bundle.path, wanted, inputs, gate, budgeted, step, on_outcome)
        timing: dict[str, Any] = {"rounds": rounds, "deadline": budgeted.begin + budget}
        if made.writes:
            held_out = inputs.held_out
            judged = judge_writers(
                bundle.path, outcomes, held_out, gate, prefer=made.prefer, say=step, **timing
            )
        else:
            items = inputs.held_out.items
            timing["prefer"] = made.prefer
            judged = judge(bundle.path, outcomes, items, gate, say=step, **timing)
        made, noted = _choose(bundle.path, made, judged, inputs, budgeted.begin + budget, step)
        result = Optimized(
            bundle=bundle.path,
            plan=made,
            outcomes=judged.outcomes,
            inputs=len(inputs.held_out),
            seconds=budgeted.spent,
            reference=judged.reference,
            notes=(*_differences(plan, made), *noted),
            at=stamp({})["at"],
        )
        _write(result)
    return replace(result, bundle=resolved.path)


def _build_all(
    path: Path,
    wanted: Sequence[Candidate],
    inputs: Inputs,
    gate: Gate,
    budget: TimeBudget,
    say: Step,
    on_outcome: Callable[[int, int, Outcome], None] | None,
) -> list[Outcome]:
    """Build one candidate after the other, as far as the budget reaches."""
    outcomes: list[Outcome] = []
    built: list[float] = []
    for number, candidate in enumerate(wanted, start=1):
        say(f"candidate {number} of {len(wanted)}: {candidate.label}")
        outcome = build(path, candidate, inputs, gate, budget.left_to_build(built))
        if outcome.status != "skipped" and not outcome.reused:
            built.append(outcome.seconds)
        outcomes.append(outcome)
        if on_outcome:
            on_outcome(number, len(wanted), outcome)
    return outcomes


def _write(result: Optimized) -> None:
    # Without a measurement the plan of an earlier call says more.
    if result.reference is not None:
        result.plan.save(result.bundle / PLAN_FILE)
        write_html(result, result.bundle / REPORT_FILE)


def _choose(
    path: Path, plan: Plan, judged: Judged, inputs: Inputs, deadline: float, say: Step
) -> tuple[Plan, tuple[str, ...]]:
    """Write measurements and the choice into the manifest; return the plan with it, and notes."""
    best = _best(judged.outcomes)
    alone = next((outcome for outcome in judged.outcomes if outcome.single), None)
    if best is not None:
        plan = replace(plan, chosen=best.candidate.name, chosen_device=best.candidate.device)
    if alone is not None and plan.prefer == "both":
        plan = replace(plan, single=alone.candidate.name, single_device=alone.candidate.device)
    _remember(path, plan, judged, described(inputs.held_out))
    if best is None or plan.writes:
        return plan, ()
    gate = Gate(min_cosine=plan.min_cosine, bounds=plan.gate)
    options, notes = remember_options(path, plan, inputs.held_out.items, gate, deadline, say)
    say("choose the number of streams")
    tune_streams(
        open_bundle(path),
        inputs.held_out.items[:TUNING_SAMPLES],
        device=canonical(best.candidate.device),
        variant=best.candidate.name,
    )
    return replace(plan, options=options), notes


def _preference(given: str | None, bundle: Bundle) -> str:
    """Return which speed counts.

    Raises:
        ConfigurationError: it is no speed of a model of this kind.
    """
    known = WRITING if writes(bundle) else ANSWERING
    prefer = given or ("decode" if writes(bundle) else "both")
    if prefer not in known:
        kind = "a language model" if writes(bundle) else f"task {bundle.manifest.task}"
        raise ConfigurationError(
            f"prefer is {prefer!r}, and {bundle.path} is of {kind}",
            fix=nearest(prefer, known),
        )
    return prefer


def _encoder(source: str | Path) -> Bundle:
    bundle = resolve(source)
    need_one_graph(bundle, "a choice of variants")
    if not bundle.task.engine or bundle.task.answer == "any":
        raise ConfigurationError(
            f"{bundle.path} has task {bundle.manifest.task}, of which optimize has no measure",
            fix="use memopt quantize, which proves perplexity",
        )
    return bundle


def _candidates(bundle: Bundle, targets: Sequence[str] | None) -> tuple[Candidate, ...]:
    here = [name for name in TARGETS if installed(canonical(name))]
    if "aoti" in here:
        here.remove("aoti")  # compiling takes minutes: only where it is asked for
    names: Sequence[str] = ()
    if writes(bundle) and not bundle.imported:
        with WeightLoader(bundle.weights) as loader:
            names = loader.names()
        if bundle.config().get("tie_word_embeddings"):  # then the last product is the table's
            names = [name for name in names if "lm_head" not in name]
    return candidates(bundle.manifest, targets or here, cpu_features(), names)


def _best(outcomes: Sequence[Outcome]) -> Outcome | None:
    return next((outcome for outcome in outcomes if outcome.status == "chosen"), None)


def _differences(before: Plan | None, now: Plan) -> tuple[str, ...]:
    """Return what a replay did otherwise than the plan it replays."""
    if before is None:
        return ()
    notes = []
    if before.calibration_sha256 and before.calibration_sha256 != now.calibration_sha256:
        notes.append(f"the calibration data are not the plan's: {now.calibration} differs")
    where = str(before.machine.get("key", ""))
    if where and where != machine_key():
        notes.append(f"the plan was measured on {where}, not on this processor: measured again")
    if before.chosen and (before.chosen, before.chosen_device) != (now.chosen, now.chosen_device):
        where = before.machine.get("processor", "another machine")
        notes.append(f"on {where} the choice was {before.chosen} on {before.chosen_device}")
    return tuple(notes)


def _remember(path: Path, plan: Plan, judged: Judged, proof: Mapping[str, Any]) -> None:
    """Put measurements, verdicts and the choice into the manifest."""
    key = machine_key()
    best = _best(judged.outcomes)
    measured: dict[str, Outcome] = {}
    for outcome in judged.outcomes:
        # The device a variant was made for comes first, and its verdict counts.
        if outcome.items_per_second is not None:
            measured.setdefault(outcome.candidate.name, outcome)
    if best is not None:
        measured[best.candidate.name] = best

    def change(manifest: Manifest) -> Manifest:
        variants = {
            name: _judged(variant, measured[name], plan, key, proof)
            if name in measured
            else variant
            for name, variant in manifest.variants.items()
        }
        chosen = dict(manifest.chosen)
        if best is not None:
            before = chosen.get(key)
            kept = before if isinstance(before, dict) else {}
            device = canonical(best.candidate.device)
            chosen[key] = {**kept, "variant": best.candidate.name, "device": device}
            chosen[key]["processor"] = cpu_model()
            chosen[key].pop("single", None)
            if plan.single is not None:
                alone = {"variant": plan.single, "device": canonical(plan.single_device or "")}
                chosen[key]["single"] = alone
            if best.threads:
                known = kept.get("threads", {})
                chosen[key]["threads"] = {**known, f"{device}:{best.candidate.name}": best.threads}
        event = {
            "event": "optimize",
            "chosen": best.candidate.label if best else None,
            **({"single": f"{plan.single} on {plan.single_device}"} if plan.single else {}),
            "min_cosine": plan.min_cosine,
            **({"gate": dict(plan.gate)} if plan.gate else {}),
            "calibration_sha256": plan.calibration_sha256,
        }
        history = (*manifest.history, stamp(event))
        return replace(
            manifest, variants=variants, chosen=chosen, history=history, validation=proof
        )

    open_bundle(path).update(change)


def _judged(
    variant: Variant, outcome: Outcome, plan: Plan, key: str, proven: Mapping[str, Any]
) -> Variant:
    record = {
        "items_per_second": round(outcome.items_per_second or 0.0, 1),
        "latency_ms_p50": round(outcome.latency_ms_p50 or 0.0, 3),
        "cosine_min": outcome.cosine_min,
        **outcome.measures,
        "device": outcome.candidate.device,
        "machine": key,
    }
    if outcome.candidate.kind == "export":
        return replace(variant, benchmark=record)
    # A variant of an earlier call may have been made under another gate, or on other inputs: these
    # count now, and of what was measured on them the worst.
    proof = {
        **(variant.validation or {}),
        **({} if plan.writes else {"cosine_min": outcome.cosine_min}),
        **({} if plan.writes else {"cosine_low": outcome.cosine_low}),
        **outcome.measures,
        "set_sha256": proven["sha256"],
        "gate": asdict(Gate(min_cosine=plan.min_cosine, bounds=plan.gate)),
    }
    passed = outcome.status in ("kept", "chosen")
    return replace(variant, benchmark=record, passed=passed, validation=proof)


def _digest(path: Path, inputs: Inputs) -> str:
    """Return the SHA-256 of a file; of a folder's pictures or sounds, of those that are used."""
    if path.is_file():
        return sha256_file(path)
    used = inputs.calibration.digest + inputs.held_out.digest
    return hashlib.sha256(used.encode()).hexdigest()
