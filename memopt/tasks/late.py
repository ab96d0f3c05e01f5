"""A vector a token: queries and documents as matrices of unequal height, and their MaxSim."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.extras import require

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

# Products of one step of MaxSim: 64 MB of float32.
_AT_ONCE = 16 << 20


@dataclass(frozen=True, slots=True, eq=False)
class TokenVectors:
    """Texts as matrices (tokens, dimension) of float32, one below the other.

    Attributes:
        values: float32 (tokens of all texts, dimension).
        starts: int64 (texts + 1,), where each text begins.
    """

    values: NDArray[np.float32]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> NDArray[np.float32]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"text {row} of {len(self)}")
        row %= len(self)
        return self.values[self.starts[row] : self.starts[row + 1]]

    def to_lists(self) -> list[Any]:
        """Return the vectors of each text as lists."""
        return [rows.tolist() for rows in self]

    def to_arrow(self) -> pa.ListArray:
        """Return a list<fixed_size_list<float>[dimension]> array over the same memory."""
        pa = require("pyarrow", extra="arrow", why="return Arrow arrays")
        flat = pa.array(self.values.reshape(-1))
        tokens = pa.FixedSizeListArray.from_arrays(flat, self.values.shape[1])
        return pa.ListArray.from_arrays(pa.array(self.starts, pa.int32()), tokens)


def stacked(texts: Sequence[NDArray[np.float32]], dimension: int) -> TokenVectors:
    """Return matrices (tokens, dimension) as one.

    >>> found = stacked([np.ones((2, 4), np.float32), np.zeros((1, 4), np.float32)], 4)
    >>> len(found), found[1].shape, stacked([], 4).values.shape
    (2, (1, 4), (0, 4))
    """
    starts = np.concatenate([[0], np.cumsum([len(rows) for rows in texts])]).astype(np.int64)
    return TokenVectors(np.concatenate([np.zeros((0, dimension), np.float32), *texts]), starts)


def maxsim(queries: TokenVectors, documents: TokenVectors) -> NDArray[np.float32]:
    """Return the MaxSim of every query with every document, float32 (queries, documents).

    Of each token of the query the most like token of the document counts, and these are summed
    (Khattab and Zaharia 2020, https://arxiv.org/abs/2004.12832). A document without tokens has
    minus infinity, which no other has.

    >>> one = stacked([np.eye(2, dtype=np.float32)], 2)
    >>> maxsim(one, one).tolist()
    [[2.0]]
    """
    found = np.full((len(queries), len(documents)), -np.inf, np.float32)
    full = np.flatnonzero(np.diff(documents.starts) > 0)
    for number, query in enumerate(queries):
        if not len(query):
            found[number, full] = 0
            continue
        for rows in _steps(documents, full, _AT_ONCE // len(query)):
            first, last = documents.starts[rows[0]], documents.starts[rows[-1] + 1]
            products = query @ documents.values[first:last].T
            best = np.maximum.reduceat(products, documents.starts[rows] - first, axis=1)
            found[number, rows] = best.sum(axis=0)
    return found


def _steps(
    documents: TokenVectors, rows: NDArray[np.intp], most: int
) -> Iterator[NDArray[np.intp]]:
    """Yield documents in runs of at most ``most`` tokens together, or one."""
    start = 0
    while start < len(rows):
        limit = documents.starts[rows[start]] + most
        stop = int(np.searchsorted(documents.starts[rows + 1], limit, side="right"))
        yield rows[start : max(stop, start + 1)]
        start = max(stop, start + 1)
