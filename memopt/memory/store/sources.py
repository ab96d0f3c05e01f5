"""Summaries follow their sources: none says any longer what a source no longer says."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

import pyarrow as pa

from memopt.memory.model.rows import with_columns
from memopt.memory.model.schema import LONG_TERM, SHORT_TERM, Filter
from memopt.memory.store.reader import Reader


def summaries_of(reader: Reader, ids: Collection[str]) -> dict[str, list[str]]:
    """Return the summaries made of any of ``ids``, each with all of its sources."""
    sources = set(ids)
    if not sources:
        return {}
    table = reader.table(Filter(tiers=(LONG_TERM,)), ["memory_id", "source_memory_ids"], 8192)
    return {
        row["memory_id"]: row["source_memory_ids"]
        for row in table.to_pylist()
        if not sources.isdisjoint(row["source_memory_ids"] or [])
    }


def released(reader: Reader, summaries: dict[str, list[str]], but: Collection[str]) -> pa.Table:
    """Return the originals of summaries that go, short-term again: the next run looks at them anew.

    Args:
        summaries: of :func:`summaries_of`.
        but: ids to leave out.
    """
    ids = {key for sources in summaries.values() for key in sources} - set(but) - set(summaries)
    return free(reader.cells.unpack(reader.rows(sorted(ids))))


def free(opened: pa.Table) -> pa.Table:
    """Return opened rows as they were before a summary stood for them."""
    return with_columns(opened, tier=SHORT_TERM, consolidated_at=None)


def expiries(reader: Reader, category: str) -> dict[str, datetime]:
    """Return the summaries of a category that would outlive a source: id -> when that one ends."""
    where = Filter(tiers=(LONG_TERM,), categories=(category,))
    rows = reader.table(where, ["memory_id", "expires_at", "source_memory_ids"], 8192).to_pylist()
    sources = sorted({key for row in rows for key in row["source_memory_ids"] or []})
    there = reader.database.light(sources, ["memory_id", "expires_at"]).to_pylist()
    ends = {row["memory_id"]: row["expires_at"] for row in there if row["expires_at"]}
    found = {}
    for row in rows:
        own = [ends[key] for key in row["source_memory_ids"] or [] if key in ends]
        first = min(own, default=None)
        if first is not None and (row["expires_at"] is None or row["expires_at"] > first):
            found[row["memory_id"]] = first
    return found
