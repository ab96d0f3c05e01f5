"""The memory store: a LanceDB database that several processes write and read at once."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import pyarrow as pa

from memopt.errors import ConsolidationError, InputError
from memopt.extras import require
from memopt.memory import incoming, payload, rows, searching
from memopt.memory.filters import EVERYTHING, expression, one_of, utc
from memopt.memory.locking import WriterLock
from memopt.memory.meta import Meta, Place
from memopt.memory.schema import (
    ACCESS_LOG,
    DEFAULT_DIM,
    EDGES,
    EVENTS,
    AddResult,
    Content,
    Embedder,
    Filter,
    Hit,
    Link,
    Memory,
    NewMemory,
    memories_schema,
)
from memopt.memory.touches import Touches

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Rows of one commit of a long stream: each commit costs milliseconds and a version, and a crash
# loses at most one unacknowledged chunk.
ROWS_PER_COMMIT = 8192
BYTES_PER_COMMIT = 256 << 20
# How many ids go into one IN list: Lance takes 10k in under 0.1 s, parsing grows with it.
_IDS_PER_QUERY = 10_000


class Listener(Protocol):
    """What wants to know of every new and every vanishing memory: the graph, the index, a log."""

    def added(
        self, ids: Sequence[str], vectors: NDArray[np.float32], timestamps: Sequence[datetime]
    ) -> None:
        """Rows were committed; called after the commit, outside the writer lock."""

    def deleting(self, ids: Sequence[str]) -> None:
        """Rows are about to be deleted; called inside the writer lock, before the commit."""


class MemoryStore:
    """A durable store of memories with their vectors.

    Args:
        path: a local folder (made when absent) or the URI of an object store.
        embedder: makes the vectors of content that comes without one.
        dim: length of a vector; by default the embedder's, or 768. An existing store keeps its own.
        cipher: encrypts text, media and summaries; an encrypted store opens only with its key.
        redact: text -> text, before it is stored, hashed or embedded.
        actor: who reads and writes, for the access log.
        clock: the current time, UTC.
        create: make the store when it is absent; False raises instead.

    Raises:
        ConsolidationError: the path is no store, the store is of a newer format, or the key is
            wrong.
        InputError: ``dim`` is not the dimension of the store.

    >>> import tempfile
    >>> with MemoryStore(tempfile.mkdtemp(), dim=2) as store:
    ...     new = NewMemory(content=Content(text="a red door"), embedding=np.array([1.0, 0.0]))
    ...     result = store.add(new)
    ...     store.search(np.array([1.0, 0.1]))[0].memory.text
    'a red door'
    """

    def __init__(
        self,
        path: str | Path,
        *,
        embedder: Embedder | None = None,
        dim: int | None = None,
        cipher: payload.Cipher | None = None,
        redact: Callable[[str], str] | None = None,
        actor: str | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        create: bool = True,
    ) -> None:
        lancedb = require("lancedb", extra="memory", why="keep memories")
        if dim is not None and dim < 1:
            raise InputError(f"dim is {dim}", fix="give the length of a vector, 1 or more")
        self.place = Place(path)
        self.embedder, self.cipher, self.redact, self.clock = embedder, cipher, redact, clock
        self.actor = actor or os.environ.get("USER", "")
        self.listeners: list[Listener] = []
        # Sets how hard a vector query looks: query, top_k -> query. The index knows.
        self.tune: Callable[[Any, int], Any] = lambda query, top_k: query
        self._touches = Touches(self)
        meta = self.place.read()
        if meta is None and not create:
            raise ConsolidationError(
                f"{self.place} is no memory store", fix="check the path, or add a memory to make it"
            )
        if meta is None:
            self.place.check_free()
        self._lock = WriterLock(self.place.local) if self.place.local else None
        # Zero: a read sees every commit that was acknowledged before it, of other processes too.
        self.database = lancedb.connect(self.place.uri, read_consistency_interval=timedelta(0))
        if meta is None:
            with self.exclusive():
                meta = self.place.read() or self._make(dim)
        self.meta: Meta = meta
        if dim is not None and dim != meta.dim:
            raise InputError(
                f"{self.place} holds vectors of {meta.dim} dimensions, not {dim}",
                fix="leave dim out, or reembed the store",
            )
        self._id_key = self._open_key()
        self._tables: dict[str, Any] = {}
        self.memories = self.table("memories")

    # --- life -------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is buffered (access counts). The store can still be used afterwards."""
        self.flush()

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.meta.dim

    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the writer lock of a local store; re-entrant. Keep it short, readers never wait.

        An object store has none: there Lance's own optimistic commits retry on a conflict.
        """
        return self._lock.held() if self._lock else nullcontext()

    def table(self, name: str) -> Any:
        """Return the LanceDB table ``memories``, ``edges``, ``access_log`` or ``events``."""
        if name not in self._tables:
            try:
                self._tables[name] = self.database.open_table(name)
            except ValueError as error:
                raise ConsolidationError(
                    f"{self.place} is damaged: its table {name!r} cannot be opened ({error})",
                    fix="restore it from a copy",
                ) from error
        return self._tables[name]

    def write_meta(self, **changes: Any) -> None:
        """Change ``memory.json`` (model_id, key_id, id_key, dim), atomically."""
        with self.exclusive():
            current = self.place.read() or self.meta
            self.meta = replace(current, **changes)
            self.place.write(self.meta)

    # --- writing ----------------------------------------------------------------------------

    def add(self, memories: NewMemory | Iterable[NewMemory]) -> AddResult:
        """Store memories; one that is there already (same id) is left as it is.

        A sequence is checked whole before anything is stored; an iterator is stored in chunks of
        ROWS_PER_COMMIT, each one atomic commit, so after an error or a crash the same call can be
        repeated and completes what is missing.

        Raises:
            InputError: a memory is empty, too large, damaged, or its vector does not fit; no
                memory of its chunk was stored.
        """
        if isinstance(memories, NewMemory):
            memories = [memories]
        checked = isinstance(memories, Sequence)
        if isinstance(memories, Sequence):
            memories = [incoming.redacted(memory, self.redact) for memory in memories]
            for at, memory in enumerate(memories):
                incoming.check(memory, at)
        ids: list[str] = []
        added = 0
        for chunk in _chunks(memories):
            if not checked:
                chunk = [incoming.redacted(memory, self.redact) for memory in chunk]
                for at, memory in enumerate(chunk, start=len(ids)):
                    incoming.check(memory, at)
            chunk_ids, new = self._add_chunk(chunk)
            ids += chunk_ids
            added += new
        return AddResult(tuple(ids), added, len(ids) - added)

    def commit(
        self,
        inserts: pa.Table | None = None,
        updates: pa.Table | None = None,
        deletes: Sequence[str] = (),
    ) -> None:
        """Change ``memories`` in one atomic commit: all of it happens or none.

        Args:
            inserts: whole rows with new ids (see :func:`memopt.memory.rows.new_rows`).
            updates: whole rows with ids that exist; access counts never go back.
            deletes: ids that exist.

        Raises:
            ConsolidationError: an id to update or delete is gone, or one to insert is there: what
                the change was computed from is no longer true. Nothing was changed.
        """
        empty = memories_schema(self.dim).empty_table()
        inserts, updates = (self._sealed(t) if t is not None else empty for t in (inserts, updates))
        old, new = updates["memory_id"].to_pylist(), inserts["memory_id"].to_pylist()
        gone = list(deletes)
        if len(set(old + new + gone)) != len(old) + len(new) + len(gone):
            raise InputError("one commit names a memory twice")
        with self.exclusive():
            current = self.light(old + gone, ("memory_id", "access_count", "last_access"))
            missing = sorted(set(old + gone) - set(current["memory_id"].to_pylist()))
            if missing:
                raise ConsolidationError(
                    f"{len(missing)} memories changed meanwhile are gone, first {missing[0]}",
                    fix="read them again and repeat",
                )
            clash = self._existing(new)
            if clash:
                raise ConsolidationError(
                    f"{len(clash)} memories to insert exist already, first {min(clash)}",
                    fix="read them again and repeat",
                )
            if gone:
                for listener in self.listeners:
                    listener.deleting(gone)
            source = pa.concat_tables([inserts, keep_counts(updates, current)])
            if source.num_rows:
                merge = (
                    self.memories.merge_insert("memory_id")
                    .when_matched_update_all()
                    .when_not_matched_insert_all()
                )
                if gone:
                    merge = merge.when_not_matched_by_source_delete(one_of("memory_id", gone))
                merge.execute(source)
            elif gone:
                self.memories.delete(one_of("memory_id", gone))
        if new:
            self._announce(inserts)

    def delete(self, ids: Sequence[str]) -> int:
        """Delete memories with their links in one commit; unknown ids are passed over.

        The bytes leave the disk with :func:`memopt.memory.erase.erase`.

        Returns:
            How many there were.
        """
        with self.exclusive():
            present = sorted(self._existing(list(dict.fromkeys(ids))))
            if present:
                for listener in self.listeners:
                    listener.deleting(present)
                self.memories.delete(one_of("memory_id", present))
        return len(present)

    def touch(self, ids: Sequence[str]) -> None:
        """Count one access of each; written in the background, at the latest by close()."""
        self._touches.count(ids, utc(self.clock()))

    def flush(self) -> None:
        """Write the buffered access counts now."""
        self._touches.flush()

    def pending_touches(self) -> dict[str, tuple[int, datetime]]:
        """Return id -> (accesses, last access) that are not in the table yet."""
        return self._touches.pending()

    # --- reading ----------------------------------------------------------------------------

    def get(self, memory_id: str, *, links: bool = True) -> Memory:
        """Return one memory; looking at it by id does not count as an access.

        Raises:
            InputError: there is none of that id.
        """
        return self.get_many([memory_id], links=links)[0]

    def get_many(self, ids: Sequence[str], *, links: bool = True) -> list[Memory]:
        """Return memories in the order of ``ids``.

        Raises:
            InputError: one is unknown (or expired), naming it.
        """
        found = payload.unseal(self.rows(ids), self.cipher)
        linked = self.links(ids) if links else {}
        pending = self.pending_touches()
        now = utc(self.clock())
        by_id = {
            memory.memory_id: memory
            for memory in rows.memories(found, self.dim, linked, pending)
            if memory.expires_at is None or memory.expires_at > now
        }
        missing = [memory_id for memory_id in ids if memory_id not in by_id]
        if missing:
            raise InputError(
                f"{self.place} has no memory {missing[0]!r}", fix="search for it, ids are exact"
            )
        return [by_id[memory_id] for memory_id in ids]

    def rows(self, ids: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """Return the raw rows of those ``ids`` that exist, in any order.

        Ids are first looked up alone (through their index), so that only the rows asked for are
        read: media stay on disk for all others.
        """
        names = list(columns or memories_schema(self.dim).names)
        tables = []
        for part in _parts(list(dict.fromkeys(ids)), _IDS_PER_QUERY):
            tables.append(self._take(part, names))
        return pa.concat_tables(tables) if tables else self._schema(names).empty_table()

    def links(self, ids: Sequence[str]) -> dict[str, list[Link]]:
        """Return the associations of each memory that has any, strongest first."""
        found: dict[str, list[Link]] = {}
        for part in _parts(list(ids), _IDS_PER_QUERY):
            edges = (
                self.table("edges")
                .search()
                .where(one_of("source", part))
                .select(["source", "target", "weight"])
                .limit(None)
                .to_arrow()
            )
            for edge in edges.to_pylist():
                found.setdefault(edge["source"], []).append(Link(edge["target"], edge["weight"]))
        for links in found.values():
            links.sort(key=lambda link: (-link.weight, link.linked_id))
        return found

    def scan(
        self,
        where: Filter = EVERYTHING,
        columns: Sequence[str] | None = None,
        batch_size: int = 4096,
    ) -> Iterator[pa.RecordBatch]:
        """Yield raw rows (packed content stays packed) in batches, from one consistent version.

        Args:
            columns: by default all; name few, media are large.
        """
        if columns is None or "access_count" in columns or "last_access" in columns:
            self.flush()
        query = self.memories.search()
        condition = expression(where)
        if condition is not None:
            query = query.where(condition)
        names = list(columns or memories_schema(self.dim).names)
        yield from query.select(names).limit(None).to_batches(batch_size)

    def vectors(
        self, ids: Sequence[str] | None = None, where: Filter = EVERYTHING
    ) -> tuple[list[str], NDArray[np.float32]]:
        """Return ids and vectors, float32 (n, dim), of given ids (in their order) or of a filter.

        Raises:
            InputError: one of ``ids`` is unknown.
        """
        names = ["memory_id", "joint_embedding"]
        if ids is None:
            batches = list(self.scan(where, names))
            table = pa.Table.from_batches(batches, schema=self._schema(names))
            found = table["memory_id"].to_pylist()
            return found, rows.vectors_array(table["joint_embedding"], self.dim)
        table = self.rows(ids, names)
        at = {memory_id: row for row, memory_id in enumerate(table["memory_id"].to_pylist())}
        missing = [memory_id for memory_id in ids if memory_id not in at]
        if missing:
            raise InputError(f"{self.place} has no memory {missing[0]!r}")
        vectors = rows.vectors_array(table["joint_embedding"], self.dim)
        return list(ids), vectors[[at[memory_id] for memory_id in ids]]

    def count(self, where: Filter = EVERYTHING) -> int:
        """Return how many memories pass the filter."""
        if where == EVERYTHING:
            return int(self.memories.count_rows())
        return sum(batch.num_rows for batch in self.scan(where, ["memory_id"]))

    def search(
        self,
        vector: NDArray[Any] | Sequence[float] | None = None,
        *,
        text: str | None = None,
        where: Filter = EVERYTHING,
        top_k: int = 10,
        touch: bool = True,
        model_id: str | None = None,
    ) -> list[Hit]:
        """Find memories by vector, by words, or by both (reciprocal rank fusion).

        Args:
            vector: (dim,), of the model the store was made with.
            text: words; full-text search of the plain texts and summaries (BM25).
            where: only these.
            touch: count the results as accessed.
            model_id: what made ``vector``; refused when it is not what made the store's vectors.

        Returns:
            At most ``top_k`` hits, best first. The score is the cosine similarity for a vector,
            BM25 relative to the best hit for words, relative rank score for both; 0..1.

        Raises:
            InputError: no query at all, a vector that does not fit, top_k below 1.
            ConsolidationError: search by words alone in an encrypted store.
        """
        self._check_model(model_id)
        found = searching.search(self, vector, text=text, where=where, top_k=top_k)
        if touch and found:
            self.touch([hit.memory.memory_id for hit in found])
        return found

    def find(
        self,
        content: Content,
        *,
        where: Filter = EVERYTHING,
        top_k: int = 10,
        touch: bool = True,
    ) -> list[Hit]:
        """Embed ``content`` and search by its vector.

        Raises:
            InputError: the content is empty or damaged, or the embedder is not the store's.
        """
        incoming.check_content(content, "query")
        searching.check_top_k(top_k)
        vector = self.embed([content])[0]
        return self.search(vector, where=where, top_k=top_k, touch=touch)

    # --- parts ------------------------------------------------------------------------------

    def embed(self, contents: Sequence[Content]) -> NDArray[np.float32]:
        """Return unit vectors, float32 (n, dim), by the store's embedder.

        Raises:
            InputError: there is no embedder, or it is not the one that made the store's vectors.
        """
        if self.embedder is None:
            raise InputError("no embedding was given and the store has no embedder")
        self._check_model(self.embedder.model_id)
        return rows.unit(np.asarray(self.embedder.embed(contents)), self.dim)

    def pack(self, table: pa.Table) -> pa.Table:
        """Return rows with their content compressed (and encrypted where the store is)."""
        return payload.seal(payload.unseal(table, self.cipher), compress=True, cipher=self.cipher)

    def unpack(self, table: pa.Table) -> pa.Table:
        """Return rows with their content back in the plain columns."""
        return payload.unseal(table, self.cipher)

    def _sealed(self, table: pa.Table) -> pa.Table:
        """Encrypt the rows that are plain, where the store is encrypted."""
        table = table.select(memories_schema(self.dim).names).cast(memories_schema(self.dim))
        if self.cipher is None or not table.num_rows:
            return table
        plain = np.array([not codec for codec in table["codec"].to_pylist()])
        return pa.concat_tables(
            [
                table.filter(pa.array(~plain)),
                payload.seal(table.filter(pa.array(plain)), compress=False, cipher=self.cipher),
            ]
        )

    def _add_chunk(self, chunk: Sequence[NewMemory]) -> tuple[list[str], int]:
        ids = [
            m.memory_id or incoming.content_id(m.content, m.category, self._id_key) for m in chunk
        ]
        unique = dict(zip(reversed(ids), reversed(chunk), strict=True))
        unique = {memory_id: unique[memory_id] for memory_id in ids}
        if any(memory.embedding is None for memory in unique.values()):
            known = self._existing(list(unique))
            unique = {key: memory for key, memory in unique.items() if key not in known}
        if not unique:
            return ids, 0
        new_ids, new = list(unique), list(unique.values())
        vectors = self._vectors_of(new)
        columns = incoming.columns(new_ids, new, utc(self.clock()), self.meta.model_id)
        table = self._sealed(rows.new_rows(vectors, columns))
        if self._lock is None:
            merge = self.memories.merge_insert("memory_id").when_not_matched_insert_all()
            added = merge.execute(table).num_inserted_rows
            self._announce(table)
            return ids, added
        with self.exclusive():
            known = self._existing(new_ids)
            if known:
                absent = [key not in known for key in table["memory_id"].to_pylist()]
                table = table.filter(pa.array(absent))
            if table.num_rows:
                self.memories.add(table)
        if table.num_rows:
            self._announce(table)
        return ids, table.num_rows

    def _vectors_of(self, memories: Sequence[NewMemory]) -> NDArray[np.float32]:
        vectors = np.empty((len(memories), self.dim), np.float32)
        given = [at for at, memory in enumerate(memories) if memory.embedding is not None]
        absent = [at for at, memory in enumerate(memories) if memory.embedding is None]
        if given:
            stacked = incoming.given_vectors([memories[at] for at in given], self.dim)
            vectors[given] = rows.unit(stacked, self.dim)
        if absent:
            vectors[absent] = self.embed([memories[at].content for at in absent])
        return vectors

    def _announce(self, table: pa.Table) -> None:
        if not self.listeners:
            return
        ids = table["memory_id"].to_pylist()
        vectors = rows.vectors_array(table["joint_embedding"], self.dim)
        timestamps = table["timestamp"].to_pylist()
        for listener in self.listeners:
            listener.added(ids, vectors, timestamps)

    def _existing(self, ids: Sequence[str]) -> set[str]:
        return set(self.light(ids, ("memory_id",))["memory_id"].to_pylist())

    def light(self, ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """Return small columns of those ``ids`` that exist, in any order."""
        tables = [
            self.memories.search()
            .where(one_of("memory_id", part))
            .select(list(columns))
            .limit(None)
            .to_arrow()
            for part in _parts(ids, _IDS_PER_QUERY)
        ]
        return pa.concat_tables(tables) if tables else self._schema(columns).empty_table()

    def _take(self, ids: Sequence[str], names: list[str]) -> pa.Table:
        where = one_of("memory_id", ids)
        query = self.memories.search().where(where).select(["memory_id"]).limit(None)
        found = query.with_row_id(True).to_arrow()
        if not found.num_rows:
            return self._schema(names).empty_table()
        wanted = [*names, "memory_id"] if "memory_id" not in names else names
        try:
            taken = self.memories.take_row_ids(found["_rowid"].to_pylist()).select(wanted)
            table = taken.to_arrow()
            if sorted(table["memory_id"].to_pylist()) == sorted(found["memory_id"].to_pylist()):
                return table.select(names)
        except (ValueError, RuntimeError, OSError):
            pass
        # Compaction moved the rows between the two reads: one query sees one version.
        return self.memories.search().where(where).select(names).limit(None).to_arrow()

    def _schema(self, names: Sequence[str]) -> pa.Schema:
        schema = memories_schema(self.dim)
        return pa.schema([schema.field(name) for name in names])

    def _check_model(self, model_id: str | None) -> None:
        if not model_id or model_id == self.meta.model_id:
            return
        if not self.meta.model_id and not self.count():
            self.write_meta(model_id=model_id)
            return
        raise InputError(
            f"{self.place} holds vectors of {self.meta.model_id or 'an unnamed model'!r}, "
            f"not of {model_id!r}",
            fix="open it with that model, or move it: memopt memory reembed",
        )

    def _make(self, dim: int | None) -> Meta:
        embedder, cipher = self.embedder, self.cipher
        dim = dim or (embedder.dim if embedder else DEFAULT_DIM)
        meta = Meta(
            dim=dim,
            model_id=embedder.model_id if embedder else "",
            created_at=utc(self.clock()).isoformat(),
            key_id=cipher.key_id if cipher else None,
            id_key=base64.b64encode(cipher.encrypt(os.urandom(32))).decode() if cipher else None,
        )
        schemas = (memories_schema(dim), EDGES, ACCESS_LOG, EVENTS)
        for name, schema in zip(
            ("memories", "edges", "access_log", "events"), schemas, strict=True
        ):
            self.database.create_table(name, schema=schema, exist_ok=True)
        searching.create_indices(self.database)
        self.place.write(meta)
        return meta

    def _open_key(self) -> bytes:
        meta, cipher = self.meta, self.cipher
        if meta.id_key is None:
            if cipher is not None:
                raise ConsolidationError(
                    f"{self.place} is not encrypted, and a key was given",
                    fix="open it without a key, or import its export into a new encrypted store",
                )
            return b""
        if cipher is None:
            raise ConsolidationError(
                f"{self.place} is encrypted with key {meta.key_id!r} and no key was given",
                fix="open the store with its key",
            )
        return payload.open_secret(cipher, base64.b64decode(meta.id_key), meta.key_id)


def keep_counts(updates: pa.Table, current: pa.Table) -> pa.Table:
    """Return ``updates`` with access counts and times no older than those of ``current``."""
    known = {row["memory_id"]: row for row in current.to_pylist()}
    counts, lasts = [], []
    for row in updates.select(["memory_id", "access_count", "last_access"]).to_pylist():
        now = known[row["memory_id"]]
        counts.append(max(row["access_count"], now["access_count"]))
        lasts.append(max(filter(None, (row["last_access"], now["last_access"])), default=None))
    for name, values in (("access_count", counts), ("last_access", lasts)):
        field = updates.schema.field(name)
        at = updates.column_names.index(name)
        updates = updates.set_column(at, field, pa.array(values, field.type))
    return updates


def _chunks(memories: Iterable[NewMemory]) -> Iterator[list[NewMemory]]:
    """Cut a stream into commits by rows and by bytes of content."""
    iterator = iter(memories)
    while part := list(islice(iterator, ROWS_PER_COMMIT)):
        chunk: list[NewMemory] = []
        size = 0
        for memory in part:
            content = getattr(memory, "content", Content())
            new = sum(len(getattr(content, name) or b"") for name in ("text", "vision", "audio"))
            if chunk and size + new > BYTES_PER_COMMIT:
                yield chunk
                chunk, size = [], 0
            chunk.append(memory)
            size += new
        yield chunk


def _parts(ids: Sequence[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(ids), size):
        yield list(ids[start : start + size])
