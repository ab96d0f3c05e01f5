"""How a graph stores a checkpoint's weight: as it is, or transposed."""

from __future__ import annotations

import numpy as np

from memopt.errors import WeightsError


def is_transposed(stored: np.ndarray, weight: np.ndarray, *, name: str) -> bool:
    """Whether a graph's initializer is the transpose of the checkpoint's weight.

    Square matrices make shapes useless here, so values decide; exporters write Linear weights
    transposed for MatMul and GPT-2's Conv1D weights as they are. A vector may have got axes of
    size one beside its own (DeBERTa's biases of queries), which is no transpose.

    Raises:
        WeightsError: it is neither: the graph was not made from these weights.

    >>> w = np.arange(4, dtype=np.float32).reshape(2, 2)
    >>> is_transposed(w.T, w, name="w"), is_transposed(w, w, name="w")
    (True, False)
    >>> is_transposed(w.reshape(1, 2, 1, 2), w.reshape(4), name="a vector")
    False
    """
    if stored.shape == weight.shape and _equal(stored, weight):
        return False
    if weight.ndim == 1 and stored.size == weight.size and _equal(stored.reshape(-1), weight):
        return False
    if weight.ndim == 2 and stored.shape == weight.shape[::-1] and _equal(stored, weight.T):
        return True
    raise WeightsError(
        f"the graph's weight {name!r} {list(stored.shape)} is not the weight file's "
        f"{list(weight.shape)}",
        fix="export the model again, then repeat",
    )


def as_stored(value: np.ndarray, stored: np.ndarray, *, turned: bool) -> np.ndarray:
    """Return a weight's value, contiguous, in the layout of the graph's initializer ``stored``.

    Args:
        turned: what :func:`is_transposed` said of the two.

    >>> w = np.arange(6).reshape(2, 3)
    >>> as_stored(w, np.zeros((3, 2)), turned=True).tolist()
    [[0, 3], [1, 4], [2, 5]]
    """
    return np.ascontiguousarray((value.T if turned else value).reshape(stored.shape))


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    # A bfloat16 or float16 checkpoint is exact in the float32 graph.
    return np.array_equal(a.astype(np.float32), b.astype(np.float32), equal_nan=True)
