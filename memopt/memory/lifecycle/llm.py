"""Language models that summarise: ollama, anthropic, and any OpenAI-compatible endpoint.

Each backend is one function that sends one request; pacing, retries and redaction are written once,
in :class:`LanguageModel`. The official packages retry by themselves as well, which is switched
off, so that a limit of three tries means three requests.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Protocol
from urllib.parse import urlsplit

from memopt.errors import ConfigurationError, ConsolidationError
from memopt.extras import require
from memopt.memory.privacy.redaction import redactor
from memopt.metrics import count

# Statuses that may pass by themselves: timeout, conflict, too early, too many, any server error.
_PASSING = frozenset({408, 409, 425, 429})
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
# The size of an answer that is read at most: a summary is kilobytes.
_MOST_BYTES = 4 << 20
# How servers say that an answer is whole. Whatever else they say (length, max_tokens, tool_calls,
# content_filter, refusal), it is not; some older ones say nothing.
_WHOLE = frozenset({None, "", "stop", "eos", "eos_token", "end_turn", "stop_sequence"})
# What reasoning models think aloud before they answer, by the tags of their chat templates.
_THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)\b[^>]*>.*?</\1\s*>", re.S | re.I)
_THOUGHT_TAG = re.compile(r"</?(think|thinking|thought|reasoning)\b[^>]*>", re.I)
_DEFAULT_MODELS = {"ollama": "llama3.2", "anthropic": "claude-haiku-4-5", "openai": "gpt-5-mini"}


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


class Refused(Exception):
    """One request failed: whether to try again, and after how many seconds at least."""

    def __init__(self, problem: str, *, passing: bool, wait: float | None = None) -> None:
        super().__init__(problem)
        self.passing, self.wait = passing, wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How a language model may be used.

    Attributes:
        max_tokens: of an answer.
        timeout_s: seconds the server may stay silent within one request.
        retries: further tries after the first one.
        per_minute: requests started in any 60 s, on average; 0 for no limit.
        longest_wait_s: a server that asks to wait longer (retry-after) is given up on.

    >>> Limits(retries=-1)
    Traceback (most recent call last):
    ...
    memopt.errors.ConfigurationError: retries -1 is below 0
    """

    max_tokens: int = 512
    timeout_s: float = 60.0
    retries: int = 2
    per_minute: float = 60.0
    longest_wait_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} {getattr(self, name)} is not above 0")
        for name in ("retries", "per_minute", "longest_wait_s"):
            if not getattr(self, name) >= 0:
                raise ConfigurationError(f"{name} {getattr(self, name)} is below 0")


Send = Callable[[str, str, Limits], str]


class LanguageModel:
    """A backend with pacing, retries and redaction.

    Args:
        name: for events and reports.
        send: (system, prompt, limits) -> answer, raising :class:`Refused`.
        limits: pacing and retries.
        redact: text -> text; nothing is sent that did not go through it.
        sleep: waits that many seconds.

    >>> model = LanguageModel("echo", lambda system, prompt, limits: prompt,
    ...                       redact=lambda text: text.replace("secret", "***"))
    >>> model.complete("", "a secret")
    'a ***'
    """

    def __init__(
        self,
        name: str,
        send: Send,
        *,
        limits: Limits | None = None,
        redact: Callable[[str], str] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name = name
        self.limits = limits or Limits()
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
                answer = _said(self._send(system, prompt, self.limits))
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
    spec: str, *, limits: Limits | None = None, redact: Callable[[str], str] | None = _redacted
) -> LanguageModel:
    """Open a language model by its name.

    Args:
        spec: ``ollama[:MODEL][@URL]``, ``anthropic[:MODEL][@URL]`` or ``openai[:MODEL][@URL]``,
            where openai is any endpoint that speaks its chat completions. Keys come from the
            environment: ANTHROPIC_API_KEY, OPENAI_API_KEY (a local server needs none).
        limits: pacing and retries.
        redact: applied to all that is sent; by default what identifies or unlocks is taken out,
            None sends texts as they are.

    Raises:
        ConfigurationError: an unknown backend or a URL that is none.
        MissingExtra: the backend's package is not installed.

    >>> language_model("openai:qwen3@http://localhost:8000/v1").name
    'openai:qwen3'
    """
    backend, _, url = spec.partition("@")
    kind, _, model = backend.partition(":")
    if kind not in _BACKENDS:
        raise ConfigurationError(
            f"unknown language model {kind!r}", fix=f"use one of {', '.join(_BACKENDS)}"
        )
    if url and (urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc):
        raise ConfigurationError(f"{url!r} is no URL", fix="give http://HOST:PORT or https://HOST")
    limits = limits or Limits()
    model = model or _DEFAULT_MODELS[kind]
    send = _BACKENDS[kind](model, url or None, limits)
    return LanguageModel(f"{kind}:{model}", send, limits=limits, redact=redact)


