"""What was measured of one contender, where, and how much faster one is than another."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from memopt.errors import InputError
from memopt.files import atomic_path
from memopt.jsontext import parse_json
from memopt.runtimes.cpu import cpu_features, cpu_model, usable_cpus

# What decides speed; each contender tells the versions of its own environment.
PACKAGES = (
    "memopt",
    "onnxruntime",
    "openvino",
    "torch",
    "transformers",
    "sentence-transformers",
    "fastembed",
    "optimum",
    "numpy",
)
BOOTSTRAP_SAMPLES = 2000
# Fields by which a record is measured again.
_READ_AGAIN: Mapping[str, type] = {
    **dict.fromkeys(("label", "python", "inputs"), str),
    "spec": Mapping,
    "items": int,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkMetrics:
    """What one contender did in one run. Times in seconds unless the name says ms."""

    label: str
    spec: Mapping[str, Any]
    python: str
    run_id: str
    items: int
    rounds_seconds: tuple[float, ...]  # per pass, one per round, paired by index within one run_id
    items_per_second: float  # items over the median round
    load_seconds: float
    first_vector_seconds: float
    latency_ms_p50: float
    latency_ms_p95: float
    latency_ms_p99: float
    rss_mb: float
    pss_mb: float
    rss_increase_mb: float  # over the worker before it opened the model
    cosine_min: float | None  # against the contender `reference`
    cosine_mean: float | None
    cosine_low: float | None = None  # what the minimum of as many other inputs stays above
    reference: str = ""
    inputs: str = ""  # the file they were read from; empty for seeded ones
    at: str = ""  # UTC
    hardware: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)  # of the contender's own environment
    vram_mb: float | None = None
    kernels: Mapping[str, Any] = field(default_factory=dict)  # of memopt's own: kernels_of()
    variants: Mapping[str, str] = field(default_factory=dict)  # of memopt's own: what answered
    measures: Mapping[str, float] = field(default_factory=dict)  # of a task without vectors
    rounds_latency_ms: tuple[float, ...] = ()  # p50 of one input, one per round, paired too

    @property
    def nearness(self) -> float | None:
        """How near the answers are to the reference's: min cosine, or the task's first measure."""
        return next(iter(self.measures.values()), None) if self.measures else self.cosine_min

    @property
    def compared(self) -> str:
        """The variant whose answers were compared, "" of a peer: of one input the single one."""
        batches = self.variants.get("batches", "")
        told = self.variants.get("single inputs", batches) if self.items == 1 else batches
        return told.partition(" on ")[0]

    def save(self, folder: Path) -> Path:
        """Write ``<folder>/<label>-<run_id>.json`` and return its path."""
        safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in self.label)
        target = folder / f"{safe}-{self.run_id}.json"
        with atomic_path(target) as path:
            path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return target

    @classmethod
    def load(cls, path: Path) -> BenchmarkMetrics:
        """Read a file that :meth:`save` wrote.

        Raises:
            InputError: the file is missing or is not such a record.
        """
        try:
            raw = parse_json(path.read_bytes(), str(path))
            raw["rounds_seconds"] = tuple(raw["rounds_seconds"])
            raw["rounds_latency_ms"] = tuple(raw.get("rounds_latency_ms", ()))
            made = cls(**raw)
            for name, kind in _READ_AGAIN.items():
                if not isinstance(getattr(made, name), kind):
                    raise TypeError(f"its {name} is {getattr(made, name)!r}")
            return made
        except (OSError, InputError, TypeError, KeyError) as error:
            raise InputError(
                f"{path} is not a benchmark record ({type(error).__name__}: {error})",
                fix="make one: memopt bench BUNDLE",
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Speed of one contender over another: above 1 is faster. 95 % bootstrap interval."""

    median: float
    low: float
    high: float
    rounds: int


def ratio(a: BenchmarkMetrics, b: BenchmarkMetrics) -> Ratio:
    """Return how much faster ``a`` is than ``b``, from the paired rounds of one run.

    The interval is a percentile bootstrap of the median (Efron and Tibshirani 1993), seeded.

    Raises:
        InputError: the two records are of different runs, so their rounds are not pairs.

    >>> from types import SimpleNamespace as N
    >>> ratio(N(run_id="r", rounds_seconds=(1.0, 1.0)), N(run_id="r", rounds_seconds=(2.0, 2.0)))
    Ratio(median=2.0, low=2.0, high=2.0, rounds=2)
    """
    if a.run_id != b.run_id:
        raise InputError(f"runs {a.run_id} and {b.run_id} are not paired", fix="measure both anew")
    quotients = np.asarray(b.rounds_seconds) / np.asarray(a.rounds_seconds)
    low, high = interval(quotients)
    return Ratio(median=float(np.median(quotients)), low=low, high=high, rounds=len(quotients))


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Return the ends of the 95 % bootstrap interval of a median, seeded.

    >>> interval([2.0, 2.0, 2.0])
    (2.0, 2.0)
    """
    generator = np.random.default_rng(0)
    samples = generator.choice(np.asarray(values), (BOOTSTRAP_SAMPLES, len(values)))
    low, high = np.percentile(np.median(samples, axis=1), (2.5, 97.5))
    return float(low), float(high)


def hardware() -> dict[str, Any]:
    """Return processor, its instruction sets, cores in use and memory of this machine."""
    import psutil

    return {
        "processor": cpu_model(),
        "instruction_sets": ", ".join(sorted(cpu_features())),
        "cores": usable_cpus(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Return the installed versions that decide speed, and Python's."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
