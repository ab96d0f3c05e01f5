"""Upkeep: many small commits leave many small files, which every search looks into.

A memory at a time, as an agent adds them, leaves a file each in two tables; a search of a thousand
files takes 150 ms instead of 10. So a store looks at its files now and then, joins the small ones
and deletes the versions nobody reads any more.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.background import Task
from memopt.memory.model.schema import EDGES
from memopt.memory.store.access_counts import cover_ids
from memopt.memory.store.locking import unless_read
from memopt.memory.store.meta import TABLES

if TYPE_CHECKING:
    from memopt.memory.memory_store import MemoryStore

_LOG = logging.getLogger(__name__)
# Each file costs a search 0.1 ms.
MOST_FILES = 64
# A file of fewer rows is small; so many of them are joined.
_FEW = 32
# Commits of this process between two looks; a look takes 2 ms.
_LOOK = 16
# Merging a whole table of this size takes 0.3 s. What is larger is merged less often.
_WHOLE_BYTES = 64 << 20
# A search is through in a second, and is repeated where it was not; what reads longer is known by
# its lock. Every version that is kept costs a search a look at its name.
_KEEP, _KEEP_READ = timedelta(seconds=10), timedelta(days=7)
# Rows are written anew in parts of about this size: pictures and sounds are large.
_PART_ROWS, _PART_BYTES = 256, 64 << 20


class Upkeep:
    """Looks after the files of one open store.

    Args:
        store: whose files. An object store has no writer lock, so that merging might fail another
            process's update: there only :meth:`MemoryStore.optimize` merges.
        background: look in a thread when commits call for it, and once when the store is closed.
    """

    def __init__(self, store: MemoryStore, *, background: bool = True) -> None:
        self.store = store
        self.background = background and store.place.local is not None
        self._commits = 0
        self._task = Task(self._look, "memopt-upkeep", on_error=self._failed)

    def wrote(self) -> None:
        """Count a commit; look at the files, in the background, when there were enough."""
        self._commits += 1
        if self.background and self._commits >= _LOOK and not self._task.busy:
            self._commits = 0
            self._task.start()

    def close(self) -> None:
        """Wait for a look in progress; look once more if something was written."""
        self._task.close()
        if self.background and self._commits:
            self._task.run()
            self._commits = 0

    def _look(self) -> None:
        tidy(self.store)
        self.store.index.fit()

    def _failed(self, error: Exception) -> None:
        # Untidy files cost time; nothing else may fail by them.
        _LOG.warning("the files of %s could not be merged: %s", self.store.place, error)


def tidy(store: MemoryStore) -> None:
    """Join small files where there are too many of them.

    Raises:
        ConsolidationError: the disk takes no more; the store is as it was.

    >>> import tempfile
    >>> from memopt.memory.model.schema import Content, NewMemory
    >>> from memopt.memory.memory_store import MemoryStore
    >>> store = MemoryStore(tempfile.mkdtemp(), dim=2, background=False)
    >>> for name in range(40):
    ...     new = NewMemory(content=Content(text=f"note {name}"), embedding=np.array([1.0, name]))
    ...     _ = store.add(new)
    >>> tidy(store)
    >>> store.table("memories").stats()["fragment_stats"]["num_fragments"]
    1
    """
    for name in TABLES:
        files, size, rows = _files(store.table(name))
        if files < _FEW:
            continue
        with store.changing():
            if size <= _WHOLE_BYTES:
                merge(store, name)
            elif name == "memories" and store.place.local is not None:
                files -= _join_small(store, max(1, min(_PART_ROWS, rows * _PART_BYTES // size)))
                if files >= MOST_FILES:
                    merge(store, name)
            elif files >= MOST_FILES * min(8, size / _WHOLE_BYTES):
                merge(store, name)


def merge(store: MemoryStore, name: str) -> None:
    """Merge the files of a table, bring its indices up to date, drop versions nobody reads."""
    local = store.place.local
    unread = unless_read(local) if local is not None else nullcontext(False)
    with store.changing(), unread as nobody:
        keep = _KEEP if nobody else _KEEP_READ
        before = store.version(name)
        store.table(name).optimize(cleanup_older_than=keep)
        if name == "edges":
            # The same links in another version: what is held of them need not be read anew.
            store.adjacency.follow(before, store.version(name), EDGES.empty_table())


def _files(table: Any) -> tuple[int, int, int]:
    """Return how many files a table has, their bytes, and their rows."""
    stats = table.stats()
    files = int(stats["fragment_stats"]["num_fragments"])
    return files, int(stats["total_bytes"]), int(stats["num_rows"])


def _join_small(store: MemoryStore, part: int) -> int:
    """Write the rows of small files anew, as one; return how many files are gone.

    Merging a table that is large costs its size in writes each time. This costs what is small, so a
    row is written anew twice: with 31 others, and when the table is merged.
    """
    found = store.fetch(store.query().select([]).with_row_id())["_rowid"].to_numpy()
    # The upper half of Lance's row id is the file.
    files, counts = np.unique(found >> 32, return_counts=True)
    small = files[counts < _FEW]
    if len(small) < _FEW:
        return 0
    ids = found[np.isin(found >> 32, small)]
    cover_ids(store.memories)
    for start in range(0, len(ids), part):
        rows = store.fetch(store.take(ids[start : start + part].tolist()))
        update = store.memories.merge_insert("memory_id").when_matched_update_all()
        update.execute(rows.select(store.memories.schema.names))
    cover_ids(store.memories)
    return len(small) - -(-len(ids) // part)
