"""nncf's post-training quantization and weight compression, with memopt's calibration and gate."""

from __future__ import annotations

import io
import logging
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import ConfigurationError, QuantizationError
from memopt.extras import require
from memopt.quantization.openvino_static import find_linears, read_openvino
from memopt.quantization.recipe import Recipe, match_layers
from memopt.quantization.static import Context, Layer, Make, Quantized

if TYPE_CHECKING:
    from memopt.quantization.onnx_graph import Linear as OnnxLinear
    from memopt.quantization.openvino_static import Linear

# With absolute ranges, on MiniLM: 0.5 gives min cosine .968, 0.7 .991, 0.95 .987.
AUTO_ALPHA = 0.7
_MODES = {
    ("int8", True): "INT8_SYM",
    ("int8", False): "INT8_ASYM",
    ("int4", True): "INT4_SYM",
    ("int4", False): "INT4_ASYM",
    ("nf4", True): "NF4",
}


def prepare(context: Context) -> Make:
    """Return a function that quantizes weights and activations with ``nncf.quantize``.

    Raises:
        ConfigurationError: ranges that nncf does not have.
    """
    nncf = _nncf()
    recipe = context.recipe
    model, nodes = _read(context)
    patterns = match_layers(recipe.keep_float, nodes)
    feeds = [dict(feed) for feed in context.feeds()]
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
        "subset_size": len(feeds),
        "model_type": nncf.ModelType.TRANSFORMER,
        "fast_bias_correction": recipe.bias_correction,
    }

    def make(keep: Collection[str]) -> Quantized:
        kept = patterns | set(keep)
        ignored = nncf.IgnoredScope(names=[nodes[name] for name in sorted(kept)])
        dataset = nncf.Dataset(feeds)
        with _quiet():
            if recipe.max_drop:
                made = _with_accuracy_control(context, model, dataset, feeds, ignored, options)
            else:
                made = nncf.quantize(
                    _copy(model),
                    dataset,
                    ignored_scope=ignored,
                    advanced_parameters=advanced,
                    **options,
                )
        layers = [Layer(name=n, kind="float" if n in kept else "int8") for n in nodes]
        return Quantized(model=made, layers=tuple(layers), options=_options(context))

    return make


def prepare_weights(context: Context) -> Make:
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
    model, nodes = _read(context)
    patterns = match_layers(recipe.keep_float, nodes)
    needs_data = recipe.algorithm != "rtn"
    feeds = [dict(feed) for feed in context.feeds()] if needs_data else []

    def make(keep: Collection[str]) -> Quantized:
        kept = patterns | set(keep)
        options: dict[str, Any] = {}
        if not eight:
            options = {
                "group_size": recipe.group if recipe.grain == "per-group" else -1,
                "ratio": 1.0,
                "awq": "awq" in recipe.algorithm,
                "scale_estimation": "scale-estimation" in recipe.algorithm,
                "gptq": recipe.algorithm == "gptq",
            }
        if needs_data:
            options |= {"dataset": nncf.Dataset(feeds), "subset_size": len(feeds)}
        with _quiet():
            made = nncf.compress_weights(
                _copy(model),
                mode=getattr(nncf.CompressWeightsMode, mode),
                ignored_scope=nncf.IgnoredScope(names=[nodes[name] for name in sorted(kept)]),
                **options,
            )
        kind = recipe.weight_type
        layers = [Layer(name=n, kind="float" if n in kept else kind) for n in nodes]
        return Quantized(model=made, layers=tuple(layers), options=_options(context))

    return make


