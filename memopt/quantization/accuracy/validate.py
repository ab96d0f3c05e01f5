"""PrecisionValidator: a quantized graph beside its float graph, on inputs neither has seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memopt.bundle import Bundle, Variant, read_json
from memopt.errors import QuantizationError
from memopt.graphs.session import Feed, Run, feeds, open_graph
from memopt.moved import old_names
from memopt.quantization.accuracy.calibration import CalibrationSet
from memopt.quantization.accuracy.extremes import expected_minimum
from memopt.quantization.accuracy.gate import Validation
from memopt.runtimes.segments import from_the_left, together
from memopt.runtimes.vectors import row_cosines, unit_rows
from memopt.tasks.quality import About, quality_of
from memopt.tasks.table import task_of

__getattr__ = old_names(__name__)

Rows = NDArray[np.floating[Any]]

# Neighbours compared for the retrieval overlap.
NEIGHBOURS = 10
# Timed passes of each side, in turn; the median is reported.
ROUNDS = 3
# Seconds of float work at most in one timed pass: speed here is an indication, `memopt bench`
# measures.
TIMED_SECONDS = 1.5
# Batches whose texts are put into shared rows too, and how far answers may differ then, relative to
# their size. Sums of another order turn a rounding here and there, 1e-3 in MiniLM's int8; a text
# that saw another differs by ten times as much as this and more.
SHARED_BATCHES, MIXED = 8, 2e-2
# Validation inputs kept between runs: all of a text set; of pictures and sounds, 0.6 to 1 MB each,
# a search then decodes them anew rather than hold hundreds of MB.
HELD_BYTES = 128 << 20


class PrecisionValidator:
    """Runs the float graph once over a validation set, then any number of graphs against it.

    Args:
        bundle: for its tokenizer, modality and task.
        reference: the float variant of the runtime the quantized graph is for.
        data: inputs that were not used for calibration.
        max_length: tokens at most, None for the bundle's own limit.

    Raises:
        QuantizationError: the float graph itself gives NaN.
    """

    def __init__(
        self,
        bundle: Bundle,
        reference: Variant,
        data: CalibrationSet,
        *,
        max_length: int | None = None,
    ) -> None:
        self._data = data
        self._task = bundle.manifest.task
        self._about = About(_config(bundle), data.items)
        self.output = reference.output
        self._batches = Replay(
            lambda: feeds(bundle, data.items, reference.inputs, max_length=max_length)
        )
        self._float = open_graph(
            bundle.file(reference), reference.format, reference.output, reference.options
        )
        self._expected = self._measure(self._float)
        if not all(np.isfinite(row).all() for row in self._expected):
            raise QuantizationError(f"the float variant {reference.name} gives NaN or infinity")

    def open(self, graph: Path, format: str, options: Mapping[str, str]) -> Run:
        """Open a graph for :meth:`validate`."""
        return open_graph(graph, format, self.output, options)

    def validate(self, run: Run, *, limit: int | None = None, timed: bool = True) -> Validation:
        """Compare one graph with the float one.

        Raises:
            QuantizationError: the graph gives NaN or infinity, or rows of another width.
        """
        got = self._measure(run, limit)
        expected = self._expected if limit is None else self._expected[:limit]
        for ours, theirs in zip(got, expected, strict=True):
            if ours.shape != theirs.shape:
                raise QuantizationError(f"output {ours.shape} beside float output {theirs.shape}")
            if not np.isfinite(ours).all():
                raise QuantizationError(
                    "the quantized graph gives NaN or infinity on validation data"
                )
        faster = speedup(self._float, run, self._batches) if timed else None
        if task_of(self._task).embeds:
            return self._embedding(np.stack(got), np.stack(expected), faster)
        about = replace(self._about, items=self._about.items[: len(got)])
        return Validation(
            samples=len(got),
            measures=quality_of(self._task).compare(got, expected, about),
            speedup=faster,
            set_sha256=self._data.digest,
        )

    def refuse_mixing(self, run: Run) -> None:
        """Compare texts that share rows with each alone, for a graph that takes them so.

        Raises:
            QuantizationError: their answers differ.
        """
        for _, feed in islice(self._batches, SHARED_BATCHES):
            mask = feed["attention_mask"]
            if not from_the_left(mask):
                continue
            packed, order = together(feed, 2 * mask.shape[1])
            alone = run(feed)
            error = float(np.abs(run(packed) - alone[order]).max())
            if error > MIXED * max(1.0, float(np.abs(alone).max())):
                raise QuantizationError(
                    f"texts that share rows are answered otherwise than alone (by {error:.2g})",
                    fix="use --method static or nncf-weights",
                )

    def _embedding(self, got: Rows, expected: Rows, faster: float | None) -> Validation:
        cosines = row_cosines(got, expected)
        items = self._data.items
        spearman = [
            _spearman(_pair_cosines(rows, self._data.pairs), [p[2] for p in self._data.pairs])
            if len(self._data.pairs) >= 10 and len(rows) == len(items)
            else None
            for rows in (got, expected)
        ]
        return Validation(
            samples=len(got),
            cosine_min=float(cosines.min()),
            cosine_low=expected_minimum(cosines),
            cosine_p1=float(np.percentile(cosines, 1)),
            cosine_mean=float(cosines.mean()),
            overlap_at_10=_overlap(got, expected),
            spearman=spearman[0],
            spearman_float=spearman[1],
            speedup=faster,
            set_sha256=self._data.digest,
            worst=tuple((str(items[i]), float(cosines[i])) for i in np.argsort(cosines)[:10]),
            cosines=tuple(float(c) for c in cosines),
        )

    def _measure(self, run: Run, limit: int | None = None) -> list[Rows]:
        """Return what is compared of each input: its vector, likelihood, or what its task keeps."""
        rows: dict[int, Rows] = {}
        for positions, feed in self._batches:
            wanted = [p for p in positions if limit is None or p < limit]
            if not wanted:
                continue
            output = run(feed)
            rows.update(zip(positions, self._kept(output, feed), strict=True))
        count = len(self._data) if limit is None else min(limit, len(self._data))
        return [rows[i] for i in range(count)]

    def _kept(self, output: Rows, feed: Feed) -> Sequence[Rows]:
        if task_of(self._task).embeds:
            return list(output)
        return quality_of(self._task).rows(output, feed)


class Replay:
    """Batches that are kept after the first pass while they are small, else made for each pass.

    >>> replay = Replay(lambda: iter([([0], {"x": np.zeros(4)})]), limit=8)
    >>> len(list(replay)), len(list(replay)), replay.count
    (1, 1, 1)
    """

    def __init__(
        self, start: Callable[[], Iterable[tuple[list[int], Feed]]], *, limit: int = HELD_BYTES
    ) -> None:
        self._start = start
        self._limit = limit
        self._kept: list[tuple[list[int], Feed]] | None = None
        self.count = 0  # batches of the last whole pass

    def __iter__(self) -> Iterator[tuple[list[int], Feed]]:
        if self._kept is not None:
            yield from self._kept
            return
        kept, size, count = [], 0, 0
        for item in self._start():
            count += 1
            size += sum(array.nbytes for array in item[1].values())
            if size <= self._limit:
                kept.append(item)
            else:
                kept.clear()
            yield item
        self.count = count
        self._kept = kept if size <= self._limit else None


def speedup(exact: Callable[[Feed], Any], run: Callable[[Feed], Any], batches: Replay) -> float:
    """Return how many times as fast as ``exact`` a graph reads whole inputs, in paired rounds."""
    sample = _timing_sample(exact, batches)
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(ROUNDS):
        for quantized, side in ((False, exact), (True, run)):
            start = time.perf_counter()
            for feed in sample:
                side(feed)
            times[quantized].append(time.perf_counter() - start)
    return median(times[False]) / max(median(times[True]), 1e-9)


def _timing_sample(exact: Callable[[Feed], Any], batches: Replay) -> list[Feed]:
    sample: list[Feed] = []
    start = time.perf_counter()
    # Every batch size and length class of the set, until the time is spent.
    step = max(1, batches.count // 16)
    for _, feed in islice(batches, 0, None, step):
        exact(feed)
        sample.append(feed)
        if time.perf_counter() - start > TIMED_SECONDS:
            break
    return sample


def _overlap(got: Rows, expected: Rows) -> float | None:
    """Return the mean share of the ten nearest neighbours that both graphs agree on."""
    if len(got) <= NEIGHBOURS + 1:
        return None
    neighbours = []
    for rows in (got, expected):
        unit = unit_rows(rows)
        similar = unit @ unit.T
        np.fill_diagonal(similar, -np.inf)
        neighbours.append(np.argpartition(-similar, NEIGHBOURS, axis=1)[:, :NEIGHBOURS])
    shared = [len(set(a) & set(b)) for a, b in zip(*neighbours, strict=True)]
    return float(np.mean(shared)) / NEIGHBOURS


def _pair_cosines(rows: Rows, pairs: Sequence[tuple[int, int, float]]) -> Rows:
    left, right = rows[[p[0] for p in pairs]], rows[[p[1] for p in pairs]]
    return row_cosines(left, right)


def _spearman(values: Rows, scores: Sequence[float]) -> float:
    """Return the rank correlation, ties sharing their mean rank.

    >>> _spearman(np.array([0.1, 0.2, 0.9]), [1, 2, 3])
    1.0
    """
    a, b = (_ranks(np.asarray(x, np.float64)) for x in (values, scores))
    if not (a.std() and b.std()):
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], np.float64)


def _config(bundle: Bundle) -> dict[str, Any]:
    path = bundle.path / "config.json"
    return read_json(path) if path.is_file() else {}
