"""The three Parquet files other tools read: memories, association graph, long-term memories."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from memopt.errors import InputError
from memopt.files import staged_directory, swapped_in
from memopt.memory.io.files import (
    CHUNK,
    GRAPH,
    LONG_TERMS,
    MEMORIES,
    MODEL_KEY,
    find,
    model_of,
    read_links,
    read_memories,
    read_summaries,
)
from memopt.memory.io.staging import Parts, staged
from memopt.memory.lifecycle.retention import set_ends
from memopt.memory.model import content as incoming
from memopt.memory.model import rows
from memopt.memory.model.filters import utc
from memopt.memory.model.schema import (
    EDGES,
    GRAPH_FILE,
    LONG_TERM,
    LONG_TERM_FILE,
    MEMORIES_FILE,
    TIERS,
    Filter,
    Memory,
)
from memopt.memory.store import signs as compact
from memopt.memory.store import word_column as lexicon
from memopt.memory.store.existing import has_expired, later, rows_there
from memopt.memory.store.writer import announce, clear, sweep

if TYPE_CHECKING:
    from memopt.memory.memory_store import MemoryStore


@dataclass(frozen=True, slots=True)
class Transfer:
    """How many rows went into, or came from, each file.

    Attributes:
        memories: written, or added.
        linked: memories with links that were written, or whose links were added.
        long_term: summaries among ``memories``.
        already: of an import, were there.
        differing: of ``already``, those with other content, which stays.
        expired: left out, since their time has come.
        dangling: links left out, since an end of theirs is no memory.
    """

    memories: int
    linked: int
    long_term: int
    already: int = 0
    differing: int = 0
    expired: int = 0
    dangling: int = 0


def export_parquet(store: MemoryStore, folder: str | Path) -> Transfer:
    """Write ``memories.parquet``, ``associations.parquet`` and ``long_term.parquet``.

    Content is written plain, decrypted and unpacked; vectors as float16; what has expired is left
    out. The files are their owner's, and come into place together: an export that is interrupted
    leaves the old ones.

    Args:
        folder: made when absent.

    >>> import tempfile
    >>> from memopt.memory.model.schema import Content, NewMemory
    >>> from memopt.memory.memory_store import MemoryStore
    >>> store = MemoryStore(tempfile.mkdtemp(), dim=2)
    >>> new = NewMemory(content=Content(text="a red door"), embedding=np.array([1.0, 0.0]))
    >>> _ = store.add(new)
    >>> folder = tempfile.mkdtemp()
    >>> export_parquet(store, folder).memories
    1
    >>> other = MemoryStore(tempfile.mkdtemp(), dim=2)
    >>> import_parquet(other, folder).memories
    1
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    now = utc(store.clock())
    ids: list[str] = []
    expired = 0
    for batch in store.scan(Filter(tiers=TIERS), ["memory_id", "expires_at"], 8192):
        living = [row["memory_id"] for row in batch.to_pylist() if not has_expired(row, now)]
        expired += batch.num_rows - len(living)
        ids += living
    ids.sort()
    there = set(ids)
    schema = MEMORIES_FILE.with_metadata({MODEL_KEY: store.meta.model_id.encode()})
    count = linked = 0
    long_term: list[dict[str, Any]] = []
    with staged_directory(folder) as staging:
        with (
            pq.ParquetWriter(staging / MEMORIES, schema, compression="zstd") as memories,
            pq.ParquetWriter(staging / GRAPH, GRAPH_FILE, compression="zstd") as graph,
        ):
            for start in range(0, len(ids), CHUNK):
                found = _read(store, ids[start : start + CHUNK], there)
                count += len(found)
                memories.write_table(_memories_table(found, schema))
                links = [
                    {"memory_id": m.memory_id, "links": _links(m)}
                    for m in found
                    if m.association_links
                ]
                linked += len(links)
                graph.write_table(pa.Table.from_pylist(links, GRAPH_FILE))
                long_term += [_long_term(m) for m in found if m.tier == LONG_TERM]
        table = pa.Table.from_pylist(long_term, LONG_TERM_FILE)
        pq.write_table(table, staging / LONG_TERMS, compression="zstd")
        files = {folder / name: staging / name for name in (MEMORIES, GRAPH, LONG_TERMS)}
        for file in files.values():
            file.chmod(0o600)
        with swapped_in(files, committed=lambda: False):
            pass
    store.observe("export", ids)
    return Transfer(count, linked, len(long_term), expired=expired)


