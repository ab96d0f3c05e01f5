"""Is everything there, once, readable and linked to what exists?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from memopt.errors import ConsolidationError
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.filters import DELETED, one_of
from memopt.memory.model.rows import vectors_array
from memopt.memory.model.schema import LONG_TERM, TIERS, memories_schema

_CHUNK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a check found; each tuple holds memory ids.

    Attributes:
        missing: expected by the caller and not there.
        duplicates: there more than once.
        unreadable: content that cannot be decrypted, unpacked or has no bytes.
        bad_vectors: not finite or not of length 1.
        bad_tiers: of an unknown tier.
        orphans: ends of links that are no memories.
        one_sided: links without their other direction, counted.
        half_deleted: rows that a crash left marked as deleted; nobody sees them.
        summarised: originals that are short-term although a summary replaced them.
        index_recall: of the vector index when it was last checked; None while search is exact.
    """

    memories: int
    missing: tuple[str, ...] = ()
    duplicates: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    bad_vectors: tuple[str, ...] = ()
    bad_tiers: tuple[str, ...] = ()
    orphans: tuple[str, ...] = ()
    one_sided: int = 0
    half_deleted: int = 0
    summarised: tuple[str, ...] = ()
    index_recall: float | None = None

    @property
    def problems(self) -> dict[str, int]:
        """Name -> how many, of what is wrong."""
        found = asdict(self)
        del found["memories"], found["index_recall"]
        counts = {name: v if isinstance(v, int) else len(v) for name, v in found.items()}
        return {name: count for name, count in counts.items() if count}


def verify(store: MemoryStore, expected: Sequence[str] = (), *, repair: bool = False) -> Report:
    """Read every memory and every link of a store.

    Args:
        expected: ids that must be there, for example all that were acknowledged.
        repair: first drop links to missing memories, one-sided links and half-deleted rows.

    Raises:
        ConsolidationError: a table cannot be read at all.

    >>> import tempfile
    >>> from memopt.memory import MemoryStore
    >>> verify(MemoryStore(tempfile.mkdtemp(), dim=2), ["gone"]).problems
    {'missing': 1}
    """
    if repair:
        _repair(store)
    ids: list[str] = []
    tiers: dict[str, str] = {}
    sources: list[str] = []
    unreadable, bad_vectors = [], []
    half_deleted = store.database.memories.count_rows(f"tier = '{DELETED}'")
    for batch in store.scan(batch_size=_CHUNK):
        vectors = vectors_array(batch["joint_embedding"], store.dim)
        lengths = np.linalg.norm(vectors.reshape(-1, store.dim), axis=1)
        for row, length in zip(batch.to_pylist(), lengths.tolist(), strict=True):
            key = row["memory_id"]
            ids.append(key)
            tiers[key] = row["tier"]
            if not abs(length - 1) < 1e-3:
                bad_vectors.append(key)
            if row["tier"] == LONG_TERM:
                sources += row["source_memory_ids"] or []
            if not _readable(store, row):
                unreadable.append(key)
    known = set(ids)
    edges = store.database.table("edges").to_arrow()
    pairs = list(zip(edges["source"].to_pylist(), edges["target"].to_pylist(), strict=True))
    ends = {end for pair in pairs for end in pair}
    directed = set(pairs)
    state = store.index.last_state()
    return Report(
        memories=len(known),
        missing=tuple(sorted(set(expected) - known)),
        duplicates=tuple(sorted(key for key, count in Counter(ids).items() if count > 1)),
        unreadable=tuple(sorted(unreadable)),
        bad_vectors=tuple(sorted(bad_vectors)),
        bad_tiers=tuple(sorted(key for key, tier in tiers.items() if tier not in TIERS)),
        orphans=tuple(sorted(ends - known)),
        one_sided=sum((right, left) not in directed for left, right in directed),
        half_deleted=half_deleted,
        summarised=tuple(sorted({k for k in sources if tiers.get(k) == "short_term"})),
        index_recall=state.recall if state and state.cells else None,
    )


def _readable(store: MemoryStore, row: dict[str, Any]) -> bool:
    """Whether the content that the flags promise can be read."""
    if row["codec"] or store.database.cipher is not None:
        try:
            table = pa.Table.from_pylist([row], memories_schema(store.dim))
            row = store.cells.unpack(table).to_pylist()[0]
        except ConsolidationError:
            return False
    promised = {"text": "has_text", "vision_data": "has_vision", "audio_data": "has_audio"}
    there = {**row, "text": row["text"] if row["text"] is not None else row["summary"]}
    return all(there[name] is not None for name, flag in promised.items() if row[flag])


def _repair(store: MemoryStore) -> None:
    with store.database.changing():
        store.writer.sweep()
        edges = store.database.table("edges")
        table = edges.to_arrow()
        pairs = set(zip(table["source"].to_pylist(), table["target"].to_pylist(), strict=True))
        ends = sorted({end for pair in pairs for end in pair})
        there = store.database.existing(ends)
        gone = [end for end in ends if end not in there]
        if gone:
            edges.delete(one_of("source", gone))
            edges.delete(one_of("target", gone))
        lonely = sorted(
            (left, right)
            for left, right in pairs
            if (right, left) not in pairs and {left, right} <= there
        )
        from lancedb.expr import col, lit

        for left, right in lonely:
            edges.delete((col("source") == lit(left)) & (col("target") == lit(right)))
