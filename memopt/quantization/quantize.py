"""``quantize``: one recipe applied to one bundle, proven on other inputs, written or refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from memopt.bundle import Bundle, Variant, open_bundle
from memopt.errors import BundleError, ConfigurationError, QuantizationError
from memopt.files import staged_directory
from memopt.graphs.integers import integer_share
from memopt.graphs.linears import weight_names
from memopt.graphs.session import feeds, open_graph
from memopt.quantization.calibration import (
    CalibrationSet,
    check_disjoint,
    described,
    load,
    split,
)
from memopt.quantization.layer_error import with_errors
from memopt.quantization.recipe import Recipe
from memopt.quantization.result import Result
from memopt.quantization.static import Context, Make, Quantized
from memopt.quantization.statistics import token_probes
from memopt.quantization.validate import MIN_COSINE, Gate, PrecisionValidator
from memopt.registry import Entry
from memopt.runtimes.openvino_file import save_openvino

if TYPE_CHECKING:
    from memopt.quantization.search import Trail

Step = Callable[[str], None]
Progress = Callable[[int, int], None]

_AT = "memopt.quantization"
# (method, format) -> what builds it.
METHODS: Mapping[tuple[str, str], Entry] = MappingProxyType(
    {
        (method, format): Entry(name=method, target=f"{_AT}.{target}", summary=summary)
        for method, format, target, summary in (
            ("static", "openvino", "openvino_static:prepare", "full int8, smoothed"),
            ("static", "onnx", "onnx_static:prepare", "QDQ int8, smoothed"),
            ("dynamic", "onnx", "onnx_dynamic:prepare", "int8, activations as they come"),
            ("weight-only", "onnx", "onnx_nbits:prepare", "MatMulNBits 8, 4, 2 bits"),
            ("nncf", "openvino", "nncf:prepare", "nncf.quantize"),
            ("nncf", "onnx", "nncf:prepare", "nncf.quantize"),
            ("nncf-weights", "openvino", "nncf:prepare_weights", "nncf.compress_weights"),
            ("nncf-weights", "onnx", "nncf:prepare_weights", "nncf.compress_weights"),
        )
    }
)
# The float graph each method starts from.
BASES: Mapping[tuple[str, str], str] = MappingProxyType(
    {key: "openvino-fp32" if key[1] == "openvino" else "onnx-fp32" for key in METHODS}
    | {("dynamic", "onnx"): "onnx-fp32-fused"}
)


# Tokens of an input: one of text between the two that frame it.
SHORTEST = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Where inputs come from and how many are used.

    Raises:
        ConfigurationError: a negative seed, or a max_length that leaves no room for text.
    """

    calibration: Path
    validation: Path | None = None
    samples: int = 300
    validation_samples: int = 512
    seed: int = 0
    max_length: int | None = None
    column: str | None = None

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigurationError(f"seed {self.seed} is negative", fix="use 0 or more")
        if self.max_length is not None and self.max_length < SHORTEST:
            raise ConfigurationError(
                f"max_length {self.max_length} leaves no room for text",
                fix=f"use {SHORTEST} or more tokens",
            )


def quantize(
    bundle: str | Path | Bundle,
    samples: Samples,
    recipe: Recipe | None = None,
    *,
    gate: Gate | None = None,
    keep_failing: bool = False,
    budget: float | None = None,
    step: Step = lambda _: None,
    progress: Progress = lambda done, whole: None,
) -> Result:
    """Quantize a bundle's float graph, compare it with the float one, and record the variant.

    Args:
        bundle: an exported bundle.
        samples: calibration and validation inputs.
        recipe: what to do; the default is full int8 on OpenVINO with smoothing.
        gate: what to reach; by default min cosine .95, or .98 for GPTQ, perplexity at most +15 %.
        keep_failing: write a variant that fails its gate, marked so; the engine never picks it.
        budget: seconds, calibration included, for a search of layers to keep in float; None for no
            search.
        step: called with a line before each step.
        progress: called with (tries done, tries in all) of a search.

    Raises:
        QuantizationError: the variant fails its gate (nothing is written then), or cannot be built.
        InputError: the calibration data cannot be used.
        BundleError: no bundle, or no float graph of the wanted kind in it.
        ConfigurationError: a recipe that does not fit.
    """
    started = time.monotonic()
    recipe = recipe or Recipe()
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    opened.check(opened.weights.name)
    gate = gate or Gate(min_cosine=least_cosine(recipe))
    key = (recipe.method, recipe.format)
    if key not in METHODS:
        raise ConfigurationError(
            f"method {recipe.method!r} makes no variant to run", fix="it writes weights: see arrow"
        )
    base = float_variant(opened, key)
    calibration, held_out = read_samples(opened, samples)
    context = make_context(opened, base, recipe, calibration, samples, step)
    step("float reference")
    validator = PrecisionValidator(opened, base, held_out, max_length=samples.max_length)
    make: Make = METHODS[key].load()(context)
    trail: Trail | None = None
    with staged_directory(opened.path) as folder:
        if budget is None:
            step("building the graph")
            made = make(())
        else:
            from memopt.quantization.search import search

            left = budget - (time.monotonic() - started)
            found = search(
                make,
                validator,
                gate,
                recipe.format,
                folder,
                budget=left,
                step=step,
                progress=progress,
            )
            made, trail = found.made, found.trail
            recipe = replace(recipe, keep_float=(*recipe.keep_float, *found.kept))
        files = write_graph(made, recipe.format, folder, file_stem(recipe))
        step("validation")
        options = {**made.options} if made.options else {**base.options}
        run = open_graph(files[0], recipe.format, base.output, options)
        validation = validator.validate(run)
        failures = tuple(validation.failures(gate))
        if failures and not keep_failing:
            raise QuantizationError(
                f"{recipe.variant_name} fails its gate: {'; '.join(failures)}",
                fix="try --search, another recipe, or --keep-failing to write it marked as failed",
            )
        step("work in integers, error by layer")
        share = {}
        if recipe.method not in ("weight-only", "nncf-weights"):
            feed = next(iter(context.feeds()))
            share = integer_share(files[0], recipe.format, feed, options)
        layers = with_errors(made.layers, context, files[0])
        variant = Variant(
            name=recipe.variant_name,
            format=recipe.format,
            precision=recipe.weight_type,
            file=f"{recipe.format}/{files[0].name}",
            companions=tuple(f"{recipe.format}/{file.name}" for file in files[1:]),
            target=recipe.runtime,
            fused=base.fused or recipe.method in ("weight-only", "dynamic"),
            method=recipe.method,
            inputs=base.inputs,
            output=base.output,
            options=options,
            passed=not failures,
            validation={**validation.record(gate), **share},
            recipe=recipe.to_dict(),
        )
        data = describe_data(samples, calibration, held_out)
        event = {"event": "quantize", "variant": variant.name, "passed": variant.passed, **data}
        # The graph, which is the first, after what it needs.
        staged = {f"{recipe.format}/{file.name}": file for file in reversed(files)}
        opened.add_variants(variant, event=event, staged=staged, proof=described(held_out))
    return Result(
        name=variant.name,
        file=variant.file,
        passed=variant.passed,
        failures=failures,
        validation=validation,
        gate=gate,
        layers=layers,
        recipe=recipe.to_dict(),
        data=data,
        bytes=size_of(opened, variant),
        float_bytes=size_of(opened, base),
        trail=trail,
        variant=variant,
        int8_macs=share.get("int8_macs"),
        kernels=share.get("kernels", {}),
    )


