"""Answers out of logits, and SQuAD's measures."""

from __future__ import annotations

import operator

import numpy as np
import pytest
from transformers.pipelines.document_question_answering import select_starts_ends

from memopt.tasks.extraction import Answer, best_spans, exact_match, merged, token_f1


@pytest.mark.parametrize("tokens", [1, 3, 20, 90])
@pytest.mark.parametrize("top", [1, 7, 500])
def test_spans_are_those_of_transformers(tokens: int, top: int) -> None:
    """Same scores in the same order, for any number of tokens and of answers."""
    logits = np.random.default_rng(tokens).normal(0, 3, (tokens + 4, 2)).astype(np.float32)
    context = np.zeros(tokens + 4, bool)
    context[3 : 3 + tokens] = True
    outside = (~context).astype(int)
    outside[0] = 0
    start, end = logits.T.copy()
    first, last, scores, null = select_starts_ends(
        start[None], end[None], outside[None], np.ones((1, tokens + 4), int), 1e6, top, True, 15
    )
    found = best_spans(logits, context, 0, top=top)
    right = scores[scores > 0]
    assert found.null == pytest.approx(null, rel=1e-4)
    positive = found.scores > 0
    np.testing.assert_allclose(found.scores[positive], right[: positive.sum()], rtol=1e-4)
    assert (found.first[0], found.last[0]) == (first[0], last[0])
    assert (found.last - found.first < 15).all()
    assert (found.last >= found.first).all()


def test_nothing_outside_the_context_answers() -> None:
    """However sure the model is of it."""
    logits = np.zeros((5, 2), np.float32)
    logits[1] = 50
    found = best_spans(logits, np.array([False, False, False, True, True]), 0, top=9)
    assert set(found.first) <= {3, 4}
    assert best_spans(logits, np.zeros(5, bool), 0).first.tolist() == []


def test_answers_of_one_text_are_one() -> None:
    """Case aside; the better one says where, and ``join`` what its score is."""
    rome, again = Answer("Rome", 0, 4, 0.25), Answer("rome", 9, 13, 0.5)
    assert merged([rome, again]) == [again]
    assert merged([rome, again], operator.add) == [Answer("rome", 9, 13, 0.75)]
    assert merged([]) == []


@pytest.mark.parametrize(
    ("found", "expected", "exact", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1, 1),
        ("in Paris", "Paris", 0, 2 / 3),
        ("", "", 1, 1),
        ("", "Paris", 0, 0),
        ("the", "a", 1, 1),
        ("Paris Paris", "Paris", 0, 2 / 3),
        ("Rome", "Paris", 0, 0),
    ],
)
def test_measures_are_those_of_squad(found: str, expected: str, exact: float, f1: float) -> None:
    """Articles, case, punctuation and spaces do not count."""
    assert exact_match(found, expected) == exact
    assert token_f1(found, expected) == pytest.approx(f1)
