"""What a store holds and how much room it takes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from memopt.memory.model.filters import EVERYTHING
from memopt.memory.model.rows import vectors_array
from memopt.memory.model.schema import (
    LONG_TERM,
    MODALITIES,
    SHORT_TERM,
    TIERS,
    Filter,
    memories_schema,
)
from memopt.memory.store.meta import TABLES

if TYPE_CHECKING:
    from memopt.memory.memory_store import MemoryStore

# Sentences that differ by a word or two; a product of 512 x 100,000 x 384 takes half a second.
_NEAR, _SAMPLE, _BATCH = 0.9, 512, 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """A store at one moment.

    Attributes:
        tiers, modalities, categories: how many memories of each; categories most frequent first.
        links: undirected edges of the association graph.
        accesses: sum of all access counts.
        oldest, newest: bounds of ``timestamp``.
        last_consolidation: the latest ``consolidated_at``.
        bytes_on_disk: of the whole folder, old versions included; None for an object store.
        table_bytes: of each table, the same way.
        duplicate_rate: share of the memories at hand (none of the archive) that have a near
            duplicate, cosine 0.9 and above; of a sample where there are many. None of fewer than 2.
    """

    memories: int
    tiers: dict[str, int]
    modalities: dict[str, int]
    categories: dict[str, int]
    links: int
    events: int
    accesses: int
    oldest: datetime | None
    newest: datetime | None
    last_consolidation: datetime | None
    dim: int
    model_id: str
    encrypted: bool
    bytes_on_disk: int | None
    table_bytes: dict[str, int]
    duplicate_rate: float | None


def stats(store: MemoryStore) -> Stats:
    """Do what :meth:`MemoryStore.stats` says."""
    flags = {name: f"has_{name}" for name in MODALITIES}
    names = ["tier", "category", "timestamp", "access_count", "consolidated_at", *flags.values()]
    schema = pa.schema([memories_schema(store.dim).field(name) for name in names])
    table = pa.Table.from_batches(list(store.scan(EVERYTHING, names, 65536)), schema=schema)
    tiers = _value_counts(table["tier"])
    categories = _value_counts(table["category"])
    times = pc.min_max(table["timestamp"]).as_py()
    folder = store.place.local
    table_bytes = {name: _size(folder / f"{name}.lance") for name in TABLES} if folder else {}
    return Stats(
        memories=table.num_rows,
        tiers={tier: tiers.get(tier, 0) for tier in TIERS},
        modalities={name: pc.sum(table[flag]).as_py() or 0 for name, flag in flags.items()},
        categories=categories,
        links=store.table("edges").count_rows() // 2,
        events=store.table("events").count_rows(),
        accesses=pc.sum(table["access_count"]).as_py() or 0,
        oldest=times["min"],
        newest=times["max"],
        last_consolidation=pc.max(table["consolidated_at"]).as_py(),
        dim=store.dim,
        model_id=store.meta.model_id,
        encrypted=store.cipher is not None,
        bytes_on_disk=_size(folder) if folder else None,
        table_bytes=table_bytes,
        duplicate_rate=duplicate_rate(store),
    )


def duplicate_rate(store: MemoryStore) -> float | None:
    """Return the share of the memories at hand that say nearly what another one says.

    >>> import tempfile
    >>> from memopt.memory.model.schema import Content, NewMemory
    >>> from memopt.memory.memory_store import MemoryStore
    >>> store = MemoryStore(tempfile.mkdtemp(), dim=2)
    >>> rows = [("a", [1, 0]), ("b", [1, 0.1]), ("c", [0, 1]), ("d", [-1, 0])]
    >>> _ = store.add([NewMemory(content=Content(text=text), embedding=np.array(vector))
    ...                for text, vector in rows])
    >>> duplicate_rate(store)
    0.5
    """
    at_hand = Filter(tiers=(SHORT_TERM, LONG_TERM))
    count = store.count(at_hand)
    if count < 2:
        return None
    chosen = np.random.default_rng(0).choice(count, min(count, _SAMPLE), replace=False)
    chosen.sort()
    names = ["joint_embedding"]
    start, taken = 0, []
    for batch in store.scan(at_hand, names, _BATCH):
        here = chosen[(chosen >= start) & (chosen < start + batch.num_rows)] - start
        taken.append(vectors_array(batch["joint_embedding"].take(pa.array(here)), store.dim))
        start += batch.num_rows
    sample = np.concatenate(taken)
    near = np.zeros(len(sample), np.int64)
    for batch in store.scan(at_hand, names, _BATCH):
        vectors = vectors_array(batch["joint_embedding"], store.dim)
        near += (sample @ vectors.T >= _NEAR).sum(axis=1)
    # Each finds itself.
    return float(np.mean(near > 1))


def _value_counts(column: pa.ChunkedArray) -> dict[str, int]:
    counted = [(pair["values"], pair["counts"]) for pair in pc.value_counts(column).to_pylist()]
    return dict(sorted(counted, key=lambda pair: (-pair[1], pair[0])))


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            # Another process compacts the store while we look.
            continue
    return total
