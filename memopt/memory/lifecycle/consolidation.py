"""Consolidation: hot memories become summaries, cold ones go to the archive.

Each batch is one commit on ``memories``: summaries come in and their originals leave (or are
archived) together. So a crash or an error at any point leaves every original or its summary, and a
batch that is done is not done again.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from memopt.errors import MemoptError
from memopt.memory.graph.association import AssociationGraph
from memopt.memory.lifecycle.compact import compact
from memopt.memory.lifecycle.llm import Summariser
from memopt.memory.lifecycle.plan import (
    FAILED,
    LONGEST_BACKOFF,
    ConsolidationPlan,
    ConsolidationRecipe,
    Group,
    make_plan,
)
from memopt.memory.lifecycle.schedule import RUN
from memopt.memory.lifecycle.summary import Cover, centroid
from memopt.memory.lifecycle.summary_writer import SummaryWriter
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.rows import chunks, new_rows, vectors_array, with_columns
from memopt.memory.model.schema import ARCHIVED, LONG_TERM, SHORT_TERM
from memopt.memory.privacy.erase import erase, expire
from memopt.metrics import ERRORS, count
from memopt.progress import Progress

STALE = "consolidation-stale"
# A commit leaves files that every later search must look into, so several groups go into one: until
# it replaces this many rows, or the first of them has waited for a slow language model this long.
_COMMIT_ROWS = 512
_COMMIT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Consolidation:
    """What a run did; of a dry run, what it would do.

    Attributes:
        plan: what was found.
        summaries: ids of the new long-term memories.
        condensed: originals they stand for.
        archived: cold memories moved to the archive.
        expired: memories whose time had come; their bytes are off the disk.
        fallbacks: summaries the language model did not make.
        failed: batches left as they were, to be retried.
        stale: batches that changed while they were worked on; taken up by the next run.
        stopped: the run was asked to stop before it was through.
    """

    plan: ConsolidationPlan
    dry_run: bool = False
    summaries: tuple[str, ...] = ()
    condensed: int = 0
    archived: int = 0
    expired: int = 0
    fallbacks: int = 0
    failed: int = 0
    stale: int = 0
    stopped: bool = False
    seconds: float = 0.0


def plan(store: MemoryStore, recipe: ConsolidationRecipe | None = None) -> Consolidation:
    """Say what :func:`consolidate` would do; nothing is changed and nothing sent."""
    found = make_plan(store, recipe or ConsolidationRecipe())
    return Consolidation(
        plan=found,
        dry_run=True,
        condensed=sum(len(group.ids) for group in found.groups),
        archived=len(found.archive),
    )


def consolidate(
    store: MemoryStore,
    recipe: ConsolidationRecipe | None = None,
    *,
    llm: Summariser | None = None,
    stop: threading.Event | None = None,
    on_step: Progress | None = None,
) -> Consolidation:
    """Condense and archive once, now, in this thread.

    Args:
        store: with its embedder, where it has one: sentences are compared by it, else by words.
        llm: writes the summaries; without one, or where it fails, sentences are extracted.
        stop: when set, the batch at work is finished and the run ends.
        on_step: called with (batches done, batches in all).

    Raises:
        ConsolidationError: the store cannot be read or written. A failing batch raises nothing, it
            becomes an event.

    >>> import tempfile
    >>> import numpy as np
    >>> from memopt.memory import Content, MemoryStore, NewMemory
    >>> store = MemoryStore(tempfile.mkdtemp(), dim=2)
    >>> same = np.array([1.0, 0.0])
    >>> texts = ["The door is red.", "The door is red!"]
    >>> ids = store.add([NewMemory(content=Content(text=t), embedding=same) for t in texts]).ids
    >>> store.touch(ids * 10)
    >>> report = consolidate(store)
    >>> store.get(report.summaries[0]).summary
    'The door is red.'
    """
    return _ConsolidationRun(
        store, recipe or ConsolidationRecipe(), llm, stop or threading.Event()
    ).run(on_step)


@dataclass(frozen=True, eq=False)
class _Batch:
    """What is to be written for a group: its summaries, and its originals as they are kept."""

    ids: list[str]
    before: pa.Table
    summaries: pa.Table | None
    archived: pa.Table
    since: float = field(default_factory=time.monotonic)

    def is_stale(self, now: pa.Table) -> bool:
        """Say whether ``now`` has its rows otherwise than they were, but for access counts."""
        own = now.filter(pc.is_in(now["memory_id"], pa.array(self.ids, pa.string())))
        names = [name for name in own.column_names if name not in ("access_count", "last_access")]
        key = [("memory_id", "ascending")]
        return not own.select(names).sort_by(key).equals(self.before.select(names).sort_by(key))


class _ConsolidationRun:
    """One run; what it did is counted as it goes."""

    def __init__(
        self,
        store: MemoryStore,
        recipe: ConsolidationRecipe,
        llm: Summariser | None,
        stop: threading.Event,
    ) -> None:
        self.store, self.recipe, self.stop = store, recipe, stop
        self.writer = SummaryWriter(store, recipe, llm)
        self.summaries: list[str] = []
        self.condensed = self.archived = self.failed = self.stale = 0

    def run(self, on_step: Progress | None) -> Consolidation:
        started = time.monotonic()
        # Before anything is summarised: what has to go must not live on in other words.
        expired = expire(self.store)
        if expired:
            erase(self.store)
        found = make_plan(self.store, self.recipe)
        with _links_followed(self.store):
            finished = self._work(found, on_step, started)
        compacted = self.recipe.compact and finished and compact(self.store) is not None
        if self.summaries or self.archived or compacted:
            self.store.optimize()
            self.store.index.fit()
        report = Consolidation(
            plan=found,
            summaries=tuple(self.summaries),
            condensed=self.condensed,
            archived=self.archived,
            expired=expired,
            fallbacks=self.writer.fallbacks,
            failed=self.failed,
            stale=self.stale,
            stopped=not finished,
            seconds=time.monotonic() - started,
        )
        self._tell(report)
        return report

    def _work(self, found: ConsolidationPlan, on_step: Progress | None, begun: float) -> bool:
        """Do the plan, batch by batch; return whether it was done to the end."""
        steps: list[Callable[[], _Batch | None]] = [
            partial(self.condense, group) for group in found.groups
        ]
        steps += [partial(self.archive, part) for part in chunks(found.archive, _COMMIT_ROWS)]
        waiting: list[_Batch] = []
        for done, step in enumerate(steps, 1):
            if self._stopped(begun):
                self.commit(waiting)
                return False
            begun, self.writer.waited = time.monotonic(), 0.0
            batch = step()
            if batch is not None:
                waiting.append(batch)
            if done == len(steps) or _is_full(waiting):
                self.commit(waiting)
                waiting = []
            if on_step:
                on_step(done, len(steps))
        return True

    def _tell(self, report: Consolidation) -> None:
        count("memopt_consolidation_runs_total")
        for what in ("condensed", "archived", "expired", "fallbacks", "failed", "stale"):
            count(f"memopt_consolidation_{what}_total", getattr(report, what))
        count("memopt_consolidation_summaries_total", len(report.summaries))
        if not report.stopped:
            self.store.event(
                RUN,
                f"{len(report.summaries)} summaries of {report.condensed}, {report.archived} "
                f"archived, {report.failed} batches failed",
            )

    def condense(self, group: Group) -> _Batch | None:
        """Make what replaces a group; None where it changed meanwhile, failed, or stays."""
        return self._tried(list(group.ids), partial(self._summarised, group))

    def archive(self, ids: list[str]) -> _Batch | None:
        """Make the archived rows of cold memories; None where they changed meanwhile, or failed."""
        return self._tried(ids, self._archived)

    def _tried(self, ids: list[str], make: Callable[[pa.Table], _Batch | None]) -> _Batch | None:
        try:
            rows = self.store.rows(ids)
            if rows.num_rows == len(ids) and set(rows["tier"].to_pylist()) == {SHORT_TERM}:
                return make(rows)
            self._changed(ids)
        except MemoptError as error:
            self._failure(ids, error)
        return None

    def _summarised(self, group: Group, before: pa.Table) -> _Batch | None:
        store = self.store
        opened = store.cells.unpack(before)
        covers = self.writer.write(opened, group)
        # What no summary says stays as it is.
        said = sorted({place for part in covers for place in part.of})
        if not said:
            return None
        vectors = vectors_array(opened["joint_embedding"], store.dim)
        summaries = [self._summary_row(opened, vectors, part, group) for part in covers]
        before, opened = before.take(said), opened.take(said)
        if self.recipe.originals == "drop":
            # Words stand for words: pictures and sounds are kept.
            opened = opened.filter(_has_media(opened))
        now = store.database.now()
        archived = store.cells.pack(with_columns(opened, tier=ARCHIVED, consolidated_at=now))
        ids = before["memory_id"].to_pylist()
        return _Batch(ids, before, pa.concat_tables(summaries), archived)

    def _archived(self, before: pa.Table) -> _Batch:
        cells = self.store.cells
        archived = cells.pack(with_columns(cells.unpack(before), tier=ARCHIVED))
        return _Batch(before["memory_id"].to_pylist(), before, None, archived)

    def commit(self, batches: list[_Batch]) -> None:
        """Write what was made, in one commit, but for what changed meanwhile."""
        if not batches:
            return
        try:
            # Short: one look at the rows and one commit, so that other writers hardly wait.
            with self.store.database.exclusive():
                now = self.store.rows([key for batch in batches for key in batch.ids])
                stale = [batch for batch in batches if batch.is_stale(now)]
                batches = [batch for batch in batches if batch not in stale]
                if batches:
                    self._write(batches)
        except MemoptError as error:
            for batch in batches:
                self._failure(batch.ids, error)
            return
        for batch in stale:
            self._changed(batch.ids)
        for batch in batches:
            if batch.summaries is None:
                self.archived += len(batch.ids)
            else:
                self.summaries += batch.summaries["memory_id"].to_pylist()
                self.condensed += len(batch.ids)
        if batches:
            self.store.upkeep.tidy()

    def _write(self, batches: list[_Batch]) -> None:
        summaries = [batch.summaries for batch in batches if batch.summaries is not None]
        archived = pa.concat_tables([batch.archived for batch in batches])
        stay = set(archived["memory_id"].to_pylist())
        self.store.commit(
            inserts=pa.concat_tables(summaries) if summaries else None,
            updates=archived,
            deletes=[key for batch in batches for key in batch.ids if key not in stay],
        )

    def _stopped(self, begun: float) -> bool:
        """Leave the time to readers that work since ``begun`` calls for; whether to stop."""
        work = time.monotonic() - begun - self.writer.waited
        return self.stop.wait(work * (1 / self.recipe.duty - 1))

    def _summary_row(
        self, opened: pa.Table, vectors: NDArray[Any], cover: Cover, group: Group
    ) -> pa.Table:
        """Return the row of a summary: at the centroid of its sources."""
        redact, places = self.store.redact, list(cover.of)
        sources = opened.take(places)
        ids = sources["memory_id"].to_pylist()
        columns: dict[str, Any] = {
            "memory_id": "sum-" + hashlib.sha256("\n".join(ids).encode()).hexdigest()[:32],
            "timestamp": max(sources["timestamp"].to_pylist()),
            "category": group.category,
            "tier": LONG_TERM,
            "expires_at": group.expires_at,
            "model_id": sources["model_id"][0].as_py(),
            "summary": redact(cover.text) if redact else cover.text,
            "has_text": True,
            "source_count": len(ids),
            "consolidated_at": self.store.database.now(),
            "last_access": max(filter(None, sources["last_access"].to_pylist()), default=None),
        }
        # Archived originals keep their own counts: nothing is counted twice.
        if self.recipe.originals == "drop":
            gone = sources.filter(pc.invert(_has_media(sources)))
            columns["access_count"] = sum(gone["access_count"].to_pylist())
        middle = centroid(vectors[places])[None, :]
        return new_rows(middle, {**columns, "source_memory_ids": [ids]})

    def _changed(self, ids: list[str]) -> None:
        self.stale += 1
        self.store.event(STALE, "memories changed while they were condensed", ids)

    def _failure(self, ids: list[str], error: MemoptError) -> None:
        self.failed += 1
        count(ERRORS, component="consolidation", error=type(error).__name__)
        before = sum(1 for event in self.store.events(FAILED) if set(event.memory_ids) & set(ids))
        wait = min(self.recipe.retry_s * 2**before, LONGEST_BACKOFF)
        retry_at = self.store.database.now() + timedelta(seconds=wait)
        self.store.event(FAILED, str(error), ids, retry_at)


def _is_full(batches: list[_Batch]) -> bool:
    rows = sum(len(batch.ids) for batch in batches)
    return rows >= _COMMIT_ROWS or (rows > 0 and time.monotonic() - batches[0].since > _COMMIT_S)


def _has_media(opened: pa.Table) -> pa.ChunkedArray:
    """Return which rows hold a picture or a sound, bool."""
    return pc.or_(opened["has_vision"], opened["has_audio"])


@contextmanager
def _links_followed(store: MemoryStore) -> Iterator[None]:
    """Link the summaries, also where nobody attached the graph to the store."""
    attached = any(isinstance(each, AssociationGraph) for each in store.observers)
    if attached or not store.database.table("edges").count_rows():
        yield
        return
    graph = AssociationGraph(store)
    try:
        yield
    finally:
        graph.close()
