"""How long memories of a category are kept."""

from __future__ import annotations

from datetime import datetime

from memopt.errors import InputError
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Filter
from memopt.memory.store.ends import expiry, set_ends
from memopt.memory.store.sources import expiries

_CHUNK = 8192
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
    >>> from memopt.memory import MemoryStore
    >>> store = MemoryStore(tempfile.mkdtemp(), dim=2)
    >>> retain(store, "visitors", 30), store.meta.retention
    (0, {'visitors': 30})
    """
    if days is not None and not 0 < days <= _LONGEST_DAYS:
        raise InputError(f"{days} days is no time to keep memories", fix="give more than 0")
    database, changed = store.database, 0
    with database.changing():
        policy = {key: value for key, value in store.meta.retention.items() if key != category}
        database.write_meta(retention=policy if days is None else {**policy, category: days})
        if days is None:
            return 0
        names = ["memory_id", "timestamp", "expires_at"]
        table = store.reader.table(Filter(categories=(category,)), names, _CHUNK)
        for batch in table.to_batches():
            ends: dict[str, datetime | None] = {}
            for row in batch.to_pylist():
                end = expiry(category, row["timestamp"], {category: days})
                if end is not None and (row["expires_at"] is None or row["expires_at"] > end):
                    ends[row["memory_id"]] = end
            set_ends(database, ends)
            changed += len(ends)
        # A summary happened when the latest of its sources did: it would outlive the others.
        sooner = expiries(store.reader, category)
        set_ends(database, sooner)
    return changed + len(sooner)
