"""Candidates and the plan: frozen data that another machine can replay."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from memopt.errors import ConfigurationError
from memopt.files import atomic_path
from memopt.registry import nearest

PLAN_VERSION = 1
TARGETS = ("cpu", "openvino", "cuda", "rocm", "coreml", "vulkan")
KINDS = ("export", "quantize")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to run the model: how its variant is made, and on which device it is opened.

    ``settings`` are the keyword arguments of the exporter or the fields of the quantization
    recipe; ``device`` is a device name of the runtime.
    """

    name: str
    kind: str
    device: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigurationError(
                f"candidate {self.name!r} has kind {self.kind!r}", fix=nearest(self.kind, KINDS)
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What ``memopt optimize`` tried and chose, enough to do the same elsewhere."""

    source: str
    min_cosine: float
    samples: int
    seed: int
    candidates: tuple[Candidate, ...]
    chosen: str | None = None
    calibration: str = ""
    calibration_sha256: str = ""
    machine: Mapping[str, Any] = field(default_factory=dict)
    version: int = PLAN_VERSION

    def save(self, target: Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        with atomic_path(target) as path:
            path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan.

        Raises:
            ConfigurationError: missing file, not a plan, unknown keys, or a newer version.
        """
        fix = "memopt optimize writes one: plan.json in the bundle"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            version = int(raw["version"])
            items = list(raw.pop("candidates"))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigurationError(f"{path} is not an optimize plan: {error}", fix=fix) from error
        if version > PLAN_VERSION:
            raise ConfigurationError(
                f"{path} has plan version {version}, this memopt reads {PLAN_VERSION}",
                fix="upgrade memopt",
            )
        try:
            return cls(**raw, candidates=tuple(Candidate(**item) for item in items))
        except TypeError as error:
            raise ConfigurationError(f"{path} is not an optimize plan: {error}", fix=fix) from error


def check_targets(text: str) -> tuple[str, ...]:
    """Split and check a comma-separated list of targets.

    Raises:
        ConfigurationError: empty, or a name that is no target.

    >>> check_targets("cpu, openvino")
    ('cpu', 'openvino')
    """
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise ConfigurationError("no target given", fix="choose from: " + ", ".join(TARGETS))
    for name in names:
        if name not in TARGETS:
            raise ConfigurationError(f"unknown target {name!r}", fix=nearest(name, TARGETS))
    return names


def parse_budget(text: str) -> float:
    """Return seconds of ``90``, ``90s``, ``15m`` or ``1h``.

    Raises:
        ConfigurationError: not a positive duration.

    >>> parse_budget("15m")
    900.0
    """
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigurationError(f"budget {text!r} is not a duration", fix="write 90s, 15m or 1h")
    return seconds
