"""Speculation by prompt lookup: the text without it, in fewer runs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt import Generator
from memopt.bundle import Bundle
from memopt.errors import ConfigurationError
from memopt.runtimes.generate.lookup import Lookup

VARIANTS = [("cpu", "onnx-fp32"), ("cpu", "onnx-fp32-fused"), ("openvino", "openvino-fp32")]


@pytest.fixture(scope="module", params=VARIANTS, ids=[variant for _, variant in VARIANTS])
def engine(talker: tuple[Bundle, Any], request: pytest.FixtureRequest) -> Any:
    device, variant = request.param
    with Generator(talker[0], device, variant, strict=True) as opened:
        yield opened


@settings(max_examples=12)
@given(
    words=st.lists(st.sampled_from(["ab", "cab", "é", " ", "xy"]), min_size=1, max_size=12),
    most=st.integers(1, 40),
    size=st.integers(1, 9),
    seed=st.integers(0, 9),
    how=st.sampled_from(
        [
            {},
            {"temperature": 0.8, "top_k": 20},
            {"repetition_penalty": 1.3},
            {"regex": "(ab|c)*"},
            {"stop": "b"},
            {"context": "slide", "max_context": 40},
        ]
    ),
)
def test_the_text_is_the_one_without_it(
    engine: Generator, words: list[str], most: int, size: int, seed: int, how: dict[str, Any]
) -> None:
    """Greedy or drawn with a seed, of a form, cut or sliding: not a token is another."""
    options: dict[str, Any] = {"max_new_tokens": most, "seed": seed, **how}
    if "context" not in how and sum(len(word.encode()) for word in words) + most > 128:
        return
    prompt = "".join(words)
    plain = engine.generate(prompt, **options)[0]
    found = engine.generate(prompt, speculate=size, **options)[0]
    assert (found.tokens, found.text, found.finish) == (plain.tokens, plain.text, plain.finish)
    again = engine.generate(prompt, **options)[0]
    assert again.tokens == plain.tokens


def test_a_text_that_repeats_takes_fewer_runs(engine: Generator) -> None:
    """What the form forces again and again is read several tokens at a time."""
    runs: list[int] = []
    decoder: Any = engine._chain.backend
    forward, verify = decoder.forward, decoder.verify

    def counted(run: Any) -> Any:
        def call(*arguments: Any) -> Any:
            runs[-1] += 1
            return run(*arguments)

        return call

    decoder.forward, decoder.verify = counted(forward), counted(verify)
    try:
        for size in (0, 8):
            runs.append(0)
            engine.generate("x", regex="(hello ){9}", max_new_tokens=54, speculate=size)
    finally:
        decoder.forward, decoder.verify = forward, verify
    # The portable ONNX graph's `forward` calls `verify`; each is counted.
    assert runs[1] < runs[0] / 2


def test_it_is_for_one_prompt(engine: Generator) -> None:
    """Several prompts are refused, not written without it."""
    with pytest.raises(ConfigurationError, match="speculate is 4 for 2 prompts"):
        engine.generate(["a", "b"], speculate=4)


@given(tokens=st.lists(st.integers(0, 3), max_size=40), most=st.integers(1, 5))
def test_what_is_proposed_stood_behind_the_same_tokens(tokens: list[int], most: int) -> None:
    """Each proposal follows an earlier place of the last two or three tokens, the last such."""
    lookup = Lookup(most)
    proposals = 0
    for end in range(1, len(tokens) + 1):
        found = lookup.propose(tokens[:end], 9)
        places = [
            at
            for size in (2, 3)
            for at in range(size, end)
            if tokens[at - size : at] == tokens[end - size : end]
        ]
        if found:
            place = places[-1]
            assert found == tokens[place : min(place + len(found), end)]
        assert len(found) <= most
        proposals += bool(found)
    # Something is proposed at the first place where anything can be.
    repeats = any(tokens[at - 2 : at] in _pairs(tokens[: at - 1]) for at in range(3, len(tokens)))
    assert proposals or not repeats


def _pairs(tokens: list[int]) -> list[list[int]]:
    return [tokens[at - 2 : at] for at in range(2, len(tokens) + 1)]


def test_wrong_proposals_are_made_less_often() -> None:
    """A text that never goes on as before is soon left alone."""
    lookup = Lookup(4)
    tokens: list[int] = [1, 2]
    tried = 0
    for number in range(60):
        tried += bool(lookup.propose(tokens, 9))
        tokens += [10 + number, 1, 2]
    assert 3 <= tried <= 10


def test_a_variant_that_rounds_otherwise_is_refused(talker: tuple[Bundle, Any]) -> None:
    """Where a run over several tokens gives other logits, the text would: said, or allowed."""
    with Generator(talker[0], "cpu", "onnx-fp32-fused", strict=True) as engine:
        decoder: Any = engine._chain.backend
        verify = decoder.verify
        forward = decoder.forward
        decoder.forward = lambda *given: verify(*given)[:, -1]
        decoder.verify = lambda *given: verify(*given) + 0.01
        options: dict[str, Any] = {"max_new_tokens": 30, "speculate": 4, "regex": "(hello ){9}"}
        with pytest.raises(ConfigurationError, match=r"logits differ by 0\.01.*exact=False"):
            engine.generate("x", **options)
        assert engine.events == ()
        free = engine.generate("x", exact=False, **options)[0]
        decoder.forward, decoder.verify = forward, verify
        assert engine.generate("x", **options)[0].tokens == free.tokens
