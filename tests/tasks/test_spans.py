"""Spans of labelled tokens: schemes of labels, words, and how well two lists agree."""

from __future__ import annotations

import numpy as np
import pytest

from memopt.tasks.spans import Span, TokenScores, span_f1, spans_of


def tokens(names: list[str], labels: list[str]) -> TokenScores:
    """Tokens of two characters with a space between them, sure of these labels."""
    scores = np.full((len(names), len(labels)), 0.1, np.float32)
    scores[np.arange(len(names)), [labels.index(name) for name in names]] = 0.9
    offsets = np.array([(3 * i, 3 * i + 2) for i in range(len(names))]).reshape(-1, 2)
    return TokenScores("ab " * len(names), scores, offsets, np.zeros(len(names), bool))


SCHEMES = {
    "two begin": (["B-X", "I-X", "B-X", "O", "I-X"], [("X", 0, 5), ("X", 6, 8), ("X", 12, 14)]),
    "one after the other": (["B-X", "I-Y", "I-Y"], [("X", 0, 2), ("Y", 3, 8)]),
    "plain": (["X", "X", "O", "Y", "X"], [("X", 0, 5), ("Y", 9, 11), ("X", 12, 14)]),
    "BIOES": (["B-X", "I-X", "E-X", "S-X", "S-X"], [("X", 0, 8), ("X", 9, 11), ("X", 12, 14)]),
    "BILOU": (["B-X", "L-X", "I-X", "U-X", "O"], [("X", 0, 5), ("X", 6, 8), ("X", 9, 11)]),
    "a hyphen": (["E-mail", "E-mail", "first-name"], [("E-mail", 0, 5), ("first-name", 6, 8)]),
    "nothing": (["O", "O"], []),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_of_labels_gives_its_spans(scheme: str) -> None:
    """BIO, plain names, BIOES and BILOU; a hyphen in a plain name is no prefix."""
    names, expected = SCHEMES[scheme]
    labels = sorted({"O", "B-X", "I-X", *names} if scheme != "a hyphen" else {"O", *names})
    found = spans_of(tokens(names, labels), labels)
    assert [(span.label, span.start, span.end) for span in found] == expected


@pytest.mark.parametrize(
    ("aggregation", "label", "score"),
    [("first", "A", 0.6), ("max", "B", 0.8), ("average", "B", 0.6)],
)
def test_a_word_has_one_label(aggregation: str, label: str, score: float) -> None:
    """Its first token's, its surest token's, or that of the mean."""
    scores = np.array([[0.6, 0.4], [0.2, 0.8]], np.float32)
    offsets = np.array([[0, 2], [2, 4]])
    word = TokenScores("abcd", scores, offsets, np.array([False, True]))
    (span,) = spans_of(word, ["A", "B"], aggregation)
    assert (span.label, span.text) == (label, "abcd")
    assert span.score == pytest.approx(score)


def test_spaces_around_a_span_are_no_part_of_it() -> None:
    """SentencePiece counts the space before a word to it; a span of spaces alone stays."""
    scores = np.array([[0.0, 1.0], [1.0, 0.0]], np.float32)
    places = np.array([[1, 5], [5, 6]])
    found = spans_of(TokenScores("a Rom  ", scores, places, np.zeros(2, bool)), ["P", "X"])
    assert [(s.label, s.start, s.end, s.text) for s in found] == [
        ("X", 2, 5, "Rom"),
        ("P", 5, 6, " "),
    ]
    assert spans_of(tokens([], ["O"]), ["O"], "first") == []


def test_f1_counts_places_and_labels() -> None:
    """Of all texts together; two empty lists agree."""
    span, other = Span("X", 0, 2, "ab", 0.5), Span("X", 0, 3, "abc", 0.5)
    assert span_f1([[span], []], [[span], []]) == 1.0
    assert span_f1([[span], []], [[], [span]]) == 0.0
    assert span_f1([[span, other]], [[span]]) == pytest.approx(2 / 3)
    assert span_f1([[]], [[]]) == 1.0
