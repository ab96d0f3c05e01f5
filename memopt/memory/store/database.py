"""An open database: its tables, its lock, its meta, and queries on it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa

from memopt.errors import ConsolidationError, InputError
from memopt.extras import require
from memopt.memory.model import payload
from memopt.memory.model.filters import utc
from memopt.memory.model.schema import BITS, Embedder
from memopt.memory.store import founding as opening
from memopt.memory.store.locking import lock_of
from memopt.memory.store.meta import Meta, Place

# Lance caches what it read of each version, 7 GB of it unless told otherwise: a store that is
# written all day would fill that. The least holds the index of 150,000 memories.
_LEAST_INDEX_CACHE, _METADATA_CACHE = 128 << 20, 64 << 20


class Connection:
    """What :class:`memopt.memory.MemoryStore` stands on; its arguments are described there.

    Attributes:
        place: where the store lies.
    """

    def __init__(
        self,
        path: str | Path,
        dim: int | None,
        embedder: Embedder | None,
        cipher: payload.Cipher | None,
        clock: Callable[[], datetime],
        *,
        create: bool,
    ) -> None:
        # Read when lancedb is imported: a line per empty cell of an index tells nobody anything.
        os.environ.setdefault("LANCEDB_LOG", "error")
        lancedb = require("lancedb", extra="memory", why="keep memories")
        opening.check_forked(lancedb)
        self._process = os.getpid()
        if dim is not None and dim < 1:
            raise InputError(f"dim is {dim}", fix="give the length of a vector, 1 or more")
        self.place = Place(path)
        self.embedder, self.cipher, self.clock = embedder, cipher, clock
        self._tables: dict[str, Any] = {}
        self._readers: dict[str, Any] = {}
        # Zero: a read sees every commit that was acknowledged before it, of other processes too.
        self._options = {
            "read_consistency_interval": timedelta(0),
            "session": lancedb.Session(*_cache_bytes(self.place)),
            # Rows of many columns are read in 4 ms instead of the 7 ms of the newer 2.2.
            "storage_options": {"new_table_data_storage_version": "2.1"},
        }
        if self.place.local is None:
            self.place.database = lancedb.connect(self.place.uri, **self._options)
        self._stamp = self.place.stamp()
        meta = self.place.read()
        if meta is None:
            self.place.check_free(create=create)
        self._lock = lock_of(self.place.local) if self.place.local else None
        self.database = self.place.database or lancedb.connect(self.place.uri, **self._options)
        if meta is None:
            with self.exclusive():
                meta = self.place.read() or opening.make(
                    self.place, self.database, dim, embedder, cipher, utc(clock())
                )
        self._meta: Meta = meta
        if dim is not None and dim != meta.dim:
            raise InputError(
                f"{self.place} holds vectors of {meta.dim} dimensions, not {dim}",
                fix="leave dim out, or reembed the store",
            )
        self.table("memories")
        self._compact: bool | None = None
        self._tight = False

    @property
    def memories(self) -> Any:
        """The LanceDB table; raw, with rows that a commit deleted and did not sweep yet."""
        return self.table("memories")

    @property
    def forked(self) -> bool:
        """Whether this is a process that was forked from the one that opened the store."""
        return os.getpid() != self._process

    def check_process(self) -> None:
        """Refuse to go on in a forked process: threads, locks and buffers are of the other one.

        Raises:
            ConsolidationError: it is one; what was to be waited for there would never come.
        """
        if self.forked:
            raise ConsolidationError(
                f"{self.place} was opened before this process was forked",
                fix="start processes by 'spawn' or 'forkserver', and open the store in each",
            )

    @property
    def compact(self) -> bool:
        """Whether the vectors were compact when :meth:`look_again` looked last."""
        if self._compact is None:
            with opening.named_errors(self.place, "read"):
                self._compact = BITS in self.memories.schema.names
        return self._compact

    def look_again(self) -> None:
        """Notice whether another process made the vectors compact, or plain again."""
        self._compact = None

    @property
    def meta(self) -> Meta:
        """Dimension, model and format, as they are now: another process may reembed the store."""
        stamp = self.place.stamp()
        if stamp != self._stamp:
            self._meta = self.place.read() or self._meta
            self._stamp = stamp
        return self._meta

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.meta.dim

    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the writer lock of a local store; re-entrant. Keep it short; readers never wait.

        An object store has none: there Lance's own optimistic commits retry on a conflict, so any
        number of processes may add, but only one at a time should update, commit or delete.

        Raises:
            ConsolidationError: the lock stays taken.
        """
        self.check_process()
        return self._lock.held() if self._lock else nullcontext()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the writer lock and give failures of the disk their name.

        Raises:
            ConsolidationError: the disk is full, the folder is read-only, a file is damaged.
        """
        with self.exclusive(), opening.named_errors(self.place, "changed"):
            if not self._tight:
                self.place.tighten()
                self._tight = True
            yield

    def table(self, name: str) -> Any:
        """Return the LanceDB table ``memories``, ``edges``, ``access_log`` or ``events``."""
        self.check_process()
        if name not in self._tables:
            self._tables[name] = opening.table(self.place, self.database, name)
        return self._tables[name]

    def query(self, name: str = "memories") -> Any:
        """Return a new asynchronous query of a table, to be run by :meth:`fetch`.

        The blocking query builder asks for the schema several times, 2 ms of each search.
        """
        return self._reader(name).query()

    def version(self, name: str) -> int:
        """Return the version a table has now; other processes' commits count."""
        from lancedb.background_loop import LOOP

        with opening.named_errors(self.place, "read"):
            return int(LOOP.run(self._reader(name).version()))

    def take(self, row_ids: Sequence[int]) -> Any:
        """Return a query of rows of ``memories`` by Lance's row ids, for :meth:`fetch`."""
        return self._reader("memories").take_row_ids(list(row_ids))

    def fetch(self, query: Any) -> pa.Table:
        """Run a query of :meth:`query` and return all its rows.

        Raises:
            ConsolidationError: a file of the store cannot be read.
        """
        return self.fetch_all([query])[0]

    def fetch_all(self, queries: Sequence[Any]) -> list[pa.Table]:
        """Run several queries at the same time; see :meth:`fetch`."""
        from lancedb.background_loop import LOOP

        async def run() -> list[pa.Table]:
            return await asyncio.gather(*(query.to_arrow() for query in queries))

        self.check_process()
        with opening.named_errors(self.place, "read"):
            try:
                found: list[pa.Table] = LOOP.run(run())
            except (RuntimeError, OSError, ValueError) as error:
                if "not found" not in str(error).lower():
                    raise
                # A file of a version that upkeep or an erasure dropped meanwhile; there is a newer.
                found = LOOP.run(run())
        return found

    def _reader(self, name: str) -> Any:
        self.check_process()
        if name not in self._readers:
            self._readers[name] = opening.reader(self.place, name, self._options)
        return self._readers[name]

    def write_meta(self, **changes: Any) -> None:
        """Change fields of ``memory.json``, atomically."""
        with self.exclusive():
            self._meta = replace(self.place.read() or self._meta, **changes)
            self.place.write(self._meta)


def _cache_bytes(place: Place) -> tuple[int, int]:
    """Return the sizes of the index and the metadata cache.

    The indices that there are, twice, for a version and the next; an eighth of the machine at most.
    """
    found = place.local.glob("*.lance/_indices/*/*") if place.local is not None else ()
    wanted = max(_LEAST_INDEX_CACHE, 2 * sum(file.stat().st_size for file in found))
    memory = psutil.virtual_memory().total
    return min(wanted, memory // 8), min(_METADATA_CACHE, memory // 32)
