"""Arrow batches that others made, as memories to be added."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from memopt.errors import InputError
from memopt.memory.model.rows import holds_vectors
from memopt.memory.model.schema import CONTENT_COLUMNS, Content, NewMemory, memories_schema


def arrow_memories(batches: Iterable[pa.RecordBatch], dim: int) -> Iterator[NewMemory]:
    """Turn Arrow batches into memories; see :meth:`MemoryStore.add_arrow`.

    Raises:
        InputError: an unknown column, or one of a type that does not fit.
    """
    known = ("memory_id", *CONTENT_COLUMNS, "joint_embedding", "timestamp", "category")
    known = (*known, "expires_at")
    schema = memories_schema(dim)
    for batch in batches:
        unknown = sorted(set(batch.schema.names) - set(known))
        if unknown:
            raise InputError(f"unknown column {unknown[0]!r}", fix=f"use {', '.join(known)}")
        columns: dict[str, list[Any]] = {name: [None] * batch.num_rows for name in known}
        for name in batch.schema.names:
            columns[name] = (
                _embeddings(batch[name], dim)
                if name == "joint_embedding"
                else _values(batch[name], schema.field(name))
            )
        for at in range(batch.num_rows):
            row = {name: values[at] for name, values in columns.items()}
            yield NewMemory(
                content=Content(**{short: row[name] for name, short in CONTENT_COLUMNS.items()}),
                category=row["category"] or "",
                timestamp=row["timestamp"],
                embedding=row["joint_embedding"],
                expires_at=row["expires_at"],
                memory_id=row["memory_id"],
            )


def _values(column: pa.Array, field: pa.Field) -> list[Any]:
    try:
        # Nanoseconds and float dates lose what the table cannot hold.
        return list(column.cast(field.type, safe=False).to_pylist())
    except pa.ArrowInvalid as error:
        raise InputError(f"column {field.name!r} does not fit: {error}") from error
    except pa.ArrowNotImplementedError as error:
        raise InputError(f"column {field.name!r} is {column.type}, not {field.type}") from error


def _embeddings(column: pa.Array, dim: int) -> list[Any]:
    """Return one float array per row, None for null."""
    kind = column.type
    if not holds_vectors(kind):
        raise InputError(f"joint_embedding is {kind}, not a list of floats")
    present = column.drop_null()
    lengths = set(present.value_lengths().to_pylist()) if len(present) else set()
    wrong = sorted(lengths - {dim})
    if wrong:
        raise InputError(
            f"joint_embedding has {wrong[0]} dimensions, this store has {dim}",
            fix="use the model the store was made with, or reembed the store",
        )
    values = iter(present.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim))
    return [next(values) if there else None for there in column.is_valid().to_pylist()]
