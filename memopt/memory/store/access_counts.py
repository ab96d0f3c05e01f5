"""Access counts: kept in memory by the reader, written now and then in the background.

A write per read would cost a commit each. Only the small columns are written (Lance replaces
columns of a fragment without rewriting the others), so media and vectors are never moved.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from datetime import datetime

import pyarrow as pa

from memopt.background import BackgroundTask
from memopt.memory.model.filters import id_list
from memopt.memory.store.database import Database
from memopt.memory.store.locking import ReadOnlyError
from memopt.memory.store.observers import StoreObserver

_LOG = logging.getLogger(__name__)
# What a crash may forget: this many accesses, or those of this many seconds of steady reading.
MOST_PENDING = 2048
LONGEST_PENDING = 30.0
_COLUMNS = ("memory_id", "access_count", "last_access")


class AccessCounts(StoreObserver):
    """The accesses of one open store that are not in the table yet."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._guard = threading.Lock()
        self._pending: dict[str, tuple[int, datetime]] = {}
        self._since = time.monotonic()
        self._task = BackgroundTask(
            lambda: database.keep_book(self._write_or_drop),
            "memopt-access-counts",
            # Nothing is lost: the counts stay pending, and flush() raises what is still wrong.
            on_error=lambda error: _LOG.warning("access counts are not written yet: %s", error),
            daemon=False,
        )

    def count(self, ids: Sequence[str]) -> None:
        """Count one access of each id; starts a background write when enough are waiting."""
        self._database.check_process()
        ids, now = id_list(ids), self._database.now()
        with self._guard:
            if not self._pending:
                self._since = time.monotonic()
            for memory_id in ids:
                self._pending[memory_id] = (self._pending.get(memory_id, (0, now))[0] + 1, now)
            waited = time.monotonic() - self._since
            if len(self._pending) >= MOST_PENDING or waited > LONGEST_PENDING:
                self._task.start()

    def pending(self) -> dict[str, tuple[int, datetime]]:
        """Return id -> (accesses, last) that are not written yet."""
        with self._guard:
            return dict(self._pending)

    def flush(self) -> None:
        """Wait for a background write, then write the rest."""
        self._task.close()
        self._write_or_drop()

    def closing(self) -> None:
        """Write what waits, where the store can be written."""
        self._database.keep_book(self.flush)

    def _write_or_drop(self) -> None:
        try:
            self._write()
        except ReadOnlyError:
            with self._guard:
                self._pending.clear()
            raise

    def _write(self) -> None:
        database = self._database
        if not self._pending:
            return
        with database.changing():
            waiting, now = self.pending(), database.now()
            current = database.light(list(waiting), _COLUMNS).to_pylist()
            for row in current:
                count, last = waiting[row["memory_id"]]
                row["access_count"] += count
                row["last_access"] = later(row["last_access"], last, now)
            if current:
                database.replace(pa.Table.from_pylist(current, schema=database.schema(_COLUMNS)))
        with self._guard:
            # A failed write leaves everything pending; what came in meanwhile stays pending too.
            for memory_id, (count, _) in waiting.items():
                left, last = self._pending[memory_id]
                if left == count:
                    del self._pending[memory_id]
                else:
                    self._pending[memory_id] = (left - count, last)
            self._since = time.monotonic()


def later(one: datetime | None, other: datetime | None, now: datetime) -> datetime | None:
    """Return the later of two accesses; one after ``now`` was written by a wrong clock.

    >>> from datetime import UTC
    >>> wrong, right = datetime(2099, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)
    >>> later(wrong, right, right).year
    2026
    """
    known = [moment for moment in (one, other) if moment is not None]
    past = [moment for moment in known if moment <= now]
    return max(past or known, default=None)
