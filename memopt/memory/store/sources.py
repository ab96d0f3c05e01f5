"""Summaries follow their sources: none says any longer what a source no longer says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from memopt.memory.lifecycle.condensed_rows import moved
from memopt.memory.model.schema import LONG_TERM, SHORT_TERM, Filter

if TYPE_CHECKING:
    from collections.abc import Collection
    from datetime import datetime

    from memopt.memory.memory_store import MemoryStore

_SUMMARIES = Filter(tiers=(LONG_TERM,))


def summaries(store: MemoryStore, ids: Collection[str]) -> dict[str, list[str]]:
    """Return the summaries made of any of ``ids``, each with all of its sources.

    >>> import tempfile
    >>> from memopt.memory.memory_store import MemoryStore
    >>> summaries(MemoryStore(tempfile.mkdtemp(), dim=2), ["a"])
    {}
    """
    wanted, found = set(ids), {}
    names = ["memory_id", "source_memory_ids"]
    for batch in store.scan(_SUMMARIES, names, 8192) if wanted else ():
        for row in batch.to_pylist():
            sources = row["source_memory_ids"] or []
            if not wanted.isdisjoint(sources):
                found[row["memory_id"]] = sources
    return found


def released(store: MemoryStore, made: dict[str, list[str]], but: Collection[str]) -> pa.Table:
    """Return the originals of summaries that go, short-term again: the next run looks at them anew.

    Args:
        made: of :func:`summaries`.
        but: ids to leave out.
    """
    ids = {key for sources in made.values() for key in sources} - set(but) - set(made)
    return free(store.unpack(store.rows(sorted(ids))))


def free(opened: pa.Table) -> pa.Table:
    """Return opened rows as they were before a summary stood for them."""
    field = opened.schema.field("consolidated_at")
    nothing = pa.nulls(opened.num_rows, field.type)
    at = opened.column_names.index(field.name)
    return moved(opened, SHORT_TERM).set_column(at, field, nothing)


def expiries(store: MemoryStore, category: str) -> dict[str, datetime]:
    """Return the summaries of a category that would outlive a source: id -> when that one ends."""
    where = Filter(tiers=(LONG_TERM,), categories=(category,))
    names = ["memory_id", "expires_at", "source_memory_ids"]
    rows = [row for batch in store.scan(where, names, 8192) for row in batch.to_pylist()]
    sources = sorted({key for row in rows for key in row["source_memory_ids"] or []})
    there = store.light(sources, ["memory_id", "expires_at"]).to_pylist()
    ends = {row["memory_id"]: row["expires_at"] for row in there if row["expires_at"]}
    found = {}
    for row in rows:
        own = [ends[key] for key in row["source_memory_ids"] or [] if key in ends]
        first = min(own, default=None)
        if first is not None and (row["expires_at"] is None or row["expires_at"] > first):
            found[row["memory_id"]] = first
    return found
