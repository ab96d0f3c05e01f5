"""Upkeep: many small commits leave many small files, which every search looks into.

A memory at a time, as an agent adds them, leaves a file each in two tables; a search of a thousand
files takes 150 ms instead of 10. So a store looks at its files now and then, joins the small ones
and deletes the versions nobody reads any more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import numpy as np

from memopt.background import BackgroundTask
from memopt.memory.model.rows import chunks
from memopt.memory.store.database import Database
from memopt.memory.store.link_cache import LinkCache
from memopt.memory.store.locking import unless_read
from memopt.memory.store.meta import TABLES
from memopt.memory.store.observers import StoreObserver

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


class Upkeep(StoreObserver):
    """Looks after the files of one open store.

    Args:
        database: whose files. An object store has no writer lock, so that merging might fail
            another process's update: there only :meth:`MemoryStore.optimize` merges.
        links: told that merging the links changes none.
        then: done after a look.
        background: look in a thread when commits call for it, and once when the store is closed.
    """

    def __init__(
        self,
        database: Database,
        links: LinkCache,
        then: Callable[[], object],
        *,
        background: bool = True,
    ) -> None:
        self._database, self._links, self._then = database, links, then
        self._background = background and database.place.local is not None
        self._commits = 0
        self._task = BackgroundTask(
            self._look,
            "memopt-upkeep",
            # Untidy files cost time; nothing else may fail by them.
            on_error=lambda error: _LOG.warning(
                "the files of %s could not be merged: %s", database.place, error
            ),
        )

    def changed(self) -> None:
        """Count a commit; look at the files, in the background, when there were enough."""
        self._commits += 1
        if self._background and self._commits >= _LOOK and not self._task.busy:
            self._commits = 0
            self._task.start()

    def closing(self) -> None:
        """Wait for a look in progress; look once more if something was written."""
        self._task.close()
        if self._background and self._commits:
            self._task.run()
            self._commits = 0

    def tidy(self) -> None:
        """Join small files where there are too many of them.

        Raises:
            ConsolidationError: the disk takes no more; the store is as it was.

        >>> import tempfile
        >>> from memopt.memory import Content, MemoryStore, NewMemory
        >>> store = MemoryStore(tempfile.mkdtemp(), dim=2, background=False)
        >>> for at in range(40):
        ...     new = NewMemory(content=Content(text=f"note {at}"), embedding=np.array([1.0, at]))
        ...     _ = store.add(new)
        >>> store.upkeep.tidy()
        >>> store.database.memories.stats()["fragment_stats"]["num_fragments"]
        1
        """
        local = self._database.place.local is not None
        for name in TABLES:
            files, size, rows = _files(self._database.table(name))
            if files < _FEW:
                continue
            with self._database.changing():
                if size <= _WHOLE_BYTES:
                    self.merge(name)
                elif name == "memories" and local:
                    files -= self._join_small(max(1, min(_PART_ROWS, rows * _PART_BYTES // size)))
                    if files >= MOST_FILES:
                        self.merge(name)
                elif files >= MOST_FILES * min(8, size / _WHOLE_BYTES):
                    self.merge(name)

    def merge(self, name: str) -> None:
        """Merge the files of a table, bring its indices up to date, drop versions nobody reads."""
        local = self._database.place.local
        unread = unless_read(local) if local is not None else nullcontext(False)
        # The same links in another version: what is held of them need not be read anew.
        following = self._links.following() if name == "edges" else nullcontext()
        with self._database.changing(), unread as nobody, following:
            keep = _KEEP if nobody else _KEEP_READ
            self._database.table(name).optimize(cleanup_older_than=keep)

    def _look(self) -> None:
        self.tidy()
        self._then()

    def _join_small(self, part: int) -> int:
        """Write the rows of small files anew, as one; return how many files are gone.

        Merging a table that is large costs its size in writes each time. This costs what is small,
        so a row is written anew twice: with 31 others, and when the table is merged.
        """
        database = self._database
        found = database.fetch(database.query().select([]).with_row_id())["_rowid"].to_numpy()
        # The upper half of Lance's row id is the file.
        files, counts = np.unique(found >> 32, return_counts=True)
        small = files[counts < _FEW]
        if len(small) < _FEW:
            return 0
        ids = found[np.isin(found >> 32, small)]
        for row_ids in chunks(ids.tolist(), part):
            rows = database.fetch(database.take(row_ids))
            database.replace(rows.select(database.memories.schema.names))
        return len(small) - -(-len(ids) // part)


def _files(table: Any) -> tuple[int, int, int]:
    """Return how many files a table has, their bytes, and their rows."""
    stats = table.stats()
    files = int(stats["fragment_stats"]["num_fragments"])
    return files, int(stats["total_bytes"]), int(stats["num_rows"])
