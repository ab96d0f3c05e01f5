"""An open database: its tables, its lock, its meta, its key, and queries on it."""

from __future__ import annotations

import asyncio
import logging
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
from memopt.memory.model.filters import id_list, one_of, present, utc
from memopt.memory.model.payload import Cipher
from memopt.memory.model.rows import chunks
from memopt.memory.model.schema import BITS, WORDS, Embedder, memories_schema
from memopt.memory.store import creation
from memopt.memory.store.locking import ReadOnlyError, lock_of
from memopt.memory.store.meta import Location, Meta
from memopt.memory.store.observers import Observers

_LOG = logging.getLogger(__name__)
# Lance caches what it read of each version, 7 GB of it unless told otherwise: a store that is
# written all day would fill that. The least holds the index of 150,000 memories.
_LEAST_INDEX_CACHE, _METADATA_CACHE = 128 << 20, 64 << 20
# How many ids go into one IN list: Lance takes 10k in under 0.1 s, parsing grows with it.
_IDS_PER_QUERY = 10_000


class Database:
    """A LanceDB database that is a store; :class:`memopt.memory.MemoryStore` has the arguments.

    Attributes:
        place: where the store lies.
        connection: LanceDB's own.
        cipher: seals content; None in a plain store.
        clock: the current time, UTC.
        observers: who is told what happens to the memories.
    """

    def __init__(
        self,
        path: str | Path,
        dim: int | None,
        embedder: Embedder | None,
        cipher: Cipher | None,
        clock: Callable[[], datetime],
        *,
        create: bool,
    ) -> None:
        # Read when lancedb is imported: a line per empty cell of an index tells nobody anything.
        os.environ.setdefault("LANCEDB_LOG", "error")
        lancedb = require("lancedb", extra="memory", why="keep memories")
        creation.check_forked(lancedb)
        self._process = os.getpid()
        if dim is not None and dim < 1:
            raise InputError(f"dim is {dim}", fix="give the length of a vector, 1 or more")
        self.place = Location(path)
        self.cipher, self.clock = cipher, clock
        self.observers = Observers()
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
        self.connection = self.place.database or lancedb.connect(self.place.uri, **self._options)
        if meta is None:
            with self.exclusive():
                meta = self.place.read() or creation.make(
                    self.place, self.connection, dim, embedder, cipher, self.now()
                )
        self._meta: Meta = meta
        if dim is not None and dim != meta.dim:
            raise InputError(
                f"{self.place} holds vectors of {meta.dim} dimensions, not {dim}",
                fix="leave dim out, or reembed the store",
            )
        self.table("memories")
        self._compact: bool | None = None
        self._tight = self._told_read_only = False
        self._id_key = creation.IdKey()
        self._id_key_of: str | None = ""
        self.id_key()

    # --- what it is -------------------------------------------------------------------------

    def now(self) -> datetime:
        """Return the time of the clock in UTC."""
        return utc(self.clock())

    @property
    def memories(self) -> Any:
        """The LanceDB table; raw, with rows that a commit deleted and did not sweep yet."""
        return self.table("memories")

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

    def write_meta(self, **changes: Any) -> None:
        """Change fields of ``memory.json``, atomically."""
        with self.exclusive():
            self._meta = replace(self.place.read() or self._meta, **changes)
            self.place.write(self._meta)

    def id_key(self) -> creation.IdKey:
        """Return the secret of an encrypted store, as it is now: another process may rotate keys.

        Raises:
            ConsolidationError: the key does not open it, any longer.
        """
        meta = self.meta
        if meta.id_key != self._id_key_of:
            self._id_key = creation.id_key(self.place, meta, self.cipher)
            self._id_key_of = meta.id_key
        return self._id_key

    def use_key(self, cipher: Cipher) -> None:
        """Seal with another key from now on, which opens the store too."""
        self.cipher = cipher

    @property
    def compact(self) -> bool:
        """Whether the vectors were compact when :meth:`look_again` looked last."""
        if self._compact is None:
            with creation.named_errors(self.place, "read"):
                self._compact = BITS in self.memories.schema.names
        return self._compact

    def look_again(self) -> None:
        """Notice whether another process made the vectors compact, or plain again."""
        self._compact = None

    # --- who may change it ------------------------------------------------------------------

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
        """Hold the writer lock, give failures of the disk their name, and tell the observers.

        Raises:
            ConsolidationError: the disk is full, the folder is read-only, a file is damaged, or the
                key was replaced.
        """
        with self.exclusive(), creation.named_errors(self.place, "changed"):
            if not self._tight:
                self.place.tighten()
                self._tight = True
            # What is sealed under a key that was replaced meanwhile would open for nobody.
            self.id_key()
            yield
        self.observers.changed()

    def keep_book(self, write: Callable[[], None]) -> None:
        """Write down what reading leaves behind, where the store can be written.

        Whoever may only read finds what is there; that is said in the log once. What a forked
        process finds buffered is written by the other.
        """
        if self.forked:
            return
        try:
            write()
        except ReadOnlyError as error:
            if not self._told_read_only:
                self._told_read_only = True
                _LOG.warning(
                    "%s may only be read: accesses are neither counted nor logged (%s)",
                    self.place,
                    error,
                )

    # --- tables and queries -----------------------------------------------------------------

    def table(self, name: str) -> Any:
        """Return the LanceDB table ``memories``, ``edges``, ``access_log`` or ``events``."""
        self.check_process()
        if name not in self._tables:
            self._tables[name] = creation.table(self.place, self.connection, name)
        return self._tables[name]

    def schema(self, names: Sequence[str]) -> pa.Schema:
        """Return the schema of some columns of ``memories``, row ids among them."""
        row_id = pa.field("_rowid", pa.uint64())
        known = memories_schema(self.dim).append(WORDS).append(row_id)
        return pa.schema([known.field(name) for name in names])

    def query(self, name: str = "memories") -> Any:
        """Return a new asynchronous query of a table, to be run by :meth:`fetch`.

        The blocking query builder asks for the schema several times, 2 ms of each search.
        """
        return self._reader(name).query()

    def version(self, name: str) -> int:
        """Return the version a table has now; other processes' commits count."""
        from lancedb.background_loop import LOOP

        with creation.named_errors(self.place, "read"):
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
        with creation.named_errors(self.place, "read"):
            try:
                found: list[pa.Table] = LOOP.run(run())
            except (RuntimeError, OSError, ValueError) as error:
                if "not found" not in str(error).lower():
                    raise
                # A file of a version that upkeep or an erasure dropped meanwhile; there is a newer.
                found = LOOP.run(run())
        return found

    def light(self, ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """Return small columns of those ``ids`` that exist, in any order, by one filtered scan."""
        tables = [
            self.fetch(self.query().where(present(one_of("memory_id", part))).select(list(columns)))
            for part in chunks(id_list(ids), _IDS_PER_QUERY)
        ]
        return pa.concat_tables(tables) if tables else self.schema(columns).empty_table()

    def existing(self, ids: Sequence[str]) -> set[str]:
        """Return those of ``ids`` that exist, expired ones too."""
        return set(self.light(ids, ("memory_id",))["memory_id"].to_pylist())

    # --- writing ----------------------------------------------------------------------------

    def replace(self, values: pa.Table) -> None:
        """Replace, under the lock, columns of rows that are there, found by ``memory_id``.

        Only with an id index that covers every row does a merge of a few columns replace just
        these, otherwise it scans the table and writes the rows anew, media and all. And afterwards
        the index has forgotten the fragments that were touched, since their key counts as written.
        """
        self._cover_ids()
        self.memories.merge_insert("memory_id").when_matched_update_all().execute(values)
        self._cover_ids()

    def overwrite_memories(self, batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> None:
        """Write all memories anew in one commit, under the lock, and their indices after it."""
        self.memories.add(pa.RecordBatchReader.from_batches(schema, batches), mode="overwrite")
        self.remake_indices()

    def remake_indices(self) -> None:
        """Make the indices that a table written anew lacks, and look how it keeps vectors."""
        creation.create_indices(self.connection)
        self.look_again()

    def _cover_ids(self) -> None:
        """Rebuild the id index where it does not cover every row; 50 ms for 100k rows."""
        from lancedb.index import BTree

        stats = self.memories.index_stats("memory_id_idx")
        if stats is None or stats.num_unindexed_rows:
            self.memories.create_index("memory_id", config=BTree(), replace=True)

    def _reader(self, name: str) -> Any:
        self.check_process()
        if name not in self._readers:
            self._readers[name] = creation.reader(self.place, name, self._options)
        return self._readers[name]


def _cache_bytes(place: Location) -> tuple[int, int]:
    """Return the sizes of the index and the metadata cache.

    The indices that there are, twice, for a version and the next; an eighth of the machine at most.
    """
    files = place.local.glob("*.lance/_indices/*/*") if place.local is not None else ()
    size = max(_LEAST_INDEX_CACHE, 2 * sum(file.stat().st_size for file in files))
    memory = psutil.virtual_memory().total
    return min(size, memory // 8), min(_METADATA_CACHE, memory // 32)