def import_parquet(store: MemoryStore, folder: str | Path) -> Transfer:
    """Add what :func:`export_parquet` or another tool wrote, as :meth:`MemoryStore.add` would.

    Everything is read, checked and redacted before anything is stored, then stored in one commit;
    the links follow. An id that is there keeps its content, but for a later end. A memory expires
    at its own time, or by the retention of this store when that is sooner. Summaries whose ids are
    not among the memories get the middle of their sources for a vector; sources that the files
    give no tier are archived, as consolidation does.

    Args:
        folder: files as in :mod:`memopt.memory.io.files`, or one of them.

    Raises:
        InputError: there are none, one is damaged, of another kind, dimension or model, or a row
            is one that add would refuse. Nothing was added.
    """
    files = find(Path(folder))
    model = model_of(files)
    if model and store.meta.model_id and model != store.meta.model_id:
        raise InputError(
            f"{folder} holds vectors of {model!r}, the store of {store.meta.model_id!r}",
            fix="import into a new store, or reembed",
        )
    links = sum(len(part) for part in read_links(files))  # checked, before anything is stored
    with staged(store, files, model) as (parts, expired):
        added, already, differing, long_term = _commit(store, parts, model)
    linked: set[str] = set()
    dangling: set[tuple[str, str]] = set()
    if links:
        for part in read_links(files):
            _add_links(store, part, linked, dangling)
    return Transfer(added, len(linked), long_term, already, differing, expired, len(dangling))


def check_export(folder: str | Path) -> int | None:
    """Look at every memory, summary and link of an export before anything is made of it.

    Returns:
        The dimension of its vectors; None when it has none.

    Raises:
        InputError: as :func:`import_parquet`, as far as no store is needed to tell.
    """
    files = find(Path(folder))
    model_of(files)
    dim: int | None = None
    for row in read_memories(files):
        dim = len(row.vector)
    read_summaries(files)
    for _ in read_links(files):
        pass
    return dim


def _commit(store: MemoryStore, parts: Parts, model: str) -> tuple[int, int, int, int]:
    """Store what of the staged rows is not there, in one commit.

    Returns:
        Memories added, there already, there with other content; summaries added.
    """
    now = utc(store.clock())
    with store.changing():
        sweep(store)
        if model and not store.meta.model_id and not store.memories.count_rows():
            store.write_meta(model_id=model)
        kept: list[pa.Array] = []
        expired: list[str] = []
        ends: dict[str, datetime | None] = {}
        differing = already = 0
        for part in parts:
            there = rows_there(store, part["memory_id"].to_pylist())
            living = {key: row for key, row in there.items() if not has_expired(row, now)}
            expired += sorted(set(there) - set(living))
            new = pa.array([key not in living for key in part["memory_id"].to_pylist()], pa.bool_())
            kept.append(new)
            already += len(living)
            if not living:
                continue
            for row in store.unpack(part.filter(pc.invert(new))).to_pylist():
                old = living[row["memory_id"]]
                same = all(
                    _composed(old[name]) == _composed(row[name])
                    for name in ("text", "vision_data", "audio_data", "summary")
                )
                differing += not same
                if same and later(old["expires_at"], row["expires_at"]) != old["expires_at"]:
                    ends[row["memory_id"]] = row["expires_at"]
        set_ends(store, ends)
        if expired:
            clear(store, expired)

        def rest() -> Iterator[pa.Table]:
            for part, new in zip(parts, kept, strict=True):
                yield part.filter(new)

        ids = [key for part in rest() for key in part["memory_id"].to_pylist()]
        if ids:
            _append(store, rest())
    store.observe("delete", expired)
    store.observe("write", [*ids, *ends])
    summaries = 0
    for part in rest():
        announce(store, part)
        summaries += part["tier"].to_pylist().count(LONG_TERM)
    return len(ids), already, differing, summaries


