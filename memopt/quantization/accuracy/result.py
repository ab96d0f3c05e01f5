"""What quantizing made, and the proof: for people (tables, report) and for programs (JSON)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from memopt.bundle import Variant
from memopt.quantization.static import Layer
from memopt.quantization.validate import Gate, Validation

if TYPE_CHECKING:
    from memopt.quantization.search import Trail


@dataclass(frozen=True, slots=True, kw_only=True)
class Proven:
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

    @property
    def work(self) -> Mapping[str, Any]:
        """``int8_macs`` and ``kernels`` where the work was looked at, else nothing."""
        return {}

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Result(Proven):
    """A quantized graph, recorded as a variant of its bundle."""

    variant: Variant
    int8_macs: float | None = None
    kernels: Mapping[str, int] = field(default_factory=dict)

    @property
    def work(self) -> Mapping[str, Any]:
        """The share of multiply-adds in int8 and the kernels that ran."""
        return {"int8_macs": self.int8_macs, "kernels": dict(self.kernels)}
