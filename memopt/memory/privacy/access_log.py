"""Who read, wrote and deleted what: an append-only table in the store."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa

from memopt.background import BackgroundTask
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.filters import all_of, utc
from memopt.memory.model.schema import ACCESS_LOG
from memopt.memory.store.locking import ReadOnlyError
from memopt.memory.store.observers import StoreObserver

# Reads are written in groups: a commit each would cost more than the read. A crash may forget so
# many, or those of so many seconds.
MOST_PENDING = 256
LONGEST_PENDING = 5.0
_LOG = logging.getLogger(__name__)
_ACTOR: ContextVar[str | None] = ContextVar("memopt_actor", default=None)


@contextmanager
def acting(actor: str) -> Iterator[None]:
    """Log what this thread or task does meanwhile as done by ``actor``, not by the store's own.

    For a store that one process opens for many: the clients of a server. Threads that
    :func:`asyncio.to_thread` starts inside go along.

    >>> import tempfile
    >>> from memopt.memory import MemoryStore
    >>> store = MemoryStore(tempfile.mkdtemp(), dim=2, actor="server")
    >>> log = AccessLog(store)
    >>> with acting("ann"):
    ...     log.accessed("read", ["m"])
    >>> log.accessed("read", ["m"])
    >>> [line.actor for line in read_log(store)]
    ['ann', 'server']
    """
    token = _ACTOR.set(actor)
    try:
        yield
    finally:
        _ACTOR.reset(token)


@dataclass(frozen=True, slots=True)
class Access:
    """One line of the log."""

    at: datetime
    actor: str
    action: str
    memory_ids: tuple[str, ...]
    detail: str | None


class AccessLog(StoreObserver):
    """Writes down every read, write and delete of an open store.

    What changes or gives away data is on the disk before the call returns, reads soon after.

    Args:
        store: watched from now on; ``store.actor`` says who, :func:`acting` who else for a while.

    >>> import tempfile
    >>> import numpy as np
    >>> from memopt.memory import Content, MemoryStore, NewMemory
    >>> store = MemoryStore(tempfile.mkdtemp(), dim=2, actor="ann")
    >>> log = AccessLog(store)
    >>> new = NewMemory(content=Content(text="a"), embedding=np.ones(2), memory_id="m")
    >>> _ = store.add(new), store.get("m"), store.delete(["m"])
    >>> [(line.actor, line.action) for line in read_log(store, memory_id="m")]
    [('ann', 'write'), ('ann', 'read'), ('ann', 'delete')]
    """

    def __init__(self, store: MemoryStore) -> None:
        self._store, self._database = store, store.database
        self._pending: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._task = BackgroundTask(
            self._keep,
            "memopt-access-log",
            # The lines stay; the next flush() raises what is still wrong.
            on_error=lambda error: _LOG.warning("the access log is not written yet: %s", error),
        )
        self._database.observers.add(self)

    def accessed(self, action: str, ids: Sequence[str]) -> None:
        """Note one access."""
        line = {
            "at": self._database.now(),
            "actor": self._store.actor if (actor := _ACTOR.get()) is None else actor,
            "action": action,
            "memory_ids": list(ids),
            "detail": None,
        }
        with self._lock:
            self._pending.append(line)
            full = action != "read" or len(self._pending) >= MOST_PENDING
            if not full:
                self._task.start(after=LONGEST_PENDING)
        if full:
            self._keep()

    def flush(self) -> None:
        """Write what is buffered."""
        with self._lock:
            lines, self._pending = self._pending, []
        if not lines:
            return
        try:
            with self._database.changing():
                self._database.table("access_log").add(pa.Table.from_pylist(lines, ACCESS_LOG))
        except ReadOnlyError:
            # Never to be written: kept, they would fill the memory of who reads for a year.
            raise
        except Exception:
            with self._lock:
                self._pending = lines + self._pending
            raise

    def closing(self) -> None:
        """Write what is buffered, where the store can be written."""
        self._task.close()
        self._keep()

    def close(self) -> None:
        """Write what is buffered and stop watching."""
        self.closing()
        self._database.observers.remove(self)

    def _keep(self) -> None:
        self._database.keep_book(self.flush)


def read_log(
    store: MemoryStore,
    *,
    memory_id: str | None = None,
    actor: str | None = None,
    action: str | None = None,
    since: datetime | None = None,
) -> list[Access]:
    """Return lines of the log, oldest first; every argument narrows."""
    from lancedb.expr import col, lit

    database = store.database
    for observer in database.observers:
        if isinstance(observer, AccessLog):
            observer.closing()
    parts = []
    if actor is not None:
        parts.append(col("actor") == lit(actor))
    if action is not None:
        parts.append(col("action") == lit(action))
    if since is not None:
        parts.append(col("at") >= lit(utc(since)))
    condition = all_of(parts)
    query = database.query("access_log")
    table = database.fetch(query.where(condition) if condition is not None else query)
    lines = [Access(**{**row, "memory_ids": tuple(row["memory_ids"])}) for row in table.to_pylist()]
    if memory_id is not None:
        lines = [line for line in lines if memory_id in line.memory_ids]
    return sorted(lines, key=lambda line: line.at)
