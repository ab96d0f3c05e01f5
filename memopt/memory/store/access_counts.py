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
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from memopt.background import Task
from memopt.memory.model.filters import utc
from memopt.memory.model.schema import TIMESTAMP
from memopt.memory.store.locking import ReadOnlyError

if TYPE_CHECKING:
    from memopt.memory.memory_store import MemoryStore

_LOG = logging.getLogger(__name__)
# What a crash may forget: this many accesses, or those of this many seconds of steady reading.
MOST_PENDING = 2048
LONGEST_PENDING = 30.0
_ID = "memory_id"
_SCHEMA = pa.schema(
    [
        pa.field("memory_id", pa.string(), nullable=False),
        pa.field("access_count", pa.int64(), nullable=False),
        pa.field("last_access", TIMESTAMP),
    ]
)


class Touches:
    """The accesses of one open store that are not in the table yet."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._guard = threading.Lock()
        self._pending: dict[str, tuple[int, datetime]] = {}
        self._since = time.monotonic()
        self._task = Task(
            self._write_or_keep, "memopt-touches", on_error=self._failed, daemon=False
        )

    def count(self, ids: Sequence[str], now: datetime) -> None:
        """Count one access of each id; starts a background write when enough are waiting."""
        with self._guard:
            if not self._pending:
                self._since = time.monotonic()
            for memory_id in ids:
                self._pending[memory_id] = (self._pending.get(memory_id, (0, now))[0] + 1, now)
            due = (
                len(self._pending) >= MOST_PENDING
                or time.monotonic() - self._since > LONGEST_PENDING
            )
            if due:
                self._task.start()

    def pending(self) -> dict[str, tuple[int, datetime]]:
        """Return id -> (accesses, last) that are not written yet."""
        with self._guard:
            return dict(self._pending)

    def flush(self) -> None:
        """Wait for a background write, then write the rest."""
        self._task.close()
        self._write_or_drop()

    def _write_or_drop(self) -> None:
        try:
            self._write()
        except ReadOnlyError:
            with self._guard:
                self._pending.clear()
            raise

    def _write_or_keep(self) -> None:
        self._store.keep_book(self._write_or_drop)

    def _failed(self, error: Exception) -> None:
        # Nothing is lost: the counts stay pending, and flush() raises what is still wrong.
        _LOG.warning("access counts could not be written yet: %s", error)

    def _write(self) -> None:
        store = self._store
        if not self._pending:
            return
        with store.changing():
            taken, now = self.pending(), utc(store.clock())
            current = store.light(list(taken), _SCHEMA.names).to_pylist()
            if current:
                source = [
                    {
                        "memory_id": row["memory_id"],
                        "access_count": row["access_count"] + taken[row["memory_id"]][0],
                        "last_access": later(row["last_access"], taken[row["memory_id"]][1], now),
                    }
                    for row in current
                ]
                cover_ids(store.memories)
                merge = store.memories.merge_insert(_ID).when_matched_update_all()
                merge.execute(pa.Table.from_pylist(source, schema=_SCHEMA))
                cover_ids(store.memories)
        with self._guard:
            # A failed write leaves everything pending; what came in meanwhile stays pending too.
            for memory_id, (count, _) in taken.items():
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


def cover_ids(memories: Any) -> None:
    """Rebuild the id index where it does not cover every row; 50 ms for 100k rows.

    Only with a covering index does a merge of two columns replace just these columns, otherwise
    it scans the table and writes the rows anew, media and all. And afterwards the index has
    forgotten the fragments that were touched, since their key counts as written.
    """
    from lancedb.index import BTree

    stats = memories.index_stats(f"{_ID}_idx")
    if stats is None or stats.num_unindexed_rows:
        memories.create_index(_ID, config=BTree(), replace=True)
