"""What goes wrong while a text is written: memory, Ctrl-C, broken characters, strange templates."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt import Generator
from memopt.bundle import Bundle
from memopt.errors import BundleError, DeviceError
from memopt.runtimes.generate.chat import prompt_of
from tests.runtimes.generate.kit import greedy

Talker = tuple[Bundle, Any]


@pytest.fixture(scope="module")
def engine(talker: Talker) -> Any:
    with Generator(talker[0], "cpu", "onnx-fp32-fused") as opened:
        yield opened


@settings(max_examples=25)
@given(seed=st.integers(0, 999), stop=st.sampled_from(["", "é", "x", "�"]))
def test_a_stream_of_random_bytes_is_the_text_in_whole_characters(
    engine: Generator, seed: int, stop: str
) -> None:
    """Bytes that are no text, and characters of several tokens: what came once is never changed."""
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 3.0, "seed": seed}
    if stop:
        options["stop"] = stop
    whole = engine.generate("a", **options)[0]
    pieces = list(engine.stream("a", **options))
    assert all(pieces)
    assert "".join(pieces) == whole.text
    assert engine._tokenizer.decode(list(whole.tokens)).startswith(whole.text)
    assert not stop or stop not in whole.text


def test_out_of_memory_is_one_line_or_the_next_provider(talker: Talker) -> None:
    """A cache that does not fit is a failure of its provider; the text is whole on the next."""
    bundle, model = talker

    def full(*_: object) -> None:
        raise MemoryError("Unable to allocate 9 TiB")

    with Generator(bundle, "cpu", "onnx-fp32-fused", strict=True) as alone:
        backend: Any = alone._chain.backend
        backend.begin = full
        with pytest.raises(DeviceError, match="9 TiB") as caught:
            alone.generate("a", max_new_tokens=3)
        assert "\n" not in str(caught.value)
    with Generator(bundle, "cpu", "onnx-fp32-fused") as several:
        backend = several._chain.backend
        backend._grow = backend.begin = full
        found = several.generate("a", max_new_tokens=9)[0]
        assert list(found.tokens) == greedy(model, [*several._tokenizer.encode("a").ids], 9)
        assert "9 TiB" in several.events[0].reason


def test_no_memory_is_taken_for_an_answer_that_may_never_come(engine: Generator) -> None:
    """A billion tokens are allowed, not reserved."""
    decoder: Any = engine._chain.backend
    pieces = engine.stream("never seen before", max_new_tokens=10**9)
    next(pieces)
    assert decoder._capacity < 2000
    pieces.close()


def test_an_interrupt_leaves_the_engine_whole(engine: Generator) -> None:
    """Ctrl-C within a run passes through; no lock is held, the next text is right."""
    wanted = engine.generate("hello", max_new_tokens=20)[0]
    decoder: Any = engine._chain.backend
    forward, calls = decoder.forward, [0]

    def interrupted(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return forward(*arguments)

    decoder.forward = interrupted
    written: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        written.extend(engine.stream("hello", max_new_tokens=20))
    decoder.forward = forward
    assert wanted.text.startswith("".join(written))
    assert not engine._writing.locked()
    assert engine.events == ()
    assert engine.generate("hello", max_new_tokens=20)[0].tokens == wanted.tokens


def test_ctrl_c_in_the_command_is_a_line(talker: Talker) -> None:
    """`memopt generate` that is interrupted leaves with 130 and one line, no traceback."""
    root = str(Path(__file__).parents[3])
    command = [sys.executable, "-m", "memopt", "generate", str(talker[0].path), "a"]
    command += ["--device", "cpu", "--context", "slide", "--max-tokens", "1000000", "--regex"]
    process = subprocess.Popen(
        [*command, "(abc|de){50000,}"],  # it cannot end before Ctrl-C comes
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
        # A shell's job in the background has Ctrl-C ignored, and its children too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    begun = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert begun
    assert process.returncode == 130
    assert "interrupted" in told.decode()
    assert "Traceback" not in told.decode()


def test_a_text_that_is_cancelled_says_so(engine: Generator) -> None:
    """Set while it is written, the event ends it; what was written stands."""
    event = threading.Event()
    decoder: Any = engine._chain.backend
    forward, calls = decoder.forward, [0]

    def counted(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:
            event.set()
        return forward(*arguments)

    decoder.forward = counted
    try:
        found = engine.generate("hello", max_new_tokens=20, cancel=event)[0]
    finally:
        decoder.forward = forward
    assert (found.finish, len(found.tokens)) == ("cancelled", 5)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1/0 }}", "does not work"),
        ("{% for i in range(10**7) %}a{% endfor %}", "does not work"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "does not work"),
        ("{{ nothing.x }}", "does not work"),
        ("{% include '/etc/passwd' %}", "does not work"),
        ("{% import 'os' as os %}{{ os.getcwd() }}", "does not work"),
        ("{{ 'a'.__class__.__base__.__subclasses__() }}", "must not"),
        ("{{ '{0.__class__.__mro__}'.format(messages) }}", "must not"),
        ("{{ cycler.__init__.__globals__.os.getcwd() }}", "must not"),
        ("{{ strftime_now.__globals__.json.loads('1') }}", "must not"),
        ("{{ messages.append(1) }}", "must not"),
    ],
)
def test_a_template_cannot_leave_its_box(tmp_path: Path, template: str, said: str) -> None:
    """Whatever it raises or reaches for is one line."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(BundleError, match=said) as caught:
        prompt_of(tmp_path, [{"role": "user", "content": "hi"}], {})
    assert "\n" not in str(caught.value)
