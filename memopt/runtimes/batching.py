"""Which inputs run together: token budgets, few distinct shapes, preparation beside inference."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from memopt.runtimes.base import TOKENS_ON_CPU
from memopt.runtimes.vectors import refusal

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memopt.runtimes.base import Feed

T = TypeVar("T")
# Images or waveforms in one batch.
MEDIA_BATCH = 8


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

    def prepare(
        self,
        items: Sequence[Any],
        batch_size: int | None,
        tokens: int = TOKENS_ON_CPU,
        step: int = 1,
    ) -> list[Batch]:
        """Turn one chunk into batches of ``batch_size``, or of at most ``tokens`` tokens.

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
    lengths: NDArray[np.intp], batch_size: int | None, tokens: int, limit: int | None
) -> list[tuple[NDArray[np.intp], int]]:
    """Cut rows of these token lengths into batches; return (rows, padded width) of each.

    Sorted by length, longest first. With ``batch_size`` a batch has that many rows, else as many as
    keep rows x width within ``tokens``.

    >>> lengths = np.array([700, 3, 700, 4])
    >>> [(len(rows), width) for rows, width in by_budget(lengths, None, 800, None)]
    [(1, 704), (1, 704), (2, 4)]
    """
    order = np.argsort(-lengths, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        width = bucket(int(lengths[order[start]]), limit)
        count = batch_size or max(1, tokens // width)
        batches.append((order[start : start + count], width))
        start += count
    return batches


def ahead(jobs: Sequence[Callable[[], Any]]) -> Iterator[Any]:
    """Yield the result of each job, the next one being worked on in a thread meanwhile."""
    if len(jobs) == 1:
        yield jobs[0]()
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1, "memopt-prepare") as pool:
        coming = pool.submit(jobs[0])
        for job in jobs[1:]:
            current, coming = coming, pool.submit(job)
            yield current.result()
        yield coming.result()


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
    cut: tuple[int | None, int, int],
    failures: dict[int, str],
    fail: bool,
) -> Iterator[tuple[NDArray[np.intp], Feed]]:
    """Yield each batch's rows in ``items`` and its model inputs, chunks prepared ahead."""

    def job(chunk: NDArray[np.intp]) -> Callable[[], list[tuple[NDArray[np.intp], Feed]]]:
        def work() -> list[tuple[NDArray[np.intp], Feed]]:
            taken = [items[i] for i in chunk]
            done = prepare_chunk(front, taken, chunk, cut, failures, fail)
            return [(chunk[batch.rows], batch.feed) for batch in done]

        return work

    for prepared in ahead([job(chunk) for chunk in chunks]):
        yield from prepared


def prepare_chunk(
    front: FrontEnd,
    taken: Sequence[Any],
    positions: NDArray[np.intp] | None,
    cut: tuple[int | None, int, int],
    failures: dict[int, str],
    fail: bool,
) -> list[Batch]:
    """Prepare one chunk; unusable items raise InputError with ``fail``, else go to ``failures``."""
    try:
        return front.prepare(taken, *cut)
    except UnusableItems as found:
        reasons = {
            (int(positions[i]) if positions is not None else i): why
            for i, why in found.reasons.items()
        }
        if fail:
            raise refusal(reasons) from found
        failures.update(reasons)
        keep = np.array([i for i in range(len(taken)) if i not in found.reasons], np.intp)
        if not len(keep):
            return []
        return [
            Batch(keep[batch.rows], batch.feed)
            for batch in front.prepare([taken[i] for i in keep], *cut)
        ]
