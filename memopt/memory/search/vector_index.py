"""The vector index: built when it pays, kept fresh, used only as far as its recall is proven."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memopt.background import BackgroundTask
from memopt.errors import ConsolidationError
from memopt.memory.model.schema import BITS
from memopt.memory.store.creation import named_errors
from memopt.memory.store.events import Events
from memopt.memory.store.observers import StoreObserver
from memopt.memory.store.reader import Reader
from memopt.memory.store.stats import sampled_vectors

# Exact search of 5,000 x 768 takes 4 ms: below that an index costs more than it saves.
MIN_ROWS = 5_000
# Rows the index does not know are searched exactly beside it, so none is ever missed; past this
# share that costs more than taking them in.
MOST_FRESH = 0.1
# Cells made for a quarter of the rows are twice too full, and the other way round: then made anew.
REBUILD_GROWTH = 4
LEAST_RECALL = 0.95
_AT = 10
_QUERIES = 64
_COLUMN = "joint_embedding"
# Tried in this order, that of their cost, until the recall is reached: (cells looked into,
# candidates per result). Sentences lie in no clusters and need many cells, but few candidates.
_SETTINGS = ((16, 2), (32, 2), (32, 5), (64, 2), (64, 5), (128, 2), (128, 10), (256, 2), (512, 10))
_EVENT = "index"
# Seconds between two looks whether another process built or dropped the index.
_LOOK_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexState:
    """How the index is used since it was last checked.

    Attributes:
        rows: memories it was checked with.
        cells: partitions of the inverted file; 0 where search is exact.
        nprobes: cells a query looks into.
        refine: candidates per result that are compared again with their full vectors.
        recall: measured recall@10 against exact search, mean of sampled queries.
    """

    rows: int
    cells: int
    nprobes: int
    refine: int
    recall: float


class VectorIndex(StoreObserver):
    """Keeps an inverted file with 8-bit vectors (IVF_SQ) over the memories of a store.

    Every store has one, ``store.index``. What another process built is used too, as soon as it is
    noticed; an index nobody checked is passed by.

    Args:
        events: where it is written down how the index is used.
        merge: merges the files of a table and brings its index up to date.
        background: build in a thread when additions call for it; else only :meth:`ensure` builds.
    """

    def __init__(
        self,
        reader: Reader,
        events: Events,
        merge: Callable[[str], None],
        *,
        background: bool = True,
    ) -> None:
        self._database, self._reader = reader.database, reader
        self._events, self._merge = events, merge
        self.background = background
        self._state: IndexState | None = None
        self._looked = -_LOOK_S
        self._seen_version = -1
        self._task = BackgroundTask(self.ensure, "memopt-index", on_error=self._failed)
        self._one_at_a_time = threading.Lock()
        self._counted = 0

    @property
    def state(self) -> IndexState | None:
        """How the index is used; None where there is none or nobody checked it."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_S:
            self._looked = now
            version = self._database.version("events")
            if version != self._seen_version:
                self._state, self._seen_version = self.last_state(), version
        return self._state

    def closing(self) -> None:
        """Wait for a build in progress; take in what a short-lived writer added."""
        self._task.close()
        if self.background and self._counted:
            self._counted = 0
            self._task.run()

    def added(
        self, ids: Sequence[str], vectors: NDArray[np.float32], timestamps: Sequence[datetime]
    ) -> None:
        """Take new rows in, in the background, when there are enough of them."""
        self._counted += len(ids)
        if not self.background or self._counted < MOST_FRESH * MIN_ROWS:
            return
        known = self.state.rows if self.state else 0
        due = self._counted >= max(MOST_FRESH * MIN_ROWS, MOST_FRESH * known)
        if due and not self._task.busy:
            self._counted = 0
            self._task.start()

    def ensure(self, *, rebuild: bool = False) -> IndexState | None:
        """Build or refresh the index where that is due, and check its recall.

        Returns:
            How it is used from now on; None where the store is small and searched exactly, or
            compact.

        Raises:
            ConsolidationError: the disk takes no more, or there is no memory for it; searches go on
                without the index.
        """
        memories = self._database.memories
        with self._one_at_a_time, named_errors(self._database.place, "indexed"):
            if BITS in memories.schema.names:
                return None
            rows = memories.count_rows()
            state = self.last_state()
            if rows < MIN_ROWS:
                if state is not None and state.cells:
                    self._drop(memories)
                return None
            if rebuild or state is None or _outgrown(state, rows):
                self._build(memories, rows)
            elif state.cells and _fresh(memories) > MOST_FRESH * rows:
                self._merge("memories")
            else:
                self._state = state
                return state
            return self._use(self._checked(memories, rows))

    def fit(self) -> None:
        """Make the index anew where most of what it was made for is gone.

        Few memories in many cells: the cells a query looks into are no longer those it was checked
        with.

        Raises:
            ConsolidationError: as :meth:`ensure`.
        """
        state = self.state
        if state is None or not state.cells:
            return
        rows = self._database.memories.count_rows()
        if rows < MIN_ROWS or _outgrown(state, rows):
            self.ensure()

    def tune(self, query: Any, top_k: int, spare: int) -> Any:
        """Return a vector query that looks into as many cells as the recall needs.

        Args:
            query: a query of the store's vectors.
            top_k: rows it returns.
            spare: rows asked for per row that is wanted; the caller compares them itself.
        """
        state = self.state
        if state is None or not state.cells:
            # Whatever another tool indexed has a recall that nobody measured.
            return query.bypass_vector_index()
        # More results lie in more cells.
        nprobes = min(state.cells, state.nprobes * max(1, top_k // (4 * _AT)))
        refine = -(-state.refine // spare)
        # A factor of 1 still reads the full vectors of all results.
        return (
            query.nprobes(nprobes).refine_factor(refine) if refine > 1 else query.nprobes(nprobes)
        )

    def last_state(self) -> IndexState | None:
        """Return how the index was used when it was last checked.

        None where nobody checked it, or it was made or dropped since.
        """
        events = self._events.read(_EVENT)
        if not events:
            return None
        state = IndexState(**json.loads(events[-1].detail))
        there = _name(self._database.memories) is not None
        return state if there == bool(state.cells) else None

    def _build(self, memories: Any, rows: int) -> None:
        from lancedb.index import IvfSq

        cells = int(rows**0.5)
        # A number of cells would be forgotten by the next optimize(), which joins cells up to
        # Lance's own size of some ten thousand rows; the size of a cell is kept.
        config = IvfSq(distance_type="cosine", target_partition_size=cells)
        memories.create_index(_COLUMN, config=config, replace=True)
        if _name(memories) is None:
            raise ConsolidationError("the vector index was not made", fix="free memory, try again")

    def _checked(self, memories: Any, rows: int) -> IndexState:
        cells = int(rows**0.5)
        queries = sample(self._reader)
        exact = [self._nearest(query, None) for query in queries]
        for nprobes, refine in _SETTINGS:
            found = [self._nearest(query, (nprobes, refine)) for query in queries]
            shares = [len(a & b) / max(1, len(b)) for a, b in zip(found, exact, strict=True)]
            recall = float(np.mean(shares))
            if recall >= LEAST_RECALL:
                return IndexState(
                    rows=rows, cells=cells, nprobes=nprobes, refine=refine, recall=recall
                )
        memories.drop_index(_name(memories))
        return _exact(rows)

    def _drop(self, memories: Any) -> None:
        """Search exactly from now on; nothing was checked, so that growth builds an index again."""
        memories.drop_index(_name(memories))
        self._use(_exact(0))

    def _use(self, state: IndexState) -> IndexState:
        self._events.record(_EVENT, json.dumps(asdict(state)))
        self._state, self._looked = state, time.monotonic()
        return state

    def _nearest(self, query: NDArray[np.float32], setting: tuple[int, int] | None) -> set[str]:
        search = self._database.query().nearest_to(query).column(_COLUMN).distance_type("cosine")
        if setting is None:
            search = search.bypass_vector_index()
        else:
            search = search.nprobes(setting[0]).refine_factor(setting[1])
        table = self._database.fetch(search.select(["memory_id", "_distance"]).limit(_AT))
        return set(table["memory_id"].to_pylist())

    def _failed(self, error: Exception) -> None:
        # A search without an index is slower, not wrong.
        self._events.record("index-failed", f"{type(error).__name__}: {error}"[:500])


def _exact(rows: int) -> IndexState:
    return IndexState(rows=rows, cells=0, nprobes=0, refine=0, recall=1.0)


def _outgrown(state: IndexState, rows: int) -> bool:
    """Return whether the cells were made for far fewer or far more rows."""
    return not max(1, state.rows) / REBUILD_GROWTH <= rows <= REBUILD_GROWTH * max(1, state.rows)


def _fresh(memories: Any) -> int:
    return int(memories.index_stats(_name(memories)).num_unindexed_rows)


def _name(memories: Any) -> str | None:
    found = [index.name for index in memories.list_indices() if _COLUMN in index.columns]
    return found[0] if found else None


def sample(reader: Reader) -> NDArray[np.float32]:
    """Return queries near stored vectors, float32 (64, dim), the same for the same store."""
    generator = np.random.default_rng(0)
    rows = reader.database.memories.count_rows()
    chosen = np.sort(generator.choice(rows, min(_QUERIES, rows), replace=False))
    found = sampled_vectors(reader, chosen)
    noise = generator.normal(size=found.shape).astype(np.float32)
    noise *= 0.3 / np.linalg.norm(noise, axis=1, keepdims=True)
    moved = found + noise
    return np.asarray(moved / np.linalg.norm(moved, axis=1, keepdims=True), np.float32)
