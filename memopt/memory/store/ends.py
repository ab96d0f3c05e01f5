"""When memories end: by a time of their own, or by how long their category is kept.

And the times that a wrong clock wrote: they have not come yet, and would delay for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import pyarrow as pa

from memopt.memory.model.filters import all_of, one_of, utc
from memopt.memory.model.rows import with_columns
from memopt.memory.model.schema import EDGES, TIMESTAMP, NewMemory
from memopt.memory.store.database import Database


def set_ends(database: Database, ends: Mapping[str, datetime | None]) -> None:
    """Write, under the lock, when memories that are there expire; None is never."""
    if ends:
        times = pa.array(ends.values(), TIMESTAMP)
        schema = database.schema(["memory_id", "expires_at"])
        database.replace(pa.table([list(ends), times], schema=schema))


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


def mend_times(database: Database) -> int:
    """Take times that cannot be for times of now; return how many.

    A memory accessed tomorrow would stay the latest one, a link strengthened tomorrow would not
    fade, and one whose category is kept for a month would be kept until a month after the time the
    wrong clock showed. When a memory happened is left as it is: that may be meant.
    """
    now = database.now()
    with database.changing():
        count = _set(database, "last_access", _after("last_access", now), now)
        for category, days in database.meta.retention.items():
            end = expiry(category, now, {category: days})
            if end is not None:
                kind = one_of("category", [category])
                late = all_of([kind, _after("expires_at", end)])
                count += _set(database, "expires_at", late, end)
        late = database.query("edges").where(_after("updated_at", now))
        if database.fetch(late.select(["source"]).limit(1)).num_rows:
            edges = database.table("edges")
            table = edges.to_arrow()
            times = [min(moment, now) for moment in table["updated_at"].to_pylist()]
            edges.add(with_columns(table, updated_at=times).cast(EDGES), mode="overwrite")
            count += 1
    return count


def _set(database: Database, name: str, condition: Any, moment: datetime) -> int:
    table = database.fetch(database.query().where(condition).select(["memory_id"]))
    if table.num_rows:
        schema = database.schema(["memory_id", name])
        times = pa.array([moment] * table.num_rows, TIMESTAMP)
        ids = table["memory_id"].combine_chunks()
        database.replace(pa.table([ids, times], schema=schema))
    return int(table.num_rows)


def _after(name: str, moment: datetime) -> Any:
    from lancedb.expr import col, lit

    return col(name) > lit(moment)
