"""The three Parquet files other tools read: memories, association graph, long-term memories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from memopt.errors import InputError
from memopt.files import atomic_path
from memopt.memory import rows
from memopt.memory.filters import utc
from memopt.memory.schema import (
    EDGES,
    GRAPH_FILE,
    LONG_TERM,
    LONG_TERM_FILE,
    MEMORIES_FILE,
    TIERS,
    Filter,
    Memory,
)
from memopt.parquetfile import batches, open_parquet

if TYPE_CHECKING:
    from memopt.memory.store import MemoryStore

MEMORIES, GRAPH, LONG_TERMS = "memories.parquet", "associations.parquet", "long_term.parquet"
_CHUNK = 512
_MODEL_KEY = b"memopt.model_id"


@dataclass(frozen=True, slots=True)
class Transfer:
    """How many rows went into, or came from, each file."""

    memories: int
    linked: int
    long_term: int


def export_parquet(store: MemoryStore, folder: str | Path) -> Transfer:
    """Write ``memories.parquet``, ``associations.parquet`` and ``long_term.parquet``.

    Content is written plain, decrypted and unpacked; vectors as float16. Each file is written
    beside and renamed, so an interrupted export leaves the old one.

    Args:
        folder: made when absent.

    >>> import tempfile
    >>> from memopt.memory.schema import Content, NewMemory
    >>> from memopt.memory.store import MemoryStore
    >>> store = MemoryStore(tempfile.mkdtemp(), dim=2)
    >>> new = NewMemory(content=Content(text="a red door"), embedding=np.array([1.0, 0.0]))
    >>> _ = store.add(new)
    >>> folder = tempfile.mkdtemp()
    >>> export_parquet(store, folder)
    Transfer(memories=1, linked=0, long_term=0)
    >>> other = MemoryStore(tempfile.mkdtemp(), dim=2)
    >>> import_parquet(other, folder)
    Transfer(memories=1, linked=0, long_term=0)
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tiers = Filter(tiers=TIERS)
    ids: list[str] = []
    for batch in store.scan(tiers, ["memory_id"], 8192):
        ids += batch["memory_id"].to_pylist()
    ids.sort()
    metadata = {_MODEL_KEY: store.meta.model_id.encode()}
    linked = 0
    long_term: list[dict[str, Any]] = []
    with atomic_path(folder / MEMORIES) as first, atomic_path(folder / GRAPH) as second:
        memories_schema = MEMORIES_FILE.with_metadata(metadata)
        with (
            pq.ParquetWriter(first, memories_schema, compression="zstd") as memories,
            pq.ParquetWriter(second, GRAPH_FILE, compression="zstd") as graph,
        ):
            for start in range(0, len(ids), _CHUNK):
                part = ids[start : start + _CHUNK]
                found = _read(store, part)
                memories.write_table(_memories_table(found, memories_schema))
                links = [
                    {"memory_id": m.memory_id, "links": _links(m)}
                    for m in found
                    if m.association_links
                ]
                linked += len(links)
                graph.write_table(pa.Table.from_pylist(links, GRAPH_FILE))
                long_term += [_long_term(m) for m in found if m.tier == LONG_TERM]
    with atomic_path(folder / LONG_TERMS) as third:
        pq.write_table(pa.Table.from_pylist(long_term, LONG_TERM_FILE), third, compression="zstd")
    store.observe("export", ids)
    return Transfer(len(ids), linked, len(long_term))


