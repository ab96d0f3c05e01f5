"""Rows of ``memories`` that consolidation writes: summaries, and originals in another tier."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from memopt.memory.lifecycle import summary as summarise
from memopt.memory.model.filters import utc
from memopt.memory.model.rows import new_rows
from memopt.memory.model.schema import LONG_TERM, SHORT_TERM

if TYPE_CHECKING:
    from memopt.memory.lifecycle.plan import Group
    from memopt.memory.memory_store import MemoryStore


@dataclass(frozen=True, eq=False)
class Ready:
    """What is to be written for a group: its summaries, and its originals as they are kept."""

    ids: list[str]
    before: pa.Table
    summaries: pa.Table | None
    archived: pa.Table
    since: float = field(default_factory=time.monotonic)

    def of(self, rows: pa.Table) -> pa.Table:
        """Return those of ``rows`` that are this group's."""
        own = set(self.ids)
        return rows.filter(pa.array([key in own for key in rows["memory_id"].to_pylist()]))


def summary_row(
    store: MemoryStore,
    opened: pa.Table,
    vectors: Any,
    summary: str,
    group: Group,
    originals: str,
) -> pa.Table:
    """Return the row of a summary: at the centroid of its sources."""
    ids = opened["memory_id"].to_pylist()
    middle = summarise.centroid(vectors)
    columns: dict[str, Any] = {
        "memory_id": "sum-" + hashlib.sha256("\n".join(ids).encode()).hexdigest()[:32],
        "timestamp": max(opened["timestamp"].to_pylist()),
        "category": group.category,
        "tier": LONG_TERM,
        "expires_at": group.expires_at,
        "model_id": opened["model_id"][0].as_py(),
        "summary": store.redact(summary) if store.redact else summary,
        "has_text": True,
        "source_count": len(ids),
        "consolidated_at": utc(store.clock()),
        "last_access": max(filter(None, opened["last_access"].to_pylist()), default=None),
    }
    # Archived originals keep their own counts: nothing is counted twice.
    if originals == "drop":
        gone = opened.filter(pc.invert(has_media(opened)))
        columns["access_count"] = sum(gone["access_count"].to_pylist())
    listed = {name: [value] for name, value in columns.items()}
    return new_rows(middle[None, :], {**listed, "source_memory_ids": [ids]})


def has_media(opened: pa.Table) -> pa.ChunkedArray:
    """Return which rows hold a picture or a sound, bool."""
    return pc.or_(opened["has_vision"], opened["has_audio"])


def moved(opened: pa.Table, tier: str, consolidated_at: datetime | None = None) -> pa.Table:
    """Return opened rows in another tier; a time of consolidation marks them as condensed."""
    changes: dict[str, Any] = {"tier": tier}
    if consolidated_at is not None:
        changes["consolidated_at"] = consolidated_at
    for name, value in changes.items():
        kind = opened.schema.field(name)
        values = pa.repeat(pa.scalar(value, kind.type), opened.num_rows)
        opened = opened.set_column(opened.column_names.index(name), kind, values)
    return opened


def untouched(rows: pa.Table, ids: list[str]) -> bool:
    """Say whether all of ``ids`` are there and short-term."""
    return rows.num_rows == len(ids) and set(rows["tier"].to_pylist()) == {SHORT_TERM}


def same(before: pa.Table, now: pa.Table) -> bool:
    """Say whether rows are the same but for their access counts."""
    names = [name for name in before.column_names if name not in ("access_count", "last_access")]
    key = [("memory_id", "ascending")]
    return bool(before.select(names).sort_by(key).equals(now.select(names).sort_by(key)))
