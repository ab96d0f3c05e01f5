"""Reads: ids are looked up alone first, so that media of other rows stay on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from memopt.errors import ConsolidationError, InputError
from memopt.memory.model import rows
from memopt.memory.model.filters import (
    DELETED,
    EVERYTHING,
    expression,
    id_list,
    one_of,
    present,
    utc,
)
from memopt.memory.model.schema import WORDS, Filter, Link, Memory, memories_schema
from memopt.memory.store.founding import named_errors
from memopt.memory.store.locking import reading as keeping

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memopt.memory.memory_store import MemoryStore

# How many ids go into one IN list: Lance takes 10k in under 0.1 s, parsing grows with it.
_IDS_PER_QUERY = 10_000


def get_many(store: MemoryStore, ids: Sequence[str], *, links: bool) -> list[Memory]:
    """Do what :meth:`MemoryStore.get_many` says."""
    ids = id_list(ids)
    found = store.unpack(raw_rows(store, ids, None))
    linked = links_of(store, ids) if links else {}
    now = utc(store.clock())
    by_id = {
        memory.memory_id: memory
        for memory in rows.memories(found, store.dim, linked, store.pending_touches())
        if memory.expires_at is None or memory.expires_at > now
    }
    _all_known(store, ids, by_id)
    store.observe("read", ids)
    return [by_id[memory_id] for memory_id in ids]


def raw_rows(store: MemoryStore, ids: Sequence[str], columns: Sequence[str] | None) -> pa.Table:
    """Do what :meth:`MemoryStore.rows` says."""
    names = list(columns or memories_schema(store.dim).names)
    tables = [_take(store, part, names) for part in _parts(list(dict.fromkeys(id_list(ids))))]
    tables = [table for table in tables if table.num_rows]
    return pa.concat_tables(tables) if tables else _schema(store, names).empty_table()


def light(store: MemoryStore, ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
    """Do what :meth:`MemoryStore.light` says."""
    tables = [
        store.fetch(_where(store.query(), present(one_of("memory_id", part)), columns))
        for part in _parts(id_list(ids))
    ]
    if tables:
        return pa.concat_tables(tables)
    row_id = pa.field("_rowid", pa.uint64())
    names = [name for name in columns if name != "_rowid"]
    empty = pa.schema([*_schema(store, names), *([row_id] if "_rowid" in columns else [])])
    return empty.empty_table().select(columns)


def links_of(store: MemoryStore, ids: Sequence[str]) -> dict[str, list[Link]]:
    """Do what :meth:`MemoryStore.links` says."""
    found: dict[str, list[Link]] = {}
    for part in _parts(id_list(ids)):
        query = store.query("edges").where(one_of("source", part))
        for edge in store.fetch(query.select(["source", "target", "weight"])).to_pylist():
            found.setdefault(edge["source"], []).append(Link(edge["target"], edge["weight"]))
    for links in found.values():
        links.sort(key=lambda link: (-link.weight, link.linked_id))
    return found


def scan(
    store: MemoryStore, where: Filter, columns: Sequence[str] | None, batch_size: int
) -> Iterator[pa.RecordBatch]:
    """Do what :meth:`MemoryStore.scan` says."""
    if columns is None or "access_count" in columns or "last_access" in columns:
        store.flush()
    names = list(columns or memories_schema(store.dim).names)
    local = store.place.local
    with keeping(local) if local is not None else nullcontext():
        query = _where(store.memories.search(), present(expression(where)), names)
        with named_errors(store.place, "read"):
            batches = query.limit(None).to_batches(batch_size)
        while True:
            with named_errors(store.place, "read"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


def vectors(
    store: MemoryStore, ids: Sequence[str] | None, where: Filter
) -> tuple[list[str], NDArray[np.float32]]:
    """Do what :meth:`MemoryStore.vectors` says."""
    names = ["memory_id", "joint_embedding"]
    if ids is None:
        batches = scan(store, where, names, 4096)
        parts = list(batches)
        empty = _schema(store, names) if not parts else None
        table = pa.Table.from_batches(parts, schema=empty)
        found = table["memory_id"].to_pylist()
        return found, rows.vectors_array(table["joint_embedding"], store.dim)
    table = raw_rows(store, ids, names)
    at = {memory_id: row for row, memory_id in enumerate(table["memory_id"].to_pylist())}
    _all_known(store, ids, at)
    array = rows.vectors_array(table["joint_embedding"], store.dim)
    return list(ids), array[[at[memory_id] for memory_id in ids]]


def count(store: MemoryStore, where: Filter) -> int:
    """Do what :meth:`MemoryStore.count` says."""
    if where == EVERYTHING:
        return int(store.memories.count_rows(f"tier != '{DELETED}'"))
    return sum(batch.num_rows for batch in scan(store, where, ["memory_id"], 8192))


def _take(store: MemoryStore, ids: Sequence[str], names: list[str]) -> pa.Table:
    where = present(one_of("memory_id", ids))
    found = store.fetch(_where(store.query(), where, ["memory_id"]).with_row_id())
    if not found.num_rows:
        return _schema(store, names).empty_table()
    at = dict(zip(found["memory_id"].to_pylist(), found["_rowid"].to_pylist(), strict=True))
    taken = by_row_id(store, at, names)
    if taken is None:
        # Rows moved (update, compaction) between the two reads; one query sees one version.
        taken = store.fetch(
            _where(store.query(), where, list(dict.fromkeys(["memory_id", *names])))
        )
    return taken.select(names)


def by_row_id(
    store: MemoryStore, row_ids: Mapping[str, int], names: Sequence[str]
) -> pa.Table | None:
    """Return columns of the rows (id -> row id) just found, in any order.

    None where the rows moved meanwhile: a row id is good until the next update or compaction.
    """
    try:
        return _unmoved(store.fetch(_rows_query(store, row_ids, names)), row_ids)
    except ConsolidationError:
        return None


def light_and_rows(
    store: MemoryStore,
    ids: Sequence[str],
    seen: Mapping[str, int],
    columns: Sequence[str],
    row_ids: Mapping[str, int],
    names: Sequence[str],
) -> tuple[pa.Table, pa.Table | None, int]:
    """Do :func:`light` of a few ids and :func:`by_row_id` at the same time.

    Args:
        ids: with the ``columns`` to read, ``memory_id`` and ``_rowid`` among them.
        seen: id -> row id that some of them had once: where the row is still there, that saves the
            look-up by id, and a row that is not is looked up after all.
        row_ids: id -> row id, with the ``names`` to read.

    Returns:
        Both tables, and how many rows had moved from where they were seen.
    """
    at = {key: seen[key] for key in ids if key in seen}
    rest = [key for key in ids if key not in seen]
    asked = {
        "seen": _rows_query(store, at, columns) if at else None,
        "rest": _where(store.query(), present(one_of("memory_id", rest)), columns)
        if rest
        else None,
        "rows": _rows_query(store, row_ids, names) if row_ids else None,
    }
    wanted = {name: query for name, query in asked.items() if query is not None}
    try:
        found = dict(zip(wanted, store.fetch_all(list(wanted.values())), strict=True))
    except ConsolidationError:
        return light(store, ids, columns), None, len(at)
    # A place may be empty by now, never another memory's: Lance gives no row id twice.
    moved = sorted(set(at) - set(found["seen"]["memory_id"].to_pylist())) if at else []
    parts = [found[name].select(columns) for name in ("seen", "rest") if name in found]
    if moved or not parts:
        parts.append(light(store, moved, columns))
    table = pa.concat_tables(parts)
    taken = _unmoved(found["rows"], row_ids) if row_ids else None
    return table, taken, len(moved)


def _rows_query(store: MemoryStore, row_ids: Mapping[str, int], names: Sequence[str]) -> Any:
    wanted = list(dict.fromkeys(["memory_id", *names]))
    return store.take(list(row_ids.values())).select(wanted)


def _unmoved(taken: pa.Table, row_ids: Mapping[str, int]) -> pa.Table | None:
    return taken if set(taken["memory_id"].to_pylist()) == set(row_ids) else None


def _where(query: Any, condition: Any, columns: Sequence[str]) -> Any:
    return query.where(condition).select(list(columns))


def _all_known(store: MemoryStore, ids: Sequence[str], known: Any) -> None:
    missing = [memory_id for memory_id in ids if memory_id not in known]
    if missing:
        raise InputError(
            f"{store.place} has no memory {missing[0]!r}", fix="search for it, ids are exact"
        )


def _schema(store: MemoryStore, names: Sequence[str]) -> pa.Schema:
    schema = memories_schema(store.dim).append(WORDS)
    return pa.schema([schema.field(name) for name in names])


def _parts(ids: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(ids), _IDS_PER_QUERY):
        yield list(ids[start : start + _IDS_PER_QUERY])
