"""Boxes of things in a picture: a detector's numbers to detections, and how much two sets agree.

As ``post_process_object_detection`` of transformers' image processors: DETR's kind has a class "no
object" and a softmax (Carion et al. 2020, https://arxiv.org/abs/2005.12872), later ones a sigmoid a
class and the highest scores over all boxes (Zhu et al. 2021, https://arxiv.org/abs/2010.04159).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.tasks.classes import sigmoid, softmax

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What transformers' processors keep of all (box, class) scores before the threshold: 100, or None
# for as many as there are boxes. Those that are not here have a class "no object".
HIGHEST: dict[str, int | None] = {"ConditionalDetr": 100, "DeformableDetr": 100, "RTDetr": None}


# Whose processor a type of model comes with; those that are not here have DETR's.
_PROCESSORS = {
    **dict.fromkeys(("conditional_detr", "dab-detr"), "ConditionalDetr"),
    **dict.fromkeys(("deformable_detr", "lw_detr"), "DeformableDetr"),
    **dict.fromkeys(("rt_detr", "rt_detr_v2", "d_fine", "deimv2"), "RTDetr"),
    "yolos": "Yolos",
}


@dataclass(frozen=True, slots=True)
class Detection:
    """One thing in a picture.

    ``box`` is (left, top, right, bottom) in pixels of the picture that was given.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """The things of one picture: ``scores`` float32 (n,), ``classes`` (n,), ``corners`` (n, 4)."""

    scores: NDArray[np.float32]
    classes: NDArray[np.intp]
    corners: NDArray[np.float32]


def corners(boxes: NDArray[Any]) -> NDArray[np.float32]:
    """Return (left, top, right, bottom) of boxes (centre x, centre y, width, height).

    >>> corners(np.array([[0.5, 0.5, 1.0, 0.5]])).tolist()
    [[0.0, 0.25, 1.0, 0.75]]
    """
    middle, half = (
        np.asarray(boxes[..., :2], np.float32),
        np.asarray(boxes[..., 2:], np.float32) / 2,
    )
    return np.concatenate([middle - half, middle + half], axis=-1)


def find_boxes(
    answer: NDArray[Any], size: tuple[int, int], kind: str, threshold: float = 0.5
) -> Boxes:
    """Return what a detector found in one picture, in the order of the processor of its kind.

    Args:
        answer: (boxes, classes + 4), each row logits and then a box relative to the picture.
        size: (width, height) of the picture.
        kind: the class of its image processor, without its suffix.
        threshold: the least score, itself left out.

    >>> answer = np.array([[3.0, 0.0, 0.5, 0.5, 1.0, 1.0]], np.float32)
    >>> find_boxes(answer, (8, 4), "Detr").corners.tolist()
    [[0.0, 0.0, 8.0, 4.0]]
    """
    logits, boxes = answer[:, :-4], corners(answer[:, -4:])
    if kind in HIGHEST:
        flat = sigmoid(logits).reshape(-1)
        most = HIGHEST[kind] or len(logits)
        order = np.argsort(-flat, kind="stable")[:most]
        scores, classes, rows = flat[order], order % logits.shape[1], order // logits.shape[1]
    else:
        likely = softmax(logits)[:, :-1]
        rows, classes = np.arange(len(logits)), likely.argmax(axis=1)
        scores = likely[rows, classes]
    kept = scores > threshold
    scale = np.array([*size, *size], np.float32)
    return Boxes(scores[kept], classes[kept], boxes[rows[kept]] * scale)


def detector_kind(model_type: str) -> str:
    """Return the class of image processor that a type of detector comes with, without its suffix.

    >>> detector_kind("d_fine"), detector_kind("detr")
    ('RTDetr', 'Detr')
    """
    return _PROCESSORS.get(model_type, "Detr")


def box_overlap(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Return intersection over union of every box of ``a`` (n, 4) with every one of ``b`` (m, 4).

    >>> box_overlap(np.array([[0, 0, 2, 2]]), np.array([[0, 0, 2, 1], [5, 5, 6, 6]])).tolist()
    [[0.5, 0.0]]
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    areas = [np.clip(x[:, 2:] - x[:, :2], 0, None).prod(axis=1) for x in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    return np.asarray(np.divide(shared, union, out=np.zeros_like(shared), where=union > 0))


def box_agreement(expected: Sequence[Boxes], found: Sequence[Boxes]) -> tuple[float, float]:
    """Return how well detections agree: mean box IoU, and the share of boxes of the same class.

    Each expected box is paired with the found one that overlaps it most, each found one used once,
    the best pairs first; a box without a partner, on either side, counts 0 in both. 1.0 and 1.0
    where there is nothing to find and nothing was found.

    >>> one = Boxes(np.ones(1, np.float32), np.zeros(1, np.intp), np.array([[0, 0, 1, 1]]))
    >>> box_agreement([one], [one])
    (1.0, 1.0)
    """
    overlaps, alike, boxes = 0.0, 0, 0
    for wanted, got in zip(expected, found, strict=True):
        boxes += max(len(wanted.scores), len(got.scores))
        table = box_overlap(wanted.corners, got.corners)
        while table.size and table.max() > 0:
            i, j = divmod(int(table.argmax()), table.shape[1])
            overlaps += float(table[i, j])
            alike += int(wanted.classes[i] == got.classes[j])
            table[i], table[:, j] = 0, 0
    return (overlaps / boxes, alike / boxes) if boxes else (1.0, 1.0)
