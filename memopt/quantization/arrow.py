"""ArrowQuantizer: a float weight file (schema V1) into a quantized one (schema V2), streaming.

PTQ (round to nearest) needs the weights alone; GPTQ takes a Hessian per layer from a callable, so
that nothing here knows where activations come from (``memopt.quantization.math.hessians`` is one).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from memopt.errors import QuantizationError
from memopt.files import sha256_file
from memopt.quantization.math.gptq import DAMPING, gptq_quantize, output_error
from memopt.quantization.math.hessians import Calibrated
from memopt.quantization.math.rounding import rtn_quantize
from memopt.quantization.method import match_layers
from memopt.weights.quantized import QuantizedWeight
from memopt.weights.reader import WeightLoader
from memopt.weights.schema import is_float, numpy_dtype, split_name
from memopt.weights.writer import write_quantized

# Weight name -> what calibration saw; None for a weight without activations (an embedding table).
Calibration = Callable[[str], Calibrated | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """What happened to one weight."""

    name: str
    kind: str  # rtn, gptq or kept
    bits: int
    bytes: int
    error: float  # root mean square error / root mean square of the weight
    output_error: float | None = None  # of the layer's outputs on the calibration inputs
    size: int = 0  # values
    matrix: bool = False  # two axes or more, floats: what is quantized unless it is kept


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrowReport:
    """What a quantization changed, weight by weight."""

    path: Path
    float_bytes: int
    layers: tuple[LayerReport, ...] = field(repr=False)

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """The weights that became integers."""
        return tuple(layer for layer in self.layers if layer.kind != "kept")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrowQuantizer:
    """How to quantize a weight file.

    Matrices (and convolution kernels) are quantized; vectors, scalars and integer buffers are kept:
    they are little data, and norms and biases are where rounding hurts most.

    Attributes:
        bits: 8, 4 or 2.
        axis: the axis with a scale per index, -1 for one per tensor; with ``group_size``, the axis
            the groups run along (1 for the inputs of a Linear). None: 0, or 1 with groups.
        group_size: 0, or weights per scale.
        symmetric: no zero points.
        algorithm: "rtn" or "gptq".
        keep: shell patterns of weights or layers kept in float16; each must match something.
        act_order, damping: see :func:`memopt.quantization.math.gptq.gptq_quantize`.

    Raises:
        QuantizationError: a value out of range, or GPTQ with an axis it does not have.
    """

    bits: int = 8
    axis: int | None = None
    group_size: int = 0
    symmetric: bool = True
    algorithm: str = "rtn"
    keep: tuple[str, ...] = ()
    act_order: bool = True
    damping: float = DAMPING

    def __post_init__(self) -> None:
        if self.algorithm not in ("rtn", "gptq"):
            raise QuantizationError(f"algorithm {self.algorithm!r}", fix="use rtn or gptq")
        if self.bits not in (8, 4, 2):
            raise QuantizationError(f"{self.bits} bits is not a weight width", fix="use 8, 4 or 2")
        if self.group_size < 0:
            raise QuantizationError(f"group size {self.group_size} is negative", fix="use 0 or 32")
        if self.algorithm == "gptq" and self.axis is not None:
            raise QuantizationError(
                f"axis {self.axis} with gptq", fix="leave axis out: GPTQ scales outputs or groups"
            )

    def quantize(
        self,
        source: Path,
        output: Path,
        *,
        calibration: Calibration | None = None,
        on_step: Callable[[str, int, int], None] | None = None,
    ) -> ArrowReport:
        """Quantize ``source`` (V1) into ``output`` (V2), one weight in memory at a time.

        Args:
            source: the float weight file.
            output: the file to write, whole or not at all.
            calibration: weight name -> :class:`Calibrated`; required by gptq. Weights it returns
                None for are rounded to nearest.
            on_step: called with (weight, number done, number in all).

        Raises:
            QuantizationError: NaN weights (by name), gptq without calibration.
            ConfigurationError: a ``keep`` pattern matches no weight; the nearest are named.
            WeightsError: ``source`` is damaged or already quantized.
        """
        if self.algorithm == "gptq" and calibration is None:
            raise QuantizationError("gptq without calibration", fix="give calibration inputs")
        layers: list[LayerReport] = []
        with WeightLoader(source) as loader:
            if loader.version != 1:
                raise QuantizationError(
                    f"{source} is already quantized", fix="give the float weights (weights.parquet)"
                )
            names = loader.names()
            kept = _kept(self.keep, names)
            infos = [loader.info(name) for name in names]

            def stream() -> Iterator[tuple[str, QuantizedWeight | np.ndarray]]:
                for name, weight in loader.items():
                    seen = None
                    if name in kept or weight.ndim < 2 or not is_float(weight.dtype):
                        _refuse_nan(name, weight)
                        yield name, weight
                        quantized: QuantizedWeight | None = None
                    else:
                        seen = calibration(name) if calibration else None
                        quantized = self.quantize_one(name, weight.astype(np.float32), seen)
                        yield name, quantized
                    layers.append(_report(name, weight, quantized, seen, self.algorithm))
                    if on_step:
                        on_step(name, len(layers), len(names))

            write_quantized(
                output,
                stream(),
                metadata={
                    "memopt.source_sha256": sha256_file(source),
                    "memopt.group_size": str(self.group_size),
                    "memopt.quantizer": json.dumps(asdict(self), sort_keys=True),
                },
            )
        size = sum(info.size * numpy_dtype(info.dtype).itemsize for info in infos)
        return ArrowReport(path=output, float_bytes=size, layers=tuple(layers))

    def quantize_one(
        self, name: str, weight: np.ndarray, seen: Calibrated | None = None
    ) -> QuantizedWeight:
        """Quantize one weight; with ``seen`` and algorithm gptq by GPTQ, else to nearest."""
        if self.algorithm == "gptq" and seen is not None:
            quantized = gptq_quantize(
                weight if seen.input_axis == 1 else weight.T,
                seen.hessian,
                bits=self.bits,
                group_size=self.group_size,
                symmetric=self.symmetric,
                act_order=self.act_order,
                damping=self.damping,
                name=name,
            )
            return quantized if seen.input_axis == 1 else quantized.transposed()
        axis = self.axis if self.axis is not None else int(self.group_size > 0)
        return rtn_quantize(
            weight,
            bits=self.bits,
            axis=axis if axis < weight.ndim else 0,
            group_size=self.group_size,
            symmetric=self.symmetric,
            name=name,
        )


def _kept(patterns: tuple[str, ...], names: list[str]) -> set[str]:
    """Return the weights whose own name or whose layer's name a pattern matches."""
    layers = {name: split_name(name)[0] for name in names}
    matches = match_layers(patterns, {*names, *layers.values()} - {""})
    return {name for name in names if name in matches or layers[name] in matches}


