"""Consolidation: hot memories become summaries, cold ones go to the archive.

Each batch is one commit on ``memories``: the summary comes in and its originals leave (or are
archived) together. So a crash or an error at any point leaves every original or its summary, and a
batch that is done is not done again.

``MEMOPT_FAULT=consolidation:STEP`` kills the process at one of :data:`STEPS`; the tests of crashes
use it, and nothing else should.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from memopt.errors import ConfigurationError, ConsolidationError, MemoptError
from memopt.memory import summarise
from memopt.memory.batches import Group, Plan, chunks, make_plan
from memopt.memory.filters import utc
from memopt.memory.graph import AssociationGraph
from memopt.memory.rows import new_rows, vectors_array
from memopt.memory.schedule import RUN
from memopt.memory.schema import ARCHIVED, LONG_TERM, SHORT_TERM, Content

if TYPE_CHECKING:
    from memopt.memory.llm import Summariser
    from memopt.memory.store import MemoryStore

STEPS = ("planned", "summarised", "ready", "committed", "archive-ready", "archived", "finished")
FAILED, FALLBACK, STALE = "consolidation-failed", "llm-fallback", "consolidation-stale"
# A failure is tried again after retry_s, then twice as long each time, a day at most.
_LONGEST_BACKOFF = 86_400.0
# After so many failures in a row a language model is not asked again in this run: each costs its
# whole timeout.
_GIVE_UP = 2
# TF-IDF vectors of two texts are farther apart than sentence embeddings.
_WORD_FIDELITY = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsolidationRecipe:
    """What is condensed, and how.

    Attributes:
        hot_accesses: memories read this often are summarised with those that say the same.
        cold_age_days: others are archived when they are that old.
        similarity: least cosine similarity of a group's members to its centre.
        batch_size: memories per summary, and per commit of the archive, at most.
        originals: what happens to those a summary stands for: 'archive' or 'drop'.
        fidelity: least cosine similarity of a summary to its sources' centroid.
        summary_length: characters of a summary at most.
        retry_s: seconds until a failed batch is tried again, the first time.
        duty: share of the time to be at work; the rest is left to readers.

    >>> ConsolidationRecipe(originals="burn")
    Traceback (most recent call last):
    ...
    memopt.errors.ConfigurationError: originals 'burn' is neither 'archive' nor 'drop'
    """

    hot_accesses: int = 10
    cold_age_days: float = 30
    similarity: float = 0.8
    batch_size: int = 50
    originals: Literal["archive", "drop"] = "archive"
    fidelity: float = 0.7
    summary_length: int = 500
    retry_s: float = 3600
    duty: float = 0.5

    def __post_init__(self) -> None:
        if self.originals not in ("archive", "drop"):
            raise ConfigurationError(
                f"originals {self.originals!r} is neither 'archive' nor 'drop'"
            )
        for name in ("similarity", "fidelity", "duty"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigurationError(f"{name} {getattr(self, name)} is not in (0, 1]")
        for name in ("hot_accesses", "cold_age_days", "summary_length", "retry_s"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} {getattr(self, name)} is not above 0")
        if self.batch_size < 2:
            raise ConfigurationError(f"batch_size {self.batch_size} is below 2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Consolidation:
    """What a run did; of a dry run, what it would do.

    Attributes:
        plan: what was found.
        summaries: ids of the new long-term memories.
        condensed: originals they stand for.
        archived: cold memories moved to the archive.
        fallbacks: summaries the language model did not make.
        failed: batches left as they were, to be retried.
        stale: batches that changed while they were worked on; taken up by the next run.
        stopped: the run was asked to stop before it was through.
    """

    plan: Plan
    dry_run: bool = False
    summaries: tuple[str, ...] = ()
    condensed: int = 0
    archived: int = 0
    fallbacks: int = 0
    failed: int = 0
    stale: int = 0
    stopped: bool = False
    seconds: float = 0.0


Progress = Callable[[int, int], None]


def plan(store: MemoryStore, recipe: ConsolidationRecipe | None = None) -> Consolidation:
    """Say what :func:`consolidate` would do; nothing is changed and nothing sent."""
    recipe = recipe or ConsolidationRecipe()
    found = _plan(store, recipe)
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
    >>> from memopt.memory.schema import NewMemory
    >>> from memopt.memory.store import MemoryStore
    >>> store = MemoryStore(tempfile.mkdtemp(), dim=2)
    >>> same = np.array([1.0, 0.0])
    >>> texts = ["The door is red.", "The door is red!"]
    >>> ids = store.add([NewMemory(content=Content(text=t), embedding=same) for t in texts]).ids
    >>> store.touch(ids * 10)
    >>> report = consolidate(store)
    >>> store.get(report.summaries[0]).summary
    'The door is red.'
    """
    return _Run(store, recipe or ConsolidationRecipe(), llm, stop or threading.Event()).run(on_step)