def _with_accuracy_control(
    context: Context,
    model: Any,
    dataset: Any,
    feeds: list[dict[str, Any]],
    ignored: Any,
    options: dict[str, Any],
) -> Any:
    """Quantize, then let nncf return layers to float until the mean cosine drops no further."""
    nncf = _nncf()
    if context.base.format != "openvino":
        raise ConfigurationError(
            "accuracy-aware quantization works on OpenVINO graphs", fix="use target openvino"
        )
    from memopt.quantization.graph_runner import open_graph

    output = context.base.output
    reference = open_graph(context.graph, "openvino", output, context.base.options)
    expected = [reference(feed) for feed in feeds]

    def measure(compiled: Any, data: Iterable[Any]) -> tuple[float, None]:
        cosines: list[float] = []
        for feed, want in zip(data, expected, strict=False):
            got = np.array(compiled(feed)[output], np.float32).reshape(len(want), -1)
            flat = want.reshape(len(want), -1)
            norms = np.linalg.norm(got, axis=1) * np.linalg.norm(flat, axis=1)
            cosines += list((got * flat).sum(axis=1) / np.maximum(norms, 1e-12))
        return float(np.mean(cosines)), None

    return nncf.quantize_with_accuracy_control(
        _copy(model),
        dataset,
        nncf.Dataset(feeds),
        measure,
        max_drop=context.recipe.max_drop,
        ignored_scope=ignored,
        **options,
    )


def _nncf() -> Any:
    return require("nncf", extra="quantize", why="quantize with nncf")


def _options(context: Context) -> dict[str, str]:
    return {"INFERENCE_PRECISION_HINT": "f32"} if context.base.format == "openvino" else {}


def _copy(model: Any) -> Any:
    if hasattr(model, "clone"):
        return model.clone()
    import copy

    return copy.deepcopy(model)


def _read(context: Context) -> tuple[Any, dict[str, str]]:
    """Return the float model, and layer name -> node name."""
    found: list[Linear] | list[OnnxLinear]
    if context.base.format == "openvino":
        model = read_openvino(context.graph)
        found = find_linears(model, context.name_of)
        nodes = {item.name: item.node.get_friendly_name() for item in found}
    else:
        from memopt.quantization import onnx_graph

        model = onnx_graph.read_onnx(context.graph)
        nodes = {item.name: item.node.name for item in onnx_graph.find_linears(model)}
    if not nodes:
        raise QuantizationError("this graph has no matrix product with a constant weight")
    return model, nodes


def _alphas(recipe: Recipe) -> Any:
    parameters = _nncf().quantization.advanced_parameters.AdvancedSmoothQuantParameters
    if recipe.smooth == "none":
        return parameters(matmul=-1, convolution=-1)
    alpha = AUTO_ALPHA if recipe.smooth == "auto" else float(recipe.smooth)
    return parameters(matmul=alpha)


def _ranges(recipe: Recipe) -> Any:
    kinds = _range_module()
    if recipe.ranges == "minmax":
        low, high = (
            kinds.StatisticsCollectorParameters(
                statistics_type=getattr(kinds.StatisticsType, name),
                aggregator_type=getattr(kinds.AggregatorType, name),
            )
            for name in ("MIN", "MAX")
        )
        return kinds.RangeEstimatorParameters(min=low, max=high)
    if recipe.ranges == "percentile":
        outside = (1 - recipe.percentile / 100) / 2
        sides = [
            kinds.StatisticsCollectorParameters(
                statistics_type=kinds.StatisticsType.QUANTILE,
                aggregator_type=getattr(kinds.AggregatorType, name),
                quantile_outlier_prob=outside,
            )
            for name in ("MIN", "MAX")
        ]
        return kinds.RangeEstimatorParameters(min=sides[0], max=sides[1])
    raise ConfigurationError(
        f"nncf has no ranges {recipe.ranges!r}", fix="use minmax or percentile, or method static"
    )


def _range_module() -> Any:
    import importlib

    return importlib.import_module("nncf.quantization.range_estimator")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep nncf's progress bars and log lines, which go to stdout, out of the command's answer."""
    _nncf().set_log_level(logging.ERROR)
    with redirect_stdout(io.StringIO()):
        yield
