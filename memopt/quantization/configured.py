"""What the settings, a recipe file and flags say of a quantization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.bundle import Bundle
from memopt.errors import ConfigurationError
from memopt.quantization.accuracy.gate import Gate
from memopt.quantization.quantize import least_cosine
from memopt.quantization.recipe import Recipe, known_recipe, load_recipe

if TYPE_CHECKING:
    from memopt.settings import QuantizationSection


def choose_recipe(
    bundle: Bundle, settings: QuantizationSection, file: Path | None, flags: Mapping[str, Any]
) -> Recipe:
    """Return the recipe: of the flags, then of the file, else of the settings and the known model.

    Raises:
        ConfigurationError: a value is unknown, or two contradict.
    """
    if file is not None:
        base = load_recipe(file)
    else:
        base = Recipe.from_dict({**known_recipe(bundle), **recipe_fields(settings)})
    given = dict(flags)
    if "smooth" in given:
        given["smooth"] = _alpha(given["smooth"])
    return Recipe.from_dict({**base.to_dict(), **given})


def gate_of(
    settings: QuantizationSection,
    recipe: Recipe,
    min_cosine: float | None = None,
    max_perplexity_increase: float | None = None,
    bounds: Sequence[str] = (),
) -> Gate:
    """Return the bounds: those of the flags, of the settings that are set, of the method."""
    if min_cosine is None and "cosine_threshold" in settings.model_fields_set:
        min_cosine = settings.cosine_threshold
    if max_perplexity_increase is None:
        max_perplexity_increase = settings.ppl_threshold
    return Gate(
        min_cosine=least_cosine(recipe) if min_cosine is None else min_cosine,
        max_perplexity_increase=max_perplexity_increase,
        bounds=parse_bounds(bounds),
    )


def parse_bounds(texts: Sequence[str]) -> dict[str, float]:
    """Return the bounds that ``NAME=VALUE`` texts say.

    Raises:
        ConfigurationError: one that says nothing.

    >>> parse_bounds(["agreement=0.99"])
    {'agreement': 0.99}
    """
    bounds = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            bounds[name.strip()] = float(value)
        except ValueError as error:
            raise ConfigurationError(
                f"--gate {text!r} is no bound", fix="write NAME=VALUE, as in agreement=0.99"
            ) from error
    return bounds


def recipe_fields(settings: QuantizationSection) -> dict[str, Any]:
    """Return what the settings say of a recipe; what they leave out stays the recipe's own."""
    given = settings.model_fields_set
    if not settings.enabled:
        raise ConfigurationError(
            "quantization.enabled is false", fix="set it to true, or give --recipe"
        )
    fields: dict[str, Any] = {}
    if "quant_type" in given:
        if settings.quant_type == "fp16":
            raise ConfigurationError(
                "quantization.quant_type fp16 is a float: there is nothing to quantize",
                fix="run: memopt export BUNDLE --precision fp16",
            )
        fields["weight_type"] = settings.quant_type
    if "calibration_method" in given:
        gptq = settings.calibration_method == "gptq"
        fields |= {"algorithm": "gptq"} if gptq else {"ranges": settings.calibration_method}
    if fields.get("weight_type", "int8") != "int8" or "algorithm" in fields:
        # Neither fewer than eight bits nor GPTQ exist where activations are quantized too.
        fields["method"] = "weight-only"
    if "per_channel" in given:
        # Auto is per channel, or finer where the method has nothing coarser than groups.
        fields["granularity"] = "auto" if settings.per_channel else "per-tensor"
    if "symmetric" in given:
        fields["symmetric"] = settings.symmetric
    if "mixed_precision_layers" in given:
        fields["keep_float"] = list(settings.mixed_precision_layers)
    return fields


def _alpha(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


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