def _composed(value: str | bytes | None) -> str | bytes | None:
    return incoming.composed(value) if isinstance(value, str) else value


def _append(store: MemoryStore, parts: Iterable[pa.Table]) -> None:
    schema = store.memories.schema
    tables = (compact.fitted(schema, lexicon.with_words(store, part)) for part in parts)
    batches = (batch for table in tables for batch in table.cast(schema).to_batches())
    stream = pa.RecordBatchReader.from_batches(schema, batches)
    if store.place.local is not None:
        store.memories.add(stream)
        return
    merge = store.memories.merge_insert("memory_id").when_not_matched_insert_all()
    merge.execute(stream.read_all())


def _read(store: MemoryStore, ids: list[str], there: set[str]) -> list[Memory]:
    table = store.unpack(store.rows(ids))
    links = {
        key: [link for link in own if link.linked_id in there]
        for key, own in store.links(ids).items()
    }
    found = rows.memories(table, store.dim, links, store.pending_touches())
    return sorted(found, key=lambda memory: memory.memory_id)


def _links(memory: Memory) -> list[dict[str, Any]]:
    return [{"linked_id": e.linked_id, "weight": e.weight} for e in memory.association_links]


def _naive(moment: datetime | None) -> datetime | None:
    return moment.astimezone(UTC).replace(tzinfo=None) if moment else None


def _memories_table(found: list[Memory], schema: pa.Schema) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "joint_embedding": [np.asarray(m.joint_embedding, np.float16) for m in found],
        "association_links": [_links(m) for m in found],
    }
    for field in schema:
        if field.name not in columns:
            values = [getattr(m, field.name) for m in found]
            timed = pa.types.is_timestamp(field.type)
            columns[field.name] = [_naive(value) for value in values] if timed else values
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    return pa.table(arrays, schema=schema)


def _long_term(memory: Memory) -> dict[str, Any]:
    return {
        "memory_id": memory.memory_id,
        "category": memory.category,
        "summary": memory.summary,
        "source_memory_ids": list(memory.source_memory_ids),
        "consolidated_at": _naive(memory.consolidated_at),
        "source_count": memory.source_count,
    }


def _add_links(
    store: MemoryStore,
    links: list[tuple[str, str, float]],
    linked: set[str],
    dangling: set[tuple[str, str]],
) -> None:
    """Add links in both directions where both ends are there; those there already stay."""
    wanted: dict[tuple[str, str], float] = {}
    for left, right, weight in links:
        for pair in ((left, right), (right, left)) if left != right else ():
            wanted[pair] = max(weight, wanted.get(pair, 0.0))
    if not wanted:
        return
    ends = list({end for pair in wanted for end in pair})
    with store.changing():
        there = set(store.light(ends, ("memory_id",))["memory_id"].to_pylist())
        dangling |= {pair for pair in wanted if pair[0] < pair[1] and not set(pair) <= there}
        known = {
            (source, link.linked_id) for source, own in store.links(ends).items() for link in own
        }
        new = {p: w for p, w in wanted.items() if p not in known and set(p) <= there}
        if new:
            now = utc(store.clock())
            edges = [
                {"source": a, "target": b, "weight": w, "kind": "imported", "updated_at": now}
                for (a, b), w in new.items()
            ]
            store.table("edges").add(pa.Table.from_pylist(edges, EDGES))
    linked |= {pair[0] for pair in new}
