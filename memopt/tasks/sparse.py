"""Sparse vectors: compressed rows, their words, and how alike two are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.extras import require

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class SparseVectors:
    """Rows with few numbers that are not zero (CSR): SciPy's three arrays.

    Attributes:
        indptr: int64 (rows + 1,), where each row begins.
        indices: int32 (numbers,), columns, rising within a row.
        values: float32 (numbers,).
        dimension: columns in all.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    values: NDArray[np.float32]
    dimension: int

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __iter__(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32]]]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        part = slice(self.indptr[row], self.indptr[row + 1])
        return self.indices[part], self.values[part]

    def dense(self) -> NDArray[np.float32]:
        """Return float32 (rows, dimension).

        >>> sparse_rows([np.array([0, 2.0, 0, 1.0], np.float32)], 4).dense().tolist()
        [[0.0, 2.0, 0.0, 1.0]]
        """
        whole = np.zeros((len(self), self.dimension), np.float32)
        whole[np.repeat(np.arange(len(self)), np.diff(self.indptr)), self.indices] = self.values
        return whole

    def to_scipy(self) -> Any:
        """Return a ``scipy.sparse.csr_array`` over the same memory."""
        sparse = require("scipy.sparse", extra="media", why="return SciPy arrays")
        shape = (len(self), self.dimension)
        return sparse.csr_array((self.values, self.indices, self.indptr), shape=shape)

    def to_lists(self) -> list[Any]:
        """Return each row as a list of [column, value]."""
        return [
            [[int(c), float(v)] for c, v in zip(columns, values, strict=True)]
            for columns, values in self
        ]

    def to_arrow(self) -> pa.ListArray:
        """Return a list<struct<index: int32, value: float>> array over the same memory."""
        pa = require("pyarrow", extra="arrow", why="return Arrow arrays")
        pairs = pa.StructArray.from_arrays(
            [pa.array(self.indices), pa.array(self.values)], names=["index", "value"]
        )
        return pa.ListArray.from_arrays(pa.array(self.indptr, pa.int32()), pairs)


def sparse_row(
    row: NDArray[np.float32], top: int | None = None
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return columns and values that are not zero; with ``top`` the largest so many.

    >>> columns, values = sparse_row(np.array([1.0, 0.0, 3.0, 2.0], np.float32), top=2)
    >>> columns.tolist(), values.tolist()
    ([2, 3], [3.0, 2.0])
    """
    columns = np.flatnonzero(row)
    if top is not None and len(columns) > top:
        columns = np.sort(columns[np.argpartition(-row[columns], top - 1)[:top]])
    return columns.astype(np.int32), row[columns]


def sparse_rows(rows: Sequence[NDArray[np.float32]], dimension: int) -> SparseVectors:
    """Return dense rows as sparse ones."""
    return gathered([sparse_row(row) for row in rows], dimension)


def gathered(
    rows: Sequence[tuple[NDArray[np.int32], NDArray[np.float32]]], dimension: int
) -> SparseVectors:
    """Return rows of (columns, values) as one.

    >>> len(gathered([], 10)), gathered([], 10).dense().shape
    (0, (0, 10))
    """
    counts = np.array([len(columns) for columns, _ in rows], np.int64)
    return SparseVectors(
        indptr=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)]),
        indices=np.concatenate([np.zeros(0, np.int32), *(columns for columns, _ in rows)]),
        values=np.concatenate([np.zeros(0, np.float32), *(values for _, values in rows)]),
        dimension=dimension,
    )


def dots(queries: SparseVectors, documents: SparseVectors) -> NDArray[np.float32]:
    """Return the dot product of every query with every document, float32 (queries, documents).

    >>> one = sparse_rows([np.array([1.0, 2.0], np.float32)], 2)
    >>> dots(one, one).tolist()
    [[5.0]]
    """
    found = np.empty((len(queries), len(documents)), np.float32)
    weights = np.zeros(queries.dimension, np.float32)
    for number, (columns, values) in enumerate(queries):
        weights[columns] = values
        products = np.append(weights[documents.indices] * documents.values, np.float32(0))
        # reduceat gives the element itself where a document has none.
        sums = np.add.reduceat(products, documents.indptr[:-1])
        found[number] = np.where(np.diff(documents.indptr) > 0, sums, 0)
        weights[columns] = 0
    return found
