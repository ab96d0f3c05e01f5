"""Boxes of two graphs side by side: which of one belongs to which of the other.

A detector that chooses its queries by score (RT-DETR, D-FINE, two-stage deformable DETR) gives its
boxes in the order of those scores, and of nearly equal ones rounding decides which comes first.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

ANSWER = "detections"


def in_order_of(
    outputs: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> Mapping[str, np.ndarray]:
    """Return a detector's outputs with each picture's boxes in the order of the expected ones.

    Outputs without boxes, or of another shape, come back as they are.
    """
    got, wanted = outputs.get(ANSWER), expected.get(ANSWER)
    if got is None or wanted is None or np.shape(got) != np.shape(wanted):
        return outputs
    orders = [matching_rows(np.asarray(a), b) for a, b in zip(got, wanted, strict=True)]
    return {
        name: np.stack([np.asarray(v)[order] for v, order in zip(values, orders, strict=True)])
        for name, values in outputs.items()
    }


def matching_rows(got: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the position in ``got`` (n, width) of the row nearest to each of ``wanted``.

    Each is used once, the nearest pairs first.

    >>> matching_rows(np.array([[0.0], [5.0]]), np.array([[5.1], [0.0]])).tolist()
    [1, 0]
    """
    distances = np.abs(got[None, :, :] - wanted[:, None, :]).max(axis=2)
    order = np.full(len(wanted), -1)
    free = np.ones(len(got), bool)
    for pair in np.argsort(distances, axis=None, kind="stable"):
        row, column = divmod(int(pair), len(got))
        if order[row] < 0 and free[column]:
            order[row], free[column] = column, False
    return order
