"""Deletion that reaches the disk: afterwards no file holds the bytes, old versions included."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pyarrow as pa

from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.filters import one_of
from memopt.memory.store.ends import mend_times
from memopt.memory.store.meta import TABLES
from memopt.memory.store.reembed import unfinished
from memopt.memory.store.stats import folder_bytes
from memopt.moved import old_names

__getattr__ = old_names(__name__)

_BATCH = 1024
# What holds content or vectors; the others hold ids and are only compacted.
_REWRITTEN = ("memories", "edges")


@dataclass(frozen=True, slots=True)
class Erasure:
    """What went: memories deleted, of which expired, and bytes given back to the disk."""

    memories: int
    expired: int
    bytes_freed: int


def forget(store: MemoryStore, ids: Sequence[str]) -> Erasure:
    """Delete memories and everything expired, and erase their bytes from every file.

    Summaries made of a forgotten memory go with it: they repeat it in other words.

    Args:
        ids: unknown ones are passed over.

    Raises:
        ConsolidationError: the disk has no room for one more copy of what stays; the memories are
            deleted, their bytes still on the disk: call it again.

    >>> import tempfile
    >>> import numpy as np
    >>> from memopt.memory import Content, MemoryStore, NewMemory
    >>> store = MemoryStore(tempfile.mkdtemp(), dim=2)
    >>> new = NewMemory(content=Content(text="a secret"), embedding=np.array([1.0, 0.0]))
    >>> forget(store, store.add(new).ids).memories
    1
    """
    gone = store.delete(sorted(set(ids))) if ids else 0
    expired = expire(store)
    return Erasure(gone + expired, expired, erase(store))


def expire(store: MemoryStore) -> int:
    """Delete the memories whose time has come; return how many. Their bytes go with erase()."""
    from lancedb.expr import col, lit

    database = store.database
    mend_times(database)
    query = database.query().where(col("expires_at") <= lit(database.now())).select(["memory_id"])
    ids = database.fetch(query)["memory_id"].to_pylist()
    return store.delete(sorted(ids)) if ids else 0


def erase(store: MemoryStore) -> int:
    """Write what is left anew and drop every old version; return the bytes given back.

    Compaction alone leaves a deleted row on the disk while less than a tenth of its file is
    deleted. So the tables are written once more, in one commit each, and all other files go. Scans
    that other processes began before must be repeated. Vector and word indices are made anew.
    """
    database, folder = store.database, store.place.local
    before = folder_bytes(folder) if folder else 0
    store.flush()
    with database.changing():
        store.writer.sweep()
        for name in _REWRITTEN:
            _rewrite(database.table(name))
        moving = unfinished(database)
        if moving is not None:
            # Vectors of a new model are vectors too.
            ids = moving.search().select(["memory_id"]).limit(None).to_arrow()["memory_id"]
            gone = sorted(set(ids.to_pylist()) - database.existing(ids.to_pylist()))
            if gone:
                moving.delete(one_of("memory_id", gone))
            _rewrite(moving)
        store.event_log.scrub()
        database.remake_indices()
        reclaim(store)
    store.index.ensure(rebuild=True)
    return max(0, before - folder_bytes(folder)) if folder else 0


def reclaim(store: MemoryStore) -> None:
    """Compact every table and delete the files of all versions but the newest.

    A scan that was begun before, in another process too, may miss files and must be repeated.

    Raises:
        ConsolidationError: the disk takes no more; the store is as it was.

    >>> import tempfile
    >>> from memopt.memory import MemoryStore
    >>> reclaim(MemoryStore(tempfile.mkdtemp(), dim=2))
    """
    database = store.database
    store.flush()
    with database.changing(), warnings.catch_warnings():
        # Lance warns that old versions go: that is what this is for.
        warnings.filterwarnings("ignore", message="optimize\\(cleanup_older_than=0\\)")
        moving = unfinished(database)
        for table in [*map(database.table, TABLES), *([] if moving is None else [moving])]:
            # Under the writer lock no commit is under way, so unverified files are leftovers.
            table.optimize(
                cleanup_older_than=timedelta(0), delete_unverified=store.place.local is not None
            )


def _rewrite(table: Any) -> None:
    schema = table.schema
    batches = (
        pa.RecordBatch.from_arrays([batch[f.name].cast(f.type) for f in schema], schema=schema)
        for batch in table.search().limit(None).to_batches(_BATCH)
    )
    table.add(pa.RecordBatchReader.from_batches(schema, batches), mode="overwrite")