def _ollama(model: str, url: str | None, limits: Limits) -> Send:
    ollama = require("ollama", extra="llm", why="summarise with ollama")
    import httpx

    seen: dict[str, str | None] = {}

    def remember(response: httpx.Response) -> None:
        # ollama's own error keeps the status and drops the headers.
        seen["retry-after"] = response.headers.get("retry-after")

    client = ollama.Client(
        host=url,
        timeout=limits.timeout_s,
        event_hooks={"response": [remember]},
        follow_redirects=False,
    )

    def send(system: str, prompt: str, limits: Limits) -> str:
        seen.clear()
        try:
            answer = client.chat(
                model=model,
                messages=[
                    {"role": "system", "content": system},
                    {"role": "user", "content": prompt},
                ],
                options={"num_predict": limits.max_tokens, "temperature": 0, "seed": 0},
            )
            return _whole(answer.done_reason, answer.message.content)
        except ollama.ResponseError as error:
            raise _status(error.status_code, error.error, seen.get("retry-after")) from error
        except httpx.TimeoutException as error:
            raise Refused(f"no answer within {limits.timeout_s:g} s", passing=True) from error
        except (httpx.HTTPError, ConnectionError) as error:
            raise Refused(_line(error), passing=True) from error
        except (ValueError, AttributeError) as error:  # no JSON, or JSON of another shape
            raise Refused(f"unreadable answer: {_line(error)}", passing=True) from error

    return send


def _anthropic(model: str, url: str | None, limits: Limits) -> Send:
    anthropic = require("anthropic", extra="llm", why="summarise with anthropic")
    try:
        client = anthropic.Anthropic(
            base_url=url,
            timeout=limits.timeout_s,
            max_retries=0,
            http_client=anthropic.DefaultHttpxClient(follow_redirects=False),
        )
    except anthropic.AnthropicError as error:
        raise ConfigurationError(
            f"anthropic cannot be used: {_line(error)}", fix="set ANTHROPIC_API_KEY"
        ) from error

    def send(system: str, prompt: str, limits: Limits) -> str:
        try:
            # No temperature: the newer models refuse sampling parameters.
            answer = client.messages.create(
                model=model,
                max_tokens=limits.max_tokens,
                system=system,
                messages=[{"role": "user", "content": prompt}],
            )
            if answer.stop_reason == "refusal":
                raise Refused("the model declined", passing=False)
            parts = [part.text for part in answer.content if part.type == "text"]
            return _whole(answer.stop_reason, "".join(parts))
        except anthropic.APITimeoutError as error:
            raise Refused(f"no answer within {limits.timeout_s:g} s", passing=True) from error
        except anthropic.APIStatusError as error:
            wait = error.response.headers.get("retry-after")
            raise _status(error.status_code, error.message, wait) from error
        except anthropic.APIConnectionError as error:
            raise Refused(_line(error.__cause__ or error), passing=True) from error
        except (anthropic.APIResponseValidationError, ValueError) as error:
            raise Refused(f"unreadable answer: {_line(error)}", passing=True) from error
        except (AttributeError, TypeError) as error:
            # The client hands on whatever the server sent, a string or an object without content.
            raise Refused("unreadable answer: not a message", passing=True) from error
        except anthropic.AnthropicError as error:  # no key, found out at the first request
            raise Refused(_line(error), passing=False) from error

    return send


