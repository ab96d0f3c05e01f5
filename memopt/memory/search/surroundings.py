"""What a store knows of all its memories at once: which follow each other, and how rare words are.

Read once and held: 16 bytes a memory, and the words of at most some thousand of them. When the
store changed, both are read anew, but seldom: what was added since lacks its neighbours so long.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memopt.memory.model.schema import LONG_TERM
from memopt.memory.model.words import words
from memopt.memory.store.cells import Cells

# Memories further apart do not belong to one conversation: the window of the association graph.
APART_S = 300
# After reading for t seconds none starts for so many times t.
_REST = 50
# Memories whose words are counted: how rare a word is need not be known better.
_SAMPLE = 10_000
_NOWHERE = np.iinfo(np.uint64).max


@dataclass(frozen=True, slots=True, eq=False)
class Surroundings:
    """One look at a store.

    Attributes:
        places: int64 (n,), for each of the ascending ``row_ids`` its place in the order of time.
        order: uint64 (n,), row ids in the order of time.
        follows: bool (n - 1,), whether a moment is followed by another of the same conversation.
        counts: word -> in how many of ``counted`` memories it is.
        length: mean number of words.
    """

    row_ids: NDArray[np.uint64]
    places: NDArray[np.int64]
    order: NDArray[np.uint64]
    follows: NDArray[np.bool_]
    counts: Counter[str]
    counted: int
    length: float

    def rarity(self, word: str) -> float:
        """Return the inverse document frequency of a word, as BM25 has it."""
        held = self.counts[word]
        return math.log(1 + (self.counted - held + 0.5) / (held + 0.5))

    def beside(self, row_ids: NDArray[np.uint64], offset: int) -> NDArray[np.uint64]:
        """Return the row ``offset`` (1, -1, 2, -2) moments on in the conversation of each row."""
        found = np.full(len(row_ids), _NOWHERE, np.uint64)
        if not len(self.row_ids):
            return found
        at = np.minimum(np.searchsorted(self.row_ids, row_ids), len(self.row_ids) - 1)
        place = self.places[at]
        there = self.row_ids[at] == row_ids
        step = 1 if offset > 0 else -1
        for _ in range(abs(offset)):
            edge = place if step > 0 else place - 1
            inside = (edge >= 0) & (edge < len(self.follows))
            there &= inside
            there[there] = self.follows[edge[there]]
            place = place + step
        found[there] = self.order[place[there]]
        return found


class SurroundingsCache:
    """Gives the surroundings as they are, or were a moment ago."""

    def __init__(self, cells: Cells) -> None:
        self._cells = cells
        self._last: Surroundings | None = None
        self._version = -1
        self._rest_until = 0.0

    def current(self) -> Surroundings:
        """Return what the store looks like."""
        version = self._cells.database.version("memories")
        begin = time.monotonic()
        if self._last is None or (version != self._version and begin >= self._rest_until):
            self._last, self._version = _look(self._cells), version
            now = time.monotonic()
            self._rest_until = now + _REST * (now - begin)
        return self._last


def nowhere(row_ids: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Say which of the rows of :meth:`Surroundings.beside` there are not."""
    return np.asarray(row_ids == _NOWHERE, np.bool_)


def _look(cells: Cells) -> Surroundings:
    from lancedb.expr import col, lit

    database = cells.database
    # A summary has the time of its last source: it is no moment, and would part that from others.
    moments_only = database.query().where(col("tier") != lit(LONG_TERM))
    queries = [moments_only.select(["timestamp"]).with_row_id()]
    plain = database.cipher is None
    if plain:
        name = "words" if cells.has_word_index else "text"
        queries.append(database.query().select([name]).limit(_SAMPLE))
    found = database.fetch_all(queries)
    moments = found[0]["timestamp"].cast(pa.int64()).to_numpy()
    row_ids = found[0]["_rowid"].to_numpy()
    by_time = np.lexsort((row_ids, moments))
    gaps = np.diff(moments[by_time])
    # What came at the very same moment came in no order.
    alone = np.ones(len(moments), bool)
    alone[1:] &= gaps != 0
    alone[:-1] &= gaps != 0
    follows = (gaps <= APART_S * 1_000_000) & alone[1:] & alone[:-1]
    place = np.empty(len(moments), np.int64)
    place[by_time] = np.arange(len(moments))
    by_row = np.argsort(row_ids)
    counts: Counter[str] = Counter()
    total = counted = 0
    for held in _held(found[1], name) if plain else ():
        counts.update(set(held))
        total, counted = total + len(held), counted + 1
    mean = total / max(1, counted)
    order = row_ids[by_time]
    return Surroundings(row_ids[by_row], place[by_row], order, follows, counts, counted, mean)


def _held(table: pa.Table, name: str) -> Iterable[list[str]]:
    for text in table[name].to_pylist():
        if text:
            yield text.split() if name == "words" else words(text)
