"""What a quantization method is given, what it makes, and the settings that all have."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, get_args, get_type_hints

from numpy.typing import NDArray

from memopt.bundle import Bundle, Variant
from memopt.errors import ConfigurationError, QuantizationError
from memopt.graphs.linears import Linear
from memopt.progress import Progress, Step, silent
from memopt.registry import check_keys

BITS: Mapping[str, int] = {"int8": 8, "int4": 4, "int2": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRecipe:
    """The settings of one method; each has a class of its own that says what goes with it."""

    target: str = "auto"  # where a subclass lists targets, the first after auto is what auto means
    weight_type: str = "int8"
    granularity: str = "auto"
    keep_float: tuple[str, ...] = ()

    @classmethod
    def check(cls, method: str, values: Mapping[str, Any]) -> None:
        """Refuse values that do not go with the method.

        Raises:
            ConfigurationError: one does not; what does is named.
        """
        hints = get_type_hints(cls)
        for name in ("target", "weight_type", "granularity", "algorithm"):
            allowed = get_args(hints[name]) if name in hints else ("rtn",)
            if values[name] not in allowed:
                raise ConfigurationError(
                    f"{name} {values[name]!r} does not go with method {method!r}",
                    fix="use " + " or ".join(allowed),
                )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Build the settings from plain data; keys that the method does not have are refused."""
        known = [item.name for item in fields(cls)]
        check_keys(cls.__name__, raw, known)
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        settings = cls(**values)
        cls.check(cls.__name__, {"algorithm": "rtn"} | {k: getattr(settings, k) for k in known})
        return settings

    @property
    def runtime(self) -> str:
        """The target with "auto" resolved: openvino, cpu or gpu."""
        return self._choices("target")[0] if self.target == "auto" else self.target

    @property
    def group(self) -> int:
        """The group size with 0 resolved.

        For eight bits 64: on MiniLM blocks of 128 cost a minimum cosine of .994 against .997, and
        blocks of 32 (.998) make the file larger than 26 % of float32; all run equally fast.
        """
        size: int = getattr(self, "group_size", 0)
        return size or (64 if self.weight_type == "int8" else 32)

    @property
    def grain(self) -> str:
        """The granularity with "auto" resolved: blocks below eight bits, else channels."""
        if self.granularity != "auto":
            return self.granularity
        choices = self._choices("granularity")
        narrow = self.weight_type != "int8" and "per-group" in choices
        return "per-group" if narrow else choices[0]

    def _choices(self, name: str) -> list[str]:
        return [value for value in get_args(get_type_hints(type(self))[name]) if value != "auto"]


R = TypeVar("R", bound=MethodRecipe)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What became of one layer: ``error`` is a squared error over the power of what was exact.

    Of the layer's output where calibration inputs tell it, else of its weight.
    """

    name: str
    kind: str  # int8 | float | embedding | ...
    error: float | None = None
    alpha: float | None = None
    macs: int = 0  # multiply-accumulates per token
    value: str | None = None  # its output in the graph, for errors measured there


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A graph made by a method: the model in the runtime's own type, and its layers.

    Attributes:
        options: how the runtime must open it.
        finish: what makes the product itself, where a graph to try is something else.
        weights: the file that is the product, where the graph only proves it.
        notes: what the manifest keeps of such a file.
    """

    model: Any
    layers: tuple[Layer, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    finish: Callable[[], Quantized] | None = None
    weights: Path | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


# Builds the quantized graph with these layers, beside the recipe's own, left in float.
Make = Callable[[Collection[str]], Quantized]


@dataclass(frozen=True, slots=True, kw_only=True)
class Context(Generic[R]):
    """What every method gets: the float graph, calibration inputs and the method's settings.

    ``feeds`` starts a new pass over the calibration inputs each time; ``name_of`` gives the
    checkpoint's name of a weight matrix, in either orientation; ``folder`` is for files that wait
    to be published.
    """

    bundle: Bundle
    base: Variant
    recipe: R
    feeds: Callable[[], Iterable[Mapping[str, NDArray[Any]]]]
    probes: Sequence[Mapping[str, NDArray[Any]]] = ()
    name_of: Callable[[NDArray[Any]], str | None] = lambda _: None
    seed: int = 0
    samples: int = 0
    step: Step = silent
    progress: Progress = silent
    folder: Path | None = None

    @property
    def graph(self) -> Path:
        """The float graph's file."""
        return self.bundle.file(self.base)


def writes(bundle: Bundle) -> bool:
    """Say whether a bundle is a language model's, whose graph gives logits of the next token."""
    return bundle.task.answer == "logits"


def float_layer(linear: Linear) -> Layer:
    """Return what is said of a layer that stays in float."""
    return Layer(name=linear.name, kind="float", macs=linear.size)


def kept_layers(recipe: MethodRecipe, linears: Sequence[Linear], tables: Sequence[str]) -> set[str]:
    """Return the layers and tables that the recipe keeps in float.

    Raises:
        QuantizationError: the graph has no weighted product.
        ConfigurationError: a pattern matches no layer.
    """
    if not linears:
        raise QuantizationError("this graph has no matrix product with a constant weight")
    return match_layers(recipe.keep_float, [*(item.name for item in linears), *tables])


def match_layers(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """Return the layer names that any shell pattern matches.

    Raises:
        ConfigurationError: a pattern matches nothing; the message lists the nearest names.

    >>> sorted(match_layers(["*.0.*"], ["layer.0.query", "layer.1.query"]))
    ['layer.0.query']
    """
    known = sorted(set(names))
    matches: set[str] = set()
    for pattern in patterns:
        hits = {name for name in known if fnmatch.fnmatchcase(name, pattern)}
        if not hits:
            close = _nearest_layers(pattern, known)
            raise ConfigurationError(
                f"no layer matches {pattern!r}",
                fix="nearest: " + ", ".join(close) if close else "this graph has no such layers",
            )
        matches |= hits
    return matches


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
