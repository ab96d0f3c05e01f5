"""Times that a wrong clock wrote: they have not come yet, and would delay for ever."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pyarrow as pa

from memopt.memory.model.filters import all_of, one_of
from memopt.memory.model.rows import with_columns
from memopt.memory.model.schema import EDGES, TIMESTAMP
from memopt.memory.store.database import Database
from memopt.memory.store.ends import expiry


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
