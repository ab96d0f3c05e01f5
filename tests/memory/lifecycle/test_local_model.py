"""Summaries by a bundle in this process: no server, nothing leaves it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from memopt.bundle import Bundle, open_bundle
from memopt.config import load_config
from memopt.errors import BundleError, ConfigurationError, ConsolidationError
from memopt.exporters.base import export
from memopt.memory.lifecycle.backends import CallLimits
from memopt.memory.lifecycle.from_settings import summariser
from memopt.memory.lifecycle.llm import language_model
from memopt.memory.lifecycle.summary import SYSTEM, prompt
from memopt.weights.convert import convert
from tests.runtimes.generate.kit import write

ASKED = prompt(["Ann has key 7.", "The door is red."], "home")


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A random language model with room for a prompt of memories, in a folder with odd signs."""
    home = tmp_path_factory.mktemp("local@8:1")
    write(home / "source", max_position_embeddings=8192)
    bundle = convert(home / "source", home / "bundle")
    export(bundle)
    return open_bundle(bundle.path)


def test_even_a_random_model_answers_in_sentences(
    talker: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form makes JSON of whatever it writes; without network, and read unredacted."""

    def unreachable(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    limits = CallLimits(max_tokens=6000, per_minute=0)
    model = language_model(f"memopt:{talker.path}", limits=limits)
    assert model.name == f"memopt:{talker.path}"
    answer = model.complete(SYSTEM, ASKED)
    assert answer.endswith(".")
    assert "{" not in answer[:1]
    assert model.complete(SYSTEM, ASKED) == answer


def test_a_cut_answer_is_no_answer(talker: Bundle) -> None:
    """What did not end within its tokens, or does not fit the context, is refused, not kept."""
    model = language_model(f"memopt:{talker.path}", limits=CallLimits(max_tokens=5))
    with pytest.raises(ConsolidationError, match="no whole answer within 5 tokens"):
        model.complete(SYSTEM, ASKED)
    with pytest.raises(ConsolidationError, match=r"after 1 try: prompt 0 has \d+ tokens"):
        model.complete(SYSTEM, "x" * 9000)


def test_the_settings_name_the_bundle(talker: Bundle) -> None:
    """`llm_provider: memopt` with its folder; no text goes anywhere, and none is said to."""
    given = {"llm_provider": "memopt", "llm_model": str(talker.path)}
    settings = load_config(None, {"consolidation": given}).consolidation
    assert settings.language_model() == f"memopt:{talker.path}"
    assert settings.idle()["llm_endpoint"] == "a bundle runs here"
    said: list[str] = []
    model = summariser(settings, None, redact=None, where={}, say=said.append)
    assert model is not None
    assert said == []


def test_what_is_no_language_model_is_named(minilm: Bundle, tmp_path: Path) -> None:
    """No folder, an empty one, or a bundle of another task: before a memory is touched."""
    with pytest.raises(ConfigurationError, match="memopt without a bundle"):
        language_model("memopt")
    with pytest.raises(BundleError, match="no bundle at"):
        language_model(f"memopt:{tmp_path}")
    with pytest.raises(ConfigurationError, match="has task embedding"):
        language_model(f"memopt:{minilm.path}")
    settings = load_config(None, {"consolidation": {"llm_provider": "memopt"}}).consolidation
    with pytest.raises(ConfigurationError, match=r"consolidation\.llm_model"):
        summariser(settings, None, redact=None, where={})
