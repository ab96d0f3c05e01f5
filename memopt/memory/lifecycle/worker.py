"""The worker that consolidates a store by itself, beside whatever else its event loop does."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from memopt.errors import ConfigurationError, ConsolidationError
from memopt.memory.lifecycle.consolidation import Consolidation, consolidate, plan
from memopt.memory.lifecycle.llm import Summariser
from memopt.memory.lifecycle.plan import FAILED, ConsolidationRecipe
from memopt.memory.lifecycle.schedule import SAVED, Triggers, due
from memopt.memory.memory_store import MemoryStore
from memopt.memory.privacy.erase import reclaim
from memopt.progress import Progress

_LOG = logging.getLogger(__name__)

__all__ = [
    "Consolidation",
    "ConsolidationRecipe",
    "ConsolidationWorker",
    "Saving",
    "Triggers",
    "saving",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """What a run did, and the bytes on disk before and after it; None where nobody can tell."""

    report: Consolidation
    before: int | None
    after: int | None


def saving(
    store: MemoryStore, run: Callable[[], Consolidation], *, drop_versions: bool = True
) -> Saving:
    """Do a run, give its room back to the disk, and write down what it saved.

    Args:
        drop_versions: old versions keep the room, and the pressure with it, until they are dropped.
    """
    before = store.stats().bytes_on_disk
    report = run()
    if drop_versions:
        reclaim(store)
    after = store.stats().bytes_on_disk
    if drop_versions and before and after:
        store.event(SAVED, json.dumps({"before": before, "after": after}))
    return Saving(report=report, before=before, after=after)


def waiting(store: MemoryStore) -> list[str]:
    """Return what failed and is to be tried again."""
    events, now = store.events(FAILED), store.database.now()
    return [event.detail for event in events if event.retry_at and event.retry_at > now]


def document(saved: Saving, events: list[str]) -> dict[str, object]:
    """Return what a run did as JSON takes it, with the events of :func:`waiting`."""
    report = saved.report
    found = ("scanned", "hot", "cold", "alone", "postponed")
    done = ("condensed", "archived", "expired", "fallbacks", "failed", "stale")
    return {
        "dry_run": report.dry_run,
        **{name: getattr(report.plan, name) for name in found},
        "groups": [list(group.ids) for group in report.plan.groups],
        "summaries": list(report.summaries),
        **{name: getattr(report, name) for name in done},
        "waiting": events,
        "bytes_before": saved.before,
        "bytes_after": saved.after,
        "seconds": round(report.seconds, 3),
    }


class ConsolidationWorker:
    """Consolidates when the schedule or the size of the store says so.

    All work is done in a thread, a batch at a time, with pauses between batches; readers and the
    event loop are never blocked. The time of the last run is kept in the store, so that a run
    missed while nobody was there is caught up once.

    Args:
        store: the store to keep small.
        recipe: what is condensed, and how.
        triggers: when.
        llm: writes the summaries; sentences are extracted without one, or where it fails.
        poll_s: seconds between two looks at the triggers.
        around: makes the runs that a trigger starts, in the worker's thread: given the trigger's
            name and what runs once.

    >>> import tempfile
    >>> from memopt.memory import MemoryStore
    >>> worker = ConsolidationWorker(MemoryStore(tempfile.mkdtemp(), dim=2))
    >>> asyncio.run(worker.dry_run()).plan.scanned
    0
    """

    def __init__(
        self,
        store: MemoryStore,
        recipe: ConsolidationRecipe | None = None,
        *,
        triggers: Triggers | None = None,
        llm: Summariser | None = None,
        poll_s: float = 30.0,
        around: Callable[[str, Callable[[], Consolidation]], object] = lambda _, run: run(),
    ) -> None:
        if not poll_s > 0:
            raise ConfigurationError(f"poll_s {poll_s} is not above 0")
        self.store, self.recipe, self.llm = store, recipe or ConsolidationRecipe(), llm
        self.triggers, self.poll_s = triggers or Triggers(), poll_s
        self.around = around
        self.last: Consolidation | None = None
        self._stop = threading.Event()
        self._wake: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None
        self._one_at_a_time = threading.Lock()

    async def start(self) -> None:
        """Begin to watch the triggers.

        Raises:
            ConsolidationError: it runs already.
        """
        if self._task is not None and not self._task.done():
            raise ConsolidationError("the consolidation worker runs already", fix="stop it first")
        self._stop.clear()
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._watch(self._wake), name="memopt-consolidation")

    async def stop(self) -> None:
        """Finish the batch at work, if there is one, and stop watching."""
        self._stop.set()
        if self._wake is not None:
            self._wake.set()
        if self._task is not None:
            await self._task
        self._task = None

    async def consolidate(self, on_step: Progress | None = None) -> Consolidation:
        """Run once, now; waits for a run that is under way.

        Raises:
            ConsolidationError: as :func:`memopt.memory.consolidate`.
        """
        if self._task is None:
            self._stop.clear()
        return await asyncio.to_thread(self._run, on_step)

    async def dry_run(self) -> Consolidation:
        """Say what a run would do now."""
        return await asyncio.to_thread(plan, self.store, self.recipe)

    def _run(self, on_step: Progress | None = None) -> Consolidation:
        self.store.database.check_process()
        with self._one_at_a_time:
            self.last = consolidate(
                self.store, self.recipe, llm=self.llm, stop=self._stop, on_step=on_step
            )
            return self.last

    async def _watch(self, wake: asyncio.Event) -> None:
        while not self._stop.is_set():
            pause = await asyncio.to_thread(self._look)
            try:
                await asyncio.wait_for(wake.wait(), pause)
            except TimeoutError:
                continue

    def _look(self) -> float:
        """Run if it is time; return the seconds until the next look."""
        try:
            why = due(self.store, self.triggers)
            if why:
                _LOG.info("consolidation of %s starts by %s", self.store.place, why)
                self.around(why, self._run)
        except Exception as error:  # noqa: BLE001 - the worker outlives a full disk or a lost share
            _LOG.warning("consolidation of %s failed: %s", self.store.place, error)
            self._record(error)
            return self.recipe.retry_s
        return self.poll_s

    def _record(self, error: Exception) -> None:
        retry_at = self.store.database.now() + timedelta(seconds=self.recipe.retry_s)
        try:
            self.store.event(FAILED, f"{type(error).__name__}: {error}", (), retry_at)
        except Exception as second:  # noqa: BLE001 - what broke the run may break its record too
            _LOG.warning("and the failure could not be recorded: %s", second)
