"""QuestionAnswerer: the part of a text that answers a question."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from memopt.errors import InputError
from memopt.runtimes.batching import UnusableItems
from memopt.runtimes.engines.windowed import WindowedEngine, positive, unusable
from memopt.runtimes.vectors import as_items
from memopt.tasks.extraction import Answer, best_spans, merged

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memopt.runtimes.task_engine import Answers
    from memopt.runtimes.windows import Windows

# What transformers' pipeline took: tokens of a window and of an answer, at most.
_WINDOW = 384
_LONGEST = 15


class QuestionAnswerer(WindowedEngine):
    """Finds the part of a text of any length that answers a question.

    Arguments and errors are those of :class:`memopt.runtimes.task_engine.Engine`.

    >>> QuestionAnswerer("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """

    tasks = ("question-answering",)

    @overload
    def answer(
        self,
        question: str,
        context: str,
        top: int = ...,
        *,
        impossible: bool = ...,
        whole_words: bool = ...,
        longest: int = ...,
        window: int | None = ...,
        stride: int | None = ...,
        batch_size: int | None = ...,
        show_progress: bool = ...,
    ) -> list[Answer]: ...

    @overload
    def answer(
        self,
        question: Any,
        context: Any,
        top: int = ...,
        *,
        impossible: bool = ...,
        whole_words: bool = ...,
        longest: int = ...,
        window: int | None = ...,
        stride: int | None = ...,
        batch_size: int | None = ...,
        show_progress: bool = ...,
    ) -> list[list[Answer]]: ...

    def answer(
        self,
        question: Any,
        context: Any,
        top: int = 1,
        *,
        impossible: bool = False,
        whole_words: bool = True,
        longest: int = _LONGEST,
        window: int | None = None,
        stride: int | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> Any:
        """Return the best answers, best first: for one question and one context a list of them.

        For several questions, or contexts, a list a pair; one question is asked of every context,
        and one context of every question. A context longer than the model is cut into windows that
        overlap; an answer's score is the best that a window gives it. Answers of one text, within
        a window, are one: their scores are added, and the place is that of the best.

        Args:
            question: a text, or several.
            context: where the answer lies: a text, or several.
            top: answers a pair, at most.
            impossible: an empty answer is one too, with the least score of the windows for it.
            whole_words: an answer is never a part of a word; False for a language without spaces.
            longest: tokens of an answer, at most.
            window: tokens of a window; None takes 384, or what the model has where that is less.
            stride: tokens that two windows share; None takes 128, of short windows half.
            batch_size, show_progress: as of :meth:`answers`.

        Raises:
            InputError: an empty question or context, a question that leaves no room for a context,
                or lists of two lengths; named by its position.
            ConfigurationError: a number that is none, or a stride that leaves no way on.
            DeviceError: the engine is closed, or no provider is left.
        """
        positive("top", top)
        positive("longest", longest)
        front = self._windows()
        size = positive("window", _WINDOW if window is None else window)
        size = min(size, front.max_length or size)
        pairs = _pairs(question, context)
        numbers = iter(range(len(pairs)))

        def cut(group: Sequence[Any]) -> list[Windows]:
            cuts, broken = [], {}
            for number, (asked, text) in zip(numbers, group, strict=False):
                try:
                    # A window that holds no whole answer is no use.
                    cuts.append(front.paired(asked, text, size, stride, longest + 1))
                except UnusableItems as error:
                    broken[number] = error.reasons[0]
            if broken:
                raise unusable(broken)
            return cuts

        def best(windows: Windows, rows: Answers) -> list[Answer]:
            return _best(windows, rows, front.null, top, longest, whole_words, impossible)

        found = self._windowed(pairs, cut, _all, best, batch_size, show_progress)
        return found[0] if isinstance(question, str) and isinstance(context, str) else found


def _pairs(question: Any, context: Any) -> list[tuple[Any, Any]]:
    questions, contexts = as_items(question, "text"), as_items(context, "text")
    if isinstance(question, str):
        questions = [question] * len(contexts)
    if isinstance(context, str):
        contexts = [context] * len(questions)
    if len(questions) != len(contexts):
        raise InputError(
            f"{len(questions)} questions for {len(contexts)} contexts",
            fix="give as many of both, or one of either",
        )
    pairs = list(zip(questions, contexts, strict=True))
    blank = {i: why for i, pair in enumerate(pairs) if (why := _blank(*pair))}
    if blank:
        raise unusable(blank)
    return pairs


def _blank(question: Any, context: Any) -> str | None:
    for what, text in (("question", question), ("context", context)):
        if isinstance(text, str) and not text.strip():
            return f"has an empty {what}"
    return None


def _all(windows: Windows) -> list[NDArray[np.intp]]:
    return [np.arange(len(encoding)) for encoding in windows.encodings]


def _best(
    windows: Windows,
    rows: Answers,
    null: int | None,
    top: int,
    longest: int,
    whole_words: bool,
    impossible: bool,
) -> list[Answer]:
    found: list[Answer] = []
    nothing = 1.0
    for number, logits in enumerate(rows):
        ids = windows.encodings[number].ids
        begin = windows.inside[number]
        context = np.zeros(len(ids), bool)
        context[begin : begin + windows.lengths[number]] = True
        none = ids.index(null) if null in ids else None
        # Some are one when they are made whole; as many more as transformers looks at.
        count = 2 * top + 10 if whole_words else top
        spans = best_spans(logits, context, none, top=count, longest=longest)
        nothing = min(nothing, spans.null)
        shift = windows.starts[number] - begin
        places = zip(spans.first + shift, spans.last + shift, spans.scores, strict=True)
        texts = (_text(windows, int(a), int(b), float(s), whole_words) for a, b, s in places)
        found += merged((answer for answer in texts if answer.text), operator.add)
    answers = merged(found)
    if impossible:
        answers.append(Answer("", 0, 0, nothing))
    return sorted(answers, key=lambda answer: -answer.score)[:top]


def _text(windows: Windows, first: int, last: int, score: float, whole_words: bool) -> Answer:
    """Return the text of some tokens, without spaces around it."""
    if whole_words:
        first, last = next(_word(windows, first, -1)), next(_word(windows, last, 1))
    start, end = int(windows.offsets[first][0]), int(windows.offsets[last][1])
    whole = windows.text[start:end]
    inner = whole.strip()
    start += len(whole) - len(whole.lstrip())
    return Answer(inner, start, start + len(inner), score)


def _word(windows: Windows, token: int, step: int) -> Iterator[int]:
    """Yield the last token of its word in one direction."""
    words = windows.words
    while 0 <= token + step < len(words) and 0 <= words[token] == words[token + step]:
        token += step
    yield token
