"""Vectors of a store in a quarter of the room: 8 bits a number, and their signs to search by.

Vectors are four fifths of a store of texts. A compact store keeps each number of a vector as an
int8 (the largest of a vector is 127), and beside it one bit a number, its sign. A search compares
the signs of all (Hamming distance) and then the vectors of the nearest ones: 32 candidates a result
found 99.5 % of the ten nearest of 2,200 sentences (MiniLM, 384 dimensions), as many as comparing
all int8 vectors does; of 100,000 it takes 35 ms, without an index.

A store becomes compact by consolidation, once, in one commit, where its search is shown to find the
same; moving it to another model makes it plain again.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from memopt.memory.model.rows import vectors_array
from memopt.memory.model.schema import BITS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memopt.memory.memory_store import MemoryStore

EVENT = "compact"
# Shorter vectors have too few signs to tell them apart, and are no great part of their rows.
LEAST_DIM = 128
# All signs are compared: beyond this an inverted file is faster, and the store stays as it is.
MOST_ROWS = 200_000
LEAST_RECALL = 0.98
_PER_RESULT, _LEAST, _PER_MORE = 32, 320, 8
_AT, _QUERIES, _CHUNK = 10, 64, 1024
_SCALE = 127


def candidates(count: int) -> int:
    """Return how many rows are near enough by their signs to hold the ``count`` nearest.

    >>> candidates(10), candidates(1000)
    (320, 8000)
    """
    return max(_LEAST, min(_PER_RESULT * count, 640), _PER_MORE * count)


def signs(vectors: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return one bit a number, uint8 (n, dim / 8 rounded up).

    >>> signs(np.array([[1, -1, 1, 1, -1, -1, -1, 1]], np.float32)).tolist()
    [[177]]
    """
    return np.packbits(vectors > 0, axis=1)


def fitted(schema: pa.Schema, table: pa.Table) -> pa.Table:
    """Return whole rows as a table of ``schema`` keeps them: compact where it does.

    >>> from memopt.memory.model.schema import memories_schema
    >>> rows = memories_schema(8).empty_table()
    >>> fitted(rows.schema, rows) is rows
    True
    """
    if BITS not in schema.names:
        return table
    field = schema.field("joint_embedding")
    vectors = vectors_array(table["joint_embedding"], field.type.list_size)
    largest = np.maximum(np.abs(vectors).max(axis=1, keepdims=True, initial=0), 1e-30)
    codes = np.round(vectors * (_SCALE / largest)).astype(np.int8)
    made = {"joint_embedding": codes, BITS: signs(vectors)}
    columns = [
        pa.FixedSizeListArray.from_arrays(
            pa.array(made[field.name].reshape(-1)), field.type.list_size
        )
        if field.name in made
        else table[field.name]
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def compact(store: MemoryStore) -> float | None:
    """Make the vectors of a store compact where a search of them finds the same.

    Readers go on meanwhile; a search that meets the change is repeated.

    Returns:
        The recall that was measured; None where nothing was changed: the store is compact already,
        is too large or too small for it, or search by signs would miss too much.

    Raises:
        ConsolidationError: the disk takes no more; the store is as it was.

    >>> import tempfile
    >>> from memopt.memory.memory_store import MemoryStore
    >>> compact(MemoryStore(tempfile.mkdtemp(), dim=2)) is None
    True
    """
    if store.dim < LEAST_DIM or store.place.local is None:
        return None
    with store.changing():
        memories = store.memories
        if BITS in memories.schema.names or not 0 < memories.count_rows() <= MOST_ROWS:
            return None
        found = recall(store)
        if found < LEAST_RECALL:
            return None
        rewrite(store, _schema(memories.schema))
    store.event(EVENT, json.dumps({"recall": round(found, 4), "rows": memories.count_rows()}))
    return found


def rewrite(store: MemoryStore, schema: pa.Schema) -> None:
    """Write all memories anew with another schema, in one commit, and their indices after it."""
    from memopt.memory.search import searcher as searching

    memories = store.memories
    stream = pa.RecordBatchReader.from_batches(schema, _batches(memories, schema))
    memories.add(stream, mode="overwrite")
    searching.create_indices(store.database)
    store.look_again()


def recall(store: MemoryStore) -> float:
    """Return the share of the ten nearest that a compact search would find, of sampled queries."""
    from memopt.memory.search.vector_index import sample

    queries = sample(store)
    exact, rough = [], []
    bits = np.where(queries > 0, 1, -1).astype(np.float32)
    for batch in store.scan(columns=["joint_embedding"], batch_size=8192):
        vectors = vectors_array(batch["joint_embedding"], store.dim)
        exact.append(queries @ vectors.T)
        # As many signs differ as this is below the dimension, halved.
        rough.append((bits @ np.where(vectors > 0, 1, -1).astype(np.float32).T).astype(np.int16))
    similar, agree = np.hstack(exact), np.hstack(rough)
    wanted, looked = min(_AT, similar.shape[1]), min(candidates(_AT), similar.shape[1])
    best = np.argpartition(-similar, wanted - 1, axis=1)[:, :wanted]
    near = np.argpartition(-agree, looked - 1, axis=1)[:, :looked]
    shares = [len(np.intersect1d(a, b)) / wanted for a, b in zip(best, near, strict=True)]
    return float(np.mean(shares))


def _schema(plain: pa.Schema) -> pa.Schema:
    at = plain.get_field_index("joint_embedding")
    dim = plain.field(at).type.list_size
    codes = pa.field("joint_embedding", pa.list_(pa.int8(), dim), nullable=False)
    return plain.set(at, codes).append(pa.field(BITS, pa.list_(pa.uint8(), -(-dim // 8))))


def _batches(memories: Any, schema: pa.Schema) -> Any:
    for batch in memories.search().limit(None).to_batches(_CHUNK):
        yield from fitted(schema, pa.Table.from_batches([batch])).to_batches()