@dataclass
class _Run:
    store: MemoryStore
    recipe: ConsolidationRecipe
    llm: Summariser | None
    stop: threading.Event
    refusals: int = 0
    summaries: list[str] = field(default_factory=list)
    condensed: int = 0
    archived: int = 0
    fallbacks: int = 0
    failed: int = 0
    stale: int = 0

    def run(self, on_step: Progress | None) -> Consolidation:
        started = time.monotonic()
        found = _plan(self.store, self.recipe)
        _fault("planned")
        work: list[Callable[[], None]] = [partial(self.condense, group) for group in found.groups]
        work += [
            partial(self.archive, part) for part in chunks(found.archive, self.recipe.batch_size)
        ]
        done = 0
        with _links_followed(self.store):
            while done < len(work) and not self.stop.is_set():
                begun = time.monotonic()
                work[done]()
                done += 1
                if on_step:
                    on_step(done, len(work))
                if done < len(work):
                    self.stop.wait((time.monotonic() - begun) * (1 / self.recipe.duty - 1))
        report = Consolidation(
            plan=found,
            summaries=tuple(self.summaries),
            condensed=self.condensed,
            archived=self.archived,
            fallbacks=self.fallbacks,
            failed=self.failed,
            stale=self.stale,
            stopped=done < len(work),
            seconds=time.monotonic() - started,
        )
        if not report.stopped:
            self.store.event(
                RUN,
                f"{len(self.summaries)} summaries of {self.condensed}, {self.archived} "
                f"archived, {self.failed} batches failed",
            )
        _fault("finished")
        return report

    def condense(self, group: Group) -> None:
        """Replace a group by its summary, in one commit."""
        ids = list(group.ids)
        try:
            before = self.store.rows(ids)
            if not _still(before, ids):
                raise _Stale
            opened = self.store.unpack(before)
            vectors = vectors_array(opened["joint_embedding"], self.store.dim)
            summary = self._summary(opened, group)
            _fault("summarised")
            row = _summary_row(self.store, opened, vectors, summary, group, self.recipe.originals)
            archived = None
            if self.recipe.originals == "archive":
                archived = self.store.pack(moved(opened, ARCHIVED, utc(self.store.clock())))
            _fault("ready")
            # Short: one look at the rows and one commit, so that other writers hardly wait.
            with self.store.exclusive():
                if not _same(before, self.store.rows(ids)):
                    raise _Stale
                deletes = ids if archived is None else []
                self.store.commit(inserts=row, updates=archived, deletes=deletes)
            _fault("committed")
        except _Stale:
            self._changed(ids)
        except MemoptError as error:
            self._failure(ids, error)
        else:
            self.summaries.append(row["memory_id"][0].as_py())
            self.condensed += len(ids)

    def archive(self, ids: list[str]) -> None:
        """Move cold memories to the archive, in one commit."""
        try:
            before = self.store.rows(ids)
            if not _still(before, ids):
                raise _Stale
            packed = self.store.pack(moved(self.store.unpack(before), ARCHIVED, None))
            _fault("archive-ready")
            with self.store.exclusive():
                if not _same(before, self.store.rows(ids)):
                    raise _Stale
                self.store.commit(updates=packed)
            _fault("archived")
        except _Stale:
            self._changed(ids)
        except MemoptError as error:
            self._failure(ids, error)
        else:
            self.archived += len(ids)

    def _summary(self, opened: pa.Table, group: Group) -> str:
        texts = [text for text in opened["text"].to_pylist() if text and text.strip()]
        if not texts:
            names = (("has_vision", "pictures"), ("has_audio", "sounds"))
            kinds = " and ".join(what for flag, what in names if any(opened[flag].to_pylist()))
            return f"{len(group.ids)} {kinds}" + (f" of {group.category}" if group.category else "")
        embed, bound = self._comparison(texts)
        if self.llm is not None and self.refusals < _GIVE_UP:
            try:
                asked = summarise.prompt(texts, group.category)
                if self.store.redact:
                    asked = self.store.redact(asked)
                answer = self.llm.complete(summarise.SYSTEM, asked)[: self.recipe.summary_length]
                self.refusals = 0
                wrong = summarise.problem(answer, texts, embed, bound)
                if wrong is None:
                    return answer
                reason = f"the summary by {self.llm.name} was rejected: {wrong}"
            except Exception as error:  # noqa: BLE001 - a client of the caller's may raise anything
                self.refusals += 1
                reason = error.problem if isinstance(error, MemoptError) else repr(error)
            self.store.event(FALLBACK, f"{reason}; sentences were extracted", group.ids)
            self.fallbacks += 1
        elif self.llm is not None:
            self.fallbacks += 1
            detail = f"{self.llm.name} is given up on for this run; sentences were extracted"
            self.store.event(FALLBACK, detail, group.ids)
        # More sentences until the facts are there, as many as the length allows.
        wrong = "nothing fits"
        words = summarise.with_words(embed, texts)
        for most in (3, 6, 12):
            answer = _cut(summarise.extract(texts, words, most=most), self.recipe.summary_length)
            found = summarise.problem(answer, texts, embed, bound)
            if found is None:
                return answer
            wrong = found
        raise ConsolidationError(f"no summary of {len(texts)} texts holds: {wrong}")

    def _comparison(self, texts: list[str]) -> tuple[summarise.Embed, float]:
        embedder = self.store.embedder
        if embedder is None:
            return summarise.word_vectors(texts), min(self.recipe.fidelity, _WORD_FIDELITY)
        return (
            lambda parts: self.store.embed([Content(text=part) for part in parts]),
            self.recipe.fidelity,
        )

    def _changed(self, ids: list[str]) -> None:
        self.stale += 1
        self.store.event(STALE, "memories changed while they were condensed", ids)

    def _failure(self, ids: list[str], error: MemoptError) -> None:
        self.failed += 1
        before = sum(1 for event in self.store.events(FAILED) if set(event.memory_ids) & set(ids))
        wait = min(self.recipe.retry_s * 2**before, _LONGEST_BACKOFF)
        retry_at = utc(self.store.clock()) + timedelta(seconds=wait)
        self.store.event(FAILED, str(error), ids, retry_at)


