"""The three Parquet files other tools read: memories, association graph, long-term memories."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from memopt.files import staged_directory, swapped_in
from memopt.memory.io.files import CHUNK, GRAPH, LONG_TERMS, MEMORIES, MODEL_KEY
from memopt.memory.model.filters import unexpired
from memopt.memory.model.rows import chunks
from memopt.memory.model.schema import (
    GRAPH_FILE,
    LONG_TERM,
    LONG_TERM_FILE,
    MEMORIES_FILE,
    TIERS,
    Filter,
    Memory,
)
from memopt.memory.store.reader import Reader


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


def export(reader: Reader, folder: str | Path) -> Transfer:
    """Write ``memories.parquet``, ``associations.parquet`` and ``long_term.parquet``.

    Content is written plain, decrypted and unpacked; vectors as float16; what has expired is left
    out. The files are their owner's, and come into place together: an export that is interrupted
    leaves the old ones.

    Args:
        folder: made when absent.

    >>> import tempfile
    >>> from memopt.memory import Content, MemoryStore, NewMemory
    >>> store = MemoryStore(tempfile.mkdtemp(), dim=2)
    >>> new = NewMemory(content=Content(text="a red door"), embedding=np.array([1.0, 0.0]))
    >>> _ = store.add(new)
    >>> folder = tempfile.mkdtemp()
    >>> store.export_parquet(folder).memories
    1
    >>> MemoryStore(tempfile.mkdtemp(), dim=2).import_parquet(folder).memories
    1
    """
    database, folder = reader.database, Path(folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    table = reader.table(Filter(tiers=TIERS), ["memory_id", "expires_at"], 8192)
    alive = table.filter(unexpired(table["expires_at"], database.now()))
    ids = sorted(alive["memory_id"].to_pylist())
    schema = MEMORIES_FILE.with_metadata({MODEL_KEY: database.meta.model_id.encode()})
    linked = 0
    summaries = [LONG_TERM_FILE.empty_table()]
    with staged_directory(folder) as staging:
        with (
            pq.ParquetWriter(staging / MEMORIES, schema, compression="zstd") as memories,
            pq.ParquetWriter(staging / GRAPH, GRAPH_FILE, compression="zstd") as graph,
        ):
            for part in _memories(reader, ids):
                memories.write_table(_table(part, schema))
                linking = [memory for memory in part if memory.association_links]
                linked += len(linking)
                links = [{"memory_id": each.memory_id, "links": _links(each)} for each in linking]
                graph.write_table(pa.Table.from_pylist(links, GRAPH_FILE))
                long_term = [memory for memory in part if memory.tier == LONG_TERM]
                summaries.append(_table(long_term, LONG_TERM_FILE))
        table_of_summaries = pa.concat_tables(summaries)
        pq.write_table(table_of_summaries, staging / LONG_TERMS, compression="zstd")
        files = {folder / name: staging / name for name in (MEMORIES, GRAPH, LONG_TERMS)}
        for file in files.values():
            file.chmod(0o600)
        with swapped_in(files, committed=lambda: False):
            pass
    database.observers.accessed("export", ids)
    expired = table.num_rows - len(ids)
    return Transfer(len(ids), linked, table_of_summaries.num_rows, expired=expired)


def _memories(reader: Reader, ids: list[str]) -> Iterator[list[Memory]]:
    """Yield the memories of sorted ids, with the links among them."""
    there = set(ids)
    for part in chunks(ids, CHUNK):
        yield [
            replace(
                memory,
                association_links=tuple(
                    link for link in memory.association_links if link.linked_id in there
                ),
            )
            for memory in sorted(
                reader.records(reader.rows(part), links=True), key=lambda each: each.memory_id
            )
        ]


def _links(memory: Memory) -> list[dict[str, Any]]:
    return [{"linked_id": e.linked_id, "weight": e.weight} for e in memory.association_links]


def _naive(moment: datetime | None) -> datetime | None:
    return moment.astimezone(UTC).replace(tzinfo=None) if moment else None


def _table(memories: list[Memory], schema: pa.Schema) -> pa.Table:
    """Return memories as a file has them."""
    columns: dict[str, list[Any]] = {
        "joint_embedding": [np.asarray(memory.joint_embedding, np.float16) for memory in memories],
        "association_links": [_links(memory) for memory in memories],
    }
    for field in schema:
        if field.name not in columns:
            values = [getattr(memory, field.name) for memory in memories]
            timed = pa.types.is_timestamp(field.type)
            columns[field.name] = [_naive(value) for value in values] if timed else values
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    return pa.table(arrays, schema=schema)
