"""Candidates, what became of them, and the plan: frozen data that another machine can replay."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any

from memopt.errors import ConfigurationError
from memopt.files import atomic_path
from memopt.jsontext import parse_json
from memopt.quantization.recipe import Recipe
from memopt.registry import check_keys, check_names, nearest
from memopt.tasks.quality import MEASURES

PLAN_VERSION = 1
TARGETS = ("cpu", "openvino", "cuda", "aoti", "rocm", "coreml", "vulkan")
KINDS = ("export", "quantize")
# Which speed decides: of a language model, and of a model that answers inputs.
WRITING = ("decode", "prefill", "mix")
ANSWERING = ("throughput", "latency", "both")
PREFERENCES = (*WRITING, *ANSWERING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to run the model: how its variant is made, and on which device it is opened.

    ``settings`` are the keyword arguments of the exporter or the fields of the quantization
    recipe; ``device`` is a device name of the runtime.

    >>> Candidate(name="onnx-fp32", kind="export", device="cpu").label
    'onnx-fp32 on cpu'
    """

    name: str
    kind: str
    device: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""

    def __post_init__(self) -> None:
        for what, value, known in (("kind", self.kind, KINDS), ("device", self.device, TARGETS)):
            if value not in known:
                raise ConfigurationError(
                    f"candidate {self.name!r} has {what} {value!r}",
                    fix=nearest(str(value), known),
                )
        if not isinstance(self.settings, Mapping):
            raise ConfigurationError(
                f"candidate {self.name!r} has settings {self.settings!r}", fix="give an object"
            )
        if self.kind == "quantize":
            made = Recipe.from_dict(self.settings).variant_name
            if made != self.name:  # else what is measured under the name is something else
                raise ConfigurationError(
                    f"candidate {self.name!r} has the recipe of {made!r}", fix="name it so"
                )

    @property
    def label(self) -> str:
        """Name and device: one graph may be a candidate on two devices."""
        return f"{self.name} on {self.device}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one candidate, and why."""

    candidate: Candidate
    status: str  # chosen | kept | dropped | skipped
    reason: str
    reused: bool = False
    seconds: float = 0.0  # spent on building it
    bytes: int = 0
    cosine_min: float | None = None
    cosine_mean: float | None = None
    cosine_low: float | None = None  # what the minimum of as many other inputs stays above
    items_per_second: float | None = None
    measures: Mapping[str, float] = field(default_factory=dict)  # of a task without vectors
    latency_ms_p50: float | None = None
    rounds_seconds: tuple[float, ...] = ()  # paired by position with those of the others
    threads: int | None = None  # of a language model, the number that was fastest
    single: bool = False  # chosen for requests of one input
    rounds_latency_ms: tuple[float, ...] = ()  # p50 of one input, paired with those of the others

    @property
    def shown(self) -> float | None:
        """How near its answers are to float32's: min cosine, or the task's first measure."""
        return next(iter(self.measures.values())) if self.measures else self.cosine_min

    @property
    def quality(self) -> float | None:
        """The same, more is better: one less a measure that falls."""
        name = next(iter(self.measures), None)
        falls = name is not None and not MEASURES[name].rising
        return 1.0 - self.measures[str(name)] if falls else self.shown