def import_parquet(store: MemoryStore, folder: str | Path) -> Transfer:
    """Add what :func:`export_parquet` (or another tool) wrote; ids that are there are left alone.

    Args:
        folder: holds ``memories.parquet``; the two others may be absent (links are in the memories
            as well).

    Returns:
        Memories added, memories whose links were added, summaries added.

    Raises:
        InputError: a file is missing, damaged, has another schema, or vectors of another dimension
            or model. Nothing was added.
    """
    folder = Path(folder)
    file = _opened(folder / MEMORIES, MEMORIES_FILE)
    model = (file.schema_arrow.metadata or {}).get(_MODEL_KEY, b"").decode()
    if model and store.meta.model_id and model != store.meta.model_id:
        raise InputError(
            f"{folder / MEMORIES} holds vectors of {model!r}, the store of {store.meta.model_id!r}",
            fix="import into a new store, or reembed",
        )
    dim = check_export(folder)
    if dim not in (None, store.dim):
        raise InputError(
            f"{folder / MEMORIES} has vectors of {dim} numbers, the store of {store.dim}",
            fix="import into a new store, or reembed",
        )
    summaries: dict[str, dict[str, Any]] = {}
    if (folder / LONG_TERMS).is_file():
        table = _opened(folder / LONG_TERMS, LONG_TERM_FILE).read()
        summaries = {row["memory_id"]: row for row in table.to_pylist()}
    graph = _opened(folder / GRAPH, GRAPH_FILE) if (folder / GRAPH).is_file() else None
    if model and not store.meta.model_id and not store.count():
        store.write_meta(model_id=model)
    added, condensed = 0, 0
    for batch in batches(file, folder / MEMORIES, _CHUNK):
        table = _new_rows(store, batch, summaries)
        with store.changing():
            known = store.light(table["memory_id"].to_pylist(), ("memory_id",))
            there = set(known["memory_id"].to_pylist())
            keep = [key not in there for key in table["memory_id"].to_pylist()]
            table = table.filter(pa.array(keep, pa.bool_()))
            if table.num_rows:
                store.commit(inserts=table)
        added += table.num_rows
        condensed += table["tier"].to_pylist().count(LONG_TERM)
    if graph is not None:
        links = batches(graph, folder / GRAPH, _CHUNK)
    else:
        # The memories carry their links too.
        named = ["memory_id", "association_links"]
        links = (
            batch.rename_columns(GRAPH_FILE.names)
            for batch in batches(file, folder / MEMORIES, _CHUNK, named)
        )
    linked = sum(_add_links(store, batch) for batch in links)
    return Transfer(added, linked, condensed)


def check_export(folder: str | Path) -> int | None:
    """Look at every id, time and vector of an export before anything is made of it.

    Returns:
        The dimension of its vectors; None when it is empty.

    Raises:
        InputError: it is no export, an id or a time is missing, an id comes twice, or a vector is
            NaN, infinite, all zeros, or not as long as the first.
    """
    path = Path(folder) / MEMORIES
    dim: int | None = None
    seen: set[str] = set()
    columns = ["memory_id", "timestamp", "joint_embedding"]
    for batch in batches(_opened(path, MEMORIES_FILE), path, _CHUNK, columns):
        for key, moment, vector in zip(*(batch[name].to_pylist() for name in columns), strict=True):
            dim = dim or len(vector or ()) or None
            problem = _problem(key, moment, vector or (), dim, seen)
            if problem:
                raise InputError(f"{path}: memory {key!r} {problem}", fix="export it again")
            seen.add(key)
    return dim


def _problem(
    key: str | None, moment: Any, vector: Sequence[float], dim: int | None, seen: set[str]
) -> str | None:
    array = np.asarray(vector, np.float32)
    if not key or moment is None:
        return "has no id" if not key else "has no timestamp"
    if key in seen:
        return "comes twice"
    if not len(array) or len(array) != dim:
        return f"has a vector of {len(array)} numbers, not {dim or 'any'}"
    if not np.isfinite(array).all():
        return "has a vector with NaN or infinity"
    return None if array.any() else "has a vector of zeros"


def _read(store: MemoryStore, ids: list[str]) -> list[Memory]:
    table = store.unpack(store.rows(ids))
    found = rows.memories(table, store.dim, store.links(ids), store.pending_touches())
    return sorted(found, key=lambda memory: memory.memory_id)


def _links(memory: Memory) -> list[dict[str, Any]]:
    return [{"linked_id": e.linked_id, "weight": e.weight} for e in memory.association_links]


