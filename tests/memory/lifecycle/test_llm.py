"""Language models: one protocol over three real wire formats, and what goes wrong with each."""

from __future__ import annotations

import json
import socket

import pytest

from memopt.errors import ConfigurationError, ConsolidationError
from memopt.memory.lifecycle.backends import CallLimits, Refused, _whole
from memopt.memory.lifecycle.llm import LanguageModel, language_model
from tests.memory.llm_server import Served, serve

KINDS = ("ollama", "anthropic", "openai")
QUICK = CallLimits(timeout_s=0.4, retries=1, per_minute=0, longest_wait_s=5)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "not-a-key")
    pytest.importorskip(request.param if request.param != "openai" else "json")
    return str(request.param)


def client(kind: str, server: Served, waits: list[float], **limits: float) -> LanguageModel:
    from dataclasses import replace

    opened = language_model(
        f"{kind}:m@{server.url(kind)}",
        limits=replace(QUICK, **limits),  # type: ignore[arg-type]
        redact=lambda text: text.replace("secret", "***"),
    )
    opened._sleep = waits.append
    return opened


def test_the_answer_comes_back_and_only_redacted_text_leaves(kind: str) -> None:
    """System and prompt go through redaction; the model and the token limit are asked for."""
    with serve("ok") as server:
        assert client(kind, server, []).complete("be secret", "a secret") == "The door is red."
    sent = json.dumps(server.requests[0])
    assert "secret" not in sent
    assert sent.count("***") == 2
    assert server.requests[0]["model"] == "m"
    assert "512" in sent


def test_a_server_that_asks_to_wait_is_waited_for(kind: str) -> None:
    """429 with retry-after: exactly that long, then again."""
    waits: list[float] = []
    with serve("429:3", "ok") as server:
        assert client(kind, server, waits).complete("s", "p") == "The door is red."
    assert waits == [3.0]


def test_a_wait_beyond_patience_is_given_up(kind: str) -> None:
    """A server that asks for an hour is not asked again now."""
    with serve("429:3600") as server:
        with pytest.raises(ConsolidationError, match="1 try: HTTP 429"):
            client(kind, server, []).complete("s", "p")
        assert len(server.requests) == 1


@pytest.mark.parametrize("step", ["500", "empty", "garbage", "shape", "timeout"])
def test_what_may_pass_is_tried_again_and_then_named(kind: str, step: str) -> None:
    """Two requests, never the official package's own retries on top; then one clear error."""
    words = {"500": "HTTP 500", "empty": "empty", "timeout": "within 0.4 s"}
    with serve(step) as server:
        with pytest.raises(ConsolidationError, match=f"after 2 tries: .*{words.get(step, '')}"):
            client(kind, server, []).complete("s", "p")
        assert len(server.requests) == 2
    with serve(step, "ok") as server:
        assert client(kind, server, []).complete("s", "p") == "The door is red."


def test_a_refusal_is_final(kind: str) -> None:
    """A wrong key is not tried twice."""
    with serve("401") as server:
        with pytest.raises(ConsolidationError, match="1 try: HTTP 401"):
            client(kind, server, []).complete("s", "p")
        assert len(server.requests) == 1


@pytest.mark.parametrize("status", ["301", "302", "303", "307", "308"])
def test_a_redirect_takes_neither_texts_nor_keys_elsewhere(
    kind: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever answers with another address gets no second request, and that address none at all."""
    for name in ("OPENAI_API_KEY", "OLLAMA_API_KEY"):
        monkeypatch.setenv(name, "not-a-key")
    with serve("ok") as other, serve(f"{status}:{other.url(kind)}/chat/completions") as server:
        with pytest.raises(ConsolidationError, match=f"1 try: HTTP {status}.*not followed"):
            client(kind, server, []).complete("s", "p")
        assert (len(server.requests), other.requests, other.headers) == (1, [], [])


def test_an_answer_that_was_cut_off_is_none(kind: str) -> None:
    """The server says that the token limit ended it; asking again would end the same way."""
    whole = pytest.raises(ConsolidationError, match="1 try: the answer is not whole")
    with serve("cut") as server, whole:
        client(kind, server, []).complete("s", "p")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<think>Red? Blue?</think>\n\nThe door is red.", "The door is red."),
        ("<reasoning a='b'>Red?</reasoning>The door is red.", "The door is red."),
        ("<think>The door is red. Is it?", None),
        ("Is it? </think> The door is red.", None),
        ("<think>The door is red.</think>", None),
    ],
)
def test_what_a_model_thinks_aloud_is_no_answer(kind: str, text: str, said: str | None) -> None:
    """Only what comes after a whole thought is taken; a thought without an end is refused."""
    with serve("ok", text=text) as server:
        if said is not None:
            assert client(kind, server, []).complete("s", "p") == said
            return
        with pytest.raises(ConsolidationError, match=r"thought without an end|answer is empty"):
            client(kind, server, []).complete("s", "p")


@pytest.mark.parametrize(
    ("reason", "content", "said"),
    [
        (
            "stop",
            [{"type": "text", "text": "The "}, {"type": "text", "text": "door."}],
            "The door.",
        ),
        ("stop", [{"type": "text", "text": "A."}, {"type": "image_url", "image_url": {}}], None),
        ("stop", ["The door."], None),
        ("stop", {"text": "The door."}, None),
        ("stop", 5, None),
        ("tool_calls", "The door.", None),
        ("content_filter", "The door.", None),
        ({"length": 1}, "The door.", None),
        (None, "The door.", "The door."),
    ],
)
def test_an_odd_answer_is_named(reason: object, content: object, said: str | None) -> None:
    """Parts of text are joined; anything else than whole text is refused, never a traceback."""
    if said is not None:
        assert _whole(reason, content) == said
        return
    with pytest.raises(Refused):
        _whole(reason, content)


def test_nobody_listens(kind: str) -> None:
    """A refused connection is an error of ours, after all tries."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    opened = language_model(f"{kind}:m@http://127.0.0.1:{port}", limits=QUICK)
    opened._sleep = lambda _: None
    with pytest.raises(ConsolidationError, match="after 2 tries"):
        opened.complete("s", "p")


def test_requests_are_paced() -> None:
    """At 60 a minute the third one starts two seconds after the first."""
    waits: list[float] = []
    model = LanguageModel(
        "m", lambda *_: "ok", limits=CallLimits(per_minute=60), sleep=waits.append
    )
    for _ in range(3):
        model.complete("", "")
    assert waits == pytest.approx([1, 2], abs=0.2)


@pytest.mark.parametrize("spec", ["llama", "openai:m@localhost:80", "ollama@ftp://x"])
def test_an_unknown_model_or_address_is_refused(spec: str) -> None:
    """Before anything is sent."""
    with pytest.raises(ConfigurationError):
        language_model(spec)
