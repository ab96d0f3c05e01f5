"""Generator: transformers' own text, in any batch, cut, provider and number of tries."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from memopt import Generator
from memopt.bundle import Bundle
from memopt.cli import app
from memopt.errors import ConfigurationError, DeviceError, InputError
from tests.runtimes.generate.kit import greedy

PROMPTS = ["hello there", "a", "the quick brown fox jumps over", "Zwölf Boxkämpfer: 日本"]
VARIANTS = [("cpu", "onnx-fp32"), ("cpu", "onnx-fp32-fused"), ("openvino", "openvino-fp32")]
Talker = tuple[Bundle, Any]


def ids(engine: Generator, text: str) -> list[int]:
    return list(engine._tokenizer.encode(text).ids)


@pytest.fixture(scope="module")
def engine(talker: Talker) -> Any:
    with Generator(talker[0], "cpu", "onnx-fp32-fused") as opened:
        yield opened


@pytest.mark.parametrize(("device", "variant"), VARIANTS)
def test_the_text_is_transformers_own(talker: Talker, device: str, variant: str) -> None:
    """Each row of a batch of several lengths is what its prompt alone gives in torch."""
    bundle, model = talker
    with Generator(bundle, device, variant, strict=True) as opened:
        found = opened.generate(PROMPTS, max_new_tokens=24)
        for prompt, generation in zip(PROMPTS, found, strict=True):
            assert list(generation.tokens) == greedy(model, ids(opened, prompt), 24)
            assert generation.finish == ("length" if len(generation.tokens) == 24 else "stop")
            assert generation.prompt_tokens == len(ids(opened, prompt))
            assert max(generation.logprobs) < 0


@settings(max_examples=15)
@given(
    prompts=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=4),
    cut=st.integers(1, 9),
)
def test_batch_and_cache_change_nothing(engine: Generator, prompts: list[str], cut: int) -> None:
    """Any batch gives each prompt's own text; so does a prompt whose beginning was read before."""
    together = engine.generate(prompts, max_new_tokens=8)
    for prompt, beside in zip(prompts, together, strict=True):
        alone = engine.generate(prompt, max_new_tokens=8)[0]
        assert alone.tokens == beside.tokens
        engine.generate(prompt[:cut], max_new_tokens=2)
        again = engine.generate(prompt, max_new_tokens=8)[0]
        assert again.tokens == alone.tokens


def test_a_known_beginning_is_not_read_again(engine: Generator) -> None:
    """The cache of the last text is kept for the next that begins like it."""
    first = engine.generate("hello there", max_new_tokens=10)[0]
    second = engine.generate("hello there, you", max_new_tokens=4)[0]
    assert (first.reused_tokens, second.reused_tokens) == (0, 11)
    assert engine.generate("quite another", max_new_tokens=4)[0].reused_tokens == 0


def test_a_stream_is_the_text_in_pieces(engine: Generator) -> None:
    """Sync and async streams give the text of generate; closing one early leaves all well."""
    whole = engine.generate("a", max_new_tokens=30)[0]
    assert "".join(engine.stream("a", max_new_tokens=30)) == whole.text

    async def collected() -> str:
        return "".join([piece async for piece in engine.astream("a", max_new_tokens=30)])

    assert asyncio.run(collected()) == whole.text
    pieces = engine.stream("a", max_new_tokens=30)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert engine.generate("a", max_new_tokens=30)[0].tokens == whole.tokens


def test_a_seed_repeats_and_beside_others_too(engine: Generator) -> None:
    """Draws are of a row's own seed; without one they differ."""
    how: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.5}
    first = engine.generate(["abc", "xyz"], seed=3, **how)
    assert [g.tokens for g in engine.generate(["abc", "xyz"], seed=3, **how)] == [
        g.tokens for g in first
    ]
    assert engine.generate("abc", seed=3, **how)[0].tokens == first[0].tokens
    assert len({engine.generate("abc", **how)[0].tokens for _ in range(4)}) > 1


def test_a_stop_string_across_tokens_ends_the_text(engine: Generator) -> None:
    """The text ends before it, however it is cut into tokens, and nothing of it was streamed."""
    whole = engine.generate("hello there", max_new_tokens=30)[0].text
    stop = whole[8:11]
    found = engine.generate("hello there", max_new_tokens=30, stop=stop)[0]
    assert found.text == whole[: whole.index(stop)]
    assert found.finish == "stop"
    pieces = list(engine.stream("hello there", max_new_tokens=30, stop=stop))
    assert "".join(pieces) == found.text