def _items(table: object) -> Iterable[tuple[str, object]]:
    return table.items() if isinstance(table, Mapping) else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What ``memopt optimize`` tried and chose, enough to do the same elsewhere.

    ``chosen`` and ``chosen_device`` name the winner, ``single`` and ``single_device`` the one for
    requests of one input where that was asked for; ``machine`` says where that was so, ``options``
    with which open options each placement was fastest there.
    """

    source: str
    min_cosine: float
    samples: int
    seed: int
    candidates: tuple[Candidate, ...]
    chosen: str | None = None
    chosen_device: str | None = None
    calibration: str = ""
    calibration_sha256: str = ""
    machine: Mapping[str, Any] = field(default_factory=dict)
    gate: Mapping[str, float] = field(default_factory=dict)  # bounds of a task's measures
    prefer: str = ""  # what speed is: see WRITING and ANSWERING
    single: str | None = None
    single_device: str | None = None
    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    version: int = PLAN_VERSION

    def __post_init__(self) -> None:
        words, numbers, tables = (str,), (int, float), (Mapping,)
        kinds: dict[str, tuple[type, ...]] = {
            **dict.fromkeys(("source", "calibration", "calibration_sha256"), words),
            **dict.fromkeys(
                ("chosen", "chosen_device", "single", "single_device"), (str, NoneType)
            ),
            **dict.fromkeys(("machine", "gate", "options"), tables),
            **dict.fromkeys(("samples", "seed"), (int,)),
            "min_cosine": numbers,
        }
        given = {name: (getattr(self, name), kind) for name, kind in kinds.items()}
        given |= {f"gate {name}": (bound, numbers) for name, bound in _items(self.gate)}
        given |= {f"options of {name}": (told, tables) for name, told in _items(self.options)}
        for name, (value, kind) in given.items():
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ConfigurationError(f"a plan's {name} cannot be {value!r}")
        if not -1 <= self.min_cosine <= 1:
            raise ConfigurationError(f"min_cosine {self.min_cosine} is not in [-1, 1]")
        if self.prefer not in ("", *PREFERENCES):
            raise ConfigurationError(
                f"prefer cannot be {self.prefer!r}", fix=nearest(str(self.prefer), PREFERENCES)
            )

    @property
    def writes(self) -> bool:
        """Whether it is of a language model."""
        return self.prefer in WRITING

    def save(self, target: Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        with atomic_path(target) as path:
            path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def only(self, targets: Sequence[str]) -> Plan:
        """Return the plan with the candidates of these targets alone.

        Raises:
            ConfigurationError: it has none of them.
        """
        kept = tuple(c for c in self.candidates if c.device in targets)
        if not kept:
            there = sorted({c.device for c in self.candidates})
            raise ConfigurationError(
                f"the plan has no candidate for {', '.join(targets)}",
                fix="it has some for " + ", ".join(there),
            )
        return replace(self, candidates=kept)

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan.

        Raises:
            ConfigurationError: missing file, not a plan, unknown keys, or a newer version.
        """
        fix = "memopt optimize writes one: plan.json in the bundle"
        try:
            raw = parse_json(path.read_bytes(), str(path), error=ConfigurationError)
            version = int(raw["version"])
            items = list(raw.pop("candidates"))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigurationError(f"{path} is not an optimize plan: {error}", fix=fix) from error
        if version > PLAN_VERSION:
            raise ConfigurationError(
                f"{path} has plan version {version}, this memopt reads {PLAN_VERSION}",
                fix="upgrade memopt",
            )
        check_keys(f"{path} is not an optimize plan: it", raw, [item.name for item in fields(cls)])
        try:
            return cls(**raw, candidates=tuple(Candidate(**item) for item in items))
        except (TypeError, ConfigurationError) as error:
            raise ConfigurationError(f"{path} is not an optimize plan: {error}", fix=fix) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimized:
    """The result: the plan that was carried out and one outcome per candidate.

    ``reference`` is the portable float graph's inputs per second, what speeds are multiples of;
    ``notes`` are lines a reader should know, such as other calibration data than the plan's;
    ``at`` is when it was recorded, UTC.
    """

    bundle: Path
    plan: Plan
    outcomes: tuple[Outcome, ...]
    inputs: int
    seconds: float
    reference: float | None = None
    notes: tuple[str, ...] = ()
    at: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "bundle": str(self.bundle),
            "chosen": self.plan.chosen,
            "chosen_device": self.plan.chosen_device,
            "single": self.plan.single,
            "single_device": self.plan.single_device,
            "options": {name: dict(told) for name, told in self.plan.options.items()},
            "seconds": self.seconds,
            "inputs": self.inputs,
            "reference_items_per_second": self.reference,
            "notes": list(self.notes),
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }


def check_targets(text: str) -> tuple[str, ...]:
    """Split and check a comma-separated list of targets.

    Raises:
        ConfigurationError: empty, or a name that is no target.

    >>> check_targets("cpu, openvino")
    ('cpu', 'openvino')
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise ConfigurationError("no target given", fix="choose from: " + ", ".join(TARGETS))
    check_names("target", names, TARGETS)
    return names
