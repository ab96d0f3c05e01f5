"""Spans of a text that a tagger labels: tokens to words, words to spans, and how well two agree."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# How tokens become spans: none gives each token; simple joins neighbours of one label; the others
# first give all tokens of a word one label: its first token's, its surest one's, or that of their
# mean. The names are those of transformers' pipeline.
AGGREGATIONS = ("simple", "first", "max", "average", "none")
# The label of what is nothing.
OUTSIDE = ("O",)


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a text: ``text`` is what stands from character ``start`` up to ``end``."""

    label: str
    start: int
    end: int
    text: str
    score: float


@dataclass(frozen=True, slots=True, eq=False)
class TokenScores:
    """What a model says of each token of a text.

    ``scores`` are probabilities, float32 (tokens, labels); ``offsets`` the characters of each
    token, int (tokens, 2); ``continues``, bool (tokens,), which tokens go on with the word of the
    token before.
    """

    text: str
    scores: NDArray[np.float32]
    offsets: NDArray[np.intp]
    continues: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Unit:
    """One token, or one word."""

    label: str
    score: float
    start: int
    end: int


def spans_of(
    tokens: TokenScores,
    labels: Sequence[str],
    aggregation: str = "simple",
    ignore: Collection[str] = OUTSIDE,
) -> list[Span]:
    """Return the spans of a text, in its order, as transformers' pipeline finds them.

    Labels are B-X (begins) and I-X (inside), or plain X, neighbours of which are one span. Unlike
    there E-X and L-X end a span and S-X and U-X are one of their own, where the model has B-X or
    I-X as well; a plain label with a hyphen keeps its whole name; and spaces around a span, which
    some tokenizers count to a word, are no part of it.

    Args:
        tokens: of the text.
        labels: names of the columns of the scores.
        aggregation: one of ``AGGREGATIONS``.
        ignore: labels that are no span.

    >>> scores = np.array([[0.1, 0.8, 0.1], [0.2, 0.0, 0.8], [0.9, 0.1, 0.0]], np.float32)
    >>> offsets = np.array([[0, 3], [4, 8], [9, 13]])
    >>> tokens = TokenScores("New York wins", scores, offsets, np.zeros(3, bool))
    >>> [(span.label, span.text) for span in spans_of(tokens, ["O", "B-LOC", "I-LOC"])]
    [('LOC', 'New York')]
    """
    units = _tokens(tokens, labels) if aggregation in ("none", "simple") else None
    units = _words(tokens, labels, aggregation) if units is None else units
    if aggregation == "none":
        groups = [(unit.label, [unit]) for unit in units]
    else:
        groups = _groups(units, frozenset(labels))
    return [
        _span(tokens.text, label, group)
        for label, group in groups
        if label not in ignore and group[0].label not in ignore
    ]


def span_f1(found: Sequence[Sequence[Span]], expected: Sequence[Sequence[Span]]) -> float:
    """Return the micro F1 of spans, one list a text: equal are those of one label and one place.

    As CoNLL 2003 counts (Tjong Kim Sang and De Meulder, https://aclanthology.org/W03-0419). 1.0
    where neither has any.

    >>> one, two = Span("LOC", 0, 3, "Rom", 0.9), Span("PER", 0, 3, "Rom", 0.9)
    >>> span_f1([[one], [two]], [[one], [one]])
    0.5
    """
    a, b = ({(i, s.label, s.start, s.end) for i, row in enumerate(rows) for s in row}
            for rows in (found, expected))  # fmt: skip
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0


def _tokens(tokens: TokenScores, labels: Sequence[str]) -> list[_Unit]:
    best = tokens.scores.argmax(axis=1)
    rows = zip(best, tokens.scores, tokens.offsets, strict=True)
    return [_Unit(labels[k], float(s[k]), int(o[0]), int(o[1])) for k, s, o in rows]


def _words(tokens: TokenScores, labels: Sequence[str], aggregation: str) -> list[_Unit]:
    begins = np.flatnonzero(~tokens.continues)
    edges = [0, *(int(i) for i in begins if i), len(tokens.scores)]
    units = []
    for begin, end in pairwise(edges):
        if begin == end:
            continue  # of a text without a token
        row = _of_word(tokens.scores[begin:end], aggregation)
        best = int(row.argmax())
        first, last = tokens.offsets[begin], tokens.offsets[end - 1]
        units.append(_Unit(labels[best], float(row[best]), int(first[0]), int(last[1])))
    return units


def _of_word(scores: NDArray[np.float32], aggregation: str) -> NDArray[np.float32]:
    if aggregation == "first":
        return np.asarray(scores[0])
    if aggregation == "max":
        return np.asarray(scores[scores.max(axis=1).argmax()])
    return np.asarray(scores.mean(axis=0))


def _groups(units: Sequence[_Unit], labels: Collection[str]) -> list[tuple[str, list[_Unit]]]:
    groups: list[tuple[str, list[_Unit]]] = []
    open_ = ""
    for unit in units:
        begins, ends, name = _parts(unit.label, labels)
        if not groups or begins or name != open_:
            groups.append((name, []))
        groups[-1][1].append(unit)
        open_ = "" if ends else name
    return groups


def _parts(label: str, labels: Collection[str]) -> tuple[bool, bool, str]:
    """Return whether a label begins a span, whether it ends one, and the span's own label."""
    prefix, hyphen, name = label.partition("-")
    if hyphen and prefix in ("B", "I"):
        return prefix == "B", False, name
    paired = f"B-{name}" in labels or f"I-{name}" in labels
    if hyphen and paired and prefix in ("E", "L", "S", "U"):
        return prefix in ("S", "U"), True, name
    return False, False, label


def _span(text: str, label: str, units: Sequence[_Unit]) -> Span:
    start, end = units[0].start, units[-1].end
    whole = text[start:end]
    if inner := whole.strip():
        start += len(whole) - len(whole.lstrip())
        end = start + len(inner)
    score: Any = np.mean([unit.score for unit in units])
    return Span(label, start, end, text[start:end], float(score))
