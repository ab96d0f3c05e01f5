"""A context that is full: refused, ended or sliding, with right positions."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt import Generator
from memopt.bundle import Bundle
from memopt.errors import ConfigurationError, InputError
from memopt.runtimes.generate.request import Request

VARIANTS = [("cpu", "onnx-fp32"), ("cpu", "onnx-fp32-fused"), ("openvino", "openvino-fp32")]


@pytest.fixture(scope="module")
def engine(talker: tuple[Bundle, Any]) -> Any:
    with Generator(talker[0], "cpu", "onnx-fp32-fused") as opened:
        yield opened


@pytest.mark.parametrize(("device", "variant"), VARIANTS)
def test_a_long_prompt_is_its_beginning_and_its_end(
    talker: tuple[Bundle, Any], device: str, variant: str
) -> None:
    """Sliding gives what the kept window gives as a prompt of its own."""
    prompt = "".join(chr(97 + n * 7 % 26) for n in range(200))
    with Generator(talker[0], device, variant, strict=True) as engine:
        found = engine.generate(prompt, max_context=64, context="slide", keep=5, max_new_tokens=9)
        kept = Request(max_new_tokens=9, keep=5).window(64, 0)
        assert kept == 55
        window = prompt[:5] + prompt[5 - kept :]
        alone = engine.generate(window, max_new_tokens=9)[0]
        assert found[0].tokens == alone.tokens
        assert (found[0].prompt_tokens, found[0].dropped_tokens) == (200, 145)


@settings(max_examples=10)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    keep=st.integers(0, 8),
    most=st.integers(1, 60),
)
def test_each_slide_is_a_fresh_reading_of_what_stays(
    engine: Generator, sizes: list[int], keep: int, most: int
) -> None:
    """A text that slides several times, in any batch, is its windows read one after another."""
    limit, width = 32, (32 - keep) // 2
    prompts = [("ab1c é-"[number] * size)[:size] for number, size in enumerate(sizes)]
    found = engine.generate(
        prompts, max_context=limit, context="slide", keep=keep, max_new_tokens=most
    )
    for prompt, generation in zip(prompts, found, strict=True):
        read = list(engine._tokenizer.encode(prompt).ids)
        written: list[int] = []
        while len(written) < most:
            if len(read) >= limit:
                stay = limit - max(1, min(most - len(written), width))
                read = read[:keep] + read[len(read) - stay + keep :]
            row = _next(engine, read)
            if row is None:
                break
            read, written = [*read, row], [*written, row]
        assert list(generation.tokens) == written


def _next(engine: Generator, read: list[int]) -> int | None:
    """Return the token behind others by a reading from nothing."""
    import numpy as np

    ids = np.array([read], np.int64)
    decoder: Any = engine._chain.backend
    engine._read, engine._reader = [], None
    decoder.begin(1, len(read))
    places = np.arange(len(read), dtype=np.int64)[None]
    token = int(decoder.forward(ids, np.ones_like(ids), places)[0].argmax())
    return None if token in engine._ends else token


def test_without_sliding_the_end_is_told(engine: Generator) -> None:
    """A longer prompt is refused with what helps; an answer that gets to the end has `length`."""
    with pytest.raises(InputError, match=r"300 tokens.*room for 128.*--context slide"):
        engine.generate("a" * 300)
    full = engine.generate("a" * 120, max_new_tokens=64)[0]
    assert (full.finish, len(full.tokens), full.dropped_tokens) == ("length", 8, 0)
    on = engine.generate("a" * 120, max_new_tokens=64, context="slide")[0]
    assert on.tokens[:8] == full.tokens
    assert on.finish == ("length" if len(on.tokens) == 64 else "stop")


def test_a_chat_keeps_what_stands_before_the_first_user(engine: Generator) -> None:
    """The system's words stay while the oldest turns slide out."""
    talk = [{"role": "system", "content": "be brief"}]
    talk += [{"role": "user", "content": "x" * 90}]
    assert engine.opening(talk) == len("<system>be brief<user>")
    assert engine.opening(talk[1:]) == len("<user>")
    answer = engine.chat(talk, max_context=80, context="slide", max_new_tokens=6)
    kept = "<system>be brief<user>"
    prompt = engine.chat_prompt(talk)
    window = kept + prompt[len(kept) - 74 :]
    assert answer.tokens == engine.generate(window, max_new_tokens=6)[0].tokens


def test_wrong_numbers_are_named(engine: Generator) -> None:
    """What cannot be kept, and a context that is no choice."""
    with pytest.raises(ConfigurationError, match="keep is 40, of a context of 64; give 32"):
        engine.generate("a", keep=40, max_context=64, context="slide")
    with pytest.raises(ConfigurationError, match="context is 'roll'; give refuse or slide"):
        engine.generate("a", context="roll")
    with pytest.raises(ConfigurationError, match="keep is -1"):
        engine.generate("a", keep=-1)
