"""Writes: every call is one atomic commit on ``memories``, or one per chunk of a long stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from memopt.errors import ConsolidationError, InputError
from memopt.memory.lifecycle.retention import set_ends
from memopt.memory.model import content as incoming
from memopt.memory.model import rows
from memopt.memory.model.filters import DELETED, id_list, one_of, utc
from memopt.memory.model.schema import (
    SHORT_TERM,
    AddResult,
    Content,
    NewMemory,
    memories_schema,
)
from memopt.memory.store import signs as compact
from memopt.memory.store import sources as derived
from memopt.memory.store import word_column as lexicon
from memopt.memory.store.existing import Standing, standing

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memopt.memory.memory_store import MemoryStore

# Rows of one commit of a long stream: each commit costs milliseconds and a version, and a crash
# loses at most one unacknowledged chunk.
ROWS_PER_COMMIT = 8192
BYTES_PER_COMMIT = 256 << 20
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CONTENT = {"text": "text", "vision_data": "vision", "audio_data": "audio"}
_OTHERS = ("joint_embedding", "category", "timestamp", "expires_at", "summary")
_UPDATABLE = (*_CONTENT, *_OTHERS)


def add(store: MemoryStore, memories: NewMemory | Iterable[NewMemory]) -> AddResult:
    """Do what :meth:`MemoryStore.add` says."""
    if isinstance(memories, NewMemory):
        memories = [memories]
    checked = isinstance(memories, Sequence)
    if isinstance(memories, Sequence):
        memories = _checked(store, memories, 0)
    ids: list[str] = []
    differing: list[str] = []
    added = 0
    for chunk in _chunks(memories):
        if not checked:
            chunk = _checked(store, chunk, len(ids))
        found, new = _add_chunk(store, chunk)
        ids += found.ids
        differing += found.differing
        added += new
    return AddResult(tuple(ids), added, len(ids) - added, tuple(differing))


def commit(
    store: MemoryStore,
    inserts: pa.Table | None,
    updates: pa.Table | None,
    deletes: Sequence[str],
) -> None:
    """Do what :meth:`MemoryStore.commit` says."""
    empty = memories_schema(store.dim).empty_table()
    inserts = sealed(store, empty if inserts is None else inserts)
    updates = sealed(store, empty if updates is None else updates)
    old, new, gone = _ids(updates), _ids(inserts), id_list(deletes)
    if len({*old, *new, *gone}) != len(old) + len(new) + len(gone):
        raise InputError("one commit names a memory twice")
    with store.changing():
        sweep(store)
        current = store.light(old + gone, ("memory_id", "access_count", "last_access"))
        missing = sorted({*old, *gone} - set(_ids(current)))
        if missing:
            raise ConsolidationError(
                f"{len(missing)} memories of this commit are gone, first {missing[0]}",
                fix="read them again and repeat",
            )
        clash = sorted(_ids(store.light(new, ("memory_id",))))
        if clash:
            raise ConsolidationError(
                f"{len(clash)} memories to insert exist already, first {clash[0]}",
                fix="read them again and repeat",
            )
        if gone:
            _deleting(store, gone)
        if inserts.num_rows or updates.num_rows:
            source = [inserts, _keep_counts(updates, current), _tombstones(store, gone)]
            merge = store.memories.merge_insert("memory_id")
            merge = merge.when_matched_update_all().when_not_matched_insert_all()
            merge.execute(compact.fitted(store.memories.schema, pa.concat_tables(source)))
            if gone:
                sweep(store)
        elif gone:
            store.memories.delete(one_of("memory_id", gone))
    store.observe("write", new + old)
    store.observe("delete", gone)
    announce(store, inserts)


def sweep(store: MemoryStore) -> int:
    """Delete the rows that a commit marked as deleted; return how many there were.

    A merge that deletes as well joins the whole table, seconds at 100k rows. So a commit marks
    rows as deleted, which makes them unseen at once and atomically, and sweeps afterwards; where
    it was killed in between, the next commit or verify sweeps.
    """
    from lancedb.expr import col, lit

    marked = col("tier") == lit(DELETED)
    if not store.fetch(store.query().where(marked).select(["tier"]).limit(1)).num_rows:
        return 0
    return int(store.memories.delete(marked).num_deleted_rows)


def clear(store: MemoryStore, expired: Sequence[str]) -> None:
    """Make room, under the lock, for new rows of ids whose rows have expired.

    Nobody sees those any more: a crash in between loses nothing.
    """
    _deleting(store, expired)
    store.memories.delete(one_of("memory_id", list(expired)))


def delete(store: MemoryStore, ids: Sequence[str]) -> int:
    """Do what :meth:`MemoryStore.delete` says."""
    named = list(dict.fromkeys(id_list(ids)))
    with store.changing():
        # Of dropped originals only the summary is left, which names them.
        made = derived.summaries(store, named)
        present = sorted({*_ids(store.light(named, ("memory_id",))), *made})
        others = derived.released(store, made, present)
        if others.num_rows:
            commit(store, None, others, present)
            return len(present)
        if present:
            _deleting(store, present)
            store.memories.delete(one_of("memory_id", present))
    store.observe("delete", present)
    return len(present)


def update(store: MemoryStore, memory_id: str, fields: dict[str, Any]) -> None:
    """Do what :meth:`MemoryStore.update` says."""
    unknown = sorted(set(fields) - set(_UPDATABLE))
    if unknown:
        raise InputError(f"{unknown[0]!r} cannot be updated", fix=f"one of {', '.join(_UPDATABLE)}")
    if not fields:
        raise InputError(f"nothing to update in {memory_id!r}", fix="give at least one field")
    for name in ("timestamp", "expires_at"):
        if fields.get(name) is not None:
            fields[name] = utc(fields[name])
    if store.redact and isinstance(fields.get("summary"), str):
        fields["summary"] = store.redact(fields["summary"])
    with store.exclusive():
        table = store.unpack(store.rows([memory_id]))
        if not table.num_rows:
            raise InputError(
                f"{store.place} has no memory {memory_id!r}", fix="search for it, ids are exact"
            )
        row = table.to_pylist()[0]
        if row["expires_at"] is not None and row["expires_at"] <= utc(store.clock()):
            raise InputError(f"memory {memory_id!r} has expired", fix="add it again")
        new_content = any(name in fields for name in _CONTENT)
        if "summary" in fields and row["tier"] == SHORT_TERM:
            raise InputError(f"{memory_id!r} is a short-term memory, it has no summary")
        vector = fields.get("joint_embedding")
        row.update({name: value for name, value in fields.items() if name != "joint_embedding"})
        content = Content(**{short: row[name] for name, short in _CONTENT.items()})
        # A summary may stand alone; everything else needs content, as it did when it was added.
        if new_content or not row["summary"]:
            new = _checked(
                store,
                [
                    NewMemory(
                        content=content,
                        category=row["category"],
                        timestamp=row["timestamp"],
                        expires_at=row["expires_at"],
                        embedding=vector,
                    )
                ],
                0,
            )[0]
            content = new.content
        if vector is None and new_content:
            vectors = store.embed([content])
        elif vector is None:
            vectors = rows.vectors_array(table["joint_embedding"], store.dim)
        else:
            vectors = rows.unit(np.asarray(vector)[None, :], store.dim)
        del row["joint_embedding"]
        row["text"] = content.text
        row.update({f"has_{name}": name in content.modalities for name in _CONTENT.values()})
        row["has_text"] |= row["summary"] is not None
        changed = rows.new_rows(vectors, {name: [value] for name, value in row.items()})
        # A summary would go on saying what this memory no longer says.
        made = derived.summaries(store, [memory_id])
        if made:
            others = derived.released(store, made, [memory_id])
            changed = pa.concat_tables(
                [sealed(store, derived.free(changed)), sealed(store, others)]
            )
        elif row["tier"] == "archived":
            changed = store.pack(changed)
        moved = vector is not None or new_content
        if moved:
            _deleting(store, [memory_id])
        commit(store, None, changed, sorted(made))
    if moved:
        announce(store, changed)


def arrow_memories(store: MemoryStore, batches: Iterable[pa.RecordBatch]) -> Iterator[NewMemory]:
    """Turn Arrow batches into memories; see :meth:`MemoryStore.add_arrow`.

    Raises:
        InputError: an unknown column, or one of a type that does not fit.
    """
    known = ("memory_id", *_CONTENT, "joint_embedding", "timestamp", "category", "expires_at")
    schema = memories_schema(store.dim)
    for batch in batches:
        unknown = sorted(set(batch.schema.names) - set(known))
        if unknown:
            raise InputError(f"unknown column {unknown[0]!r}", fix=f"use {', '.join(known)}")
        columns: dict[str, list[Any]] = {}
        for name in batch.schema.names:
            if name == "joint_embedding":
                columns[name] = _embeddings(batch[name], store.dim)
                continue
            try:
                # Nanoseconds and float dates lose what the table cannot hold.
                columns[name] = batch[name].cast(schema.field(name).type, safe=False).to_pylist()
            except pa.ArrowInvalid as error:
                raise InputError(f"column {name!r} does not fit: {error}") from error
            except pa.ArrowNotImplementedError as error:
                raise InputError(
                    f"column {name!r} is {batch[name].type}, not {schema.field(name).type}"
                ) from error
        nothing = [None] * batch.num_rows
        get = columns.get
        for at in range(batch.num_rows):
            yield NewMemory(
                content=Content(
                    **{short: get(name, nothing)[at] for name, short in _CONTENT.items()}
                ),
                category=get("category", nothing)[at] or "",
                timestamp=get("timestamp", nothing)[at],
                embedding=get("joint_embedding", nothing)[at],
                expires_at=get("expires_at", nothing)[at],
                memory_id=get("memory_id", nothing)[at],
            )


def sealed(store: MemoryStore, table: pa.Table) -> pa.Table:
    """Return whole rows as the table has them: with their words, or encrypted."""
    schema = memories_schema(store.dim)
    table = lexicon.with_words(store, table.select(schema.names).cast(schema))
    if store.cipher is None or not table.num_rows:
        return table
    plain = np.array([not codec for codec in table["codec"].to_pylist()])
    return pa.concat_tables(
        [
            table.filter(pa.array(~plain)),
            store.pack(table.filter(pa.array(plain)), compress=False),
        ]
    )


def announce(store: MemoryStore, table: pa.Table) -> None:
    """Tell the index and the listeners of new rows."""
    store.index.added(table.num_rows)
    if not table.num_rows or not store.listeners:
        return
    ids = _ids(table)
    vectors = rows.vectors_array(table["joint_embedding"], store.dim)
    timestamps: list[datetime] = table["timestamp"].to_pylist()
    for listener in store.listeners:
        listener.added(ids, vectors, timestamps)


def _add_chunk(store: MemoryStore, chunk: Sequence[NewMemory]) -> tuple[Standing, int]:
    """Store what of a chunk is not there, in one commit; return how many were new too."""
    now = utc(store.clock())
    vectors: dict[int, NDArray[np.float32]] = {}
    embedder = store.embedder if any(memory.embedding is None for memory in chunk) else None
    while True:
        if embedder:
            # An embedding costs a hundred times the look-up: what is there is not embedded again.
            _embed(store, chunk, standing(store, chunk, now).new.values(), vectors)
        with store.changing():
            if embedder:
                # While the vectors were made, another process may have moved the store.
                store.check_model(embedder.model_id)
            found = standing(store, chunk, now)
            if embedder and not vectors.keys() >= set(found.new.values()):
                continue  # what was there is gone meanwhile
            _embed(store, chunk, found.new.values(), vectors)
            table, added = _write(store, chunk, found, vectors, now)
        break
    store.observe("delete", found.expired)
    store.observe("write", [*_ids(table), *found.renewed])
    announce(store, table)
    return found, added


def _embed(
    store: MemoryStore,
    chunk: Sequence[NewMemory],
    positions: Iterable[int],
    vectors: dict[int, NDArray[np.float32]],
) -> None:
    """Add the vectors of memories that have none in ``vectors`` yet."""
    missing = [at for at in positions if at not in vectors]
    if missing:
        rows_of = _vectors_of(store, [chunk[at] for at in missing])
        vectors.update(zip(missing, rows_of, strict=True))


def _write(
    store: MemoryStore,
    chunk: Sequence[NewMemory],
    found: Standing,
    vectors: dict[int, NDArray[np.float32]],
    now: datetime,
) -> tuple[pa.Table, int]:
    """Write, under the lock, what ``found`` says; return the rows and how many were new."""
    if found.renewed:
        set_ends(store, found.renewed)
    if not found.new:
        return memories_schema(store.dim).empty_table(), 0
    new = [chunk[at] for at in found.new.values()]
    columns = incoming.columns(list(found.new), new, now, store.meta.model_id)
    columns["expires_at"] = list(found.ends.values())
    stacked = np.stack([vectors[at] for at in found.new.values()])
    table = sealed(store, rows.new_rows(stacked, columns))
    if found.expired:
        clear(store, found.expired)
    if store.place.local is not None:
        # Under the writer lock a look-up and an append are as safe as a merge, and twice as fast.
        store.memories.add(compact.fitted(store.memories.schema, table))
        return table, table.num_rows
    sweep(store)  # a merge would take a row that is marked as deleted for the memory
    merge = store.memories.merge_insert("memory_id").when_not_matched_insert_all()
    # Another process may have been first with some of them: those were there already.
    return table, int(merge.execute(table).num_inserted_rows)


def _checked(store: MemoryStore, memories: Sequence[NewMemory], start: int) -> list[NewMemory]:
    memories = [incoming.redacted(memory, store.redact) for memory in memories]
    dim = store.dim  # once: it looks at a file
    for at, memory in enumerate(memories, start=start):
        incoming.check(memory, at, dim)
    return memories


def _vectors_of(store: MemoryStore, memories: Sequence[NewMemory]) -> NDArray[np.float32]:
    given = [at for at, memory in enumerate(memories) if memory.embedding is not None]
    absent = [at for at, memory in enumerate(memories) if memory.embedding is None]
    parts = []
    if given:
        stacked = np.stack([np.asarray(memories[at].embedding) for at in given])
        parts.append(rows.unit(stacked, store.dim))
    if absent:
        parts.append(store.embed([memories[at].content for at in absent]))
    if len(parts) == 1:
        return parts[0]
    vectors = np.empty((len(memories), store.dim), np.float32)
    vectors[given], vectors[absent] = parts
    return vectors


def _deleting(store: MemoryStore, ids: Sequence[str]) -> None:
    # Links go first: a crash in between leaves a memory without links, never a link to nothing.
    store.adjacency.drop(ids)
    for listener in store.listeners:
        listener.deleting(ids)


def _tombstones(store: MemoryStore, ids: Sequence[str]) -> pa.Table:
    """Return rows that mark ``ids`` as deleted: no content, and expired for every search."""
    columns = {"memory_id": list(ids), "timestamp": _EPOCH, "expires_at": _EPOCH, "tier": DELETED}
    vectors = np.zeros((len(ids), store.dim), np.float32)
    # A vector of length 0 has no cosine, which an index built in between would trip over.
    vectors[:, 0] = 1
    return lexicon.with_words(store, rows.new_rows(vectors, columns))


def _keep_counts(updates: pa.Table, current: pa.Table) -> pa.Table:
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
    """Cut a stream into commits, by rows and by bytes of content."""
    iterator = iter(memories)
    while part := list(islice(iterator, ROWS_PER_COMMIT)):
        chunk: list[NewMemory] = []
        size = 0
        for memory in part:
            content = getattr(memory, "content", Content())
            values = [getattr(content, name) for name in _CONTENT.values()]
            # What is neither text nor bytes is refused when the chunk is checked.
            new = sum(len(value) for value in values if isinstance(value, str | bytes))
            if chunk and size + new > BYTES_PER_COMMIT:
                yield chunk
                chunk, size = [], 0
            chunk.append(memory)
            size += new
        yield chunk


def _embeddings(column: pa.Array, dim: int) -> list[Any]:
    """Return one float array per row, None for null."""
    kind = column.type
    if not (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    ) or not pa.types.is_floating(kind.value_type):
        raise InputError(f"joint_embedding is {kind}, not a list of floats")
    present = column.drop_null()
    lengths = set(present.value_lengths().to_pylist()) if len(present) else set()
    wrong = sorted(lengths - {dim})
    if wrong:
        raise InputError(
            f"joint_embedding has {wrong[0]} dimensions, this store has {dim}",
            fix="use the model the store was made with, or reembed the store",
        )
    values = iter(present.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim))
    return [next(values) if there else None for there in column.is_valid().to_pylist()]


def _ids(table: pa.Table) -> list[str]:
    found: list[str] = table["memory_id"].to_pylist()
    return found