def _refuse_nan(name: str, weight: np.ndarray) -> None:
    if is_float(weight.dtype) and not np.isfinite(weight).all():
        raise QuantizationError(
            f"{name!r} holds NaN or infinite values", fix="repair the checkpoint"
        )


def _report(
    name: str,
    weight: np.ndarray,
    quantized: QuantizedWeight | None,
    seen: Calibrated | None,
    algorithm: str,
) -> LayerReport:
    matrix = weight.ndim >= 2 and is_float(weight.dtype)
    about: dict[str, Any] = {"name": name, "size": weight.size, "matrix": matrix}
    if quantized is None:
        return LayerReport(kind="kept", bits=16, bytes=weight.size * 2, error=0.0, **about)
    back, exact = quantized.dequantize(), weight.astype(np.float32)
    power, noise = (
        float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) if exact.size else 0.0
        for values in (exact, exact - back)
    )
    output = None
    if seen is not None:
        turned = (exact, back) if seen.input_axis == 1 else (exact.T, back.T)
        output = output_error(*turned, seen.hessian)
    packed = -(-quantized.integers.size * quantized.bits // 8)
    return LayerReport(
        kind="gptq" if algorithm == "gptq" and seen is not None else "rtn",
        bits=quantized.bits,
        bytes=packed + quantized.scales.nbytes + quantized.zero_points.nbytes,
        error=noise / power if power else 0.0,
        output_error=output,
        **about,
    )
