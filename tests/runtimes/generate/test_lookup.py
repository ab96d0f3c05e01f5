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
    for end in range(1, len(tokens) + 1):
        found = lookup.propose(tokens[:end], 9)
        places = [
            at
            for size in (2, 3)
            for at in range(size, end)
            if tokens[at - size : at] == tokens[end - size : end]
        ]
        assert bool(found) == bool(places)
        if found:
            place = places[-1]
            assert found == tokens[place : min(place + len(found), end)]
        assert len(found) <= most
