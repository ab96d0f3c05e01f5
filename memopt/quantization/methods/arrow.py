"""Method ``arrow``: quantized weights as a Parquet file (V2), proven in the bundle's own graph."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from memopt.graphs.ir import constant, read_onnx, set_constant, to_proto
from memopt.quantization.arrow import ArrowQuantizer, ArrowReport, LayerReport
from memopt.quantization.math.hessians import GraphCalibration
from memopt.quantization.method import BITS, Context, Layer, Make, MethodRecipe, Quantized
from memopt.weights.layout import as_stored, is_transposed
from memopt.weights.reader import WeightLoader


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrowRecipe(MethodRecipe):
    """Settings of method ``arrow``."""

    target: Literal["auto", "cpu"] = "auto"
    weight_type: Literal["int8", "int4", "int2"] = "int8"
    granularity: Literal["auto", "per-channel", "per-tensor", "per-group"] = "auto"
    group_size: int = 0
    symmetric: bool = True
    algorithm: Literal["rtn", "gptq"] = "rtn"

    def quantizer(self, keep: Collection[str] = ()) -> ArrowQuantizer:
        """Return what writes the file, these layers kept beside the recipe's own."""
        return ArrowQuantizer(
            bits=BITS[self.weight_type],
            axis=-1 if self.grain == "per-tensor" else None,
            group_size=self.group if self.grain == "per-group" else 0,
            symmetric=self.symmetric,
            algorithm=self.algorithm,
            keep=(*self.keep_float, *keep),
        )


def prepare(context: Context[ArrowRecipe]) -> Make:
    """Write ``weights_<type>[_gptq].parquet``; return what builds graphs with its numbers.

    Raises:
        QuantizationError: NaN weights (by name).
        ConfigurationError: a pattern of ``recipe.keep_float`` matches no weight.
    """
    recipe = context.recipe
    assert context.folder is not None
    suffix = "_gptq" if recipe.algorithm == "gptq" else ""
    file = context.folder / f"weights_{recipe.weight_type}{suffix}.parquet"
    report = _write(context, recipe.quantizer(), file)
    inside = read_onnx(context.graph).graph.initializers
    layers = [layer for layer in _layers(report.layers) if layer.name in inside]

    def make(kept: Collection[str]) -> Quantized:
        def finish() -> Quantized:
            quantizer = recipe.quantizer(kept)
            final = _write(context, quantizer, file) if kept else report
            return Quantized(
                model=_dequantized(context, file, ()),
                layers=_layers(final.layers),
                weights=file,
                notes=asdict(quantizer),
            )

        shown = tuple(
            replace(layer, kind="float", error=None) if layer.name in kept else layer
            for layer in layers
        )
        return Quantized(model=_dequantized(context, file, kept), layers=shown, finish=finish)

    return make


def _write(context: Context[ArrowRecipe], quantizer: ArrowQuantizer, file: Path) -> ArrowReport:
    def on_step(weight: str, done: int, whole: int) -> None:
        context.step(weight)
        context.progress(done, whole)

    gptq = quantizer.algorithm == "gptq"
    weights = context.bundle.weights
    seen = GraphCalibration(weights, context.graph, context.feeds) if gptq else None
    return quantizer.quantize(weights, file, calibration=seen, on_step=on_step)


def _layers(reports: Sequence[LayerReport]) -> tuple[Layer, ...]:
    """Return the matrices: their output's error where calibration tells it, else their own."""
    layers = []
    for item in reports:
        if item.matrix:
            error = item.error if item.output_error is None else item.output_error
            kept = item.kind == "kept"
            kind, square = ("float", None) if kept else (f"int{item.bits}", error**2)
            layers.append(Layer(name=item.name, kind=kind, error=square, macs=item.size))
    return tuple(layers)


def _dequantized(context: Context[ArrowRecipe], weights: Path, kept: Collection[str]) -> Any:
    """Return the float graph with the dequantized values of a V2 file, ``kept`` ones excepted."""
    model = read_onnx(context.graph)
    with WeightLoader(weights) as quantized, WeightLoader(context.bundle.weights) as original:
        for name, tensor in model.graph.initializers.items():
            stored = np.asarray(constant(tensor))
            if name not in quantized or name in kept or stored.dtype != np.float32:
                continue
            turned = is_transposed(stored, original.load(name), name=name)
            value = np.asarray(quantized.load(name), np.float32)
            set_constant(tensor, as_stored(value, stored, turned=turned))
    return to_proto(model)
