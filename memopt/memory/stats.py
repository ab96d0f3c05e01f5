"""What a store holds and how much room it takes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from memopt.memory.filters import EVERYTHING
from memopt.memory.meta import TABLES
from memopt.memory.schema import MODALITIES, TIERS

if TYPE_CHECKING:
    from memopt.memory.store import MemoryStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """A store at one moment.

    Attributes:
        tiers, modalities, categories: how many memories of each.
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
    flags = [f"has_{name}" for name in MODALITIES]
    names = ["tier", "category", "timestamp", "access_count", "consolidated_at", *flags]
    tiers: Counter[str] = Counter()
    modalities: Counter[str] = Counter()
    categories: Counter[str] = Counter()
    times: list[datetime] = []
    consolidated: list[datetime] = []
    memories = accesses = 0
    for batch in store.scan(EVERYTHING, names, 8192):
        columns = {name: batch[name].to_pylist() for name in names}
        memories += batch.num_rows
        tiers.update(columns["tier"])
        categories.update(columns["category"])
        accesses += sum(columns["access_count"])
        for name in MODALITIES:
            modalities[name] += sum(columns[f"has_{name}"])
        times += [min(columns["timestamp"]), max(columns["timestamp"])]
        consolidated += filter(None, columns["consolidated_at"])
    folder = store.place.local
    table_bytes = {name: _size(folder / f"{name}.lance") for name in TABLES} if folder else {}
    return Stats(
        memories=memories,
        tiers={tier: tiers[tier] for tier in TIERS},
        modalities={name: modalities[name] for name in MODALITIES},
        categories=dict(categories.most_common()),
        links=store.table("edges").count_rows() // 2,
        events=store.table("events").count_rows(),
        accesses=accesses,
        oldest=min(times, default=None),
        newest=max(times, default=None),
        last_consolidation=max(consolidated, default=None),
        dim=store.dim,
        model_id=store.meta.model_id,
        encrypted=store.cipher is not None,
        bytes_on_disk=_size(folder) if folder else None,
        table_bytes=table_bytes,
    )


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            # Another process compacts the store while we look.
            continue
    return total
