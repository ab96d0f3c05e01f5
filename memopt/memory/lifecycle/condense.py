"""Consolidation: hot memories become summaries, cold ones go to the archive.

Each batch is one commit on ``memories``: summaries come in and their originals leave (or are
archived) together. So a crash or an error at any point leaves every original or its summary, and a
batch that is done is not done again.

``MEMOPT_FAULT=consolidation:STEP`` kills the process at one of :data:`STEPS`; the tests of crashes
use it, and nothing else should.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from memopt.errors import ConfigurationError, ConsolidationError, MemoptError
from memopt.memory.graph.association import AssociationGraph
from memopt.memory.lifecycle import summary as summarise
from memopt.memory.lifecycle.condensed_rows import (
    Ready,
    has_media,
    moved,
    same,
    summary_row,
    untouched,
)
from memopt.memory.lifecycle.plan import Group, Plan, chunks, make_plan
from memopt.memory.lifecycle.schedule import RUN
from memopt.memory.lifecycle.summary import Cover
from memopt.memory.model.filters import utc
from memopt.memory.model.rows import vectors_array
from memopt.memory.model.schema import ARCHIVED, Content
from memopt.memory.privacy.erase import erase, expire
from memopt.memory.store.signs import compact
from memopt.memory.store.upkeep import tidy
from memopt.metrics import ERRORS, count, fallback

if TYPE_CHECKING:
    from memopt.memory.lifecycle.llm import Summariser
    from memopt.memory.memory_store import MemoryStore

STEPS = ("planned", "summarised", "ready", "committed", "archive-ready", "archived", "finished")
FAILED, FALLBACK, STALE = "consolidation-failed", "llm-fallback", "consolidation-stale"
# A failure is tried again after retry_s, then twice as long each time, a day at most.
_LONGEST_BACKOFF = 86_400.0
# After so many failures in a row a language model is not asked again in this run: each costs its
# whole timeout.
_GIVE_UP = 2
# TF-IDF vectors of two texts are farther apart than sentence embeddings.
_WORD_FIDELITY = 0.5
# A commit leaves files that every later search must look into, so several groups go into one: until
# it replaces this many rows, or the first of them has waited for a slow language model this long.
_COMMIT_ROWS = 512
_COMMIT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsolidationRecipe:
    """What is condensed, and how.

    Attributes:
        hot_accesses: memories read this often are summarised with those that say the same.
        cold_age_days: others are archived when they are that old.
        similarity: least cosine similarity of a group's members to its centre.
        batch_size: memories per summary at most.
        originals: what happens to those a summary stands for: 'archive' or 'drop'. What has a
            picture or a sound is archived either way.
        fidelity: least cosine similarity of a summary to its sources' centroid.
        summary_length: characters of a summary at most.
        retry_s: seconds until a failed batch is tried again, the first time.
        compact: keep vectors in a quarter of the room, where search finds the same by them
            (:mod:`memopt.memory.store.signs`).
        duty: share of the time to be at work; the rest is left to readers. Waiting for a language
            model is no work. With 5 % and more the slowest twentieth of searches would all be some
            that met it.

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
    compact: bool = True
    duty: float = 0.03

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
        expired: memories whose time had come; their bytes are off the disk.
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
    expired: int = 0
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
    >>> import numpy as np
    >>> from memopt.memory.model.schema import NewMemory
    >>> from memopt.memory.memory_store import MemoryStore
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


