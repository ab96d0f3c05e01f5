"""Times that a wrong clock wrote: they have not come yet, and would delay for ever."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from memopt.memory.lifecycle.retention import expiry
from memopt.memory.model.filters import all_of, one_of, utc
from memopt.memory.model.schema import EDGES, TIMESTAMP
from memopt.memory.store.access_counts import cover_ids

if TYPE_CHECKING:
    from datetime import datetime

    from memopt.memory.memory_store import MemoryStore


def mend(store: MemoryStore) -> int:
    """Take times that cannot be for times of now; return how many.

    A memory accessed tomorrow would stay the latest one, a link strengthened tomorrow would not
    fade, and one whose category is kept for a month would be kept until a month after the time the
    wrong clock showed. When a memory happened is left as it is: that may be meant.

    >>> import tempfile
    >>> from memopt.memory.memory_store import MemoryStore
    >>> mend(MemoryStore(tempfile.mkdtemp(), dim=2))
    0
    """
    now = utc(store.clock())
    with store.changing():
        count = _set(store, "last_access", _later("last_access", now), now)
        for category, days in store.meta.retention.items():
            end = expiry(category, now, {category: days})
            if end is not None:
                kind = one_of("category", [category])
                count += _set(store, "expires_at", all_of([kind, _later("expires_at", end)]), end)
        edges = store.table("edges")
        late = store.query("edges").where(_later("updated_at", now)).select(["source"]).limit(1)
        if store.fetch(late).num_rows:
            table = edges.to_arrow()
            times = [min(moment, now) for moment in table["updated_at"].to_pylist()]
            field = EDGES.field("updated_at")
            at = table.column_names.index(field.name)
            table = table.set_column(at, field, pa.array(times, field.type))
            edges.add(table.cast(EDGES), mode="overwrite")
            count += 1
    return count


def _set(store: MemoryStore, name: str, condition: Any, moment: datetime) -> int:
    ids = store.fetch(store.query().where(condition).select(["memory_id"]))["memory_id"]
    if not len(ids):
        return 0
    schema = pa.schema(
        [pa.field("memory_id", pa.string(), nullable=False), pa.field(name, TIMESTAMP)]
    )
    times = pa.array([moment] * len(ids), TIMESTAMP)
    cover_ids(store.memories)
    merge = store.memories.merge_insert("memory_id").when_matched_update_all()
    merge.execute(pa.table([ids.combine_chunks(), times], schema=schema))
    cover_ids(store.memories)
    return len(ids)


def _later(name: str, moment: datetime) -> Any:
    from lancedb.expr import col, lit

    return col(name) > lit(moment)
