"""Make the vectors of a store compact, in one commit, where search is shown to find as much.

What compact vectors are is in :mod:`memopt.memory.model.signs`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from memopt.memory.model.rows import vectors_array
from memopt.memory.model.schema import BITS
from memopt.memory.model.signs import candidates, compact_schema, fitted
from memopt.memory.search.vector_index import sample

if TYPE_CHECKING:
    from memopt.memory.memory_store import MemoryStore


EVENT = "compact"
# Shorter vectors have too few signs to tell them apart, and are no great part of their rows.
LEAST_DIM = 128
# All signs are compared: beyond this an inverted file is faster, and the store stays as it is.
MOST_ROWS = 200_000
LEAST_RECALL = 0.98
_AT, _CHUNK = 10, 1024


def compact(store: MemoryStore) -> float | None:
    """Make the vectors of a store compact where a search of them finds the same.

    Readers go on meanwhile; a search that meets the change is repeated.

    Returns:
        The recall that was measured; None where nothing was changed: the store is compact already,
        is too large or too small for it, or search by signs would miss too much.

    Raises:
        ConsolidationError: the disk takes no more; the store is as it was.

    >>> import tempfile
    >>> from memopt.memory import MemoryStore
    >>> compact(MemoryStore(tempfile.mkdtemp(), dim=2)) is None
    True
    """
    database = store.database
    if store.dim < LEAST_DIM or database.place.local is None:
        return None
    with database.changing():
        plain, rows = database.memories.schema, database.memories.count_rows()
        if BITS in plain.names or not 0 < rows <= MOST_ROWS:
            return None
        found = recall(store)
        if found < LEAST_RECALL:
            return None
        schema = compact_schema(plain)
        database.overwrite_memories(_batches(database.memories, schema), schema)
    store.event(EVENT, json.dumps({"recall": round(found, 4), "rows": rows}))
    return found


def recall(store: MemoryStore) -> float:
    """Return the share of the ten nearest that a compact search would find, of sampled queries."""
    queries = sample(store.reader)
    exact, rough = [], []
    bits = np.where(queries > 0, 1, -1).astype(np.float32)
    for batch in store.scan(columns=["joint_embedding"], batch_size=8192):
        vectors = vectors_array(batch["joint_embedding"], store.dim)
        exact.append(queries @ vectors.T)
        # As many signs differ as this is below the dimension, halved.
        rough.append((bits @ np.where(vectors > 0, 1, -1).astype(np.float32).T).astype(np.int16))
    similar, agree = np.hstack(exact), np.hstack(rough)
    nearest, looked = min(_AT, similar.shape[1]), min(candidates(_AT), similar.shape[1])
    best = np.argpartition(-similar, nearest - 1, axis=1)[:, :nearest]
    near = np.argpartition(-agree, looked - 1, axis=1)[:, :looked]
    shares = [len(np.intersect1d(a, b)) / nearest for a, b in zip(best, near, strict=True)]
    return float(np.mean(shares))


def _batches(memories: Any, schema: pa.Schema) -> Any:
    for batch in memories.search().limit(None).to_batches(_CHUNK):
        yield from fitted(schema, pa.Table.from_batches([batch])).to_batches()
