"""Scores of documents for a query, their order, and how much two orders agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """Documents of one query, the best first.

    ``order`` holds their positions, int64 (documents,); ``scores`` their scores in that order,
    float32.
    """

    order: NDArray[np.intp]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.order)


def ranking(scores: NDArray[np.float32], top: int | None = None) -> Ranking:
    """Return documents by falling score, ``top`` of them at most; equal scores keep their order.

    >>> ranking(np.array([0.1, 0.9, 0.5], np.float32), 2).order.tolist()
    [1, 2]
    """
    order = np.argsort(-scores, kind="stable")[:top]
    return Ranking(order, scores[order])


def kendall_tau(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return Kendall's tau-b of two lists of scores: 1 for the same order, -1 for the opposite.

    Knight 1966 by counting pairs; ties count for neither. 1.0 where either is constant in both.

    >>> kendall_tau(np.array([1, 2, 3]), np.array([1, 3, 2])).__round__(3)
    0.333
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    dx, dy = np.sign(x[:, None] - x[None, :]), np.sign(y[:, None] - y[None, :])
    pairs = float(np.sqrt((dx * dx).sum() * (dy * dy).sum()))
    return float((dx * dy).sum() / pairs) if pairs else 1.0


def ndcg(scores: NDArray[Any], relevance: NDArray[Any], at: int = 10) -> float:
    """Return NDCG@``at`` of an order by ``scores``, gains being ``relevance`` (0 or more).

    Jarvelin and Kekalainen 2002, with gains as they are. 1.0 where nothing is relevant.

    >>> ndcg(np.array([3, 2, 1]), np.array([1, 0, 0]))
    1.0
    """
    gains = np.asarray(relevance, np.float64)
    discounts = 1 / np.log2(np.arange(2, min(at, len(gains)) + 2))
    order = np.argsort(-np.asarray(scores), kind="stable")[:at]
    best = float((np.sort(gains)[::-1][:at] * discounts).sum())
    return float((gains[order] * discounts).sum()) / best if best else 1.0
