"""What calibration keeps of activations: ranges, histograms and a fixed-size sample of rows.

Memory depends on the number of layers and channels, never on how many inputs are seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memopt.errors import QuantizationError
from memopt.graphs.observe import Array, valid_rows
from memopt.graphs.session import Feed, Observe

# Rows kept per layer: enough for the error of a choice of alpha to be known within a few percent.
ROWS = 1536
# Bins of a histogram; TensorRT's calibrator uses 2,048 for the same purpose.
BINS = 2048
# Levels of an unsigned 8-bit activation.
LEVELS = 255


class Observed:
    """Channel ranges and a uniform sample of rows of one activation of shape (..., channels).

    >>> seen = Observed(rows=2)
    >>> seen.add(np.array([[1.0, -2.0], [3.0, 0.0]], np.float32), np.random.default_rng(0))
    >>> seen.low.tolist(), seen.high.tolist()
    ([1.0, -2.0], [3.0, 0.0])
    """

    def __init__(self, rows: int = ROWS) -> None:
        self._capacity = rows
        self._seen = 0
        self._kept: Array | None = None
        self._filled = 0
        self.low: Array = np.zeros(0, np.float32)
        self.high: Array = np.zeros(0, np.float32)

    @property
    def rows(self) -> Array:
        """The kept rows, (at most ROWS, channels)."""
        if self._kept is None:
            raise QuantizationError("no calibration input reached this layer")
        return self._kept[: self._filled]

    def add(self, values: Array, generator: np.random.Generator) -> None:
        """Take in rows (count, channels); every row seen is kept with equal probability."""
        if len(values) == 0:
            return
        self.widen(values)
        if self._kept is None:
            self._kept = np.empty((self._capacity, values.shape[1]), np.float32)
        # Algorithm R (Vitter 1985): row n replaces a random kept one with probability capacity/n.
        order = np.arange(self._seen, self._seen + len(values))
        slots = np.where(
            order < self._capacity, order, generator.integers(0, order + 1, len(values))
        )
        taken = slots < self._capacity
        self._kept[slots[taken]] = values[taken]
        self._seen += len(values)
        self._filled = min(self._seen, self._capacity)

    def widen(self, values: Array) -> None:
        """Take in the ranges of rows (count, channels) without keeping any."""
        if len(values) == 0:
            return
        low, high = values.min(axis=0), values.max(axis=0)
        first = len(self.low) == 0
        self.low = low if first else np.minimum(self.low, low)
        self.high = high if first else np.maximum(self.high, high)


class Histogram:
    """Counts of values between fixed edges; what falls outside counts at the edge.

    >>> h = Histogram(0.0, 1.0)
    >>> h.add(np.array([0.0, 0.5, 2.0]))
    >>> int(h.counts.sum())
    3
    """

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, max(high, low + 1e-12)
        self.counts = np.zeros(BINS, np.int64)

    def add(self, values: NDArray[Any]) -> None:
        """Count values of any shape."""
        inside = np.clip(values.ravel(), self.low, self.high)
        self.counts += np.histogram(inside, BINS, (self.low, self.high))[0]

    def range(self, method: str, percentile: float) -> tuple[float, float]:
        """Return the (low, high) that ``method`` keeps: minmax, percentile, mse or entropy.

        mse searches the clip that makes the squared rounding and clipping error least; entropy
        the one whose quantized distribution is nearest by Kullback-Leibler divergence (Migacz
        2017).
        """
        if method == "minmax" or not self.counts.any():
            return self.low, self.high
        if method == "percentile":
            return self._percentile(percentile)
        measure = self._squared_error if method == "mse" else self._divergence
        # From a clip that keeps half of the range to none, as a share of the range on each side.
        grid = [(a, b) for b in np.linspace(0.5, 1, 26) for a in (0.0, *np.linspace(0.05, 0.4, 8))]
        width = self.high - self.low
        options = [(self.low + a * width, self.low + b * width) for a, b in grid]
        return min(options, key=lambda edges: measure(*edges))

    @property
    def centers(self) -> NDArray[np.float64]:
        """The middle of each bin."""
        edges = np.linspace(self.low, self.high, BINS + 1)
        return (edges[1:] + edges[:-1]) / 2

    def _percentile(self, percentile: float) -> tuple[float, float]:
        share = np.cumsum(self.counts) / self.counts.sum()
        outside = (1 - percentile / 100) / 2
        edges = np.linspace(self.low, self.high, BINS + 1)
        low = edges[int(np.searchsorted(share, outside, side="right"))]
        high = edges[int(np.searchsorted(share, 1 - outside)) + 1]
        return float(low), float(high)

    def _squared_error(self, low: float, high: float) -> float:
        centers, step = self.centers, (high - low) / LEVELS
        beyond = np.maximum(0, np.maximum(low - centers, centers - high))
        return float((self.counts * (beyond**2 + step**2 / 12)).sum())

    def _divergence(self, low: float, high: float) -> float:
        centers = self.centers
        inside = (centers >= low) & (centers <= high)
        reference = self.counts[inside].astype(np.float64)
        if len(reference) < 2:
            return float("inf")
        reference[0] += self.counts[centers < low].sum()
        reference[-1] += self.counts[centers > high].sum()
        level = np.minimum((np.arange(len(reference)) * (LEVELS + 1)) // len(reference), LEVELS)
        filled = self.counts[inside] > 0
        mass = np.bincount(level, self.counts[inside], LEVELS + 1)
        used = np.bincount(level, filled, LEVELS + 1)
        model = np.where(filled, (mass / np.maximum(used, 1))[level], 0)
        both = (reference > 0) & (model > 0)
        p, q = reference / reference.sum(), model / max(model.sum(), 1)
        # Mass that the clipped model cannot express counts as if it had one tenth of a bin's share.
        lost = p[(reference > 0) & (model == 0)].sum() * np.log(10 * len(p))
        return float((p[both] * np.log(p[both] / q[both])).sum() + lost)


def observe(
    names: Sequence[str],
    run: Observe,
    feeds: Iterable[Feed],
    *,
    probes: Iterable[Feed] = (),
    seed: int = 0,
) -> dict[str, Observed]:
    """Run inputs through a graph and return what was seen of each named activation.

    ``probes`` widen ranges only: no error is weighed on what the model is not for.

    Raises:
        QuantizationError: an activation is NaN or infinite.
    """
    generator = np.random.default_rng(seed)
    seen = {name: Observed() for name in names}
    for widen, group in ((False, feeds), (True, probes)):
        for feed in group:
            for name, values in zip(names, run(feed), strict=True):
                rows = valid_rows(values, feed)
                if not np.isfinite(rows).all():
                    raise QuantizationError(
                        f"activation {name!r} is not finite on a calibration input",
                        fix="check the float model: memopt export checks it",
                    )
                if widen:
                    seen[name].widen(rows)
                else:
                    seen[name].add(rows, generator)
    return seen


def token_probes(
    vocabulary: int, template: Feed, *, limit: int = 128, count: int = 192, seed: int = 0
) -> list[Feed]:
    """Return inputs of random and repeated tokens, up to 128 of them, for activation ranges.

    Real inputs of one kind leave most outlier channels untouched: on MiniLM a quantizer whose
    ranges came from captions alone fell to cosine 0.83 on "...", with these probes to 0.988.

    Args:
        vocabulary: number of token ids.
        template: a real input; its first and last token (such as [CLS], [SEP]) frame each probe.
        limit: tokens at most, both of those included.
        count: how many.
    """
    generator = np.random.default_rng(seed)
    lengths = (1, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 126)
    real = template["input_ids"][0]
    if "attention_mask" in template:
        real = real[template["attention_mask"][0].astype(bool)]
    feeds: list[Feed] = []
    for number in range(count):
        length = min(int(generator.choice(lengths)), max(limit - 2, 1))
        middle = generator.integers(0, vocabulary, length)
        if number % 4 == 3:
            middle[:] = middle[0]
        ids = np.concatenate([real[:1], middle, real[-1:]])[None].astype(np.int64)
        feed = {name: np.full_like(ids, 1 if name.endswith("_mask") else 0) for name in template}
        feeds.append({**feed, "input_ids": ids})
    return feeds
