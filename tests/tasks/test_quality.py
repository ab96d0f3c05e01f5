"""Measures of each task: 1 for the same answers, less for others, a bound that fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau
from sklearn.metrics import ndcg_score

from memopt.errors import ConfigurationError
from memopt.quantization.accuracy.gate import Gate, Validation
from memopt.tasks.quality import (
    _QUALITIES,
    MEASURES,
    About,
    check_measured,
    measures_of,
    quality_of,
)
from memopt.tasks.ranking import kendall_tau, ndcg

RANDOM = np.random.default_rng(5)
ABOUT = About({}, [(f"query {i % 4}", f"document {i}") for i in range(12)])


def rows(task: str, seed: int = 1) -> list[np.ndarray[Any, Any]]:
    """Return twelve answers of a task."""
    random = np.random.default_rng(seed)
    shapes = {"reranking": (1,), "sparse-embedding": (64,), "fill-mask": (7, 30)}
    shape = shapes.get(task, (5, 6) if task in TOKENS else (4,))
    output = random.normal(size=(12, *shape)).astype(np.float32)
    if task == "sparse-embedding":
        output = np.maximum(output, 0)
    return quality_of(task).rows(output, {})


TOKENS = ("token-classification", "question-answering", "late-interaction", "object-detection")
TASKS = [task for task in _QUALITIES if task != "object-detection"]


@pytest.mark.parametrize("task", TASKS)
def test_equal_answers_reach_every_bound_and_others_miss_one(task: str) -> None:
    """The same answers are perfect; those of another model fail the gate, in words."""
    right = rows(task)
    same = Validation(samples=12, measures=quality_of(task).compare(right, right, ABOUT))
    assert same.failures(Gate()) == []
    assert same.quality == pytest.approx(1.0)
    other = Validation(samples=12, measures=quality_of(task).compare(rows(task, 2), right, ABOUT))
    assert other.failures(Gate())
    assert other.quality < same.quality
    assert "misses" in other.failures(Gate())[0]


def test_not_a_number_misses_every_bound() -> None:
    """NaN is on neither side of a bound and must not pass."""
    for measure in MEASURES.values():
        assert measure.bound is None or measure.misses(float("nan"), measure.bound)


def test_a_bound_of_ones_own_counts_and_an_unknown_one_is_refused() -> None:
    """Gate(bounds=...) wins over the default; a name of no measure is an error with the nearest."""
    proof = Validation(samples=1, measures={"agreement": 0.9})
    assert proof.failures(Gate(bounds={"agreement": 0.85})) == []
    with pytest.raises(ConfigurationError, match="did you mean 'agreement'"):
        Gate(bounds={"agrement": 0.9})


@pytest.mark.parametrize("task", TASKS)
def test_the_bounds_of_a_task_are_what_it_measures_and_others_are_refused(task: str) -> None:
    """A gate of what nobody measures would pass everything."""
    right = rows(task)
    measured = quality_of(task).compare(right, right, ABOUT)
    assert set(measures_of(task)) == set(measured)
    check_measured(measured, task)
    for idle in ("min_cosine", "box_iou"):
        with pytest.raises(ConfigurationError, match=f"{idle} would hold nothing.*--gate "):
            check_measured([idle], task)


def test_tau_and_ndcg_are_those_of_scipy_and_sklearn() -> None:
    """With ties, on random scores."""
    for _ in range(20):
        a, b = RANDOM.integers(0, 6, 15), RANDOM.integers(0, 6, 15)
        assert kendall_tau(a, b) == pytest.approx(kendalltau(a, b).statistic)
    gains, scores = RANDOM.random(15), RANDOM.random(15)
    assert ndcg(scores, gains) == pytest.approx(ndcg_score([gains], [scores], k=10))


def test_padding_is_no_part_of_a_comparison() -> None:
    """What a graph gives at masked tokens is left out."""
    output = RANDOM.normal(size=(2, 4, 3)).astype(np.float32)
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1]])
    kept = quality_of("token-classification").rows(output, {"attention_mask": mask})
    assert [row.shape for row in kept] == [(2, 3), (4, 3)]
