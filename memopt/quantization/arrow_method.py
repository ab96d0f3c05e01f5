"""Method ``arrow``: quantized weights as a Parquet file (V2), proven in the bundle's own graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.bundle import Bundle
from memopt.errors import QuantizationError
from memopt.files import publish, staged_directory
from memopt.quantization.activations import GraphCalibration
from memopt.quantization.arrow import ArrowQuantizer, ArrowReport
from memopt.quantization.graph_runner import open_graph
from memopt.quantization.onnx_graph import read_onnx
from memopt.quantization.recipe import Recipe
from memopt.quantization.validate import Gate, PrecisionValidator, Validation
from memopt.weights.layout import is_transposed
from memopt.weights.reader import WeightLoader

if TYPE_CHECKING:
    from memopt.bundle import Variant
    from memopt.quantization.quantize import Samples

_BITS = {"int8": 8, "int4": 4, "int2": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrowResult:
    """The V2 file and how a graph with its numbers compares with the float graph."""

    file: str
    passed: bool
    failures: tuple[str, ...]
    validation: Validation
    gate: Gate
    report: ArrowReport
    bytes: int
    float_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        proof = {k: v for k, v in asdict(self.validation).items() if k != "cosines"}
        return {
            "file": self.file,
            "passed": self.passed,
            "failures": list(self.failures),
            "validation": proof,
            "gate": asdict(self.gate),
            "bytes": self.bytes,
            "float_bytes": self.float_bytes,
            "layers": [asdict(layer) for layer in self.report.layers],
        }


def quantize_arrow(
    bundle: Bundle,
    samples: Samples,
    recipe: Recipe,
    *,
    gate: Gate,
    keep_failing: bool = False,
    step: Callable[[str], None] = lambda _: None,
) -> ArrowResult:
    """Write ``weights_<type>[_gptq].parquet`` once a graph with its numbers passes the gate.

    The proof runs the portable float graph with every weight replaced by its dequantized value,
    which is what ``memopt export --weights`` computes with.

    Raises:
        QuantizationError: the gate fails (nothing is written then), NaN weights (by name).
        ConfigurationError: a pattern of ``recipe.keep_float`` matches no weight.
    """
    from memopt.quantization.quantize import float_variant, make_context, read_samples

    base = float_variant(bundle, ("weight-only", "onnx"))
    calibration, held_out = read_samples(bundle, samples)
    context = make_context(bundle, base, recipe, calibration, samples, step)
    step("float reference")
    validator = PrecisionValidator(bundle, base, held_out, max_length=samples.max_length)
    grouped = recipe.grain == "per-group"
    gptq = recipe.algorithm == "gptq"
    quantizer = ArrowQuantizer(
        bits=_BITS[recipe.weight_type],
        axis=-1 if recipe.grain == "per-tensor" else None,
        group_size=recipe.group if grouped else 0,
        symmetric=recipe.symmetric,
        algorithm=recipe.algorithm,
        keep=recipe.keep_float,
    )
    name = f"weights_{recipe.weight_type}{'_gptq' if gptq else ''}.parquet"
    with staged_directory(bundle.path) as folder:
        seen = GraphCalibration(bundle, lambda: map(_plain, context.feeds())) if gptq else None
        report = quantizer.quantize(
            bundle.weights,
            folder / name,
            calibration=seen,
            on_step=lambda weight, done, whole: step(f"{done}/{whole} {weight}"),
        )
        step("validation")
        graph = folder / "dequantized.onnx"
        _dequantized_graph(bundle, base, folder / name, graph)
        validation = validator.validate(open_graph(graph, "onnx", base.output), timed=False)
        failures = tuple(validation.failures(gate))
        if failures and not keep_failing:
            raise QuantizationError(
                f"{name} fails its gate: {'; '.join(failures)}",
                fix="try gptq, more bits, smaller groups, or --keep-failing",
            )
        size = (folder / name).stat().st_size
        publish(folder / name, bundle.path / name)
    bundle.add_files(
        name,
        event={
            "event": "quantize",
            "method": "arrow",
            "file": name,
            "passed": not failures,
            "validation": validation.record(gate),
            "calibration_sha256": calibration.digest,
            **asdict(quantizer),
        },
    )
    return ArrowResult(
        file=name,
        passed=not failures,
        failures=failures,
        validation=validation,
        gate=gate,
        report=report,
        bytes=size,
        float_bytes=bundle.weights.stat().st_size,
    )


def _plain(feed: Any) -> dict[str, Any]:
    return dict(feed)


def _dequantized_graph(bundle: Bundle, base: Variant, weights: Path, target: Path) -> None:
    from onnx import numpy_helper

    model = read_onnx(bundle.file(base))
    with WeightLoader(weights) as quantized, WeightLoader(bundle.weights) as original:
        for tensor in model.graph.initializer:
            stored = numpy_helper.to_array(tensor)
            if tensor.name not in quantized or stored.dtype != np.float32:
                continue
            turned = is_transposed(stored, original.load(tensor.name), name=tensor.name)
            value = np.asarray(quantized.load(tensor.name), np.float32)
            value = np.ascontiguousarray(value.T if turned else value)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    target.write_bytes(model.SerializeToString())
