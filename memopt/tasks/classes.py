"""Scores of labels: logits to probabilities, and what the labels are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Classification:
    """The labels of one input, the likeliest first, and their scores."""

    labels: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def label(self) -> str:
        """The likeliest label."""
        return self.labels[0]


def softmax(logits: NDArray[Any]) -> NDArray[np.float32]:
    """Return probabilities over the last axis, float32.

    >>> softmax(np.array([[0.0, 0.0]])).tolist()
    [[0.5, 0.5]]
    """
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), np.float32)


def sigmoid(logits: NDArray[Any]) -> NDArray[np.float32]:
    """Return 1 / (1 + e^-x), float32, without overflow.

    >>> sigmoid(np.array([0.0, -1000.0])).tolist()
    [0.5, 0.0]
    """
    return np.asarray(0.5 * (1 + np.tanh(0.5 * np.asarray(logits, np.float64))), np.float32)


def label_scores(logits: NDArray[Any], config: Mapping[str, Any]) -> NDArray[np.float32]:
    """Return scores (n, labels) of logits (n, labels), as transformers' pipeline does.

    A sigmoid a label where labels exclude each other not (``problem_type``
    multi_label_classification), or where there is one; the numbers themselves for regression; else
    a softmax.
    """
    kind = config.get("problem_type")
    if kind == "regression":
        return np.asarray(logits, np.float32)
    if kind == "multi_label_classification" or logits.shape[-1] == 1:
        return sigmoid(logits)
    return softmax(logits)


def label_names(config: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """Return the names of ``count`` labels; what ``id2label`` does not name is ``LABEL_<number>``.

    >>> label_names({"id2label": {"0": "no", "2": "yes"}}, 3)
    ('no', 'LABEL_1', 'yes')
    """
    known = config.get("id2label")
    named = {str(k): str(v) for k, v in known.items()} if isinstance(known, Mapping) else {}
    return tuple(named.get(str(number), f"LABEL_{number}") for number in range(count))


def infers(config: Mapping[str, Any]) -> bool:
    """Say whether a classifier judges if one text follows from another.

    >>> infers({"id2label": {"0": "entailment", "1": "neutral", "2": "contradiction"}})
    True
    """
    labels = config.get("id2label")
    names = labels.values() if isinstance(labels, Mapping) else ()
    return any(str(name).lower().startswith("entail") for name in names)


def ranked_labels(
    scores: NDArray[np.float32], names: Sequence[str], top: int | None = None
) -> Classification:
    """Return the labels of one row of scores, best first, ``top`` of them at most.

    >>> ranked_labels(np.array([0.25, 0.75], np.float32), ["no", "yes"], 1)
    Classification(labels=('yes',), scores=(0.75,))
    """
    order = np.argsort(-scores, kind="stable")[:top]
    return Classification(tuple(names[i] for i in order), tuple(float(scores[i]) for i in order))
