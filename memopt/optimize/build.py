"""Build the candidates, or find that they are there already: what makes an optimize resumable."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memopt.bundle import Bundle, open_bundle
from memopt.errors import ConfigurationError, MemoptError, MissingExtra
from memopt.exporters.base import current, export, whole
from memopt.optimize.plan import Candidate, Outcome
from memopt.progress import Step
from memopt.quantization.accuracy.calibration import CalibrationSet
from memopt.quantization.accuracy.gate import Gate
from memopt.quantization.quantize import Samples, quantize, read_samples
from memopt.quantization.recipe import Recipe
from memopt.runtimes.providers import canonical, missing

USED_UP = "the budget was used up"
# The float graphs that quantization starts from and that quality is measured against.
BASES = (("onnx", "fp32", "onnx-fp32"), ("openvino", "fp32", "openvino-fp32"))


def build_bases(bundle: Bundle, wanted: Sequence[Candidate], say: Step) -> Bundle:
    """Export the float graphs the candidates start from, where they are not there yet.

    Raises:
        MemoptError: one cannot be exported.
    """
    formats = {"onnx"} | {
        "openvino" for c in wanted if c.device == "openvino" and c.name.startswith("openvino-")
    }
    for format_, precision, name in BASES:
        if format_ in formats and not current(open_bundle(bundle.path), name):
            say(f"export {name}")
            export(open_bundle(bundle.path), format=format_, precision=precision)
    return open_bundle(bundle.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What quantization reads, and what that comes to.

    Attributes:
        samples: the file and how to split it.
        calibration, held_out: the two parts.
    """

    samples: Samples
    calibration: CalibrationSet
    held_out: CalibrationSet

    @classmethod
    def read(cls, bundle: Bundle, path: Path, samples: int, seed: int) -> Inputs:
        """Split a file.

        Raises:
            InputError: it cannot be used, or holds too little.
        """
        given = Samples(calibration=path, samples=samples, seed=seed)
        calibration, held_out = read_samples(bundle, given)
        return cls(samples=given, calibration=calibration, held_out=held_out)


def build(
    path: Path, candidate: Candidate, inputs: Inputs, gate: Gate, seconds_left: float
) -> Outcome:
    """Make the variant of one candidate, or take the one that an earlier call made.

    A quantized variant that misses the gate is written all the same, marked as failed: the engine
    never picks it, the picture shows what it would have been, and a later call need not make it
    again. Only a passing variant of that name, from another recipe, is not replaced by it.

    Args:
        path: the bundle.
        seconds_left: of the budget; nothing is built when this is not positive.
    """
    absent = missing(canonical(candidate.device))
    if absent is not None:
        return Outcome(candidate=candidate, status="skipped", reason=str(absent))
    begin = time.monotonic()
    try:
        reused = _make(open_bundle(path), candidate, inputs, gate, seconds_left)
    except ConfigurationError:
        raise
    except MemoptError as error:
        spent = time.monotonic() - begin
        # Of a missing library the command that installs it is the news.
        reason = str(error) if isinstance(error, MissingExtra) else error.problem
        return Outcome(candidate=candidate, status="dropped", reason=reason, seconds=spent)
    if reused is None:
        return Outcome(candidate=candidate, status="skipped", reason=USED_UP)
    bundle = open_bundle(path)
    if candidate.name not in bundle.manifest.variants:
        reason = "the exporter made no such variant for this architecture"
        return Outcome(candidate=candidate, status="dropped", reason=reason)
    proof = bundle.variant(candidate.name).validation or {}
    # What quantize measured on the very inputs that this call judges with.
    same = proof.get("set_sha256") == inputs.held_out.digest
    return Outcome(
        candidate=candidate,
        status="kept",
        reason="",
        cosine_min=proof.get("cosine_min") if same else None,
        cosine_low=proof.get("cosine_low") if same else None,
        reused=reused,
        seconds=time.monotonic() - begin,
        bytes=bundle.size(bundle.variant(candidate.name)),
    )


def _make(
    bundle: Bundle, candidate: Candidate, inputs: Inputs, gate: Gate, seconds_left: float
) -> bool | None:
    """Say whether the variant was there (True) or was made (False); None: no time is left."""
    if candidate.kind == "export":
        if current(bundle, candidate.name):
            return True
        if seconds_left <= 0:
            return None
        _export(bundle, candidate)
        return False
    recipe = Recipe.from_dict(candidate.settings)
    if _same_recipe(bundle, candidate.name, recipe, inputs.calibration):
        return True
    if seconds_left <= 0:
        return None
    variant = bundle.manifest.variants.get(candidate.name)
    keep_failing = variant is None or not variant.passed
    quantize(bundle, inputs.samples, recipe, gate=gate, keep_failing=keep_failing)
    return False


def _export(bundle: Bundle, candidate: Candidate) -> None:
    try:
        export(bundle, **candidate.settings)
    except TypeError as error:
        raise ConfigurationError(
            f"candidate {candidate.name!r} has settings export does not know: {error}",
            fix="format and precision are enough",
        ) from error


def _same_recipe(bundle: Bundle, name: str, recipe: Recipe, calibration: CalibrationSet) -> bool:
    """Say whether a quantized variant is there, of this recipe, this data and these weights."""
    variant = bundle.manifest.variants.get(name)
    if (
        variant is None
        or not variant.recipe
        or _resolved(dict(variant.recipe)) != _resolved(recipe.to_dict())
    ):
        return False
    events = [e for e in bundle.manifest.history if e.get("variant") == name]
    converted = [e for e in bundle.manifest.history if e.get("event") == "convert"]
    made = bool(events) and events[-1].get("calibration_sha256") == calibration.digest
    newer = not converted or not events or converted[-1]["at"] <= events[-1]["at"]
    return made and newer and whole(bundle, variant)


def _resolved(recipe: dict[str, object]) -> dict[str, object]:
    """Return a recipe with the target that ``auto`` stands for, older ones with every field."""
    whole = Recipe.from_dict(recipe)
    return {**whole.to_dict(), "target": whole.runtime}
