"""Quantizing a weight file, reading one weight, and comparing two files on texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from memopt.errors import ConfigurationError, InputError, MemoptError
from memopt.quantization import arrow
from memopt.weights.reader import WeightLoader
from memopt.weights.schema import join_name

_BITS = {"int8": 8, "int2": 2, "fp16": 8}


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """How to quantize: ``mixed_precision_layers`` are parts of names that stay float16.

    Raises:
        ConfigurationError: an unknown type or method.

    >>> QuantizationConfig(quant_type="int3")
    Traceback (most recent call last):
    ...
    memopt.errors.ConfigurationError: quant_type is 'int3'; use int8, int2 or fp16
    """

    quant_type: Literal["int8", "int2", "fp16"] = "int8"
    calibration_method: Literal["ptq", "gptq"] = "ptq"
    per_channel: bool = True
    symmetric: bool = True
    mixed_precision_layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.quant_type not in _BITS:
            raise ConfigurationError(
                f"quant_type is {self.quant_type!r}", fix="use int8, int2 or fp16"
            )
        if self.calibration_method not in ("ptq", "gptq"):
            raise ConfigurationError(
                f"calibration_method is {self.calibration_method!r}", fix="use ptq or gptq"
            )


class ArrowQuantizer:
    """Forwards to :class:`memopt.quantization.arrow.ArrowQuantizer`."""

    def __init__(self, config: QuantizationConfig) -> None:
        self.config = config

    def quantize_model(
        self,
        input_parquet: str | Path,
        output_parquet: str | Path,
        calibration_data: Sequence[str] | None = None,
    ) -> arrow.ArrowReport:
        """Write ``output_parquet`` (V2) of ``input_parquet`` (V1).

        Args:
            calibration_data: texts, for gptq; the input then lies in its bundle.

        Raises:
            QuantizationError: NaN weights, or gptq without texts.
            WeightsError: the input is damaged, or quantized already.
        """
        config = self.config
        keep = tuple(f"*{part}*" for part in config.mixed_precision_layers or ())
        quantizer = arrow.ArrowQuantizer(
            bits=_BITS[config.quant_type],
            axis=None if config.per_channel else -1,
            symmetric=config.symmetric,
            algorithm="gptq" if config.calibration_method == "gptq" else "rtn",
            keep=("*",) if config.quant_type == "fp16" else keep,
        )
        calibration = None
        if config.calibration_method == "gptq" and calibration_data:
            calibration = _calibration(Path(input_parquet), list(calibration_data))
        return quantizer.quantize(
            Path(input_parquet), Path(output_parquet), calibration=calibration
        )


def _calibration(weights: Path, texts: list[str]) -> Any:
    from memopt.bundle import open_bundle
    from memopt.graphs.session import feeds
    from memopt.quantization.math.hessians import GraphCalibration
    from memopt.quantization.quantize import float_variant
    from memopt.quantization.recipe import Recipe

    bundle = open_bundle(weights.parent)
    base = float_variant(bundle, Recipe(method="weight-only"))

    def batches() -> Iterator[dict[str, Any]]:
        for _, feed in feeds(bundle, texts, base.inputs):
            yield dict(feed)

    return GraphCalibration(bundle.weights, bundle.file(base), batches)


class WeightLoaderV2:
    """Forwards to :class:`memopt.weights.reader.WeightLoader`; ``schema_version`` is 1 or 2."""

    def __init__(self, parquet_path: str | Path) -> None:
        self.parquet_path = str(parquet_path)
        self._weights = WeightLoader(parquet_path)
        self.schema_version = self._weights.version

    def load_weight(self, layer_name: str, weight_name: str, device: str = "cpu") -> Any:
        """Return a torch tensor: V1 as stored, V2 dequantized.

        Raises:
            KeyError: there is no such weight.
            WeightsError: its row is damaged.
        """
        from memopt.extras import require

        torch = require("torch", extra="export", why="return torch tensors")
        name = join_name(layer_name, weight_name)
        if name not in self._weights:
            raise KeyError(f"{self.parquet_path} has no weight {name!r}")
        array = self._weights.load(name)
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16).to(device)
        return torch.from_numpy(array.copy()).to(device)

    def unload_unused_weights(self) -> None:
        """Close the file; the next question opens it again."""
        self._weights.unload()


@dataclass(frozen=True, slots=True)
class ValidationResult:
    """``cosine_similarity`` is the mean; what decides is the worst, in ``error_message``."""

    passed: bool
    cosine_similarity: float
    ppl_increase: float | None
    error_message: str | None


class PrecisionValidator:
    """Compares the vectors of two models on the same texts."""

    def __init__(self, cosine_threshold: float = 0.95, ppl_threshold: float = 0.15) -> None:
        self.cosine_threshold = cosine_threshold
        self.ppl_threshold = ppl_threshold

    def validate(
        self,
        original_model_path: str | Path,
        quantized_model_path: str | Path,
        test_texts: Sequence[str],
    ) -> ValidationResult:
        """Return whether every text keeps the bound; of language models the perplexity decides.

        Raises:
            InputError: no texts.
            BundleError, WeightsError: a model that cannot be opened.
        """
        from memopt.compat.engine import ArrowEngine, _bundle_of

        texts = list(test_texts)
        if not texts:
            raise InputError("no texts to compare with", fix="give some")
        bundle, variant = _bundle_of(quantized_model_path)
        if bundle.manifest.task == "text-generation":
            return self._language(bundle, variant, texts)
        with ArrowEngine(original_model_path, optimize=False) as original:
            expected = original.encode(texts)
        with ArrowEngine(quantized_model_path) as quantized:
            found = quantized.encode(texts)
        cosines = np.sum(expected * found, axis=1)
        worst = float(cosines.min())
        wrong = None
        if not worst >= self.cosine_threshold:
            wrong = f"cosine similarity {worst:.4f} is below {self.cosine_threshold}"
        return ValidationResult(wrong is None, float(cosines.mean()), None, wrong)

    def _language(self, bundle: Any, variant: str | None, texts: list[str]) -> ValidationResult:
        before, after = perplexities(bundle, variant, texts)
        rise = after / before - 1
        wrong = None
        if not rise <= self.ppl_threshold:
            wrong = f"perplexity rose by {rise:.1%}, more than {self.ppl_threshold:.0%}"
        return ValidationResult(wrong is None, float("nan"), rise, wrong)


def perplexities(bundle: Any, variant: str | None, texts: list[str]) -> tuple[float, float]:
    """Return the perplexity of a language model's float graph and of a variant (None: the float).

    Raises:
        MemoptError: the bundle has no float graph.
    """
    from memopt.quantization.accuracy.calibration import CalibrationSet
    from memopt.quantization.accuracy.language import LanguageValidator
    from memopt.quantization.quantize import float_variant
    from memopt.quantization.recipe import Recipe

    reference = float_variant(bundle, Recipe(method="weight-only"))
    judge = LanguageValidator(
        bundle, reference, CalibrationSet(items=tuple(texts), modality="text")
    )
    if variant is None:
        return judge.float_perplexity, judge.float_perplexity
    chosen = bundle.variant(variant)
    graph = judge.open(bundle.file(chosen), chosen.format, chosen.options)
    found = judge.validate(graph, timed=False).perplexity
    if found is None:
        raise MemoptError(f"{bundle.path} is no language model")
    return judge.float_perplexity, found
