"""Answers that are a part of a text: of logits the best of them, and SQuAD's measures of two."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from memopt.tasks.classes import softmax

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Added to the logit of a token that no answer may hold, as transformers does.
_NEVER = -10_000.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A part of a context: ``text`` is what stands from character ``start`` up to ``end``.

    Empty where the answer is that the context does not say.
    """

    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True, slots=True, eq=False)
class TokenSpans:
    """Spans of tokens, the best first: first token, last token, score, each (spans,).

    ``null`` is the score of no answer.
    """

    first: NDArray[np.intp]
    last: NDArray[np.intp]
    scores: NDArray[np.float32]
    null: float = 0.0


def best_spans(
    logits: NDArray[np.float32],
    context: NDArray[np.bool_],
    null: int | None = None,
    *,
    top: int = 1,
    longest: int = 15,
) -> TokenSpans:
    """Return the likeliest spans of tokens, as transformers' question-answering pipeline did.

    The score of a span is the product of the probabilities of its ends (Chen et al. 2017,
    https://arxiv.org/abs/1704.00051, section 3.2), which sum to 1 over the context and ``null``.

    Args:
        logits: float32 (tokens, 2), of start and of end.
        context: bool (tokens,), where an answer may lie.
        null: the token that stands for no answer.
        top: spans at most.
        longest: tokens of a span at most.

    >>> logits = np.array([[0, 0], [9, 0], [0, 9], [0, 0]], np.float32)
    >>> spans = best_spans(logits, np.array([False, True, True, True]), null=0)
    >>> int(spans.first[0]), int(spans.last[0]), round(float(spans.scores[0]), 2)
    (1, 2, 1.0)
    """
    allowed = context.copy()
    if null is not None:
        allowed[null] = True
    ends = softmax(np.where(allowed[:, None], logits, np.float32(_NEVER)).T)
    none = float(ends[0, null] * ends[1, null]) if null is not None else 0.0
    ends = np.where(context, ends, np.float32(0))
    count, width = len(context), min(longest, len(context))
    # Row: first token; column: how many tokens follow.
    padded = np.concatenate([ends[1], np.zeros(width, np.float32)])
    table = ends[0][:, None] * padded[np.arange(count)[:, None] + np.arange(width)]
    flat = table.ravel()
    best = np.argsort(-flat, kind="stable")[:top]
    first, follow = np.divmod(best, width)
    good = context[first] & context[np.minimum(first + follow, count - 1)]
    good &= first + follow < count
    return TokenSpans(first[good], (first + follow)[good], flat[best][good], none)


def merged(answers: Iterable[Answer], join: Callable[[float, float], float] = max) -> list[Answer]:
    """Return answers without those of one text but for case; ``join`` makes one score of two.

    The place is that of the better one.

    >>> merged([Answer("Rome", 0, 4, 0.5), Answer("rome", 9, 13, 0.25)], lambda a, b: a + b)
    [Answer(text='Rome', start=0, end=4, score=0.75)]
    """
    found: dict[str, Answer] = {}
    for answer in answers:
        before = found.setdefault(answer.text.lower(), answer)
        if before is not answer:
            better = answer if answer.score > before.score else before
            score = join(before.score, answer.score)
            found[answer.text.lower()] = replace(better, score=score)
    return list(found.values())


def exact_match(found: str, expected: str) -> float:
    """Return 1.0 where two answers are equal but for case, punctuation, articles and spaces.

    As SQuAD counts (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250, section 6.1).

    >>> exact_match("The Tower.", "tower"), exact_match("tower", "a town")
    (1.0, 0.0)
    """
    return float(_plain(found) == _plain(expected))


def token_f1(found: str, expected: str) -> float:
    """Return the F1 of two answers' words, as SQuAD counts; without words 1.0 where both have none.

    >>> token_f1("the old tower", "old town")
    0.5
    """
    a, b = _plain(found).split(), _plain(expected).split()
    if not a or not b:
        return float(a == b)
    return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b))


def _plain(text: str) -> str:
    text = _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION))
    return " ".join(text.split())
