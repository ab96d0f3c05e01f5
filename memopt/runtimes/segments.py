"""Several short texts in one row, for graphs whose mask numbers them (exporters/segments.py)."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from memopt.runtimes.base import Feed

# Tokens of a row: four to six texts of fifteen tokens fill 95 % of it, and what attention does for
# nothing between them is little beside a model's products.
ROW = 64


def shares(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Return which texts of these token lengths share a row of ``width`` tokens.

    Longest first, each where it leaves least room (best fit decreasing, Johnson 1974,
    https://doi.org/10.1137/0203025).

    >>> shares([30, 10, 40, 20], 64)
    [[2, 3], [0, 1]]
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for text in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        need = int(lengths[text])
        place = bisect_left(room, (need, -1))
        if place < len(room):
            free, row = room.pop(place)
            rows[row].append(text)
        else:
            free, row = width, len(rows)
            rows.append([text])
        insort(room, (free - need, row))
    return rows


def sharing(feed: Feed) -> bool:
    """Return whether a batch is of texts to be put into rows: as wide as one, none with holes.

    Args:
        feed: arrays (batch, tokens).

    >>> mask = np.zeros((2, ROW), np.int64)
    >>> mask[:, :5] = 1
    >>> sharing({"attention_mask": mask}), sharing({"attention_mask": mask[:, :8]})
    (True, False)
    """
    mask = feed["attention_mask"]
    return mask.shape[1] == ROW and from_the_left(mask)


def from_the_left(mask: NDArray[Any]) -> bool:
    """Return whether every row of a mask (batch, tokens) is ones, one at least, and then zeros.

    >>> from_the_left(np.array([[1, 1], [1, 0]])), from_the_left(np.array([[1, 1], [0, 1]]))
    (True, False)
    """
    return bool((mask[:, 0] == 1).all() and (mask[:, 1:] <= mask[:, :-1]).all())


def together(feed: Feed, width: int) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.intp]]:
    """Return a padded batch in rows that texts share, and which text each vector is of.

    Args:
        feed: arrays (batch, tokens), texts on the left and ``attention_mask`` of 0 and 1.
        width: tokens of a row.

    Returns:
        The arrays (rows, width), int64, the mask counting the texts of a row from 1; and the
        position in the batch of each text, in the order of the graph's vectors.

    >>> ids = np.array([[5, 6, 0], [7, 8, 9], [4, 0, 0]])
    >>> packed, order = together({"input_ids": ids, "attention_mask": (ids > 0).astype(int)}, 4)
    >>> packed["input_ids"].tolist(), packed["attention_mask"].tolist(), order.tolist()
    ([[7, 8, 9, 4], [5, 6, 0, 0]], [[1, 1, 1, 2], [1, 1, 0, 0]], [1, 2, 0])
    """
    lengths = np.count_nonzero(feed["attention_mask"], axis=1)
    rows = shares(lengths.tolist(), width)
    order = np.array([text for row in rows for text in row], np.intp)
    shape = (len(rows), width)
    sizes = lengths[order]
    counts = np.array([len(row) for row in rows])
    row = np.repeat(np.arange(len(rows)), counts)
    ends = np.cumsum(sizes)
    before = np.repeat((ends - sizes)[np.cumsum(counts) - counts], counts)
    begins = row * width + ends - sizes - before  # of each text, in the flattened rows
    steps = np.arange(sizes.sum()) - np.repeat(ends - sizes, sizes)
    target = np.repeat(begins, sizes) + steps
    source = np.repeat(order, sizes) * feed["attention_mask"].shape[1] + steps
    number = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts) + 1

    def placed(values: Any) -> NDArray[np.int64]:
        flat = np.zeros(shape[0] * shape[1], np.int64)
        flat[target] = values
        return flat.reshape(shape)

    packed = {
        name: placed(value.reshape(-1)[source])
        for name, value in feed.items()
        if name != "attention_mask"
    }
    return {**packed, "attention_mask": placed(np.repeat(number, sizes))}, order
