"""How long memories of a category are kept."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import pyarrow as pa

from memopt.errors import InputError
from memopt.memory.model.filters import utc
from memopt.memory.model.schema import TIMESTAMP, Filter
from memopt.memory.store import sources as derived
from memopt.memory.store.access_counts import cover_ids

if TYPE_CHECKING:
    from memopt.memory.memory_store import MemoryStore

_CHUNK = 8192
_SCHEMA = pa.schema(
    [pa.field("memory_id", pa.string(), nullable=False), pa.field("expires_at", TIMESTAMP)]
)
_LONGEST_DAYS = 36_500


def retain(store: MemoryStore, category: str, days: float | None) -> int:
    """Keep memories of a category for so long after they happened, those there and those to come.

    From then on no search finds them; :func:`memopt.memory.forget` and every consolidation erase
    them. An earlier time of expiry of a single memory stays.

    Args:
        category: which; '' is the category of memories that name none.
        days: None keeps those that are still to come for ever; what is there keeps its time.

    Returns:
        Memories whose time of expiry changed.

    Raises:
        InputError: ``days`` is not above 0, or more than a century.

    >>> import tempfile
    >>> from memopt.memory.memory_store import MemoryStore
    >>> store = MemoryStore(tempfile.mkdtemp(), dim=2)
    >>> retain(store, "visitors", 30), store.meta.retention
    (0, {'visitors': 30})
    """
    if days is not None and not 0 < days <= _LONGEST_DAYS:
        raise InputError(f"{days} days is no time to keep memories", fix="give more than 0")
    changed = 0
    with store.changing():
        policy = {key: value for key, value in store.meta.retention.items() if key != category}
        store.write_meta(retention=policy if days is None else {**policy, category: days})
        if days is None:
            return 0
        names = ["memory_id", "timestamp", "expires_at"]
        for batch in list(store.scan(Filter(categories=(category,)), names, _CHUNK)):
            ends: dict[str, datetime | None] = {}
            for row in batch.to_pylist():
                end = expiry(category, row["timestamp"], {category: days})
                if end is not None and (row["expires_at"] is None or row["expires_at"] > end):
                    ends[row["memory_id"]] = end
            set_ends(store, ends)
            changed += len(ends)
        # A summary happened when the latest of its sources did: it would outlive the others.
        sooner = derived.expiries(store, category)
        set_ends(store, sooner)
    return changed + len(sooner)


def set_ends(store: MemoryStore, ends: Mapping[str, datetime | None]) -> None:
    """Write, under the lock, when memories that are there expire; None is never."""
    if not ends:
        return
    table = pa.table([list(ends), pa.array(ends.values(), TIMESTAMP)], schema=_SCHEMA)
    cover_ids(store.memories)
    store.memories.merge_insert("memory_id").when_matched_update_all().execute(table)
    cover_ids(store.memories)


def expiry(category: str, timestamp: datetime, retention: Mapping[str, float]) -> datetime | None:
    """Return when a memory expires by the policy: at the end of that day, UTC.

    Whole days, so that memories of one day can be condensed together: a summary goes when its
    sources have to.

    >>> expiry("a", datetime(2026, 1, 1, 15), {"a": 1}).isoformat()
    '2026-01-03T00:00:00+00:00'
    """
    days = retention.get(category)
    if days is None:
        return None
    end = utc(timestamp) + timedelta(days=days)
    return (end + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
