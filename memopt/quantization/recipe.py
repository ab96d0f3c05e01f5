"""How to quantize: one frozen dataclass, the same from flags, from YAML and from a manifest."""

from __future__ import annotations

import difflib
import fnmatch
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from memopt.bundle import Bundle
from memopt.errors import ConfigurationError
from memopt.registry import nearest

Method = Literal["static", "dynamic", "weight-only", "nncf", "nncf-weights", "arrow"]
Target = Literal["auto", "cpu", "openvino", "gpu"]
WeightType = Literal["int8", "int4", "int2", "nf4"]
ActivationType = Literal["uint8", "int8"]
Granularity = Literal["auto", "per-channel", "per-tensor", "per-group"]
Algorithm = Literal["rtn", "gptq", "awq", "scale-estimation", "awq+scale-estimation"]
Ranges = Literal["minmax", "entropy", "percentile", "mse"]
Smooth = Literal["auto", "none"]

BITS: Mapping[str, int] = types.MappingProxyType({"int8": 8, "int4": 4, "int2": 2})

# Where each method may run; the first is what target "auto" means.
TARGETS: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
    {
        "static": ("openvino", "cpu"),
        "dynamic": ("cpu",),
        "weight-only": ("cpu", "gpu"),
        "nncf": ("openvino", "cpu"),
        "nncf-weights": ("openvino", "cpu"),
        "arrow": ("cpu",),
    }
)
# Weights in fewer bits than eight, or in float codes, exist only where weights alone are quantized.
WEIGHT_TYPES: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
    {
        "static": ("int8",),
        "dynamic": ("int8",),
        "weight-only": ("int8", "int4", "int2"),
        "nncf": ("int8",),
        "nncf-weights": ("int8", "int4", "nf4"),
        "arrow": ("int8", "int4", "int2"),
    }
)
ALGORITHMS: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
    {
        "static": ("rtn",),
        "dynamic": ("rtn",),
        "weight-only": ("rtn", "gptq"),
        "nncf": ("rtn",),
        "nncf-weights": ("rtn", "gptq", "awq", "scale-estimation", "awq+scale-estimation"),
        "arrow": ("rtn", "gptq"),
    }
)

# int8 kernels multiply with symmetric weights that have one scale per output channel or tensor.
GRANULARITIES: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
    {
        "static": ("per-channel", "per-tensor"),
        "dynamic": ("per-channel", "per-tensor"),
        "weight-only": ("per-group",),
        "nncf": ("per-channel", "per-tensor"),
        "nncf-weights": ("per-channel", "per-group"),
        "arrow": ("per-channel", "per-tensor", "per-group"),
    }
)
_ASYMMETRIC = ("weight-only", "nncf-weights", "arrow")


