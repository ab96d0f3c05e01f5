"""Texts of many lengths end to end in one row, without padding, for graphs that take them so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memopt.runtimes.base import Feed

# What is per token and goes through the model; masks stay (batch, tokens), for the head.
_PER_TOKEN = ("input_ids", "token_type_ids")


def pack(feed: Feed, offset: int | None = None) -> dict[str, NDArray[np.int64]]:
    """Return a padded batch as the tokens that count, row after row, and where they belong.

    Args:
        feed: ``input_ids`` and ``attention_mask`` (batch, tokens), and of that shape too
            ``token_type_ids`` and ``pooling_mask`` where the model has them.
        offset: the position of each row's first token, for models that count only tokens; None
            for those whose positions are the columns of the padded batch.

    Returns:
        ``input_ids``, ``position_ids``, ``token_type_ids`` and ``places`` (tokens,), the last the
        place in the flattened batch; ``starts`` (batch + 1,), where each row begins; the masks.
        All int64.

    >>> ids = np.array([[5, 6, 0], [7, 8, 9]])
    >>> packed = pack({"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)})
    >>> packed["input_ids"].tolist(), packed["position_ids"].tolist(), packed["starts"].tolist()
    ([5, 6, 7, 8, 9], [0, 1, 0, 1, 2], [0, 2, 5])
    """
    mask = feed["attention_mask"]
    places = np.flatnonzero(mask)
    lengths = np.count_nonzero(mask, axis=1)
    starts = np.zeros(len(mask) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    if offset is None:
        positions = places % mask.shape[1]
    else:
        positions = np.arange(len(places)) - np.repeat(starts[:-1], lengths) + offset
    tokens = {name: feed[name].reshape(-1)[places] for name in _PER_TOKEN if name in feed}
    masks = {name: value for name, value in feed.items() if name not in _PER_TOKEN}
    return {**tokens, "position_ids": positions, "places": places, "starts": starts, **masks}


def at_least_two(feed: Feed) -> dict[str, NDArray[Any]]:
    """Return a batch of two rows at least, and of two tokens where its rows have tokens.

    A compiled graph with free axes is made for two and more of everything. A further row is a copy
    of the first, a further token is masked.

    >>> at_least_two({"input_ids": np.array([[7]]), "attention_mask": np.array([[1]])})
    {'input_ids': array([[7, 0],
           [7, 0]]), 'attention_mask': array([[1, 0],
           [1, 0]])}
    """
    enough = dict(feed)
    first = next(iter(feed.values()))
    if "attention_mask" in feed and first.shape[1] < 2:
        enough = {name: np.pad(value, ((0, 0), (0, 1))) for name, value in enough.items()}
    if len(first) < 2:
        enough = {name: np.concatenate([value, value]) for name, value in enough.items()}
    return enough