def _full(batch: list[Ready]) -> bool:
    count = sum(len(part.ids) for part in batch)
    return count >= _COMMIT_ROWS or (count > 0 and time.monotonic() - batch[0].since > _COMMIT_S)


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
    waited: float = 0.0
    compacted: bool = False

    def run(self, on_step: Progress | None) -> Consolidation:
        started = begun = time.monotonic()
        # Before anything is summarised: what has to go must not live on in other words.
        expired = expire(self.store)
        if expired:
            erase(self.store)
        found = _plan(self.store, self.recipe)
        _fault("planned")
        steps: list[Callable[[], Ready | None]] = [
            partial(self.condense, group) for group in found.groups
        ]
        steps += [partial(self.archive, part) for part in chunks(found.archive, _COMMIT_ROWS)]
        done = 0
        batch: list[Ready] = []
        with _links_followed(self.store):
            while done < len(steps) and not self._stopped(begun):
                begun, self.waited = time.monotonic(), 0.0
                ready = steps[done]()
                if ready is not None:
                    batch.append(ready)
                done += 1
                if done == len(steps) or _full(batch):
                    self.commit(batch)
                    batch = []
                if on_step:
                    on_step(done, len(steps))
            self.commit(batch)
        if self.recipe.compact and done == len(steps):
            self.compacted = compact(self.store) is not None
        if self.summaries or self.archived or self.compacted:
            self.store.optimize()
            self.store.index.fit()
        report = Consolidation(
            plan=found,
            summaries=tuple(self.summaries),
            condensed=self.condensed,
            archived=self.archived,
            expired=expired,
            fallbacks=self.fallbacks,
            failed=self.failed,
            stale=self.stale,
            stopped=done < len(steps),
            seconds=time.monotonic() - started,
        )
        count("memopt_consolidation_runs_total")
        for what in ("condensed", "archived", "expired", "fallbacks", "failed", "stale"):
            count(f"memopt_consolidation_{what}_total", getattr(report, what))
        count("memopt_consolidation_summaries_total", len(report.summaries))
        if not report.stopped:
            self.store.event(
                RUN,
                f"{len(self.summaries)} summaries of {self.condensed}, {self.archived} "
                f"archived, {self.failed} batches failed",
            )
        _fault("finished")
        return report

    def condense(self, group: Group) -> Ready | None:
        """Make what replaces a group."""
        ids = list(group.ids)
        try:
            before = self.store.rows(ids)
            if not untouched(before, ids):
                self._changed(ids)
                return None
            opened = self.store.unpack(before)
            made = self._summaries(opened, group)
            _fault("summarised")
            # What no summary says stays as it is.
            rest = sorted({place for part in made for place in part.of})
            if not rest:
                return None
            vectors = vectors_array(opened["joint_embedding"], self.store.dim)
            rows = [
                summary_row(
                    self.store,
                    opened.take(list(part.of)),
                    vectors[list(part.of)],
                    part.text,
                    group,
                    self.recipe.originals,
                )
                for part in made
            ]
            before, opened = before.take(rest), opened.take(rest)
            if self.recipe.originals == "drop":
                # Words stand for words: pictures and sounds are kept.
                opened = opened.filter(has_media(opened))
            archived = self.store.pack(moved(opened, ARCHIVED, utc(self.store.clock())))
        except MemoptError as error:
            self._failure(ids, error)
            return None
        _fault("ready")
        return Ready(before["memory_id"].to_pylist(), before, pa.concat_tables(rows), archived)

    def archive(self, ids: list[str]) -> Ready | None:
        """Make the archived rows of cold memories."""
        try:
            before = self.store.rows(ids)
            if not untouched(before, ids):
                self._changed(ids)
                return None
            packed = self.store.pack(moved(self.store.unpack(before), ARCHIVED, None))
        except MemoptError as error:
            self._failure(ids, error)
            return None
        _fault("archive-ready")
        return Ready(ids, before, None, packed)

    def _stopped(self, begun: float) -> bool:
        """Leave the time to readers that work since ``begun`` calls for; whether to stop."""
        work = time.monotonic() - begun - self.waited
        return self.stop.wait(work * (1 / self.recipe.duty - 1))

    def commit(self, batch: list[Ready]) -> None:
        """Write what was made, in one commit, but for what changed meanwhile."""
        if not batch:
            return
        try:
            # Short: one look at the rows and one commit, so that other writers hardly wait.
            with self.store.exclusive():
                now = self.store.rows([key for part in batch for key in part.ids])
                stale = [part for part in batch if not same(part.before, part.of(now))]
                batch = [part for part in batch if part not in stale]
                if batch:
                    rows = [part.summaries for part in batch if part.summaries is not None]
                    packed = pa.concat_tables([part.archived for part in batch])
                    stay = set(packed["memory_id"].to_pylist())
                    self.store.commit(
                        inserts=pa.concat_tables(rows) if rows else None,
                        updates=packed,
                        deletes=[key for part in batch for key in part.ids if key not in stay],
                    )
        except MemoptError as error:
            for part in batch:
                self._failure(part.ids, error)
            return
        for part in stale:
            self._changed(part.ids)
        for part in batch:
            if part.summaries is None:
                self.archived += len(part.ids)
            else:
                self.summaries += part.summaries["memory_id"].to_pylist()
                self.condensed += len(part.ids)
        if any(part.summaries is not None for part in batch):
            _fault("committed")
        if any(part.summaries is None for part in batch):
            _fault("archived")
        if batch:
            tidy(self.store)

    def _summaries(self, opened: pa.Table, group: Group) -> list[Cover]:
        """Return texts that stand for a group, each with the rows it stands for."""
        said = [(at, text) for at, text in enumerate(opened["text"].to_pylist())]
        worded = [(at, text) for at, text in said if text and text.strip()]
        everything = tuple(range(opened.num_rows))
        if not worded:
            names = (("has_vision", "pictures"), ("has_audio", "sounds"))
            kinds = " and ".join(what for flag, what in names if any(opened[flag].to_pylist()))
            about = f" of {group.category}" if group.category else ""
            return [Cover(f"{len(group.ids)} {kinds}{about}", everything)]
        texts = [text for _, text in worded]
        embed, bound = self._comparison(texts)
        answer = self._asked(texts, group, embed, bound) if self.llm is not None else None
        if answer is not None:
            return [Cover(answer, everything)]
        length = self.recipe.summary_length
        words = summarise.with_words(embed, texts)
        covers = summarise.cover(texts, words, length=length)
        covered = {place for part in covers for place in part.of}
        found = [Cover(part.text, tuple(worded[at][0] for at in part.of)) for part in covers]
        left = [at for at in range(len(texts)) if at not in covered]
        if self.recipe.originals == "drop" or len(left) < 2 or covers:
            # Nothing is said of a text that was not said whole; it stays.
            return found
        # Long texts, which stay in the archive: more sentences until it is what they are about.
        wrong = "nothing fits"
        for most in (3, 6, 12):
            answer = _cut(summarise.extract(texts, words, most=most), length)
            problem = summarise.problem(answer, texts, embed, bound)
            if problem is None:
                return [Cover(answer, everything)]
            wrong = problem
        raise ConsolidationError(f"no summary of {len(texts)} texts holds: {wrong}")

    def _asked(
        self, texts: list[str], group: Group, embed: summarise.Embed, bound: float
    ) -> str | None:
        """Return what the language model made of ``texts``; None where that is nothing to keep."""
        assert self.llm is not None
        self.fallbacks += 1
        if self.refusals >= _GIVE_UP:
            reason = f"{self.llm.name} is given up on for this run"
        else:
            try:
                asked = summarise.prompt(texts, group.category)
                if self.store.redact:
                    asked = self.store.redact(asked)
                asking = time.monotonic()
                try:
                    answer = self.llm.complete(summarise.SYSTEM, asked)
                finally:
                    self.waited += time.monotonic() - asking
                self.refusals = 0
                wrong = self._wrong(answer, texts, embed, bound)
                if wrong is None:
                    self.fallbacks -= 1
                    return answer
                reason = f"the summary by {self.llm.name} was rejected: {wrong}"
            except Exception as error:  # noqa: BLE001 - a client of the caller's may raise anything
                self.refusals += 1
                reason = error.problem if isinstance(error, MemoptError) else repr(error)
        self.store.event(FALLBACK, f"{reason}; sentences were extracted", group.ids)
        fallback(self.llm.name, "extractive", "llm", told=reason)
        return None

    def _wrong(
        self, answer: str, texts: list[str], embed: summarise.Embed, bound: float
    ) -> str | None:
        """Say why an answer is no summary of ``texts``, None where it is."""
        if not answer.strip():
            return "it is empty"
        if len(answer) > self.recipe.summary_length:
            return f"it has {len(answer)} characters, above {self.recipe.summary_length}"
        lost = summarise.lost(answer, texts) if self.recipe.originals == "drop" else []
        if lost:
            return f"it lost {', '.join(lost[:3])}"
        return summarise.problem(answer, texts, embed, bound)

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
        count(ERRORS, component="consolidation", error=type(error).__name__)
        before = sum(1 for event in self.store.events(FAILED) if set(event.memory_ids) & set(ids))
        wait = min(self.recipe.retry_s * 2**before, _LONGEST_BACKOFF)
        retry_at = utc(self.store.clock()) + timedelta(seconds=wait)
        self.store.event(FAILED, str(error), ids, retry_at)


