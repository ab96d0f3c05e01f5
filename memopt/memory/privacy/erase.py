"""Deletion that reaches the disk: afterwards no file holds the bytes, old versions included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from memopt.memory.lifecycle.clocks import mend
from memopt.memory.model.filters import one_of, utc
from memopt.memory.privacy.reclaim import reclaim
from memopt.memory.search import searcher as searching
from memopt.memory.store import events
from memopt.memory.store import writer as writing
from memopt.memory.store.reembed import unfinished

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memopt.memory.memory_store import MemoryStore

_BATCH = 1024
# What holds content or vectors; the others hold ids and are only compacted.
_REWRITTEN = ("memories", "edges")


@dataclass(frozen=True, slots=True)
class Erased:
    """What went: memories deleted, of which expired, and bytes given back to the disk."""

    memories: int
    expired: int
    bytes_freed: int


def forget(store: MemoryStore, ids: Sequence[str]) -> Erased:
    """Delete memories and everything expired, and erase their bytes from every file.

    Summaries made of a forgotten memory go with it: they repeat it in other words.

    Args:
        ids: unknown ones are passed over.

    Raises:
        ConsolidationError: the disk has no room for one more copy of what stays; the memories are
            deleted, their bytes still on the disk: call it again.

    >>> import tempfile
    >>> import numpy as np
    >>> from memopt.memory.model.schema import Content, NewMemory
    >>> from memopt.memory.memory_store import MemoryStore
    >>> store = MemoryStore(tempfile.mkdtemp(), dim=2)
    >>> new = NewMemory(content=Content(text="a secret"), embedding=np.array([1.0, 0.0]))
    >>> forget(store, store.add(new).ids).memories
    1
    """
    gone = store.delete(sorted(set(ids))) if ids else 0
    expired = expire(store)
    return Erased(gone + expired, expired, erase(store))


def expire(store: MemoryStore) -> int:
    """Delete the memories whose time has come; return how many. Their bytes go with erase()."""
    from lancedb.expr import col, lit

    mend(store)
    now = utc(store.clock())
    query = store.query().where(col("expires_at") <= lit(now)).select(["memory_id"])
    ids = store.fetch(query)["memory_id"].to_pylist()
    return store.delete(sorted(ids)) if ids else 0


def erase(store: MemoryStore) -> int:
    """Write what is left anew and drop every old version; return the bytes given back.

    Compaction alone leaves a deleted row on the disk while less than a tenth of its file is
    deleted. So the tables are written once more, in one commit each, and all other files go. Scans
    that other processes began before must be repeated. Vector and word indices are made anew.
    """
    before = _size(store)
    store.flush()
    with store.changing():
        writing.sweep(store)
        for name in _REWRITTEN:
            _rewrite(store.table(name))
        moving = unfinished(store)
        if moving is not None:
            # Vectors of a new model are vectors too.
            made = moving.search().select(["memory_id"]).limit(None).to_arrow()["memory_id"]
            there = store.light(made.to_pylist(), ["memory_id"])["memory_id"].to_pylist()
            gone = sorted(set(made.to_pylist()) - set(there))
            if gone:
                moving.delete(one_of("memory_id", gone))
            _rewrite(moving)
        events.scrub(store)
        searching.create_indices(store.database)
        reclaim(store)
    store.index.ensure(rebuild=True)
    return max(0, before - _size(store))


def _rewrite(table: Any) -> None:
    schema = table.schema
    batches = table.search().limit(None).to_batches(_BATCH)
    stream = pa.RecordBatchReader.from_batches(schema, _cast(batches, schema))
    table.add(stream, mode="overwrite")


def _cast(batches: Any, schema: pa.Schema) -> Any:
    for batch in batches:
        yield pa.RecordBatch.from_arrays(
            [batch[field.name].cast(field.type) for field in schema], schema=schema
        )


def _size(store: MemoryStore) -> int:
    folder = store.place.local
    if folder is None:
        return 0
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
