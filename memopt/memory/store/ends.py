"""When memories end: by a time of their own, or by how long their category is kept."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

import pyarrow as pa

from memopt.memory.model.filters import utc
from memopt.memory.model.schema import TIMESTAMP, NewMemory
from memopt.memory.store.database import Database

_SCHEMA = pa.schema(
    [pa.field("memory_id", pa.string(), nullable=False), pa.field("expires_at", TIMESTAMP)]
)


def set_ends(database: Database, ends: Mapping[str, datetime | None]) -> None:
    """Write, under the lock, when memories that are there expire; None is never."""
    if ends:
        times = pa.array(ends.values(), TIMESTAMP)
        database.replace(pa.table([list(ends), times], schema=_SCHEMA))


def end_of(memory: NewMemory, now: datetime, retention: Mapping[str, float]) -> datetime | None:
    """Return when a memory expires: by its own time or by the policy of its category, if sooner."""
    at = utc(memory.timestamp) if memory.timestamp else now
    own = utc(memory.expires_at) if memory.expires_at else None
    return min(filter(None, (own, expiry(memory.category, at, retention))), default=None)


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


def later(one: datetime | None, other: datetime | None) -> datetime | None:
    """Return the later of two ends; None is never.

    >>> later(datetime(2026, 1, 1), None) is None
    True
    """
    return None if one is None or other is None else max(one, other)