def _openai(model: str, url: str | None, limits: Limits) -> Send:
    base = (url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1").rstrip("/")
    opener = urllib.request.build_opener(_NoRedirect)

    def send(system: str, prompt: str, limits: Limits) -> str:
        body = {
            "model": model,
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": prompt},
            ],
            # Local servers know only max_tokens, OpenAI's newer models only the other.
            ("max_tokens" if url else "max_completion_tokens"): limits.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{base}/chat/completions", json.dumps(body).encode(), headers
        )
        try:
            with opener.open(request, timeout=limits.timeout_s) as response:
                answer = json.loads(response.read(_MOST_BYTES))
            choice = answer["choices"][0]
            return _whole(choice.get("finish_reason"), choice["message"]["content"])
        except urllib.error.HTTPError as error:
            text = error.read(2000).decode(errors="replace")
            raise _status(error.code, text, error.headers.get("retry-after")) from error
        except TimeoutError as error:
            raise Refused(f"no answer within {limits.timeout_s:g} s", passing=True) from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise Refused(f"no answer within {limits.timeout_s:g} s", passing=True) from error
            raise Refused(_line(error.reason), passing=True) from error
        except (
            ValueError,
            KeyError,
            IndexError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise Refused(f"unreadable answer: {_line(error)}", passing=True) from error
        except (OSError, http.client.HTTPException) as error:
            raise Refused(_line(error), passing=True) from error

    return send


_BACKENDS: dict[str, Callable[[str, str | None, Limits], Send]] = {
    "ollama": _ollama,
    "anthropic": _anthropic,
    "openai": _openai,
}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Whoever answers with a redirect would be sent the texts and the key at another address."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none: the answer is then an HTTPError of its status."""
        return


def _whole(reason: object, content: object) -> str:
    """Return the text of an answer that its server calls complete.

    Content may come in parts, as newer chat completions allow; only parts of text are said.

    Raises:
        Refused: it was cut off, or is something else than text.

    >>> _whole("stop", [{"type": "text", "text": "The door "}, {"type": "text", "text": "is red."}])
    'The door is red.'
    >>> _whole("length", "The door")
    Traceback (most recent call last):
    ...
    memopt.memory.lifecycle.llm.Refused: the answer is not whole: the server says 'length'
    """
    if not (reason is None or isinstance(reason, str)) or reason not in _WHOLE:
        raise Refused(f"the answer is not whole: the server says {reason!r}", passing=False)
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        kinds = {str(part.get("type")) for part in parts} - {"text", "reasoning", "thinking"}
        if kinds or len(parts) < len(content):
            raise Refused(f"the answer holds {', '.join(kinds) or 'no text'}", passing=False)
        content = "".join(str(part.get("text")) for part in parts if part["type"] == "text")
    if not (content is None or isinstance(content, str)):
        raise Refused(f"the answer is {type(content).__name__}, not text", passing=True)
    return content or ""


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


def _status(status: int, text: object, retry_after: str | None) -> Refused:
    if 300 <= status < 400:
        return Refused(
            f"HTTP {status}: redirects are not followed, give the address itself", passing=False
        )
    passing = status in _PASSING or status >= 500
    return Refused(f"HTTP {status}: {_line(text)}", passing=passing, wait=_seconds(retry_after))


def _seconds(retry_after: str | None) -> float | None:
    """Read a retry-after header: seconds or an HTTP date (RFC 9110, 10.2.3)."""
    if not retry_after:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", retry_after.strip()):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None


def _backoff(tries: int) -> float:
    """Exponential with full jitter, so that several workers do not come back together."""
    return float(random.uniform(0.5, 1) * min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (tries - 1)))


def _line(problem: Any) -> str:
    return " ".join(str(problem).split())[:200] or type(problem).__name__
