"""``quantize``: one recipe applied to one bundle, proven on other inputs, written or refused."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memopt.bundle import Bundle, Variant, open_bundle
from memopt.errors import BundleError, ConfigurationError, QuantizationError
from memopt.exporters.refusals import need_one_graph
from memopt.files import staged_directory
from memopt.graphs.integers import integer_share
from memopt.graphs.linears import weight_names
from memopt.graphs.openvino import takes_segments
from memopt.graphs.session import feeds
from memopt.progress import Progress, Step, silent
from memopt.quantization.accuracy.calibration import (
    CalibrationSet,
    check_disjoint,
    described,
    load,
    split,
)
from memopt.quantization.accuracy.gate import MIN_COSINE, Gate, Validation
from memopt.quantization.accuracy.language import Validator, validator_of
from memopt.quantization.accuracy.layer_error import with_errors
from memopt.quantization.accuracy.result import Result, Trail
from memopt.quantization.accuracy.validate import PrecisionValidator
from memopt.quantization.math.statistics import token_probes
from memopt.quantization.method import Context, Make, Quantized, writes
from memopt.quantization.recipe import Recipe, Samples
from memopt.quantization.search import Compare, search
from memopt.runtimes.openvino_file import save_openvino
from memopt.runtimes.text import takes_pairs
from memopt.tasks.quality import check_measured

__all__ = ["Samples", "quantize"]

# What might help a variant that fails its gate, and a weight file.
_REMEDY = "try --search, another recipe, or --keep-failing to write it marked as failed"
_REMEDY_OF_WEIGHTS = "try --search, gptq, more bits, smaller groups, or --keep-failing"
# Methods that start from the graph with a cache in one buffer, where a model has one.
OF_THE_CACHE = ("weight-only",)


def quantize(
    bundle: str | Path | Bundle,
    samples: Samples,
    recipe: Recipe | None = None,
    *,
    gate: Gate | None = None,
    keep_failing: bool = False,
    budget: float | None = None,
    step: Step = silent,
    progress: Progress = silent,
) -> Result:
    """Quantize a bundle, compare the result with the float graph, and record it.

    Method ``arrow`` writes weights; its proof runs the portable float graph with every weight
    replaced by its dequantized value, which is what ``memopt export --weights`` computes with.

    Args:
        bundle: an exported bundle.
        samples: calibration and validation inputs.
        recipe: what to do; the default is full int8 on OpenVINO with smoothing.
        gate: what to reach; by default min cosine .95, or .98 for GPTQ, of language
            models perplexity at most +5 % and a mean KL of at most 0.05 nats.
        keep_failing: write a variant that fails its gate, marked so; the engine never picks it.
        budget: seconds, calibration included, for a search of layers to keep in float; None for no
            search.
        step: called with a line before each step.
        progress: called with (tries or weights done, in all).

    Raises:
        QuantizationError: the result fails its gate (nothing is written then), or cannot be built.
        InputError: the calibration data cannot be used.
        BundleError: no bundle, or no float graph of the wanted kind in it.
        ConfigurationError: a recipe that does not fit.
    """
    started = time.monotonic()
    recipe = recipe or Recipe()
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    opened.check(opened.weights.name)
    need_one_graph(opened, "quantization")
    base, gate = float_variant(opened, recipe), gate or Gate(min_cosine=least_cosine(recipe))
    check_measured(gate.bounds, opened.manifest.task)
    calibration, held_out = read_samples(opened, samples)
    context = make_context(opened, base, recipe, calibration, samples, step)
    step("float reference")
    validator = validator_of(opened, base, held_out, samples.max_length)
    with staged_directory(opened.path) as folder:
        context = replace(context, folder=folder, progress=progress)
        make: Make = recipe.prepare()(context)
        trail: Trail | None = None
        if budget is None:
            step("building the graph")
            quantized = make(())
        else:
            compare, left = comparer(validator, recipe, folder), budget + started - time.monotonic()
            choice = search(make, compare, gate, budget=left, step=step, progress=progress)
            quantized, trail = choice.quantized, choice.trail
            recipe = replace(recipe, keep_float=(*recipe.keep_float, *choice.kept))
        if quantized.finish is not None:
            quantized = quantized.finish()
        proof = _prove(quantized, context, recipe, validator, gate, keep_failing)
        data = {
            "calibration": Path(samples.calibration).name,
            "calibration_sha256": calibration.digest,
            "samples": len(calibration),
            "validated_on": len(held_out),
            "seed": samples.seed,
        }
        record = _record_weights if quantized.weights else _record_variant
        recorded = record(proof, context, recipe, gate, data, described(held_out))
        return Result(
            passed=not proof.failures,
            failures=proof.failures,
            validation=proof.validation,
            gate=gate,
            recipe=recipe.to_dict(),
            data=data,
            trail=trail,
            model=opened.manifest.name,
            **recorded,
        )


def comparer(validator: Validator, recipe: Recipe, folder: Path) -> Compare:
    """Return what a search compares graphs with; each is written below ``folder`` and removed."""

    def compare(quantized: Quantized, limit: int | None) -> Validation:
        files = write_graph(quantized, recipe.format, folder, "trial")
        try:
            run = validator.open(files[0], recipe.format, quantized.options)
            return validator.validate(run, limit=limit, timed=False)
        finally:
            for file in files:
                file.unlink(missing_ok=True)

    return compare


@dataclass(frozen=True, slots=True, kw_only=True)
class _Proof:
    """A quantized graph, where it is written, and how it compares with the float one."""

    quantized: Quantized
    files: list[Path]
    options: dict[str, str]
    validation: Validation
    failures: tuple[str, ...]


def _prove(
    quantized: Quantized,
    context: Context[Any],
    recipe: Recipe,
    validator: Validator,
    gate: Gate,
    keep_failing: bool,
) -> _Proof:
    """Write a graph and compare it on the whole validation set.

    Raises:
        QuantizationError: it fails its gate, and that is not asked for.
    """
    assert context.folder is not None
    files = write_graph(quantized, recipe.format, context.folder, file_stem(recipe))
    context.step("validation")
    base, weights = context.base, quantized.weights
    options = {**(quantized.options or ({} if weights else base.options))}
    run = validator.open(files[0], recipe.format, options)
    validation = validator.validate(run, timed=weights is None)
    if isinstance(validator, PrecisionValidator) and takes_segments(files[0], recipe.format):
        validator.refuse_mixing(run)
    failures = tuple(validation.failures(gate))
    if failures and not keep_failing:
        name = weights.name if weights else recipe.variant_name
        raise QuantizationError(
            f"{name} fails its gate: {'; '.join(failures)}",
            fix=_REMEDY_OF_WEIGHTS if weights else _REMEDY,
        )
    return _Proof(
        quantized=quantized,
        files=files,
        options=options,
        validation=validation,
        failures=failures,
    )


def _record_variant(
    proof: _Proof,
    context: Context[Any],
    recipe: Recipe,
    gate: Gate,
    data: Mapping[str, Any],
    of: Mapping[str, Any],
) -> dict[str, Any]:
    """Add a graph to the bundle as a variant; return what the result says of it."""
    bundle, base, files = context.bundle, context.base, proof.files
    context.step("work in integers, error by layer")
    work: dict[str, Any] = {}
    if recipe.method not in ("weight-only", "nncf-weights"):
        feed = next(iter(context.feeds()))
        work = integer_share(files[0], recipe.format, feed, proof.options)
    layers = with_errors(proof.quantized.layers, context, files[0])
    variant = Variant(
        name=recipe.variant_name,
        format=recipe.format,
        precision=recipe.weight_type,
        file=f"{recipe.format}/{files[0].name}",
        companions=tuple(f"{recipe.format}/{file.name}" for file in files[1:]),
        target=recipe.runtime,
        # Of a language model it says that past and present are one buffer.
        fused=base.fused or (recipe.method in ("weight-only", "dynamic") and not writes(bundle)),
        method=recipe.method,
        inputs=base.inputs,
        output=base.output,
        options=proof.options,
        passed=not proof.failures,
        validation={**proof.validation.record(gate), **work},
        recipe=recipe.to_dict(),
    )
    event = {"event": "quantize", "variant": variant.name, "passed": variant.passed, **data}
    # The graph, which is the first, after what it needs.
    staged = {f"{recipe.format}/{file.name}": file for file in reversed(files)}
    bundle = bundle.add_variants(variant, event=event, staged=staged, proof=of)
    return {
        "name": variant.name,
        "file": variant.file,
        "layers": layers,
        "bytes": bundle.size(variant),
        "float_bytes": bundle.size(base),
        "work": {"int8_macs": work.get("int8_macs"), "kernels": work.get("kernels", {})},
        "entry": variant,
        "at": bundle.manifest.history[-1]["at"],
    }


def _record_weights(
    proof: _Proof,
    context: Context[Any],
    recipe: Recipe,
    gate: Gate,
    data: Mapping[str, Any],
    of: Mapping[str, Any],
) -> dict[str, Any]:
    """Add a weight file to the bundle; return what the result says of it."""
    bundle, file = context.bundle, proof.quantized.weights
    assert file is not None
    size = file.stat().st_size
    event: dict[str, Any] = {"event": "quantize", "method": recipe.method, "file": file.name}
    event |= {"passed": not proof.failures, "validation": proof.validation.record(gate)}
    event |= {**data, **proof.quantized.notes}
    bundle = bundle.add_files({file.name: file}, event=event)
    return {
        "name": file.name,
        "file": file.name,
        "layers": proof.quantized.layers,
        "bytes": size,
        "float_bytes": bundle.weights.stat().st_size,
        "at": bundle.manifest.history[-1]["at"],
    }


def least_cosine(recipe: Recipe) -> float:
    """Return the min cosine that a recipe's variant must reach unless another is asked for."""
    return MIN_COSINE["gptq" if recipe.algorithm == "gptq" else "rtn"]


