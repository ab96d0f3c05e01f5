"""What a variant must reach, and what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from memopt.errors import ConfigurationError
from memopt.tasks import quality

# What users of an index notice, and what GPTQ can be asked for.
MIN_COSINE = {"rtn": 0.95, "gptq": 0.98}
MAX_PERPLEXITY_INCREASE = quality.MEASURES["perplexity_increase"].bound or 0.05
# Number of a validation -> what people call it, and how it is written; of embeddings and language
# models, the other tasks' are in memopt.tasks.quality.
NUMBERS = {
    "cosine_min": ("cosine, least", ".4f"),
    "cosine_low": ("cosine, least, expected on other inputs", ".4f"),
    "cosine_p1": ("cosine, 1st percentile", ".4f"),
    "cosine_mean": ("cosine, mean", ".4f"),
    "overlap_at_10": ("overlap of the ten nearest neighbours", ".4f"),
    "spearman": ("Spearman against people's scores", ".4f"),
    "spearman_float": ("Spearman of the float model", ".4f"),
    "perplexity": ("perplexity", ".4f"),
    "perplexity_float": ("perplexity of the float model", ".4f"),
    "perplexity_increase": ("perplexity increase", "+.2%"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What a variant must reach to be written and picked.

    ``bounds`` are of the measures of :mod:`memopt.tasks.quality`; what it does not name has the
    default that stands there.

    >>> Gate(min_cosine=2)
    Traceback (most recent call last):
    ...
    memopt.errors.ConfigurationError: min_cosine 2 is not in [-1, 1]; use 0.95
    """

    min_cosine: float = MIN_COSINE["rtn"]
    max_perplexity_increase: float = MAX_PERPLEXITY_INCREASE
    bounds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        quality.check_bounds(self.bounds)
        if not -1 <= self.min_cosine <= 1:
            raise ConfigurationError(
                f"min_cosine {self.min_cosine} is not in [-1, 1]", fix="use 0.95"
            )
        if not self.max_perplexity_increase >= 0:
            raise ConfigurationError(
                f"max_perplexity_increase {self.max_perplexity_increase} is negative",
                fix="use 0.05 for 5 %",
            )

    @property
    def most_perplexity(self) -> float:
        """The largest increase of perplexity: under its name among the bounds, else the field."""
        return self.bounds.get("perplexity_increase", self.max_perplexity_increase)


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """How a quantized graph compares with the float one: cosines, or measures of its task.

    ``texts`` are of language models: prompt, the float's text, the quantized one's.
    """

    samples: int
    cosine_min: float | None = None
    cosine_low: float | None = None  # what the minimum of as many other inputs stays above
    cosine_p1: float | None = None
    cosine_mean: float | None = None
    overlap_at_10: float | None = None
    spearman: float | None = None
    spearman_float: float | None = None
    perplexity: float | None = None
    perplexity_float: float | None = None
    perplexity_increase: float | None = None
    measures: Mapping[str, float] = field(default_factory=dict)  # of the task, the first decides
    speedup: float | None = None  # against the float variant of the same runtime
    set_sha256: str | None = None  # of the inputs
    worst: tuple[tuple[str, float], ...] = ()
    texts: tuple[tuple[str, str, str], ...] = ()
    cosines: tuple[float, ...] = field(default=(), repr=False)

    @property
    def quality(self) -> float:
        """What a search raises: min cosine, or the first measure, negative where less is better."""
        if self.measures:
            name, value = next(iter(self.measures.items()))
            return value if quality.MEASURES[name].rising else -value
        assert self.cosine_min is not None
        return self.cosine_min

    def failures(self, gate: Gate) -> list[str]:
        """Return one line per number that misses the gate; empty means it passes."""
        misses = quality.misses(self.measures, gate.bounds)
        if self.cosine_min is not None and not self.cosine_min >= gate.min_cosine:
            misses.append(f"min cosine {self.cosine_min:.4f} is below {gate.min_cosine}")
        elif self.cosine_low is not None and not self.cosine_low >= gate.min_cosine:
            misses.append(near(self.cosine_min, self.cosine_low, gate.min_cosine))
        rise = self.perplexity_increase
        if rise is not None and not rise <= gate.most_perplexity:
            misses.append(f"perplexity rose by {rise:.1%}, more than {gate.most_perplexity:.0%}")
        return misses

    def rows(self, gate: Gate) -> list[tuple[str, str, str]]:
        """Return (measure, value, bound) of every number there is, in words."""
        least = f"at least {gate.min_cosine:g}"
        most = f"at most {gate.most_perplexity:.0%}"
        bounds = {"cosine_min": least, "cosine_low": least, "perplexity_increase": most}
        known = [
            (label, format(value, form), bounds.get(key, ""))
            for key, (label, form) in NUMBERS.items()
            if (value := getattr(self, key)) is not None
        ]
        return known + [
            (quality.MEASURES[name].label, f"{value:.4f}", quality.words(name, gate.bounds))
            for name, value in self.measures.items()
        ]

    def record(self, gate: Gate) -> dict[str, Any]:
        """Return what the manifest keeps: the numbers, the gate, no list of every cosine."""
        numbers = {
            key: round(value, 6) if isinstance(value, float) else value
            for key, value in asdict(self).items()
            if value is not None and key not in ("cosines", "worst", "measures", "texts")
        }
        measures = {name: round(value, 6) for name, value in self.measures.items()}
        # Bounds only where they count: manifests of embeddings stay as they were.
        bound = {key: value for key, value in asdict(gate).items() if key != "bounds" or measures}
        return {**numbers, **measures, "gate": bound}


def near(cosine: float | None, low: float, bound: float) -> str:
    """Say that a minimum passes by the luck of its sample."""
    seen = f"min cosine {cosine:.4f}" if cosine is not None else "the minimum"
    return f"{seen} is too near to {bound}: other inputs would give down to {low:.4f}"