@contextmanager
def _links_followed(store: MemoryStore) -> Iterator[None]:
    """Have links go with their memories, also where nobody attached the graph to the store."""
    if store.listeners or not store.table("edges").count_rows():
        yield
        return
    graph = AssociationGraph(store)
    try:
        yield
    finally:
        graph.close()


class _Stale(Exception):
    """The rows of a batch are no longer what its plan saw."""


def _plan(store: MemoryStore, recipe: ConsolidationRecipe) -> Plan:
    now = utc(store.clock())
    latest: dict[str, datetime | None] = {}
    for event in store.events(FAILED):
        latest.update(dict.fromkeys(event.memory_ids, event.retry_at))
    postponed = frozenset(key for key, moment in latest.items() if moment and moment > now)
    return make_plan(
        store,
        hot_accesses=recipe.hot_accesses,
        cold_age=timedelta(days=recipe.cold_age_days),
        similarity=recipe.similarity,
        group_size=recipe.batch_size,
        postponed=postponed,
    )


def _summary_row(
    store: MemoryStore,
    opened: pa.Table,
    vectors: Any,
    summary: str,
    group: Group,
    originals: str,
) -> pa.Table:
    """Return the long-term row: at the centroid of its sources, with the media nearest to it."""
    middle = summarise.centroid(vectors)
    nearest = np.argsort(-(vectors @ middle), kind="stable").tolist()
    columns: dict[str, Any] = {
        "memory_id": "sum-" + hashlib.sha256("\n".join(group.ids).encode()).hexdigest()[:32],
        "timestamp": max(opened["timestamp"].to_pylist()),
        "category": group.category,
        "tier": LONG_TERM,
        "expires_at": group.expires_at,
        "model_id": opened["model_id"][0].as_py(),
        "summary": store.redact(summary) if store.redact else summary,
        "has_text": True,
        "source_count": len(group.ids),
        "consolidated_at": utc(store.clock()),
        "last_access": max(filter(None, opened["last_access"].to_pylist()), default=None),
    }
    if originals == "drop":
        # Archived originals keep their own counts: nothing is counted twice.
        columns["access_count"] = sum(opened["access_count"].to_pylist())
        for name, flag in (("vision_data", "has_vision"), ("audio_data", "has_audio")):
            media = opened[name].to_pylist()
            kept = next((media[at] for at in nearest if media[at] is not None), None)
            columns[name], columns[flag] = kept, kept is not None
    listed = {name: [value] for name, value in columns.items()}
    return new_rows(middle[None, :], {**listed, "source_memory_ids": [list(group.ids)]})


def moved(opened: pa.Table, tier: str, consolidated_at: datetime | None = None) -> pa.Table:
    """Return opened rows in another tier; a time of consolidation marks them as condensed."""
    changes: dict[str, Any] = {"tier": tier}
    if consolidated_at is not None:
        changes["consolidated_at"] = consolidated_at
    for name, value in changes.items():
        kind = opened.schema.field(name)
        values = pa.repeat(pa.scalar(value, kind.type), opened.num_rows)
        opened = opened.set_column(opened.column_names.index(name), kind, values)
    return opened


def _still(rows: pa.Table, ids: list[str]) -> bool:
    return rows.num_rows == len(ids) and set(rows["tier"].to_pylist()) == {SHORT_TERM}


def _same(before: pa.Table, now: pa.Table) -> bool:
    """Say whether rows are the same but for their access counts."""
    names = [name for name in before.column_names if name not in ("access_count", "last_access")]
    key = [("memory_id", "ascending")]
    return bool(before.select(names).sort_by(key).equals(now.select(names).sort_by(key)))


def _cut(text: str, most: int) -> str:
    """Shorten to whole words."""
    if len(text) <= most:
        return text
    return text[:most].rsplit(" ", 1)[0]


def _fault(step: str) -> None:
    if os.environ.get("MEMOPT_FAULT") == f"consolidation:{step}":
        os.kill(os.getpid(), signal.SIGKILL)
