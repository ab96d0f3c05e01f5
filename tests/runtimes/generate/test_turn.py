"""One engine, several texts at once: each waits for its turn, none for ever."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from memopt import Generator
from memopt.bundle import Bundle
from memopt.errors import ConfigurationError

Talker = tuple[Bundle, Any]


@pytest.fixture(scope="module")
def engine(talker: Talker) -> Any:
    with Generator(talker[0], "cpu", "onnx-fp32-fused") as opened:
        yield opened


def test_a_text_beside_an_open_stream_of_this_thread_is_refused(engine: Generator) -> None:
    """It would wait for ever; the stream goes on, and behind it all is well."""
    whole = engine.generate("hello", max_new_tokens=12)[0]
    pieces = engine.stream("hello", max_new_tokens=12)
    begun = next(pieces)
    for other in (engine.stream("a"), iter(lambda: engine.generate("a"), None)):
        with pytest.raises(ConfigurationError, match="not at its end"):
            next(other)
    assert begun + "".join(pieces) == whole.text
    assert engine.generate("hello", max_new_tokens=12)[0].tokens == whole.tokens


def test_another_thread_waits_until_the_stream_ends_or_it_is_cancelled(engine: Generator) -> None:
    """A text of another thread comes behind; one that is cancelled while it waits says so."""
    pieces = engine.stream("hello", max_new_tokens=12)
    next(pieces)
    cancel, found = threading.Event(), {}

    def write(name: str, event: threading.Event | None) -> None:
        found[name] = engine.generate("a", max_new_tokens=4, cancel=event)[0]

    waits = threading.Thread(target=write, args=("waits", None))
    stops = threading.Thread(target=write, args=("stops", cancel))
    for thread in (waits, stops):
        thread.start()
    cancel.set()
    stops.join(30)
    assert (found["stops"].finish, found["stops"].tokens) == ("cancelled", ())
    assert "waits" not in found
    list(pieces)
    waits.join(30)
    assert len(found["waits"].tokens) == 4


def test_more_async_streams_than_the_loop_has_threads(engine: Generator) -> None:
    """Those that wait hold up none that the text of now needs."""
    whole = engine.generate("a", max_new_tokens=3)[0].text

    async def one() -> str:
        return "".join([piece async for piece in engine.astream("a", max_new_tokens=3)])

    async def all_of_them() -> list[str]:
        return await asyncio.wait_for(asyncio.gather(*(one() for _ in range(40))), 60)

    assert asyncio.run(all_of_them()) == [whole] * 40


def test_an_async_stream_that_is_cancelled_leaves_the_engine_free(
    engine: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a step, while it waits, or closed early: no error but the cancelling."""

    decoder: Any = engine._chain.backend
    forward = decoder.forward

    def slow(*arguments: Any) -> Any:
        time.sleep(0.1)
        return forward(*arguments)

    monkeypatch.setattr(decoder, "forward", slow)

    async def cancelled() -> None:
        async def long() -> None:
            async for _ in engine.astream("hello", max_new_tokens=20):
                pass

        tasks = [asyncio.create_task(long()) for _ in range(3)]
        await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(error) for error in ended] == [asyncio.CancelledError] * 3
        pieces: Any = engine.astream("hello", max_new_tokens=20)
        await anext(pieces)
        with pytest.raises(ConfigurationError, match="not at its end"):
            engine.generate("a")
        await pieces.aclose()
        assert len(engine.generate("a", max_new_tokens=4)[0].tokens) == 4

    asyncio.run(cancelled())