@contextmanager
def _links_followed(store: MemoryStore) -> Iterator[None]:
    """Link the summaries, also where nobody attached the graph to the store."""
    attached = any(isinstance(listener, AssociationGraph) for listener in store.listeners)
    if attached or not store.table("edges").count_rows():
        yield
        return
    graph = AssociationGraph(store)
    try:
        yield
    finally:
        graph.close()


def _plan(store: MemoryStore, recipe: ConsolidationRecipe) -> Plan:
    now = utc(store.clock())
    latest: dict[str, datetime | None] = {}
    for event in store.events(FAILED):
        latest.update(dict.fromkeys(event.memory_ids, event.retry_at))
    # Nobody is asked to wait longer than this: what is later was written by a wrong clock.
    last = now + timedelta(seconds=_LONGEST_BACKOFF)
    postponed = frozenset(key for key, moment in latest.items() if moment and now < moment <= last)
    return make_plan(
        store,
        hot_accesses=recipe.hot_accesses,
        cold_age=timedelta(days=recipe.cold_age_days),
        similarity=recipe.similarity,
        group_size=recipe.batch_size,
        postponed=postponed,
    )


def _cut(text: str, most: int) -> str:
    """Shorten to whole words."""
    if len(text) <= most:
        return text
    return text[:most].rsplit(" ", 1)[0]


def _fault(step: str) -> None:
    if os.environ.get("MEMOPT_FAULT") == f"consolidation:{step}":
        os.kill(os.getpid(), signal.SIGKILL)
