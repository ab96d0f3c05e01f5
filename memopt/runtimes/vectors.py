"""What goes into encode() and what comes out of it, as plain functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import InputError
from memopt.extras import require

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

# Below this length a vector is numerically zero and stays as it is.
_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Encoded:
    """Vectors, and the inputs that have none.

    ``vectors`` is float32 (n, dimension); the row of an input that could not be used is NaN and
    ``failures`` maps its position to the reason. ``tokens`` (n,) is how many the model read of each
    text, special ones too; zero for pictures and sounds.
    """

    vectors: NDArray[np.float32]
    failures: dict[int, str] = field(default_factory=dict)
    tokens: NDArray[np.intp] = field(default_factory=lambda: np.zeros(0, np.intp))


def is_bare(inputs: Any, modality: str) -> bool:
    """Return whether this is one input, and not a sequence of them.

    >>> is_bare("a cat", "text"), is_bare(["a cat"], "text"), is_bare(np.zeros(4), "audio")
    (True, False, True)
    """
    if isinstance(inputs, str | bytes | bytearray | Path):
        return True
    if isinstance(inputs, np.ndarray):
        if modality == "image":
            return inputs.ndim == 2 or (inputs.ndim == 3 and inputs.shape[-1] in (1, 3, 4))
        return modality == "audio" and inputs.ndim == 1 and inputs.dtype != object
    if isinstance(inputs, tuple) and len(inputs) == 2 and modality == "audio":
        samples, rate = inputs
        return isinstance(samples, np.ndarray) and isinstance(rate, int | float)
    # A picture that PIL opened; it has no length and no elements.
    return modality == "image" and hasattr(inputs, "convert") and not hasattr(inputs, "__iter__")


def as_items(inputs: Any, modality: str) -> Sequence[Any]:
    """Return the inputs as a sequence; one bare item becomes a sequence of one.

    >>> as_items("a cat", "text"), as_items(iter(["a", "b"]), "text")
    (['a cat'], ['a', 'b'])
    """
    if is_bare(inputs, modality):
        return [inputs]
    if isinstance(inputs, np.ndarray):
        return inputs.tolist() if modality == "text" else list(inputs)
    if isinstance(inputs, list | tuple):
        return inputs
    if hasattr(inputs, "to_pylist"):  # an Arrow array iterates over scalars of its own
        found: list[Any] = inputs.to_pylist()
        return found
    try:
        return list(inputs)
    except TypeError as error:
        raise InputError(
            f"inputs is {type(inputs).__name__}, not a sequence", fix="pass a list"
        ) from error


def unit_length(vectors: NDArray[np.float32]) -> None:
    """Scale every row of ``vectors`` (n, dim) to length 1 in place; zero rows stay zero."""
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    np.maximum(lengths, _TINY, out=lengths)
    vectors /= lengths[:, None]


def unit_rows(vectors: NDArray[Any]) -> NDArray[Any]:
    """Return the rows of ``vectors`` (n, dim) at length 1; zero rows stay zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, _TINY))


def row_cosines(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Return the cosine of each row of ``a`` (n, dim) with the same row of ``b``; 0 for zero rows.

    >>> row_cosines(np.eye(2), np.array([[2.0, 0.0], [1.0, 0.0]])).tolist()
    [1.0, 0.0]
    """
    # float64: in float32 the cosine of nearly equal vectors comes out above 1.
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray((a * b).sum(axis=-1) / np.maximum(norms, np.finfo(np.float64).tiny))


def to_arrow(vectors: NDArray[np.float32]) -> pa.FixedSizeListArray:
    """Return rows as a FixedSizeListArray over the same memory.

    >>> to_arrow(np.zeros((2, 3), np.float32)).type
    FixedSizeListType(fixed_size_list<item: float>[3])
    """
    pa = require("pyarrow", extra="arrow", why="return Arrow arrays")
    count, width = vectors.shape
    values = pa.Array.from_buffers(
        pa.float32(), count * width, [None, pa.py_buffer(vectors.reshape(-1))]
    )
    return pa.FixedSizeListArray.from_arrays(values, width)


def refusal(failures: dict[int, str]) -> InputError:
    """Return the error for inputs that cannot be used: the first one, and how many more."""
    index = min(failures)
    more = f" ({len(failures) - 1} more like it)" if len(failures) > 1 else ""
    return InputError(
        f"input {index} {failures[index]}{more}", fix="leave it out, or pass on_error='skip'"
    )


@contextmanager
def progress(total: int | None, wanted: bool) -> Iterator[Callable[[int], None]]:
    """Yield ``advance(n)`` of a bar on stderr, shown when wanted and stderr is a terminal."""
    if not wanted:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("encode", total=total)
        yield lambda count: bar.advance(task, count)