def test_a_text_is_cancelled(engine: Generator) -> None:
    """A set event ends it at the next token."""
    event = threading.Event()
    event.set()
    found = engine.generate("a", max_new_tokens=30, cancel=event)[0]
    assert (found.finish, len(found.tokens)) == ("cancelled", 1)


@pytest.mark.parametrize("at", [1, 20])
def test_the_next_provider_goes_on_at_the_same_token(talker: Talker, at: int) -> None:
    """A backend that dies in the middle of a text loses and doubles nothing, and it is told."""
    bundle, model = talker
    with Generator(bundle, "cpu", "onnx-fp32-fused") as opened:
        wanted = greedy(model, ids(opened, "hello there"), 32)
        decoder: Any = opened._chain.backend
        forward, calls = decoder.forward, [0]

        def dying(*arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] == at:
                raise RuntimeError("the device is gone")
            return forward(*arguments)

        decoder.forward = dying
        found = opened.generate("hello there", max_new_tokens=32)[0]
        assert list(found.tokens) == wanted
        (event,) = opened.events
        assert (event.from_, event.kind) == ("cpu", "run")
        assert "the device is gone" in event.reason


def test_logits_that_are_no_numbers_are_a_failure(talker: Talker) -> None:
    """NaN is never taken for a token: the next provider takes over, or it is an error."""
    with Generator(talker[0], "cpu", "onnx-fp32-fused", strict=True) as opened:
        decoder: Any = opened._chain.backend
        decoder.forward = lambda *_: np.full((1, 257), np.nan, np.float32)
        with pytest.raises(DeviceError, match="not numbers"):
            opened.generate("a")


def test_bad_input_is_named(engine: Generator) -> None:
    """An empty prompt, one past the context, numbers out of range."""
    with pytest.raises(InputError, match="prompt 1 is empty"):
        engine.generate(["a", ""])
    with pytest.raises(InputError, match="prompt 0 has 300 tokens, and there is room for 128"):
        engine.generate("a" * 300)
    with pytest.raises(ConfigurationError, match="max_new_tokens is 0"):
        engine.generate("a", max_new_tokens=0)
    with pytest.raises(ConfigurationError, match=r"top_p is 1\.5"):
        engine.generate("a", top_p=1.5)
    with pytest.raises(ConfigurationError, match="max_context is 4000; give 2 to 128"):
        engine.generate("a", max_context=4000)
    with pytest.raises(ConfigurationError, match="stop string is empty"):
        engine.generate("a", stop="")
    full = engine.generate("a" * 120, max_new_tokens=64)[0]
    assert (full.finish, len(full.tokens)) == ("length", 8)


def test_a_chat_follows_the_template(engine: Generator) -> None:
    """The prompt is the template's; a reply goes into the next one."""
    messages = [{"role": "user", "content": "hi"}]
    assert engine.chat_prompt(messages) == "<user>hi<assistant>"
    reply = engine.chat(messages, max_new_tokens=5)
    assert reply.tokens == engine.generate("<user>hi<assistant>", max_new_tokens=5)[0].tokens
    with pytest.raises(InputError, match="message 0 has role 'robot'"):
        engine.chat([{"role": "robot", "content": "x"}])


def test_the_commands(talker: Talker, tmp_path: Path) -> None:
    """Generate and chat print text, or JSON with tokens and log-probabilities."""
    bundle, _ = talker
    run = CliRunner()
    chosen = ["--variant", "onnx-fp32-fused", "--device", "cpu", "--max-tokens", "6"]
    plain = run.invoke(app, ["generate", str(bundle.path), "hello", *chosen])
    assert plain.exit_code == 0, plain.exception
    told = run.invoke(app, ["generate", str(bundle.path), "hello", "a", *chosen, "--json"])
    first, second = map(json.loads, told.stdout.splitlines())
    assert len(first["tokens"]) == len(second["logprobs"]) == 6
    talk = ["chat", str(bundle.path), "--device", "cpu", "--max-tokens", "4", "--json"]
    spoken = run.invoke(app, talk, input="hi\nand you?\n")
    turns = [json.loads(line) for line in spoken.stdout.splitlines()]
    assert [(turn["input"], turn["finish"]) for turn in turns] == [
        ("hi", "length"),
        ("and you?", "length"),
    ]
