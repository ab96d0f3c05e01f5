"""What a store holds and how much room it takes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from memopt.memory.filters import EVERYTHING
from memopt.memory.meta import TABLES
from memopt.memory.schema import MODALITIES, TIERS, memories_schema

if TYPE_CHECKING:
    from memopt.memory.store import MemoryStore


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
    )


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