def describe_data(
    samples: Samples, calibration: CalibrationSet, held_out: CalibrationSet
) -> dict[str, Any]:
    """Return what the manifest records of the data a variant was made and proven with."""
    return {
        "calibration": Path(samples.calibration).name,
        "calibration_sha256": calibration.digest,
        "samples": len(calibration),
        "validated_on": len(held_out),
        "seed": samples.seed,
    }


def least_cosine(recipe: Recipe) -> float:
    """Return the min cosine that a recipe's variant must reach unless another is asked for."""
    return MIN_COSINE["gptq" if recipe.algorithm == "gptq" else "rtn"]


def seconds(text: str) -> float:
    """Return seconds of ``90``, ``90s``, ``15m`` or ``1h``.

    Raises:
        ConfigurationError: not a positive duration.

    >>> seconds("10m")
    600.0
    """
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        value = float(number) * units[unit]
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigurationError(f"budget {text!r} is not a duration", fix="write 90s, 10m or 1h")
    return value


def float_variant(bundle: Bundle, key: tuple[str, str]) -> Variant:
    """Return the float variant that a (method, format) starts from.

    Raises:
        BundleError: it was not exported.
    """
    name = BASES[key]
    variants = bundle.manifest.variants
    if name == "onnx-fp32-fused" and name not in variants and "onnx-fp32" in variants:
        # An architecture that nothing could be fused in: dynamic works on the plain graph too.
        name = "onnx-fp32"
    if name not in variants:
        raise BundleError(
            f"bundle {bundle.path} has no variant {name!r} to quantize",
            fix=f"run: memopt export {bundle.path} --format {key[1]}",
        )
    return variants[name]


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
    step: Step = lambda _: None,
) -> Context:
    """Return what a method needs, with calibration inputs in batches of similar length."""

    def start() -> Any:
        found = feeds(bundle, calibration.items, base.inputs, max_length=samples.max_length)
        return (feed for _, feed in found)

    probes: Sequence[Any] = ()
    vocabulary = bundle.config().get("vocab_size")
    wanted = recipe.range_probes and recipe.method == "static"
    if wanted and bundle.manifest.modality == "text" and isinstance(vocabulary, int):
        longest = samples.max_length or bundle.manifest.max_length or 128
        probes = token_probes(
            vocabulary, next(iter(start())), limit=min(longest, 128), seed=samples.seed
        )
    return Context(
        bundle=bundle,
        base=base,
        recipe=recipe,
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


def write_graph(made: Quantized, format: str, folder: Path, stem: str) -> list[Path]:
    """Write a graph; return its files, the graph first. The same graph gives the same bytes."""
    if format == "openvino":
        path = folder / f"{stem}.xml"
        save_openvino(made.model, path)
        return [path, path.with_suffix(".bin")]
    path = folder / f"{stem}.onnx"
    path.write_bytes(made.model.SerializeToString(deterministic=True))
    return [path]


def size_of(bundle: Bundle, variant: Variant) -> int:
    """Return the bytes of a variant's files."""
    names = (variant.file, *variant.companions)
    return sum((bundle.path / name).stat().st_size for name in names)
