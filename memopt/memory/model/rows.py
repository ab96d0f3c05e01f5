"""Between Arrow rows of ``memories`` and the records people use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memopt.errors import InputError
from memopt.memory.model.schema import MODALITIES, SHORT_TERM, Link, Memory, memories_schema

_T = TypeVar("_T")
_DEFAULTS: dict[str, Any] = {
    "access_count": 0,
    "category": "",
    "tier": SHORT_TERM,
    "model_id": "",
    "source_count": 0,
    "has_text": False,
    "has_vision": False,
    "has_audio": False,
    "codec": "",
}


def new_rows(vectors: NDArray[np.float32], columns: Mapping[str, Any]) -> pa.Table:
    """Build rows of ``memories``; a column that is not given takes its default.

    Args:
        vectors: float32 (n, dim), L2-normalised.
        columns: name -> n values (list or Arrow array), or one value for all rows.
            ``memory_id`` and ``timestamp`` must be given.

    Raises:
        InputError: an unknown column or one of another length.

    >>> rows = new_rows(np.eye(2, 4, dtype=np.float32),
    ...     {"memory_id": ["a", "b"], "timestamp": datetime(2026, 1, 1), "tier": "long_term"})
    >>> rows["tier"].to_pylist(), rows["access_count"].to_pylist()
    (['long_term', 'long_term'], [0, 0])
    """
    count, dim = vectors.shape
    schema = memories_schema(dim)
    unknown = sorted(set(columns) - set(schema.names))
    if unknown:
        raise InputError(f"unknown column {unknown[0]!r} of a memory")
    arrays = []
    for field in schema:
        if field.name == "joint_embedding":
            arrays.append(vectors_column(vectors))
            continue
        array = _array(columns.get(field.name, _DEFAULTS.get(field.name)), field.type, count)
        if len(array) != count or (array.null_count and not field.nullable):
            raise InputError(
                f"column {field.name!r} needs {count} values, "
                f"got {len(array)} of which {array.null_count} are null"
            )
        arrays.append(array)
    return pa.table(arrays, schema=schema)


def with_columns(rows: pa.Table, **columns: Any) -> pa.Table:
    """Return rows with columns replaced: by n values, or by one for all rows.

    >>> rows = pa.table({"tier": ["short_term"], "text": ["a"]})
    >>> with_columns(rows, tier="archived", text=None).to_pylist()
    [{'tier': 'archived', 'text': None}]
    """
    for name, value in columns.items():
        at = rows.schema.get_field_index(name)
        field = rows.schema.field(at)
        rows = rows.set_column(at, field, _array(value, field.type, rows.num_rows))
    return rows


def _array(value: Any, kind: pa.DataType, count: int) -> pa.Array | pa.ChunkedArray:
    if isinstance(value, pa.Array | pa.ChunkedArray):
        return value.cast(kind)
    if isinstance(value, list | tuple):
        return pa.array(value, kind)
    return pa.repeat(pa.scalar(value, kind), count) if value is not None else pa.nulls(count, kind)


def chunks(values: Sequence[_T], size: int) -> Iterator[list[_T]]:
    """Cut a sequence into parts of at most ``size``.

    >>> list(chunks("abc", 2))
    [['a', 'b'], ['c']]
    """
    for start in range(0, len(values), size):
        yield list(values[start : start + size])


def vectors_column(vectors: NDArray[np.float32]) -> pa.FixedSizeListArray:
    """Return float32 (n, dim) as a fixed-size list column, without a copy where contiguous."""
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def holds_vectors(kind: pa.DataType) -> bool:
    """Say whether a column of this type is of lists of floats.

    >>> holds_vectors(pa.list_(pa.float16())), holds_vectors(pa.list_(pa.int8()))
    (True, False)
    """
    types = pa.types
    listed = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(listed and types.is_floating(kind.value_type))


def vectors_array(column: pa.ChunkedArray | pa.Array, dim: int) -> NDArray[np.float32]:
    """Return a fixed-size list column as float32 (n, dim), of length 1 where it was compact.

    >>> vectors_array(vectors_column(np.eye(2, dtype=np.float32)), 2).shape
    (2, 2)
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(column, pa.ChunkedArray):  # combine_chunks of no chunk at all
        return np.empty((0, dim), np.float32)
    values = column.flatten().to_numpy(zero_copy_only=False)
    vectors = values.astype(np.float32, copy=False).reshape(-1, dim)
    if values.dtype == np.int8:
        # Of a compact store: directions without their length.
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    return cast("NDArray[np.float32]", vectors)


def memories(
    rows: pa.Table,
    dim: int,
    links: Mapping[str, Sequence[Link]] | None = None,
    extra_accesses: Mapping[str, tuple[int, datetime]] | None = None,
) -> list[Memory]:
    """Turn opened rows (see :func:`memopt.memory.model.payload.unseal`) into records.

    Args:
        rows: any subset of the columns; what is absent takes the record's default.
        links: of each memory, strongest first.
        extra_accesses: id -> (count, last) not yet written to the table.
    """
    names = set(rows.column_names)
    embeddings = vectors_array(rows["joint_embedding"], dim) if "joint_embedding" in names else None
    skip = {"joint_embedding", "codec", "packed"}
    found = []
    for at, row in enumerate(
        rows.select([n for n in rows.column_names if n not in skip]).to_pylist()
    ):
        modalities = tuple(name for name in MODALITIES if row.pop(f"has_{name}", False))
        memory_id = row["memory_id"]
        row["source_memory_ids"] = tuple(row.get("source_memory_ids") or ())
        count, last = (extra_accesses or {}).get(memory_id, (0, None))
        if count:
            row["access_count"] = row.get("access_count", 0) + count
            row["last_access"] = max(filter(None, (row.get("last_access"), last)))
        row.pop("_rowid", None)
        row.pop("_distance", None)
        row.pop("_score", None)
        found.append(
            Memory(
                **row,
                joint_embedding=None if embeddings is None else embeddings[at],
                association_links=tuple((links or {}).get(memory_id, ())),
                modalities=modalities,
            )
        )
    return found


def unit(vectors: NDArray[Any], dim: int, what: str = "embedding") -> NDArray[np.float32]:
    """Check vectors and scale each to length 1.

    Args:
        vectors: any float dtype, (n, dim).

    Returns:
        float32 (n, dim).

    Raises:
        InputError: another dimension, NaN, infinity, or a vector of length 0.

    >>> unit(np.array([[3.0, 4.0]]), 2)
    array([[0.6, 0.8]], dtype=float32)
    """
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        given = vectors.shape[-1] if vectors.ndim else 0
        raise InputError(
            f"{what} has {given} dimensions, this store has {dim}",
            fix="use the model the store was made with, or reembed the store",
        )
    if vectors.dtype.kind not in "fiu":
        raise InputError(f"{what} has dtype {vectors.dtype}, not a float")
    vectors = vectors.astype(np.float32, copy=False)
    # einsum keeps to one pass without a squared copy of the batch.
    squares = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(squares) | (squares == 0))
    if len(bad):
        kind = "is all zeros" if squares[bad[0]] == 0 else "holds NaN or infinity"
        which = f"{what} {bad[0]}" if len(vectors) > 1 else what
        raise InputError(f"{which} {kind}", fix="check the model that made it")
    return cast("NDArray[np.float32]", (vectors / np.sqrt(squares)[:, None].astype(np.float32)))
