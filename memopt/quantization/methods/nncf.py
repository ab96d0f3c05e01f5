"""nncf's post-training quantization and weight compression, with memopt's calibration and gate."""

from __future__ import annotations

import io
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import numpy as np

from memopt.errors import ConfigurationError, QuantizationError, brief
from memopt.extras import require, root_log_kept
from memopt.graphs.ir import read_onnx, to_proto, with_blocks
from memopt.graphs.linears import Linear, onnx_linears, openvino_linears
from memopt.graphs.openvino import read_openvino
from memopt.graphs.session import open_graph
from memopt.quantization.method import (
    Context,
    Layer,
    Make,
    MethodRecipe,
    Quantized,
    match_layers,
    writes,
)
from memopt.runtimes.keys_values import BEAM, has_states, with_positions
from memopt.runtimes.openvino_core import same_signal_stack
from memopt.runtimes.vectors import row_cosines

# With absolute ranges, on MiniLM: 0.5 gives min cosine .968, 0.7 .991, 0.95 .987.
AUTO_ALPHA = 0.7
_DATA_AWARE = ("awq", "scale-estimation", "gptq")
_MODES = {
    ("int8", True): "INT8_SYM",
    ("int8", False): "INT8_ASYM",
    ("int4", True): "INT4_SYM",
    ("int4", False): "INT4_ASYM",
    ("nf4", True): "NF4",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NncfRecipe(MethodRecipe):
    """Settings of method ``nncf``."""

    target: Literal["auto", "openvino", "cpu"] = "auto"
    weight_type: Literal["int8"] = "int8"
    granularity: Literal["auto", "per-channel", "per-tensor"] = "auto"
    activation_type: str = "uint8"
    ranges: str = "minmax"
    percentile: float = 99.99
    smooth: str | float = "auto"
    bias_correction: bool = True
    max_drop: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NncfWeightsRecipe(MethodRecipe):
    """Settings of method ``nncf-weights``."""

    target: Literal["auto", "openvino", "cpu"] = "auto"
    weight_type: Literal["int8", "int4", "nf4"] = "int8"
    granularity: Literal["auto", "per-channel", "per-group"] = "auto"
    group_size: int = 0
    symmetric: bool = True
    algorithm: Literal["rtn", "gptq", "awq", "scale-estimation", "awq+scale-estimation"] = "rtn"


def prepare(context: Context[NncfRecipe]) -> Make:
    """Return a function that quantizes weights and activations with ``nncf.quantize``.

    Raises:
        ConfigurationError: ranges that nncf does not have.
    """
    nncf = _nncf()
    recipe = context.recipe
    model, linears = _read(context)
    patterns = match_layers(recipe.keep_float, linears)
    advanced = nncf.AdvancedQuantizationParameters(
        smooth_quant_alphas=_alphas(recipe), activations_range_estimator_params=_ranges(recipe)
    )
    if recipe.grain == "per-tensor":
        advanced.weights_quantization_params = (
            nncf.quantization.advanced_parameters.QuantizationParameters(per_channel=False)
        )
    mixed = recipe.activation_type == "uint8"
    preset = nncf.QuantizationPreset.MIXED if mixed else nncf.QuantizationPreset.PERFORMANCE
    options: dict[str, Any] = {
        "preset": preset,
        "subset_size": context.samples,  # at most: nncf stops where the data does
        "model_type": nncf.ModelType.TRANSFORMER,
        "fast_bias_correction": recipe.bias_correction,
    }

    def make(keep: Collection[str]) -> Quantized:
        kept = patterns | set(keep)
        ignored = nncf.IgnoredScope(names=[linears[name].label for name in sorted(kept)])
        dataset = nncf.Dataset(_Feeds(context))
        with _quiet():
            if recipe.max_drop:
                quantized = _with_accuracy_control(
                    context, model, dataset, ignored, advanced, options
                )
            else:
                quantized = nncf.quantize(
                    _copy(model),
                    dataset,
                    ignored_scope=ignored,
                    advanced_parameters=advanced,
                    **options,
                )
        return Quantized(
            model=quantized, layers=_layers(linears, kept, "int8"), options=_options(context)
        )

    return make


def prepare_weights(context: Context[NncfWeightsRecipe]) -> Make:
    """Return a function that compresses weights with ``nncf.compress_weights``.

    Raises:
        ConfigurationError: a combination that nncf does not have.
    """
    nncf = _nncf()
    recipe = context.recipe
    mode = _MODES.get((recipe.weight_type, recipe.symmetric))
    if mode is None:
        raise ConfigurationError("nf4 has no zero point", fix="leave symmetric on")
    eight = recipe.weight_type == "int8"
    if eight and recipe.algorithm != "rtn":
        raise ConfigurationError(
            f"nncf rounds int8 weights to nearest, it has no {recipe.algorithm!r} for them",
            fix="use int4, or weight-only with gptq",
        )
    if context.base.format == "onnx" and (mode == "NF4" or recipe.algorithm == "gptq"):
        raise ConfigurationError(
            f"nncf has no {recipe.weight_type} with {recipe.algorithm} on ONNX",
            fix="use target openvino",
        )
    if context.base.format == "onnx" and writes(context.bundle):
        raise ConfigurationError(
            "nncf cannot read a language model's ONNX graph",
            fix="use target openvino, or method weight-only",
        )
    model, linears = _read(context)
    cached = context.base.format == "openvino" and has_states(model)
    if context.base.format == "onnx" and mode == "INT4_ASYM":
        # In older opsets nncf writes MatMulNBits with zero points that ONNX Runtime refuses.
        model = with_blocks(model)
    patterns = match_layers(recipe.keep_float, linears)

    def make(keep: Collection[str]) -> Quantized:
        kept = patterns | set(keep)
        options: dict[str, Any] = {}
        if not eight:
            options = {
                "group_size": recipe.group if recipe.grain == "per-group" else -1,
                "ratio": 1.0,
                # Only what is wanted: nncf refuses `gptq` on ONNX even when it is False.
                **{
                    name.replace("-", "_"): True for name in _DATA_AWARE if name in recipe.algorithm
                },
            }
        if recipe.algorithm != "rtn":
            feeds = _Feeds(context, cached=cached)
            options |= {"dataset": nncf.Dataset(feeds), "subset_size": context.samples}
        with _quiet():
            quantized = nncf.compress_weights(
                _copy(model),
                mode=getattr(nncf.CompressWeightsMode, mode),
                ignored_scope=nncf.IgnoredScope(names=[linears[n].label for n in sorted(kept)]),
                **options,
            )
        layers = _layers(linears, kept, recipe.weight_type)
        return Quantized(model=quantized, layers=layers, options=_options(context))

    return make


def _with_accuracy_control(
    context: Context[NncfRecipe],
    model: Any,
    dataset: Any,
    ignored: Any,
    advanced: Any,
    options: dict[str, Any],
) -> Any:
    """Quantize, then let nncf return layers to float until the mean cosine drops no further."""
    nncf = _nncf()
    if context.base.format != "openvino":
        raise ConfigurationError(
            "accuracy-aware quantization works on OpenVINO graphs", fix="use target openvino"
        )
    output = context.base.output
    reference = open_graph(context.graph, "openvino", output, context.base.options)
    expected = [reference(feed) for feed in context.feeds()]

    def measure(compiled: Any, data: Iterable[Any]) -> tuple[float, None]:
        cosines: list[float] = []
        for feed, want in zip(data, expected, strict=False):
            got = np.array(compiled(feed)[output], np.float32).reshape(len(want), -1)
            flat = want.reshape(len(want), -1)
            cosines += list(row_cosines(got, flat))
        return float(np.mean(cosines)), None

    return nncf.quantize_with_accuracy_control(
        _copy(model),
        dataset,
        nncf.Dataset(_Feeds(context)),
        measure,
        max_drop=context.recipe.max_drop,
        ignored_scope=ignored,
        advanced_quantization_parameters=advanced,
        **options,
    )


def _nncf() -> Any:
    return require("nncf", extra="quantize", why="quantize with nncf")


def _options(context: Context[Any]) -> dict[str, str]:
    if context.base.format != "openvino":
        return {}
    # What a language model's float graph says of its keys and values holds here too.
    return {**context.base.options, "INFERENCE_PRECISION_HINT": "f32"}


def _copy(model: Any) -> Any:
    return model.clone() if hasattr(model, "clone") else deepcopy(model)


class _Feeds:
    """Calibration inputs anew for each of nncf's passes, so that none of them is kept."""

    def __init__(self, context: Context[Any], *, cached: bool = False) -> None:
        self._context, self._cached = context, cached

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for feed in self._context.feeds():
            if not self._cached:
                yield dict(feed)
                continue
            # Of a graph with states: a whole text behind nothing, each row going on from its own.
            rows = np.arange(len(feed["input_ids"]), dtype=np.int32)
            yield {**with_positions(feed), BEAM: rows}


def _read(context: Context[Any]) -> tuple[Any, dict[str, Linear]]:
    """Return the float model, and its layers by name."""
    if context.base.format == "openvino":
        model = read_openvino(context.graph)
        linears = openvino_linears(model, context.name_of)
    else:
        graph = read_onnx(context.graph)
        linears, model = onnx_linears(graph), to_proto(graph)
    if not linears:
        raise QuantizationError("this graph has no matrix product with a constant weight")
    return model, {item.name: item for item in linears}


def _layers(linears: Mapping[str, Linear], kept: Collection[str], kind: str) -> tuple[Layer, ...]:
    return tuple(
        Layer(name=name, kind="float" if name in kept else kind, macs=item.size, value=item.output)
        for name, item in linears.items()
    )


def _alphas(recipe: NncfRecipe) -> Any:
    parameters = _nncf().quantization.advanced_parameters.AdvancedSmoothQuantParameters
    if recipe.smooth == "none":
        return parameters(matmul=-1, convolution=-1)
    alpha = AUTO_ALPHA if recipe.smooth == "auto" else float(recipe.smooth)
    return parameters(matmul=alpha)


def _ranges(recipe: NncfRecipe) -> Any:
    kinds = import_module("nncf.quantization.range_estimator")
    if recipe.ranges not in ("minmax", "percentile"):
        raise ConfigurationError(
            f"nncf has no ranges {recipe.ranges!r}",
            fix="use minmax or percentile, or method static",
        )
    options: dict[str, Any] = {}
    if recipe.ranges == "percentile":
        options = {"quantile_outlier_prob": (1 - recipe.percentile / 100) / 2}
    low, high = (
        kinds.StatisticsCollectorParameters(
            statistics_type=getattr(kinds.StatisticsType, "QUANTILE" if options else side),
            aggregator_type=getattr(kinds.AggregatorType, side),
            **options,
        )
        for side in ("MIN", "MAX")
    )
    return kinds.RangeEstimatorParameters(min=low, max=high)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep nncf's progress bars and log lines, which go to stdout, out of the command's answer.

    What it refuses, such as groups that a layer's inputs cannot be cut into, is one line.
    """
    # Not nncf.set_log_level: it turns down every handler of its logger, which may be the caller's.
    log = logging.getLogger("nncf")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with root_log_kept(), same_signal_stack(), redirect_stdout(io.StringIO()):
            yield
    except Exception as error:
        if type(error).__module__ != "nncf.errors":
            raise
        raise QuantizationError(
            f"nncf refuses this recipe: {brief(error)}", fix="choose another, or weight-only"
        ) from error
    finally:
        log.setLevel(level)
