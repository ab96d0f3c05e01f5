"""What a store holds and how much room it takes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from memopt.memory.model.filters import EVERYTHING
from memopt.memory.model.rows import vectors_array
from memopt.memory.model.schema import LONG_TERM, MODALITIES, SHORT_TERM, TIERS, Filter
from memopt.memory.store.meta import TABLES
from memopt.memory.store.reader import Reader

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


def stats(reader: Reader) -> Stats:
    """Count what is there, by tier, modality and category, and measure the folder."""
    flags = {name: f"has_{name}" for name in MODALITIES}
    names = ["tier", "category", "timestamp", "access_count", "consolidated_at", *flags.values()]
    table = reader.table(EVERYTHING, names)
    tiers = _value_counts(table["tier"])
    times = pc.min_max(table["timestamp"]).as_py()
    database = reader.database
    folder = database.place.local
    return Stats(
        memories=table.num_rows,
        tiers={tier: tiers.get(tier, 0) for tier in TIERS},
        modalities={name: pc.sum(table[flag]).as_py() or 0 for name, flag in flags.items()},
        categories=_value_counts(table["category"]),
        links=database.table("edges").count_rows() // 2,
        events=database.table("events").count_rows(),
        accesses=pc.sum(table["access_count"]).as_py() or 0,
        oldest=times["min"],
        newest=times["max"],
        last_consolidation=pc.max(table["consolidated_at"]).as_py(),
        dim=database.dim,
        model_id=database.meta.model_id,
        encrypted=database.cipher is not None,
        bytes_on_disk=folder_bytes(folder) if folder else None,
        table_bytes={name: folder_bytes(folder / f"{name}.lance") for name in TABLES}
        if folder
        else {},
        duplicate_rate=duplicate_rate(reader),
    )


def duplicate_rate(reader: Reader) -> float | None:
    """Return the share of the memories at hand that say nearly what another one says.

    >>> import tempfile
    >>> from memopt.memory import Content, MemoryStore, NewMemory
    >>> store = MemoryStore(tempfile.mkdtemp(), dim=2)
    >>> rows = [("a", [1, 0]), ("b", [1, 0.1]), ("c", [0, 1]), ("d", [-1, 0])]
    >>> _ = store.add([NewMemory(content=Content(text=text), embedding=np.array(vector))
    ...                for text, vector in rows])
    >>> store.stats().duplicate_rate
    0.5
    """
    at_hand = Filter(tiers=(SHORT_TERM, LONG_TERM))
    count = reader.count(at_hand)
    if count < 2:
        return None
    chosen = np.random.default_rng(0).choice(count, min(count, _SAMPLE), replace=False)
    sample = sampled_vectors(reader, np.sort(chosen), at_hand)
    near = np.zeros(len(sample), np.int64)
    for batch in reader.scan(at_hand, ["joint_embedding"], _BATCH):
        vectors = vectors_array(batch["joint_embedding"], sample.shape[1])
        near += (sample @ vectors.T >= _NEAR).sum(axis=1)
    # Each finds itself.
    return float(np.mean(near > 1))


def sampled_vectors(
    reader: Reader, places: NDArray[np.int64], where: Filter = EVERYTHING
) -> NDArray[np.float32]:
    """Return the vectors at ascending places of a scan, float32 (n, dim)."""
    dim = reader.database.dim
    start, found = 0, [np.empty((0, dim), np.float32)]
    for batch in reader.scan(where, ["joint_embedding"], _BATCH):
        here = places[(places >= start) & (places < start + batch.num_rows)] - start
        if len(here):
            found.append(vectors_array(batch["joint_embedding"].take(pa.array(here)), dim))
        start += batch.num_rows
    return np.concatenate(found)


def _value_counts(column: pa.ChunkedArray) -> dict[str, int]:
    counted = [(pair["values"], pair["counts"]) for pair in pc.value_counts(column).to_pylist()]
    return dict(sorted(counted, key=lambda pair: (-pair[1], pair[0])))


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            # Another process compacts the store while we look.
            continue
    return total
