"""Which inputs run together: token budgets, few distinct shapes, preparation beside inference."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from memopt.runtimes.base import TOKENS_ON_CPU
from memopt.runtimes.heap import trim_heap
from memopt.runtimes.segments import shares
from memopt.runtimes.vectors import progress, refusal

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memopt.runtimes.base import Feed, Rows
    from memopt.runtimes.fallback import BackendChain

T = TypeVar("T")
# Images or waveforms in one batch.
MEDIA_BATCH = 8
# A tokenizer's threads leave what a chunk took in arenas of their own: of 100,000 short texts some
# 15 MB. Given back after each large chunk, of which one is some tenths of a second of work.
TRIMMED_FROM = 2
_FIRST = np.zeros(1, np.intp)
# Requests of more texts than this are sorted by length instead of sharing rows: they hardly have
# padding then, nor many shapes. MiniLM in int8: 300 texts 1.1x as fast in shared rows, 2,000 0.95x.
MOST_SHARING = 512


# Longer texts already have few widths; every model has positions for this many tokens.
LONGEST_ROUNDED = 32
# Of so many inputs, widths are multiples of this part of the step; of more they are exact.
_FEW = ((1, 1), (8, 2), (32, 4))


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What goes into one batch.

    ``batch_size`` items, or, for None, texts of at most ``tokens`` tokens in all. The width of a
    single short text is rounded up to a multiple of ``step``, of few texts of a part of it: see
    :meth:`rounded`. Texts of at most ``row`` tokens are to share rows of so many: a batch has those
    that fill its rows, of any lengths, and of few rows each of the ``streams`` gets some.
    """

    batch_size: int | None = None
    tokens: int = TOKENS_ON_CPU
    step: int = 1
    row: int = 0
    streams: int = 1

    def rounded(self, length: int, inputs: int, limit: int | None) -> int:
        """Return the width of a batch whose longest row has ``length`` tokens, of so many inputs.

        Where a runtime pays for a shape that is not the last one (``step`` > 1), padding a few
        short texts to few widths costs less than that: MiniLM in int8 on OpenVINO, calls of 2 to 4
        texts 1.4x as fast, of 4 to 12 1.1x, of 64 the same.

        >>> [Budget(step=16).rounded(13, inputs, None) for inputs in (1, 8, 32, 100)]
        [16, 16, 16, 13]
        >>> [Budget(step=16).rounded(9, inputs, 10) for inputs in (1, 8, 32, 100)]
        [10, 10, 10, 9]
        """
        if length > LONGEST_ROUNDED:
            return length
        part = next((part for most, part in _FEW if inputs <= most), self.step)
        step = max(1, self.step // part)
        return min(-(-length // step) * step, limit or LONGEST_ROUNDED)


USUAL = Budget()


@dataclass(frozen=True, slots=True)
class Batch:
    """Model inputs and which rows of the chunk they are."""

    rows: NDArray[np.intp]
    feed: Feed


class FrontEnd(Protocol):
    """What turns the items of one modality into model inputs."""

    def check(self, item: object) -> str | None:
        """Return why an item cannot be encoded at all, None when it may."""

    def chunks(self, items: Sequence[Any]) -> list[NDArray[np.intp]]:
        """Return the positions of the items, in the chunks they are prepared in."""

    def prepare(self, items: Sequence[Any], budget: Budget = USUAL) -> list[Batch]:
        """Turn one chunk into batches.

        Raises:
            UnusableItems: naming positions in the chunk.
        """


class UnusableItems(Exception):
    """Items of a chunk that turned out unusable when read: position -> reason."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons


def in_order(count: int, size: int) -> list[NDArray[np.intp]]:
    """Return positions 0 to ``count`` in runs of ``size``.

    >>> [run.tolist() for run in in_order(5, 2)]
    [[0, 1], [2, 3], [4]]
    """
    order = np.arange(count)
    return [order[start : start + size] for start in range(0, count, size)]


def decoded(items: Sequence[Any], decode: Callable[[Any], T], what: str) -> list[T]:
    """Return every item decoded.

    Raises:
        UnusableItems: all that cannot be, with their path where they have one.
    """
    found: list[T] = []
    broken = {}
    for index, item in enumerate(items):
        try:
            found.append(decode(item))
        except Exception as error:  # noqa: BLE001 - decoders raise anything on a damaged file
            name = f"({item}) " if isinstance(item, str | Path) else ""
            absent = isinstance(error, FileNotFoundError)
            why = "is not there" if absent else f"cannot be read as {what}: {error}"
            broken[index] = name + why
    if broken:
        raise UnusableItems(broken)
    return found


def bucket(length: int, limit: int | None) -> int:
    """Return the width a batch whose longest row has ``length`` tokens is padded to.

    Exact up to 32, where padding would cost most; then multiples of 8, 16, 32 ... keep padding
    below 1/8 and the number of distinct widths below 32 + 8 per doubling.

    >>> [bucket(n, None) for n in (1, 31, 33, 65, 130, 300)]
    [1, 31, 36, 72, 144, 320]
    >>> bucket(250, 250)
    250
    """
    if length <= 32:
        return max(length, 1)
    step = 1 << ((length - 1).bit_length() - 4)
    width = -(-length // step) * step
    return min(width, limit) if limit else width


def by_budget(
    lengths: NDArray[np.intp], budget: Budget, limit: int | None, *, alike: bool = False
) -> list[tuple[NDArray[np.intp], int]]:
    """Cut rows of these token lengths into batches; return (rows, padded width) of each.

    Sorted by length, longest first; with ``alike`` a batch has rows of one length, and no padding.

    >>> lengths = np.array([700, 3, 700, 4])
    >>> [(len(rows), width) for rows, width in by_budget(lengths, Budget(tokens=800), None)]
    [(1, 704), (1, 704), (2, 4)]
    """
    order = np.argsort(-lengths, kind="stable")
    batches = []
    much = int(lengths.sum()) > budget.row // 2  # of less most of a row would be padding
    if budget.row and budget.batch_size is None and len(order) > 1 and much and not alike:
        short = order[lengths[order] <= budget.row]
        order = order[lengths[order] > budget.row]
        batches = _sharing(short, lengths, budget)
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        if alike:
            width = max(longest, 1)
        else:
            width = bucket(budget.rounded(longest, len(lengths), limit), limit)
        count = budget.batch_size or max(1, budget.tokens // width)
        rows = order[start : start + count]
        if alike:
            rows = rows[lengths[rows] == longest]
        batches.append((rows, width))
        start += len(rows)
    return batches


def _sharing(
    texts: NDArray[np.intp], lengths: NDArray[np.intp], budget: Budget
) -> list[tuple[NDArray[np.intp], int]]:
    """Return batches of the texts that fill so many rows as have the budget's tokens.

    They are padded to the width of a row, by which the backend knows them.
    """
    rows = shares(lengths[texts].tolist(), budget.row)
    height = max(1, min(budget.tokens // budget.row, -(-len(rows) // budget.streams)))
    groups = [
        texts[[text for row in rows[start : start + height] for text in row]]
        for start in range(0, len(rows), height)
    ]
    return [(group, budget.row) for group in groups]


def in_flight(
    batches: Iterator[tuple[NDArray[np.intp], Feed]],
    submit: Callable[[Feed], T],
    depth: int,
) -> Iterator[tuple[NDArray[np.intp], Feed, T]]:
    """Submit batches, at most ``depth`` unfinished at a time, and yield them in order."""
    waiting: deque[tuple[NDArray[np.intp], Feed, T]] = deque()
    for rows, feed in batches:
        waiting.append((rows, feed, submit(feed)))
        if len(waiting) >= depth:
            yield waiting.popleft()
    yield from waiting


def prepared_batches(
    front: FrontEnd,
    items: Sequence[Any],
    chunks: list[NDArray[np.intp]],
    budget: Budget,
    failures: dict[int, str],
    fail: bool,
) -> Iterator[tuple[NDArray[np.intp], Feed]]:
    """Yield each batch's rows in ``items`` and its model inputs, the next chunk prepared meanwhile.

    Unusable items raise InputError with ``fail``, else they go to ``failures``.
    """

    def prepare(chunk: NDArray[np.intp]) -> list[tuple[NDArray[np.intp], Feed]]:
        try:
            batches = front.prepare([items[i] for i in chunk], budget)
        except UnusableItems as unusable:
            reasons = {int(chunk[i]): why for i, why in unusable.reasons.items()}
            if fail:
                raise refusal(reasons) from unusable
            failures.update(reasons)
            chunk = np.array([i for i in chunk if i not in reasons], np.intp)
            batches = front.prepare([items[i] for i in chunk], budget) if len(chunk) else []
        return [(chunk[batch.rows], batch.feed) for batch in batches]

    if len(chunks) == 1:
        yield from prepare(chunks[0])
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1, "memopt-prepare") as pool:
        coming = pool.submit(prepare, chunks[0])
        for number, chunk in enumerate(chunks[1:]):
            current, coming = coming, pool.submit(prepare, chunk)
            yield from current.result()
            if number >= TRIMMED_FROM:
                trim_heap()
        yield from coming.result()


def run_items(
    chain: BackendChain,
    front: FrontEnd,
    items: Sequence[Any],
    store: Callable[[NDArray[np.intp], Feed, Rows], None],
    failures: dict[int, str],
    batch_size: int | None,
    show_progress: bool,
    fail: bool,
) -> None:
    """Hand rows, inputs and outputs of each batch to ``store``, of items not in ``failures``.

    What cannot be read is added to those.
    """
    backend = chain.backend
    if failures:
        good = np.array([i for i in range(len(items)) if i not in failures], np.intp)
        chunks = [good[chunk] for chunk in front.chunks([items[i] for i in good])]
    else:
        # One input is the commonest request: nothing to sort.
        chunks = front.chunks(items) if len(items) > 1 else [_FIRST][: len(items)]
    if not chunks:
        return
    budget = Budget(
        batch_size=batch_size,
        tokens=backend.tokens,
        step=backend.step,
        row=backend.row if len(items) <= MOST_SHARING else 0,
        streams=backend.streams,
    )
    batches = prepared_batches(front, items, chunks, budget, failures, fail)
    if len(chunks) == 1:
        ready = list(batches)
        if len(ready) == 1:
            # A batch alone gets all cores; on a stream it would get a part of them.
            rows, feed = ready[0]
            store(rows, feed, chain.run(feed))
            return
        batches = iter(ready)
    with progress(len(items), show_progress) as advance:
        # One more than can run: the next is ready the moment a stream is free.
        depth = backend.streams + 1
        for rows, feed, (used, future) in in_flight(batches, chain.submit, depth):
            store(rows, feed, chain.result(used, future, feed))
            advance(len(rows))
