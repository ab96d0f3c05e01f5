"""Method ``arrow``: quantized weights as a Parquet file (V2), proven in the bundle's own graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.bundle import Bundle
from memopt.errors import QuantizationError
from memopt.files import staged_directory
from memopt.graphs.ir import constant, read_onnx, set_constant, to_proto
from memopt.graphs.session import open_graph
from memopt.quantization.arrow import ArrowQuantizer, ArrowReport, LayerReport
from memopt.quantization.hessians import GraphCalibration
from memopt.quantization.recipe import BITS, Recipe
from memopt.quantization.result import Proven
from memopt.quantization.static import Context, Layer, Quantized
from memopt.quantization.validate import Gate, PrecisionValidator
from memopt.weights.layout import is_transposed
from memopt.weights.reader import WeightLoader

if TYPE_CHECKING:
    from memopt.bundle import Variant
    from memopt.quantization.quantize import Samples
    from memopt.quantization.search import Trail


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrowResult(Proven):
    """A V2 file, and how a graph with its numbers compares with the float graph."""

    report: ArrowReport


def quantize_arrow(
    bundle: Bundle,
    samples: Samples,
    recipe: Recipe,
    *,
    gate: Gate,
    keep_failing: bool = False,
    budget: float | None = None,
    step: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda done, whole: None,
) -> ArrowResult:
    """Write ``weights_<type>[_gptq].parquet`` once a graph with its numbers passes the gate.

    The proof runs the portable float graph with every weight replaced by its dequantized value,
    which is what ``memopt export --weights`` computes with.

    Args:
        bundle, samples, recipe, gate, keep_failing, budget, step: as of
            :func:`memopt.quantization.quantize.quantize`.
        progress: called with (weights or tries done, in all).

    Raises:
        QuantizationError: the gate fails (nothing is written then), NaN weights (by name).
        ConfigurationError: a pattern of ``recipe.keep_float`` matches no weight.
    """
    from memopt.quantization.quantize import (
        describe_data,
        float_variant,
        make_context,
        read_samples,
    )

    started = time.monotonic()
    base = float_variant(bundle, ("weight-only", "onnx"))
    calibration, held_out = read_samples(bundle, samples)
    context = make_context(bundle, base, recipe, calibration, samples, step)
    step("float reference")
    validator = PrecisionValidator(bundle, base, held_out, max_length=samples.max_length)
    name = f"weights_{recipe.weight_type}{'_gptq' if recipe.algorithm == 'gptq' else ''}.parquet"
    trail: Trail | None = None
    with staged_directory(bundle.path) as folder:
        file = folder / name
        quantizer = _quantizer(recipe)
        report = _write(bundle, quantizer, context, file, progress)
        if budget is not None:
            from memopt.quantization.search import search

            found = search(
                _maker(bundle, base, file, report),
                validator,
                gate,
                "onnx",
                folder,
                budget=budget - (time.monotonic() - started),
                step=step,
                progress=progress,
            )
            trail = found.trail
            if found.kept:
                quantizer = replace(quantizer, keep=(*quantizer.keep, *found.kept))
                recipe = replace(recipe, keep_float=(*recipe.keep_float, *found.kept))
                report = _write(bundle, quantizer, context, file, progress)
        step("validation")
        graph = folder / "dequantized.onnx"
        graph.write_bytes(_dequantized(bundle, base, file, ()).SerializeToString())
        validation = validator.validate(open_graph(graph, "onnx", base.output), timed=False)
        failures = tuple(validation.failures(gate))
        if failures and not keep_failing:
            raise QuantizationError(
                f"{name} fails its gate: {'; '.join(failures)}",
                fix="try --search, gptq, more bits, smaller groups, or --keep-failing",
            )
        size = file.stat().st_size
        data = describe_data(samples, calibration, held_out)
        bundle.add_files(
            {name: file},
            event={
                "event": "quantize",
                "method": "arrow",
                "file": name,
                "passed": not failures,
                "validation": validation.record(gate),
                **data,
                **asdict(quantizer),
            },
        )
    return ArrowResult(
        name=name,
        file=name,
        passed=not failures,
        failures=failures,
        validation=validation,
        gate=gate,
        layers=_layers(report.layers),
        recipe=recipe.to_dict(),
        data=data,
        bytes=size,
        float_bytes=bundle.weights.stat().st_size,
        trail=trail,
        report=report,
    )


def _quantizer(recipe: Recipe) -> ArrowQuantizer:
    return ArrowQuantizer(
        bits=BITS[recipe.weight_type],
        axis=-1 if recipe.grain == "per-tensor" else None,
        group_size=recipe.group if recipe.grain == "per-group" else 0,
        symmetric=recipe.symmetric,
        algorithm=recipe.algorithm,
        keep=recipe.keep_float,
    )


def _write(
    bundle: Bundle,
    quantizer: ArrowQuantizer,
    context: Context,
    file: Path,
    progress: Callable[[int, int], None],
) -> ArrowReport:
    gptq = quantizer.algorithm == "gptq"

    def on_step(weight: str, done: int, whole: int) -> None:
        context.step(weight)
        progress(done, whole)

    def feeds() -> Iterable[dict[str, Any]]:
        return map(dict, context.feeds())

    seen = GraphCalibration(bundle, feeds) if gptq else None
    return quantizer.quantize(bundle.weights, file, calibration=seen, on_step=on_step)


def _layers(reports: Sequence[LayerReport]) -> tuple[Layer, ...]:
    """Return the matrices: their output's error where calibration tells it, else their own."""
    return tuple(
        Layer(
            name=item.name,
            kind="float" if item.kind == "kept" else f"int{item.bits}",
            error=None
            if item.kind == "kept"
            else (item.error if item.output_error is None else item.output_error) ** 2,
            macs=item.size,
        )
        for item in reports
        if item.matrix
    )


def _maker(
    bundle: Bundle, base: Variant, file: Path, report: ArrowReport
) -> Callable[[Collection[str]], Quantized]:
    """Return what a search tries: the float graph with a V2 file's numbers, some layers kept."""
    inside = set(read_onnx(bundle.file(base)).graph.initializers)
    layers = [layer for layer in _layers(report.layers) if layer.name in inside]

    def make(kept: Collection[str]) -> Quantized:
        shown = tuple(
            replace(layer, kind="float", error=None) if layer.name in kept else layer
            for layer in layers
        )
        return Quantized(model=_dequantized(bundle, base, file, kept), layers=shown)

    return make


def _dequantized(bundle: Bundle, base: Variant, weights: Path, kept: Collection[str]) -> Any:
    """Return the float graph with the dequantized values of a V2 file, ``kept`` ones excepted."""
    model = read_onnx(bundle.file(base))
    with WeightLoader(weights) as quantized, WeightLoader(bundle.weights) as original:
        for name, tensor in model.graph.initializers.items():
            stored = np.asarray(constant(tensor))
            if name not in quantized or name in kept or stored.dtype != np.float32:
                continue
            turned = is_transposed(stored, original.load(name), name=name)
            value = np.asarray(quantized.load(name), np.float32)
            value = np.ascontiguousarray(value.T if turned else value)
            set_constant(tensor, value)
    return to_proto(model)
