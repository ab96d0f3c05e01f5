"""Boxes: overlap and agreement, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from memopt.tasks.boxes import Boxes, box_agreement, box_overlap


def _boxes(classes: list[int], corners: list[list[float]]) -> Boxes:
    count = len(classes)
    edges = np.array(corners, np.float32).reshape(count, 4)
    return Boxes(np.ones(count, np.float32), np.array(classes, np.intp), edges)


def test_a_box_without_area_overlaps_nothing() -> None:
    """Nor itself: there is nothing to share."""
    assert box_overlap(np.zeros((1, 4)), np.zeros((1, 4))).tolist() == [[0.0]]


def test_the_best_pair_is_made_first_and_every_box_is_used_once() -> None:
    """Of two found boxes on one expected box the worse one has no partner."""
    expected = [_boxes([0], [[0, 0, 2, 2]])]
    found = [_boxes([1, 0], [[0, 0, 2, 1], [0, 0, 2, 2]])]
    assert box_agreement(expected, found) == (0.5, 0.5)


def test_another_class_counts_as_overlap_but_not_as_agreement() -> None:
    """The two measures tell a moved box from a renamed one."""
    assert box_agreement([_boxes([0], [[0, 0, 1, 1]])], [_boxes([1], [[0, 0, 1, 1]])]) == (1.0, 0.0)


def test_nothing_found_where_something_is_counts_nothing() -> None:
    """And nothing where nothing is is right."""
    none = _boxes([], [])
    assert box_agreement([_boxes([0], [[0, 0, 1, 1]])], [none]) == (0.0, 0.0)
    assert box_agreement([none], [none]) == (1.0, 1.0)
    assert box_agreement([], []) == pytest.approx((1.0, 1.0))