def float_variant(bundle: Bundle, recipe: Recipe) -> Variant:
    """Return the float variant that a recipe starts from.

    Raises:
        BundleError: it was not exported.
    """
    variants = bundle.manifest.variants
    name = recipe.base
    if name == "onnx-fp32" and recipe.method in OF_THE_CACHE and writes(bundle):
        name = "onnx-fp32-fused"
    if name == "onnx-fp32-fused" and name not in variants and "onnx-fp32" in variants:
        # An architecture that nothing could be fused in: dynamic works on the plain graph too.
        name = "onnx-fp32"
    if name not in variants and bundle.imported:
        _refuse_not_float(bundle)
    if name not in variants:
        raise BundleError(
            f"bundle {bundle.path} has no variant {name!r} to quantize",
            fix=f"run: memopt export {bundle.path} --format {recipe.format}",
        )
    return variants[name]


def _refuse_not_float(bundle: Bundle) -> None:
    for variant in bundle.manifest.variants.values():
        if variant.method == "import" and variant.precision != "fp32":
            told = (variant.check or {}).get("graph") or {}
            how = f" ({told['quantization']})" if told.get("quantization") else ""
            raise QuantizationError(
                f"{bundle.path} was imported in {variant.precision}{how}: a graph is quantized from"
                " float32",
                fix="import the float32 graph that it was made of",
            )


