"""QuestionAnswerer: the answers that transformers' algorithm finds, over contexts of any length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers.pipelines.document_question_answering import select_starts_ends

from memopt.errors import ConfigurationError, InputError
from memopt.runtimes.engines.answerer import QuestionAnswerer
from memopt.tasks.extraction import Answer
from tests.runtimes.engines import kit

QUESTION = "Where does Müller live?"
# Of one window, of several, and with spaces that a tokenizer counts to words.
CONTEXTS = [*kit.SHORT, kit.LONG[0], kit.LONG[2]]


@pytest.fixture(scope="module", params=kit.KINDS)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[QuestionAnswerer]:
    exported = request.param == "wordpiece"
    made = kit.bundle(tmp_path_factory.mktemp("answer"), request.param, "answer", exported)
    with QuestionAnswerer(made, device="cpu" if exported else "torch") as opened:
        yield opened


def expected(
    engine: QuestionAnswerer, context: str, stride: int, top: int, whole: bool, impossible: bool
) -> list[tuple[str, int, int, float]]:
    """The pipeline of transformers 4.57 (5 has none), of the parts that 5.23 still has.

    The best window decides where its sum over windows would give more than 1.
    """
    model, tokenizer = kit.reference(engine.bundle)
    cut = tokenizer(
        QUESTION,
        context,
        truncation="only_second",
        max_length=kit.LENGTH,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    names = [n for n in ("input_ids", "token_type_ids", "attention_mask") if n in cut]
    found: dict[str, list[Any]] = {}
    least = 1.0
    for window, encoding in enumerate(cut.encodings):
        feed = {name: torch.tensor([cut[name][window]]) for name in names}
        if getattr(model.config, "type_vocab_size", 1) < 2:
            feed.pop("token_type_ids", None)
        with torch.no_grad():
            result = model(**feed)
        outside = np.array([int(s != 1) for s in encoding.sequence_ids])
        outside[np.array(encoding.ids) == tokenizer.cls_token_id] = 0
        starts, ends, scores, least = select_starts_ends(
            result.start_logits.numpy(),
            result.end_logits.numpy(),
            outside[None],
            feed["attention_mask"].numpy(),
            least,
            2 * top + 10 if whole else top,
            True,
            15,
        )
        own: dict[str, list[Any]] = {}
        for first, last, score in zip(starts, ends, scores, strict=True):
            if score == 0:
                continue  # the token of no answer
            begin, end = encoding.offsets[first][0], encoding.offsets[last][1]
            if whole:
                begin = encoding.word_to_chars(encoding.token_to_word(first), 1)[0]
                end = encoding.word_to_chars(encoding.token_to_word(last), 1)[1]
            text = context[begin:end]
            begin += len(text) - len(text.lstrip())
            text = text.strip()
            if text:
                entry = own.setdefault(text.lower(), [text, begin, begin + len(text), 0.0])
                entry[3] += float(score)
        for key, entry in own.items():
            if key not in found or entry[3] > found[key][3]:
                found[key] = entry
    answers = [tuple(entry) for entry in found.values()]
    answers += [("", 0, 0, least)] if impossible else []
    return sorted(answers, key=lambda answer: -answer[3])[:top]


def same(found: list[Answer], right: list[tuple[str, int, int, float]], places: bool) -> None:
    assert [answer.text.lower() for answer in found] == [answer[0].lower() for answer in right]
    if places:
        assert [(a.start, a.end) for a in found] == [answer[1:3] for answer in right]
    np.testing.assert_allclose(
        [answer.score for answer in found], [answer[3] for answer in right], rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize(("top", "impossible"), [(1, False), (4, True)])
def test_answers_are_those_of_transformers(
    engine: QuestionAnswerer, top: int, impossible: bool
) -> None:
    """Tokens as the model scores them: of short and long contexts, accents, emoji, CJK, spaces."""
    found = engine.answer(
        QUESTION, CONTEXTS, top, stride=8, whole_words=False, impossible=impossible
    )
    for context, answers in zip(CONTEXTS, found, strict=True):
        same(answers, expected(engine, context, 8, top, False, impossible), places=top == 1)
        assert all(context[a.start : a.end] == a.text for a in answers)


def test_an_answer_is_whole_words(engine: QuestionAnswerer) -> None:
    """As there, unless a window's edge cuts a word: then the word is whole nevertheless."""
    tokenizer = kit.reference(engine.bundle)[1]
    lengths = [len(tokenizer(QUESTION, text)["input_ids"]) for text in kit.SHORT]
    short = [text for text, n in zip(kit.SHORT, lengths, strict=True) if n <= kit.LENGTH]
    assert short
    for context, answers in zip(short, engine.answer(QUESTION, short, 2), strict=True):
        same(answers, expected(engine, context, 8, 2, True, False), places=False)
    for answer in engine.answer(QUESTION, kit.LONG[0], 9):
        before, after = kit.LONG[0][: answer.start][-1:], kit.LONG[0][answer.end :][:1]
        assert not (before.isalnum() and answer.text[0].isalnum())
        assert not (after.isalnum() and answer.text[-1].isalnum())


def test_one_and_several_questions_and_contexts(engine: QuestionAnswerer) -> None:
    """One question is asked of every context and one context of every question."""
    one = engine.answer(QUESTION, kit.SHORT[0])
    assert isinstance(one[0], Answer)
    for several in (
        engine.answer([QUESTION], kit.SHORT[0]),
        engine.answer(QUESTION, [kit.SHORT[0]] * 2),
    ):
        assert {(a.text, a.start, a.end) for (a,) in several} == {
            (one[0].text, one[0].start, one[0].end)
        }
    assert engine.answer([], []) == []


def test_bad_input_is_named(engine: QuestionAnswerer) -> None:
    """An empty context, a question that leaves no room, lists of two lengths."""
    with pytest.raises(InputError, match="input 1 has an empty context"):
        engine.answer("Who?", ["Rome", " \n"])
    with pytest.raises(InputError, match="input 0 has an empty question"):
        engine.answer("", "Rome")
    with pytest.raises(InputError, match=r"input 1 has a question of .* of 40 that a window"):
        engine.answer(["Who?", "Who? " * 40], "Rome is old. " * 40)
    with pytest.raises(InputError, match="2 questions for 3 contexts"):
        engine.answer(["a", "b"], ["a", "b", "c"])
    with pytest.raises(InputError, match="input 0 is tuple, not a pair of str"):
        engine.answer([3], "Rome")
    for wrong in ({"top": 0}, {"longest": 0}, {"window": -1}, {"stride": 99}):
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            engine.answer("Who?", kit.LONG[0], **wrong)
    with pytest.raises(InputError, match=r"question of .* tokens"):
        engine.answers([("Who? " * 99, "Rome")])
