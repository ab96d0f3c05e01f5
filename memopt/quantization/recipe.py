"""How to quantize: one frozen dataclass, the same from flags, from YAML and from a manifest."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from memopt.errors import ConfigurationError
from memopt.registry import check_keys, nearest

if TYPE_CHECKING:
    from memopt.bundle import Bundle
    from memopt.quantization.method import Context, Make, MethodRecipe

Method = Literal["static", "dynamic", "weight-only", "nncf", "nncf-weights", "arrow"]
Target = Literal["auto", "cpu", "openvino", "gpu"]
WeightType = Literal["int8", "int4", "int2", "nf4"]
ActivationType = Literal["uint8", "int8"]
Granularity = Literal["auto", "per-channel", "per-tensor", "per-group"]
Algorithm = Literal[
    "rtn", "k-quant", "gptq", "stored", "awq", "scale-estimation", "awq+scale-estimation"
]
Ranges = Literal["minmax", "entropy", "percentile", "mse"]
Smooth = Literal["auto", "none"]

# Tokens of an input: one of text between the two that frame it.
SHORTEST = 3
# Method -> its settings, and by format: what prepares it, and the float graph it starts from.
METHODS: Mapping[str, tuple[str, Mapping[str, tuple[str, str]]]] = {
    "static": (
        "static:StaticRecipe",
        {
            "openvino": ("openvino_static:prepare", "openvino-fp32"),
            "onnx": ("static_qdq:prepare", "onnx-fp32"),
        },
    ),
    "dynamic": ("dynamic:DynamicRecipe", {"onnx": ("dynamic:prepare", "onnx-fp32-fused")}),
    "weight-only": ("weight_only:WeightOnlyRecipe", {"onnx": ("weight_only:prepare", "onnx-fp32")}),
    "nncf": (
        "nncf:NncfRecipe",
        {f: ("nncf:prepare", f"{f}-fp32") for f in ("openvino", "onnx")},
    ),
    "nncf-weights": (
        "nncf:NncfWeightsRecipe",
        {f: ("nncf:prepare_weights", f"{f}-fp32") for f in ("openvino", "onnx")},
    ),
    "arrow": ("arrow:ArrowRecipe", {"onnx": ("arrow:prepare", "onnx-fp32")}),
}


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(import_module(f"memopt.quantization.methods.{module}"), attribute)


@dataclass(frozen=True, kw_only=True)
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

    # What the command line says of each; "default" where a default reads better in words.
    method: Method = field(
        default="static",
        metadata={"help": "static, dynamic, weight-only, nncf, nncf-weights or arrow"},
    )
    target: Target = field(
        default="auto", metadata={"help": "auto, cpu (ONNX Runtime), openvino or gpu"}
    )
    weight_type: WeightType = field(default="int8", metadata={"help": "int8, int4, int2 or nf4"})
    activation_type: ActivationType = field(
        default="uint8", metadata={"help": "uint8, or int8 with nncf"}
    )
    granularity: Granularity = field(
        default="auto",
        metadata={"help": "What shares a scale: auto, per-channel, per-tensor, per-group"},
    )
    group_size: int = field(
        default=0,
        metadata={"help": "Weights per scale in per-group", "default": "64 for int8, else 32"},
    )
    symmetric: bool = field(
        default=True, metadata={"help": "Weights without a zero point", "off": "asymmetric"}
    )
    algorithm: Algorithm = field(
        default="rtn",
        metadata={
            "help": "rtn, k-quant, gptq, stored (a GGUF file's own integers), awq, "
            "scale-estimation, awq+scale-estimation"
        },
    )
    ranges: Ranges = field(
        default="minmax", metadata={"help": "Activation ranges: minmax, entropy, percentile, mse"}
    )
    percentile: float = field(default=99.99, metadata={"help": "With --ranges percentile"})
    smooth: Smooth | float = field(
        default="auto", metadata={"help": "SmoothQuant alpha 0..1, auto (per layer) or none"}
    )
    range_margin: float = field(
        default=1.1, metadata={"help": "Factor on seen ranges, for unseen inputs"}
    )
    range_probes: bool = field(default=True, metadata={"help": "Widen ranges with random tokens"})
    bias_correction: bool = field(
        default=True, metadata={"help": "Move the mean error into the bias"}
    )
    embeddings: bool = field(default=True, metadata={"help": "Quantize embedding tables too"})
    keep_float: tuple[str, ...] = field(
        default=(),
        metadata={"help": "Layers kept in float, a shell pattern; repeatable", "default": "none"},
    )
    keep_int8: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "With int4 weight-only: layers in int8, a shell pattern; repeatable",
            "default": "none",
        },
    )
    max_drop: float = field(
        default=0.0,
        metadata={"help": "Accuracy-aware nncf: largest drop of mean cosine", "default": "0, off"},
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(Recipe)
        for item in fields(self):
            _check_type(item.name, getattr(self, item.name), hints[item.name])
        kind: type[MethodRecipe] = _load(METHODS[self.method][0])
        mine = {item.name for item in fields(kind)}
        if not self.symmetric and "symmetric" not in mine:
            raise ConfigurationError(
                f"method {self.method!r} computes with symmetric weights", fix="leave symmetric on"
            )
        if self.keep_int8 and ("keep_int8" not in mine or self.weight_type == "int8"):
            raise ConfigurationError(
                f"keep_int8 does not go with {self.weight_type} of method {self.method!r}",
                fix="use method weight-only with int4",
            )
        if self.activation_type != "uint8" and "activation_type" not in mine:
            raise ConfigurationError(
                f"activation_type {self.activation_type!r} does not go with method {self.method!r}",
                fix="use uint8; nncf has both",
            )
        kind.check(self.method, asdict(self))
        self._check_ranges()

    def _check_ranges(self) -> None:
        block = self.own.group
        powerless = self.method == "weight-only" and (block & (block - 1) or block < 16)
        alpha = 0.5 if isinstance(self.smooth, str) else self.smooth
        for name, wrong, what, fix in (
            ("group_size", self.group_size < 0, "is negative", "use 32"),
            (
                *("group_size", powerless, "does not fit MatMulNBits"),
                "use a power of two from 16 on: 16, 32, 64, 128",
            ),
            (
                "percentile",
                not 50 < self.percentile <= 100,
                "is not in (50, 100]",
                "use 99.9 to 100",
            ),
            ("smooth", not 0 <= alpha <= 1, "is not in [0, 1]", "use 0.5 to 0.85, auto or none"),
            ("range_margin", not 1 <= self.range_margin <= 4, "is not in [1, 4]", "use 1.0 to 1.5"),
            ("max_drop", self.max_drop < 0, "is negative", "use 0.005"),
        ):
            if wrong:
                raise ConfigurationError(f"{name} {getattr(self, name)} {what}", fix=fix)

    @cached_property
    def own(self) -> MethodRecipe:
        """The settings of the method itself."""
        kind: type[MethodRecipe] = _load(METHODS[self.method][0])
        return kind(**{item.name: getattr(self, item.name) for item in fields(kind)})

    def prepare(self) -> Callable[[Context[Any]], Make]:
        """Return the function that prepares the method: from a context to what builds graphs."""
        prepare: Callable[[Context[Any]], Make] = _load(METHODS[self.method][1][self.format][0])
        return prepare

    @property
    def base(self) -> str:
        """The name of the float variant it starts from."""
        return METHODS[self.method][1][self.format][1]

    @property
    def runtime(self) -> str:
        """The target with "auto" resolved: openvino, cpu or gpu."""
        return self.own.runtime

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
        group = ""
        if getattr(self.own, "group_size", 0) and self.own.grain == "per-group":
            usual = type(self.own)(weight_type=self.weight_type).group
            group = "" if self.own.group == usual else f"-g{self.own.group}"
        mixed = "-mixed" if self.keep_int8 else ""
        return f"{self.format}-{self.weight_type}-{kind}{rounding}{group}{mixed}"

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Recipe:
        """Build a recipe from plain data; unknown keys are refused.

        >>> from dataclasses import asdict
        >>> recipe = Recipe(smooth=0.7, keep_float=("*pooler*",))
        >>> Recipe.from_dict(asdict(recipe)) == recipe
        True
        """
        check_keys("recipe", raw, [item.name for item in fields(cls)])
        kept = {name: _patterns(raw.get(name, ())) for name in ("keep_float", "keep_int8")}
        return cls(**{**raw, **kept})

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data that ``from_dict`` takes."""
        return {
            **asdict(self),
            "keep_float": list(self.keep_float),
            "keep_int8": list(self.keep_int8),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Where inputs come from and how many are used.

    Raises:
        ConfigurationError: a negative seed, or a max_length that leaves no room for text.
    """

    calibration: Path
    samples: int = field(default=300, metadata={"help": "Inputs to calibrate."})
    validation_samples: int = field(default=512, metadata={"help": "Inputs to validate on."})
    validation: Path | None = field(
        default=None,
        metadata={"help": "Other data to validate on [default: split --calibration]."},
    )
    seed: int = field(default=0, metadata={"help": "Of every random choice."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens at most [default: the model's]."}
    )
    column: str | None = field(
        default=None, metadata={"help": "Text column [default: every text column]."}
    )

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigurationError(f"seed {self.seed} is negative", fix="use 0 or more")
        if self.max_length is not None and self.max_length < SHORTEST:
            raise ConfigurationError(
                f"max_length {self.max_length} leaves no room for text",
                fix=f"use {SHORTEST} or more tokens",
            )


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


def _patterns(given: Any) -> Any:
    return (
        (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list) else given
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