def read_samples(bundle: Bundle, samples: Samples) -> tuple[CalibrationSet, CalibrationSet]:
    """Return calibration and validation inputs that share nothing.

    Raises:
        InputError: the data cannot be used.
        QuantizationError: a validation file of its own overlaps with the calibration inputs.
        ConfigurationError: a max_length beyond the model's own.
    """
    modality, most = bundle.manifest.modality, bundle.manifest.max_length
    if most is not None and (samples.max_length or 0) > most:
        raise ConfigurationError(
            f"max_length {samples.max_length} is beyond the model's {most} tokens",
            fix=f"use {most} or less",
        )
    common = {"modality": modality, "seed": samples.seed, "column": samples.column}
    common["pairs"] = takes_pairs(bundle)
    calibration, held_out = split(
        samples.calibration,
        samples=samples.samples,
        validation=samples.validation_samples,
        **common,  # type: ignore[arg-type]
    )
    if samples.validation is not None:
        held_out = load(
            samples.validation,
            samples=samples.validation_samples,
            **common,  # type: ignore[arg-type]
        )
    check_disjoint(calibration, held_out)
    return calibration, held_out


def make_context(
    bundle: Bundle,
    base: Variant,
    recipe: Recipe,
    calibration: CalibrationSet,
    samples: Samples,
    step: Step = silent,
) -> Context[Any]:
    """Return what a method needs, with calibration inputs in batches of similar length."""

    def start() -> Any:
        batches = feeds(bundle, calibration.items, base.inputs, max_length=samples.max_length)
        return (feed for _, feed in batches)

    probes: Sequence[Any] = ()
    vocabulary = bundle.config().get("vocab_size")
    probing = recipe.range_probes and recipe.method == "static"
    if probing and bundle.manifest.modality == "text" and isinstance(vocabulary, int):
        longest = samples.max_length or bundle.manifest.max_length or 128
        probes = token_probes(
            vocabulary, next(iter(start())), limit=min(longest, 128), seed=samples.seed
        )
    return Context(
        bundle=bundle,
        base=base,
        recipe=recipe.own,
        feeds=start,
        probes=probes,
        name_of=weight_names(bundle) if base.format == "openvino" else lambda _: None,
        seed=samples.seed,
        samples=len(calibration),
        step=step,
    )


def file_stem(recipe: Recipe) -> str:
    """Return the file name, without suffix, of the variant a recipe makes."""
    name = recipe.variant_name.removeprefix(f"{recipe.format}-").replace("-", "_")
    return f"openvino_model_{name}" if recipe.format == "openvino" else f"model_{name}"


def write_graph(quantized: Quantized, format: str, folder: Path, stem: str) -> list[Path]:
    """Write a graph; return its files, the graph first. The same graph gives the same bytes."""
    if format == "openvino":
        path = folder / f"{stem}.xml"
        save_openvino(quantized.model, path)
        return [path, path.with_suffix(".bin")]
    path = folder / f"{stem}.onnx"
    path.write_bytes(quantized.model.SerializeToString(deterministic=True))
    return [path]
