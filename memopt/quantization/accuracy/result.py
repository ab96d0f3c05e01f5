"""What quantizing made, and the proof: for people (tables, report) and for programs (JSON)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from memopt.bundle import Variant
from memopt.quantization.accuracy.gate import Gate, Validation
from memopt.quantization.method import Layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Tradeoff:
    """One point of the search: what is in float, and the quality on the whole validation set."""

    kept: tuple[str, ...]
    quality: float  # min cosine, the first measure, or minus the mean KL
    float_macs: float  # share of the weighted work that stays float
    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Trail:
    """How a search went.

    Attributes:
        tried: every choice of layers that was compared on the whole validation set, in order.
        sensitivity: layer -> 1 - min cosine, or the mean KL, when it alone is
            quantized.
        complete: False when the budget ended the search: the kept layers pass, fewer might do.
        seconds: how long it took.
    """

    tried: tuple[Tradeoff, ...]
    sensitivity: Mapping[str, float] = field(default_factory=dict)
    complete: bool = True
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {**asdict(self), "seconds": round(self.seconds, 1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A quantized file with its comparison against the float graph.

    Attributes:
        name: the variant's name, or the weight file's.
        file: relative to the bundle.
        passed: whether it reached its gate.
        failures: one line per number that missed it.
        validation: the comparison.
        gate: what was asked for.
        layers: what became of each layer.
        recipe: how it was made, as recorded.
        data: what it was calibrated and validated with, as recorded.
        bytes, float_bytes: of its files, and of the float graph's or weights'.
        trail: how the search went, None without one.
        work: of a graph, ``int8_macs``, the share of multiply-adds in int8 (None where nobody
            looked), and ``kernels``, how often each ran.
        entry: the variant, None for a weight file.
        model, at: of which model it was made and when, as recorded.
    """

    name: str
    file: str
    passed: bool
    failures: tuple[str, ...]
    validation: Validation
    gate: Gate
    layers: tuple[Layer, ...]
    recipe: Mapping[str, Any]
    data: Mapping[str, Any]
    bytes: int
    float_bytes: int
    trail: Trail | None = None
    work: Mapping[str, Any] = field(default_factory=dict)
    entry: Variant | None = None
    model: str = ""
    at: str = ""

    @property
    def variant(self) -> Variant:
        """The variant that was recorded.

        Raises:
            AttributeError: method ``arrow`` writes weights, which are none.
        """
        if self.entry is None:
            raise AttributeError(f"{self.file} is a weight file, not a variant")
        return self.entry

    @property
    def int8_macs(self) -> float | None:
        """The share of multiply-adds in int8, None where nobody looked."""
        share: float | None = self.work.get("int8_macs")
        return share

    @property
    def kernels(self) -> Mapping[str, int]:
        """How often each multiplying kernel ran."""
        counts: Mapping[str, int] = self.work.get("kernels", {})
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        proof = {k: v for k, v in asdict(self.validation).items() if k != "cosines"}
        return {
            "name": self.name,
            "file": self.file,
            "passed": self.passed,
            "failures": list(self.failures),
            "validation": proof,
            "gate": asdict(self.gate),
            "recipe": dict(self.recipe),
            "data": dict(self.data),
            "bytes": self.bytes,
            "float_bytes": self.float_bytes,
            **self.work,
            "layers": [asdict(layer) for layer in self.layers],
            "search": self.trail.to_dict() if self.trail else None,
        }
