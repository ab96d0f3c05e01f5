"""Language models that summarise: pacing, retries and redaction, the same for each backend."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from typing import Protocol
from urllib.parse import urlsplit

from memopt.errors import ConfigurationError, ConsolidationError
from memopt.memory.lifecycle.backends import BACKENDS, DEFAULT_MODELS, CallLimits, Refused, Send
from memopt.memory.privacy.redaction import redactor
from memopt.metrics import count
from memopt.moved import old_names

__getattr__ = old_names(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
# What reasoning models think aloud before they answer, by the tags of their chat templates.
_THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)\b[^>]*>.*?</\1\s*>", re.S | re.I)
_THOUGHT_TAG = re.compile(r"</?(think|thinking|thought|reasoning)\b[^>]*>", re.I)


class Summariser(Protocol):
    """What consolidation asks of a language model."""

    @property
    def name(self) -> str:
        """What it is, for events and reports."""

    def complete(self, system: str, prompt: str) -> str:
        """Return the answer, not empty.

        Raises:
            ConsolidationError: there is no answer to be had.
        """


class LanguageModel:
    """A backend with pacing, retries and redaction.

    Args:
        name: for events and reports.
        send: (system, prompt) -> answer, raising :class:`Refused`.
        limits: pacing and retries.
        redact: text -> text; nothing is sent that did not go through it.
        sleep: waits that many seconds.

    >>> model = LanguageModel("echo", lambda system, prompt: prompt,
    ...                       redact=lambda text: text.replace("secret", "***"))
    >>> model.complete("", "a secret")
    'a ***'
    """

    def __init__(
        self,
        name: str,
        send: Send,
        *,
        limits: CallLimits | None = None,
        redact: Callable[[str], str] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name = name
        self.limits = limits or CallLimits()
        self._send, self._redact, self._sleep = send, redact, sleep
        self._guard = threading.Lock()
        self._next_start = 0.0

    def complete(self, system: str, prompt: str) -> str:
        """Return the answer to ``prompt``, stripped, not empty.

        Raises:
            ConsolidationError: refused, unreachable, too slow, or an empty or unreadable answer,
                after all retries.
        """
        if self._redact:
            system, prompt = self._redact(system), self._redact(prompt)
        tries = 0
        while True:
            self._pace()
            tries += 1
            try:
                answer = _said(self._send(system, prompt))
                if not answer:
                    raise Refused("the answer is empty", passing=True)
                self._count("answered")
                return answer
            except Refused as refused:
                self._count("refused")
                wait = refused.wait if refused.wait is not None else _backoff(tries)
                last = tries > self.limits.retries or wait > self.limits.longest_wait_s
                if last or not refused.passing:
                    raise ConsolidationError(
                        f"{self.name} gave no summary after {tries} "
                        f"{'try' if tries == 1 else 'tries'}: {refused}"
                    ) from refused
                self._sleep(wait)

    def _count(self, outcome: str) -> None:
        labels = {"component": "consolidation", "model": self.name, "outcome": outcome}
        count("memopt_model_calls_total", 1, **labels)

    def _pace(self) -> None:
        if not self.limits.per_minute:
            return
        with self._guard:
            now = time.monotonic()
            start = max(now, self._next_start)
            self._next_start = start + 60 / self.limits.per_minute
        if start > now:
            self._sleep(start - now)


def _redacted(text: str) -> str:
    return redactor("auto")(text)


def language_model(
    spec: str, *, limits: CallLimits | None = None, redact: Callable[[str], str] | None = _redacted
) -> LanguageModel:
    """Open a language model by its name.

    Args:
        spec: ``ollama[:MODEL][@URL]``, ``anthropic[:MODEL][@URL]`` or ``openai[:MODEL][@URL]``,
            where openai is any endpoint that speaks its chat completions. Keys come from the
            environment: ANTHROPIC_API_KEY, OPENAI_API_KEY (a local server needs none).
            ``memopt:FOLDER`` is a bundle of text-generation, run in this process, offline.
        limits: pacing and retries.
        redact: applied to all that is sent; by default what identifies or unlocks is taken out,
            None sends texts as they are. A bundle's texts stay here, and are read as they are.

    Raises:
        ConfigurationError: an unknown backend, a URL that is none, or no bundle.
        BundleError: ``memopt:FOLDER`` is none.
        MissingExtra: the backend's package is not installed.

    >>> language_model("openai:qwen3@http://localhost:8000/v1").name
    'openai:qwen3'
    """
    backend, _, url = spec.partition("@")
    kind, _, model = backend.partition(":")
    if kind not in BACKENDS:
        raise ConfigurationError(
            f"unknown language model {kind!r}", fix=f"use one of {', '.join(BACKENDS)}"
        )
    if (
        kind != "memopt"
        and url
        and (urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc)
    ):
        raise ConfigurationError(f"{url!r} is no URL", fix="give http://HOST:PORT or https://HOST")
    limits = limits or CallLimits()
    if kind == "memopt":
        # A folder may have any sign in its name; nothing is sent to anybody.
        model, url, redact = spec.partition(":")[2], "", None
    model = model or DEFAULT_MODELS.get(kind, "")
    send = BACKENDS[kind](model, url or None, limits)
    return LanguageModel(f"{kind}:{model}", send, limits=limits, redact=redact)


def _said(answer: str) -> str:
    """Return an answer without what a model thought aloud before it.

    Raises:
        Refused: a thought has no end or no beginning, so that nobody knows where the answer is.

    >>> _said("<think>Two doors?</think> The door is red.")
    'The door is red.'
    """
    said = _THOUGHT.sub("", answer)
    if _THOUGHT_TAG.search(said):
        raise Refused("the answer is a thought without an end", passing=False)
    return said.strip()


def _backoff(tries: int) -> float:
    """Exponential with full jitter, so that several workers do not come back together."""
    return float(random.uniform(0.5, 1) * min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (tries - 1)))