def _memories_table(found: list[Memory], schema: pa.Schema) -> pa.Table:
    columns = {
        "memory_id": [m.memory_id for m in found],
        "text": [m.text for m in found],
        "vision_data": [m.vision_data for m in found],
        "audio_data": [m.audio_data for m in found],
        "joint_embedding": [np.asarray(m.joint_embedding, np.float16) for m in found],
        "association_links": [_links(m) for m in found],
        "timestamp": [m.timestamp.astimezone(UTC).replace(tzinfo=None) for m in found],
        "access_count": [m.access_count for m in found],
        "category": [m.category for m in found],
    }
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    return pa.table(arrays, schema=schema)


def _long_term(memory: Memory) -> dict[str, Any]:
    at = memory.consolidated_at
    return {
        "memory_id": memory.memory_id,
        "category": memory.category,
        "summary": memory.summary,
        "source_memory_ids": list(memory.source_memory_ids),
        "consolidated_at": at.astimezone(UTC).replace(tzinfo=None) if at else None,
        "source_count": memory.source_count,
    }


def _opened(path: Path, schema: pa.Schema) -> pq.ParquetFile:
    if not path.is_file():
        raise InputError(f"{path} is missing", fix="give the folder of an export")
    file = open_parquet(path)
    missing = [name for name in schema.names if name not in file.schema_arrow.names]
    if missing:
        raise InputError(
            f"{path} has no column {missing[0]!r}", fix=f"columns: {', '.join(schema.names)}"
        )
    return file


def _new_rows(
    store: MemoryStore, batch: pa.RecordBatch, summaries: dict[str, dict[str, Any]]
) -> pa.Table:
    found = batch.to_pylist()
    vectors = [row["joint_embedding"] for row in found]
    own = [summaries.get(row["memory_id"]) for row in found]
    columns: dict[str, Any] = {
        name: [row[name] for row in found]
        for name in ("memory_id", "text", "vision_data", "audio_data", "access_count")
    }
    columns["category"] = [row["category"] or "" for row in found]
    columns["timestamp"] = [row["timestamp"].replace(tzinfo=UTC) for row in found]
    columns["tier"] = [LONG_TERM if summary else "short_term" for summary in own]
    columns["summary"] = [summary["summary"] if summary else None for summary in own]
    columns["source_memory_ids"] = [s["source_memory_ids"] if s else None for s in own]
    columns["source_count"] = [s["source_count"] or 0 if s else 0 for s in own]
    columns["consolidated_at"] = [
        s["consolidated_at"].replace(tzinfo=UTC) if s and s["consolidated_at"] else None
        for s in own
    ]
    columns["model_id"] = store.meta.model_id
    for flag, name in (("text", "text"), ("vision", "vision_data"), ("audio", "audio_data")):
        columns[f"has_{flag}"] = [row[name] is not None for row in found]
    columns["has_text"] = [
        has or summary is not None
        for has, summary in zip(columns["has_text"], columns["summary"], strict=True)
    ]
    return rows.new_rows(rows.unit(np.array(vectors, np.float32), store.dim), columns)


def _add_links(store: MemoryStore, batch: pa.RecordBatch) -> int:
    """Add the links of one batch whose both ends are there; return how many memories had any."""
    wanted: dict[tuple[str, str], float] = {}
    for row in batch.to_pylist():
        for link in row["links"] or []:
            wanted[row["memory_id"], link["linked_id"]] = float(link["weight"])
    if not wanted:
        return 0
    ends = list({end for pair in wanted for end in pair})
    with store.changing():
        there = set(store.light(ends, ("memory_id",))["memory_id"].to_pylist())
        known = {
            (source, link.linked_id)
            for source, links in store.links(ends).items()
            for link in links
        }
        new = {p: w for p, w in wanted.items() if p not in known and set(p) <= there}
        if new:
            store.table("edges").add(pa.Table.from_pylist(list(_edges(store, new)), EDGES))
    return len({pair[0] for pair in new})


def _edges(store: MemoryStore, links: dict[tuple[str, str], float]) -> Iterator[dict[str, Any]]:
    now = utc(store.clock())
    for (source, target), weight in links.items():
        yield {
            "source": source,
            "target": target,
            "weight": weight,
            "kind": "imported",
            "updated_at": now,
        }
