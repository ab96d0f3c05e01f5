"""What is kept of a batch's output for each of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def whole_rows(output: NDArray[Any], feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """Return the row of each input."""
    return list(output)


def trimmed_rows(output: NDArray[Any], feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """Return the row of each input without its padding, as the mask among the inputs says.

    >>> mask = np.array([[1, 1], [1, 0]])
    >>> [len(row) for row in trimmed_rows(np.zeros((2, 2, 3)), {"attention_mask": mask})]
    [2, 1]
    """
    mask = feed.get("attention_mask")
    if mask is None:
        return list(output)
    return [row[kept.astype(bool)] for row, kept in zip(output, mask, strict=True)]


def likeliest_rows(output: NDArray[Any], feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """Return which class wins at each token, int64: a vocabulary a token would be 4 MB a text."""
    return [row.argmax(axis=-1) for row in trimmed_rows(output, feed)]


def save_rows(path: Path, rows: Sequence[NDArray[Any]] | NDArray[Any]) -> None:
    """Write answers to a file: one array as ``.npy``, rows of unequal length as ``.npz``."""
    with path.open("wb") as file:
        if isinstance(rows, np.ndarray):
            np.save(file, np.asarray(rows, np.float32))
            return
        lengths = np.array([len(row) for row in rows])
        np.savez(file, values=np.concatenate(rows), lengths=lengths)


def load_rows(path: Path) -> Sequence[NDArray[Any]] | NDArray[Any]:
    """Read what :func:`save_rows` wrote.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "rows")
    >>> save_rows(file, [np.zeros(2), np.ones(1)])
    >>> [row.tolist() for row in load_rows(file)]
    [[0.0, 0.0], [1.0]]
    """
    with path.open("rb") as file:
        found = np.load(file, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        values, lengths = found["values"], found["lengths"]
    return np.split(values, np.cumsum(lengths)[:-1])
