"""Writes: every call is one atomic commit on ``memories``, or one per chunk of a long stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memopt.errors import ConsolidationError, InputError
from memopt.memory.model import content as contents
from memopt.memory.model import rows
from memopt.memory.model.filters import DELETED, id_list, one_of, utc
from memopt.memory.model.schema import (
    ARCHIVED,
    CONTENT_COLUMNS,
    SHORT_TERM,
    AddResult,
    Content,
    NewMemory,
    memories_schema,
)
from memopt.memory.store import sources
from memopt.memory.store.comparison import Comparison, Existing, has_expired
from memopt.memory.store.embedding import Embedding
from memopt.memory.store.ends import set_ends
from memopt.memory.store.reader import Reader

# Rows of one commit of a long stream: each commit costs milliseconds and a version, and a crash
# loses at most one unacknowledged chunk.
ROWS_PER_COMMIT = 8192
BYTES_PER_COMMIT = 256 << 20
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_OTHERS = ("joint_embedding", "category", "timestamp", "expires_at", "summary")
_UPDATABLE = (*CONTENT_COLUMNS, *_OTHERS)
_Vectors = dict[int, NDArray[np.float32]]


class Writer:
    """Writes the memories of one database.

    Attributes:
        reader: reads the same database.
        embedding: makes the vectors of what comes without.
        redact: text -> text, before it is stored, hashed or embedded.
    """

    def __init__(
        self, reader: Reader, embedding: Embedding, redact: Callable[[str], str] | None
    ) -> None:
        self.reader, self.embedding, self.redact = reader, embedding, redact
        self._database, self._cells = reader.database, reader.cells
        self.existing = Existing(reader)

    # --- adding -----------------------------------------------------------------------------

    def add(self, memories: NewMemory | Iterable[NewMemory]) -> AddResult:
        """Store memories, in chunks; see :meth:`MemoryStore.add`."""
        if isinstance(memories, NewMemory):
            memories = [memories]
        checked = isinstance(memories, Sequence)
        if isinstance(memories, Sequence):
            memories = self._checked(memories, 0)
        ids: list[str] = []
        differing: list[str] = []
        added = 0
        for chunk in _chunks(memories):
            if not checked:
                chunk = self._checked(chunk, len(ids))
            found, new = self._add_chunk(chunk)
            ids += found.ids
            differing += found.differing
            added += new
        return AddResult(tuple(ids), added, len(ids) - added, tuple(differing))

    def _add_chunk(self, chunk: Sequence[NewMemory]) -> tuple[Comparison, int]:
        """Store what of a chunk is not there, in one commit; return how many were new too."""
        now = self._database.now()
        vectors: _Vectors = {}
        absent = any(memory.embedding is None for memory in chunk)
        embedder = self.embedding.embedder if absent else None
        while True:
            if embedder:
                # An embedding costs a hundred times the look-up: what is there is not embedded.
                self._embed(chunk, self.existing.compare(chunk, now).new.values(), vectors)
            with self._database.changing():
                if embedder:
                    # While the vectors were made, another process may have moved the store.
                    self.embedding.check_model(embedder.model_id)
                found = self.existing.compare(chunk, now)
                if embedder and not vectors.keys() >= set(found.new.values()):
                    continue  # what was there is gone meanwhile
                self._embed(chunk, found.new.values(), vectors)
                table, added = self._insert_new(chunk, found, vectors, now)
            break
        observers = self._database.observers
        observers.accessed("delete", found.expired)
        observers.accessed("write", [*_ids(table), *found.renewed])
        self.announce(table)
        return found, added

    def _embed(self, chunk: Sequence[NewMemory], places: Iterable[int], vectors: _Vectors) -> None:
        """Add the vectors of memories that have none in ``vectors`` yet."""
        missing = [at for at in places if at not in vectors]
        given = [at for at in missing if chunk[at].embedding is not None]
        absent = [at for at in missing if chunk[at].embedding is None]
        if given:
            stacked = np.stack([np.asarray(chunk[at].embedding) for at in given])
            vectors.update(zip(given, rows.unit(stacked, self._database.dim), strict=True))
        if absent:
            made = self.embedding.embed([chunk[at].content for at in absent])
            vectors.update(zip(absent, made, strict=True))

    def _insert_new(
        self, chunk: Sequence[NewMemory], found: Comparison, vectors: _Vectors, now: datetime
    ) -> tuple[pa.Table, int]:
        """Write, under the lock, what was compared; return the rows and how many were new."""
        database = self._database
        set_ends(database, found.renewed)
        if not found.new:
            return memories_schema(database.dim).empty_table(), 0
        new = [chunk[at] for at in found.new.values()]
        columns = contents.columns(list(found.new), new, now, database.meta.model_id)
        columns["expires_at"] = list(found.ends.values())
        stacked = np.stack([vectors[at] for at in found.new.values()])
        table = self._cells.stored(rows.new_rows(stacked, columns))
        if found.expired:
            self.clear(found.expired)
        return table, self.insert([table])

    def insert(self, tables: Iterable[pa.Table]) -> int:
        """Write, under the lock, stored rows of ids that are free, in one commit.

        Returns:
            How many were new: on an object store another process may have been first.
        """
        memories = self._database.memories
        schema, count = memories.schema, 0

        def batches() -> Iterator[pa.RecordBatch]:
            nonlocal count
            for table in tables:
                count += table.num_rows
                yield from self._cells.fitted(table).cast(schema).to_batches()

        stream = pa.RecordBatchReader.from_batches(schema, batches())
        if self._database.place.local is not None:
            # Under the writer lock a look-up and an append are as safe as a merge, and twice as
            # fast.
            memories.add(stream)
            return count
        self.sweep()  # a merge would take a row that is marked as deleted for the memory
        merge = memories.merge_insert("memory_id").when_not_matched_insert_all()
        return int(merge.execute(stream.read_all()).num_inserted_rows)

    def announce(self, table: pa.Table) -> None:
        """Tell the observers of new rows."""
        if table.num_rows:
            vectors = rows.vectors_array(table["joint_embedding"], self._database.dim)
            self._database.observers.added(_ids(table), vectors, table["timestamp"].to_pylist())

    # --- changing ---------------------------------------------------------------------------

    def commit(
        self,
        inserts: pa.Table | None = None,
        updates: pa.Table | None = None,
        deletes: Sequence[str] = (),
    ) -> None:
        """Change ``memories`` in one atomic commit: all of it happens or none.

        Args:
            inserts: whole rows with new ids (see :func:`memopt.memory.model.rows.new_rows`).
            updates: whole rows with ids that exist; access counts never go back.
            deletes: ids that exist.

        Raises:
            ConsolidationError: an id to update or delete is gone, or one to insert is there: what
                the change was computed from is no longer true. Nothing was changed.
        """
        database, cells = self._database, self._cells
        empty = memories_schema(database.dim).empty_table()
        inserts = cells.stored(empty if inserts is None else inserts)
        updates = cells.stored(empty if updates is None else updates)
        old, new, gone = _ids(updates), _ids(inserts), id_list(deletes)
        if len({*old, *new, *gone}) != len(old) + len(new) + len(gone):
            raise InputError("one commit names a memory twice")
        with database.changing():
            self.sweep()
            current = database.light(old + gone, ("memory_id", "access_count", "last_access"))
            _refuse("of this commit are gone", {*old, *gone} - set(_ids(current)))
            _refuse("to insert exist already", database.existing(new))
            if gone:
                database.observers.deleting(gone)
            if inserts.num_rows or updates.num_rows:
                source = [inserts, _keep_counts(updates, current), self._tombstones(gone)]
                merge = database.memories.merge_insert("memory_id")
                merge = merge.when_matched_update_all().when_not_matched_insert_all()
                merge.execute(cells.fitted(pa.concat_tables(source)))
                if gone:
                    self.sweep()
            elif gone:
                database.memories.delete(one_of("memory_id", gone))
        database.observers.accessed("write", new + old)
        database.observers.accessed("delete", gone)
        self.announce(inserts)

    def delete(self, ids: Sequence[str]) -> int:
        """Delete memories with what was made of them; see :meth:`MemoryStore.delete`."""
        database, reader = self._database, self.reader
        named = list(dict.fromkeys(id_list(ids)))
        with database.changing():
            # Of dropped originals only the summary is left, which names them.
            made = sources.summaries_of(reader, named)
            present = sorted({*database.existing(named), *made})
            others = sources.released(reader, made, present)
            if others.num_rows:
                self.commit(None, others, present)
                return len(present)
            if present:
                self.clear(present)
        database.observers.accessed("delete", present)
        return len(present)

    def clear(self, ids: Sequence[str]) -> None:
        """Delete, under the lock, the rows of ids with their links.

        Links go first: a crash in between leaves a memory without links, never a link to nothing.
        """
        self._database.observers.deleting(ids)
        self._database.memories.delete(one_of("memory_id", list(ids)))

    def sweep(self) -> int:
        """Delete the rows that a commit marked as deleted; return how many there were.

        A merge that deletes as well joins the whole table, seconds at 100k rows. So a commit marks
        rows as deleted, which makes them unseen at once and atomically, and sweeps afterwards;
        where it was killed in between, the next commit or verify sweeps.
        """
        database, marked = self._database, one_of("tier", [DELETED])
        if not database.fetch(database.query().where(marked).select(["tier"]).limit(1)).num_rows:
            return 0
        return int(database.memories.delete(marked).num_deleted_rows)

    def update(self, memory_id: str, fields: dict[str, Any]) -> None:
        """Change fields of one memory; see :meth:`MemoryStore.update`."""
        fields = self._checked_fields(memory_id, fields)
        vector = fields.pop("joint_embedding", None)
        new_content = any(name in fields for name in CONTENT_COLUMNS)
        moved = vector is not None or new_content
        with self._database.exclusive():
            stored = self._cells.unpack(self.reader.rows([memory_id]))
            row = self._updated_row(memory_id, stored, fields)
            content = Content(**{short: row[name] for name, short in CONTENT_COLUMNS.items()})
            # A summary may stand alone; everything else needs content, as when it was added.
            if new_content or not row["summary"]:
                names = ("category", "timestamp", "expires_at")
                given = {name: row[name] for name in names}
                new = NewMemory(content=content, embedding=vector, **given)
                content = self._checked([new], 0)[0].content
            if vector is not None:
                vectors = rows.unit(np.asarray(vector)[None, :], self._database.dim)
            elif new_content:
                vectors = self.embedding.embed([content])
            else:
                vectors = rows.vectors_array(stored["joint_embedding"], self._database.dim)
            row["text"] = content.text
            shorts = CONTENT_COLUMNS.values()
            row.update({f"has_{name}": name in content.modalities for name in shorts})
            row["has_text"] |= row["summary"] is not None
            changed = rows.new_rows(vectors, {name: [value] for name, value in row.items()})
            if moved:
                self._database.observers.deleting([memory_id])
            self._commit_update(memory_id, row["tier"], changed)
        if moved:
            self.announce(changed)

    def _checked_fields(self, memory_id: str, fields: dict[str, Any]) -> dict[str, Any]:
        unknown = sorted(set(fields) - set(_UPDATABLE))
        if unknown:
            raise InputError(
                f"{unknown[0]!r} cannot be updated", fix=f"one of {', '.join(_UPDATABLE)}"
            )
        if not fields:
            raise InputError(f"nothing to update in {memory_id!r}", fix="give at least one field")
        for name in ("timestamp", "expires_at"):
            if fields.get(name) is not None:
                fields[name] = utc(fields[name])
        if "category" in fields:
            contents.check_label(fields["category"], f"{memory_id!r}: category")
        if fields.get("summary") is not None:
            contents.check_text(fields["summary"], f"{memory_id!r}: summary")
            if self.redact:
                fields["summary"] = self.redact(fields["summary"])
        return fields

    def _updated_row(
        self, memory_id: str, stored: pa.Table, fields: dict[str, Any]
    ) -> dict[str, Any]:
        if not stored.num_rows:
            raise InputError(
                f"{self._database.place} has no memory {memory_id!r}",
                fix="search for it, ids are exact",
            )
        row: dict[str, Any] = stored.drop_columns(["joint_embedding"]).to_pylist()[0]
        if has_expired(row, self._database.now()):
            raise InputError(f"memory {memory_id!r} has expired", fix="add it again")
        if "summary" in fields and row["tier"] == SHORT_TERM:
            raise InputError(f"{memory_id!r} is a short-term memory, it has no summary")
        return {**row, **fields}

    def _commit_update(self, memory_id: str, tier: str, changed: pa.Table) -> None:
        # A summary would go on saying what this memory no longer says.
        made = sources.summaries_of(self.reader, [memory_id])
        if made:
            others = sources.released(self.reader, made, [memory_id])
            parts = [sources.free(changed), others]
            changed = pa.concat_tables([self._cells.stored(part) for part in parts])
        elif tier == ARCHIVED:
            changed = self._cells.pack(changed)
        self.commit(None, changed, sorted(made))

    # --- parts ------------------------------------------------------------------------------

    def _checked(self, memories: Sequence[NewMemory], start: int) -> list[NewMemory]:
        dim = self._database.dim  # once: it looks at a file
        checked = []
        for at, memory in enumerate(memories, start=start):
            memory = contents.redacted(memory, self.redact, f"memory {at}")
            contents.check(memory, at, dim)
            checked.append(memory)
        return checked

    def _tombstones(self, ids: Sequence[str]) -> pa.Table:
        """Return rows that mark ``ids`` as deleted: no content, and expired for every search."""
        vectors = np.zeros((len(ids), self._database.dim), np.float32)
        # A vector of length 0 has no cosine, which an index built in between would trip over.
        vectors[:, 0] = 1
        times = {"timestamp": _EPOCH, "expires_at": _EPOCH}
        columns = {"memory_id": list(ids), "tier": DELETED, **times}
        return self._cells.with_words(rows.new_rows(vectors, columns))


def _refuse(what: str, ids: set[str]) -> None:
    if ids:
        raise ConsolidationError(
            f"{len(ids)} memories {what}, first {min(ids)}", fix="read them again and repeat"
        )


def _keep_counts(updates: pa.Table, current: pa.Table) -> pa.Table:
    """Return ``updates`` with access counts and times no older than those of ``current``."""
    known = {row["memory_id"]: row for row in current.to_pylist()}
    counts, lasts = [], []
    for row in updates.select(["memory_id", "access_count", "last_access"]).to_pylist():
        now = known[row["memory_id"]]
        counts.append(max(row["access_count"], now["access_count"]))
        lasts.append(max(filter(None, (row["last_access"], now["last_access"])), default=None))
    return rows.with_columns(updates, access_count=counts, last_access=lasts)


def _chunks(memories: Iterable[NewMemory]) -> Iterator[list[NewMemory]]:
    """Cut a stream into commits, by rows and by bytes of content."""
    iterator = iter(memories)
    while part := list(islice(iterator, ROWS_PER_COMMIT)):
        chunk: list[NewMemory] = []
        size = 0
        for memory in part:
            content = getattr(memory, "content", Content())
            values = [getattr(content, name) for name in CONTENT_COLUMNS.values()]
            # What is neither text nor bytes is refused when the chunk is checked.
            new = sum(len(value) for value in values if isinstance(value, str | bytes))
            if chunk and size + new > BYTES_PER_COMMIT:
                yield chunk
                chunk, size = [], 0
            chunk.append(memory)
            size += new
        yield chunk


def _ids(table: pa.Table) -> list[str]:
    found: list[str] = table["memory_id"].to_pylist()
    return found