# What each field says, for people: the command line shows these.
HELP: Mapping[str, str] = types.MappingProxyType(
    {
        "method": "How to quantize.",
        "target": "Runtime to build for; auto is the method's best.",
        "weight_type": "Type of the stored weights.",
        "activation_type": "Type of activations; int8 only with nncf.",
        "granularity": "What shares one scale of a weight; auto is the method's best.",
        "group_size": "Weights per scale in per-group; 0 is 64 for int8, else 32.",
        "symmetric": "Weights without a zero point.",
        "algorithm": "How weights are rounded.",
        "ranges": "How activation ranges are chosen from their histogram.",
        "percentile": "Share of values inside the range, for ranges=percentile.",
        "smooth": "SmoothQuant alpha: a number, auto (searched per layer) or none.",
        "range_margin": "Factor on the seen activation range, for unseen inputs.",
        "range_probes": "Widen ranges with random-token inputs (text, static).",
        "bias_correction": "Move the mean error into the bias (static).",
        "embeddings": "Quantize embedding tables too.",
        "keep_float": "Layers kept in float, by shell pattern.",
        "max_drop": "Accuracy-aware nncf: largest drop of mean cosine; 0 is off.",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What to do to a model's weights and activations.

    Raises:
        ConfigurationError: a value is unknown or out of range, or two fields contradict.

    >>> Recipe(method="weight-only", weight_type="int4").variant_name
    'onnx-int4-weight-only'
    >>> Recipe.from_dict({"metod": "static"})
    Traceback (most recent call last):
    ...
    memopt.errors.ConfigurationError: recipe has unknown key 'metod'; did you mean 'method'?
    """

    method: Method = "static"
    target: Target = "auto"
    weight_type: WeightType = "int8"
    activation_type: ActivationType = "uint8"
    granularity: Granularity = "auto"
    group_size: int = 0
    symmetric: bool = True
    algorithm: Algorithm = "rtn"
    ranges: Ranges = "minmax"
    percentile: float = 99.99
    smooth: Smooth | float = "auto"
    range_margin: float = 1.1
    range_probes: bool = True
    bias_correction: bool = True
    embeddings: bool = True
    keep_float: tuple[str, ...] = ()
    max_drop: float = 0.0

    def __post_init__(self) -> None:
        hints = get_type_hints(Recipe)
        for item in fields(self):
            _check_type(item.name, getattr(self, item.name), hints[item.name])
        _allowed("target", self.target, ("auto", *TARGETS[self.method]), self.method)
        _allowed("weight_type", self.weight_type, WEIGHT_TYPES[self.method], self.method)
        grains = ("auto", *GRANULARITIES[self.method])
        _allowed("granularity", self.granularity, grains, self.method)
        if not self.symmetric and self.method not in _ASYMMETRIC:
            raise ConfigurationError(
                f"method {self.method!r} computes with symmetric weights", fix="leave symmetric on"
            )
        if self.activation_type != "uint8" and self.method != "nncf":
            raise ConfigurationError(
                f"activation_type {self.activation_type!r} does not go with method {self.method!r}",
                fix="use uint8; nncf has both",
            )
        _allowed("algorithm", self.algorithm, ALGORITHMS[self.method], self.method)
        if self.group_size < 0:
            raise ConfigurationError(f"group_size {self.group_size} is negative", fix="use 32")
        odd = self.group and (self.group & (self.group - 1) or self.group < 16)
        if self.method == "weight-only" and odd:
            raise ConfigurationError(
                f"group_size {self.group_size} does not fit MatMulNBits",
                fix="use a power of two from 16 on: 16, 32, 64, 128",
            )
        if not 50 < self.percentile <= 100:
            raise ConfigurationError(
                f"percentile {self.percentile} is not in (50, 100]", fix="use 99.9 to 100"
            )
        if not isinstance(self.smooth, str) and not 0 <= self.smooth <= 1:
            raise ConfigurationError(
                f"smooth {self.smooth} is not in [0, 1]", fix="use 0.5 to 0.85, auto or none"
            )
        if not 1 <= self.range_margin <= 4:
            raise ConfigurationError(
                f"range_margin {self.range_margin} is not in [1, 4]", fix="use 1.0 to 1.5"
            )
        if self.max_drop < 0:
            raise ConfigurationError(f"max_drop {self.max_drop} is negative", fix="use 0.005")

    @property
    def runtime(self) -> str:
        """The target with "auto" resolved: openvino, cpu or gpu."""
        return TARGETS[self.method][0] if self.target == "auto" else self.target

    @property
    def group(self) -> int:
        """The group size with 0 resolved.

        For eight bits 64: on MiniLM blocks of 128 cost a minimum cosine of .994 against .997, and
        blocks of 32 (.998) make the file larger than 26 % of float32; all run equally fast.
        """
        return self.group_size or (64 if self.weight_type == "int8" else 32)

    @property
    def grain(self) -> str:
        """The granularity with "auto" resolved: blocks below eight bits, else channels."""
        if self.granularity != "auto":
            return self.granularity
        allowed = GRANULARITIES[self.method]
        narrow = self.weight_type != "int8" and "per-group" in allowed
        return "per-group" if narrow else allowed[0]

    @property
    def format(self) -> str:
        """The format of the variant this makes: "openvino" or "onnx"."""
        return "openvino" if self.runtime == "openvino" else "onnx"

    @property
    def variant_name(self) -> str:
        """The name of the variant this makes, such as ``onnx-int8-static``."""
        kind = {"nncf-weights": "weight-only"}.get(self.method, self.method)
        if self.method == "nncf-weights" and self.format == "onnx":
            kind = "nncf-weights"
        rounding = "" if self.algorithm == "rtn" else f"-{self.algorithm.replace('+', '-')}"
        return f"{self.format}-{self.weight_type}-{kind}{rounding}"

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Recipe:
        """Build a recipe from plain data; unknown keys are refused.

        >>> from dataclasses import asdict
        >>> recipe = Recipe(smooth=0.7, keep_float=("*pooler*",))
        >>> Recipe.from_dict(asdict(recipe)) == recipe
        True
        """
        known = [item.name for item in fields(cls)]
        for key in raw:
            if key not in known:
                raise ConfigurationError(
                    f"recipe has unknown key {key!r}", fix=nearest(str(key), known)
                )
        values = dict(raw)
        if isinstance(values.get("keep_float"), str):
            values["keep_float"] = (values["keep_float"],)
        elif isinstance(values.get("keep_float"), list):
            values["keep_float"] = tuple(values["keep_float"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data that ``from_dict`` takes."""
        return {**asdict(self), "keep_float": list(self.keep_float)}


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from YAML: the fields themselves, or under a ``quantize:`` key.

    Raises:
        ConfigurationError: the file is missing, not YAML, or has an unknown key or a bad value.
    """
    from memopt.yamlfile import read_yaml

    if not path.is_file():
        raise ConfigurationError(f"no recipe file {str(path)!r}", fix="check the path")
    raw = read_yaml(path)
    if isinstance(raw, dict) and "quantize" in raw:
        raw = raw["quantize"]
    if not isinstance(raw, dict):
        raise ConfigurationError(
            f"{path} holds no recipe", fix="write fields such as 'method: static'"
        )
    return Recipe.from_dict(raw)


def known_recipe(bundle: Bundle) -> dict[str, Any]:
    """Return the recipe fields that ``models/*.yaml`` gives a bundle's model, {} for others.

    A model is known by the bundle's name, or by where it came from, whatever its revision.

    Raises:
        ConfigurationError: ``quantize:`` is not a mapping.
    """
    from memopt.weights.sources import known_models

    name, source = bundle.manifest.name, bundle.manifest.source.partition("@")[0]
    for known, entry in known_models().items():
        if known == name or entry["source"] == source:
            fields_ = entry.get("quantize") or {}
            if not isinstance(fields_, dict):
                raise ConfigurationError(
                    f"models/{known}.yaml: quantize is {fields_!r}, not a recipe",
                    fix="write fields such as 'method: static' below it",
                )
            return dict(fields_)
    return {}


def match_layers(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """Return the layer names that any shell pattern matches.

    Raises:
        ConfigurationError: a pattern matches nothing; the message lists the nearest names.

    >>> sorted(match_layers(["*.0.*"], ["layer.0.query", "layer.1.query"]))
    ['layer.0.query']
    """
    known = sorted(set(names))
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in known if fnmatch.fnmatchcase(name, pattern)}
        if not hits:
            close = _nearest_layers(pattern, known)
            raise ConfigurationError(
                f"no layer matches {pattern!r}",
                fix="nearest: " + ", ".join(close) if close else "this graph has no such layers",
            )
        found |= hits
    return found


def _nearest_layers(pattern: str, names: Sequence[str], count: int = 3) -> list[str]:
    """Return the names of which a part, dots between, is most like the pattern without stars."""
    wanted = [part for part in pattern.replace("*", "").split(".") if part]

    def likeness(name: str) -> float:
        parts = name.split(".")
        best = (
            max(difflib.SequenceMatcher(None, want, part).ratio() for part in parts)
            for want in wanted
        )
        return sum(best)

    return sorted(names, key=likeness, reverse=True)[:count]


def _allowed(name: str, value: str, allowed: tuple[str, ...], method: str) -> None:
    if value not in allowed:
        raise ConfigurationError(
            f"{name} {value!r} does not go with method {method!r}",
            fix="use " + " or ".join(allowed),
        )


def _check_type(name: str, value: Any, hint: Any) -> None:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    choices: list[str] = []
    for option in options:
        if get_origin(option) is Literal:
            choices += get_args(option)
            if value in get_args(option):
                return
        elif get_origin(option) is tuple:
            if isinstance(value, tuple) and all(isinstance(item, str) for item in value):
                return
        elif option is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return
        elif isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return
    wanted = nearest(str(value), choices) if choices else f"give a {hint}"
    raise ConfigurationError(f"recipe field {name} cannot be {value!r}", fix=wanted)
