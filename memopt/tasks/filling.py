"""What fits in the gaps of a text: the likeliest tokens, and how well two models agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.tasks.classes import softmax

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Filling:
    """What fits in one mask, the likeliest first.

    The mask stands from character ``start`` up to ``end``; ``tokens`` are as a text has them, with
    a space where the tokenizer keeps one; ``ids`` are theirs.
    """

    start: int
    end: int
    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    ids: tuple[int, ...]

    @property
    def token(self) -> str:
        """The likeliest token."""
        return self.tokens[0]


def filling(
    logits: NDArray[np.float32], place: tuple[int, int], name: Callable[[int], str], top: int = 5
) -> Filling:
    """Return the ``top`` likeliest tokens of one mask.

    Args:
        logits: float32 (vocabulary,).
        place: the characters of the mask.
        name: an id as a text has it.
        top: tokens at most; equal scores go by their id.

    >>> filling(np.array([0, 9, 1], np.float32), (0, 6), "abc".__getitem__, top=2).tokens
    ('b', 'c')
    """
    scores = softmax(logits)
    edge = np.partition(scores, -top)[-top] if top < len(scores) else scores.min()
    rows = np.flatnonzero(scores >= edge)
    best = rows[np.argsort(-scores[rows], kind="stable")][:top]
    ids = tuple(int(i) for i in best)
    return Filling(*place, tuple(map(name, ids)), tuple(float(scores[i]) for i in ids), ids)


def fill_agreement(
    found: Sequence[Sequence[Filling]], expected: Sequence[Sequence[Filling]]
) -> float:
    """Return the share of masks whose likeliest token is the same; 1.0 where there is none.

    >>> a, b = (Filling(0, 6, (word,), (1.0,), (i,)) for i, word in enumerate(("cat", "dog")))
    >>> fill_agreement([[a, b]], [[a, a]])
    0.5
    """
    pairs: list[Any] = [
        (x.ids[0], y.ids[0])
        for a, b in zip(found, expected, strict=True)
        for x, y in zip(a, b, strict=True)
    ]
    return float(np.mean([a == b for a, b in pairs])) if pairs else 1.0
