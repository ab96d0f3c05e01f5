"""Who language models are asked at: ollama, anthropic, any OpenAI-compatible one, a bundle here.

Each is one function that sends one request, or runs a bundle. The official packages retry by
themselves as well, which is switched off, so that a limit of three tries means three requests.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from memopt.bundle import open_bundle
from memopt.errors import ConfigurationError, MemoptError, brief
from memopt.extras import require

# Statuses that may pass by themselves: timeout, conflict, too early, too many, any server error.
_PASSING = frozenset({408, 409, 425, 429})
# The size of an answer that is read at most: a summary is kilobytes.
_MOST_BYTES = 4 << 20
# How servers say that an answer is whole. Whatever else they say (length, max_tokens, tool_calls,
# content_filter, refusal), it is not; some older ones say nothing.
_WHOLE = frozenset({None, "", "stop", "eos", "eos_token", "end_turn", "stop_sequence"})
DEFAULT_MODELS = {"ollama": "llama3.2", "anthropic": "claude-haiku-4-5", "openai": "gpt-5-mini"}

# Small models keep to a list of facts better than to "one paragraph"; as JSON it ends by itself,
# and nothing is before or behind it. Bounds, as small models also repeat themselves.
_FACTS = {
    "type": "object",
    "properties": {
        "facts": {
            "type": "array",
            "items": {"type": "string", "minLength": 1, "maxLength": 200},
            "minItems": 1,
            "maxItems": 12,
        }
    },
    "required": ["facts"],
    "additionalProperties": False,
}
_AS_FACTS = ' Write the paragraph as JSON, a sentence an entry: {"facts": ["...", "..."]}.'

# (system, prompt) -> answer, raising Refused.
Send = Callable[[str, str], str]


class Refused(Exception):
    """One request failed: whether to try again, and after how many seconds at least."""

    def __init__(self, problem: str, *, passing: bool, wait: float | None = None) -> None:
        super().__init__(problem)
        self.passing, self.wait = passing, wait


@dataclass(frozen=True, slots=True, kw_only=True)
class CallLimits:
    """How a language model may be used.

    Attributes:
        max_tokens: of an answer.
        timeout_s: seconds the server may stay silent within one request.
        retries: further tries after the first one.
        per_minute: requests started in any 60 s, on average; 0 for no limit.
        longest_wait_s: a server that asks to wait longer (retry-after) is given up on.

    >>> CallLimits(retries=-1)
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


def _ollama(model: str, url: str | None, limits: CallLimits) -> Send:
    ollama = require("ollama", extra="llm", why="summarise with ollama")
    import httpx

    headers: dict[str, str | None] = {}

    def remember(response: httpx.Response) -> None:
        # ollama's own error keeps the status and drops the headers.
        headers["retry-after"] = response.headers.get("retry-after")

    client = ollama.Client(
        host=url,
        timeout=limits.timeout_s,
        event_hooks={"response": [remember]},
        follow_redirects=False,
    )
    options = {"num_predict": limits.max_tokens, "temperature": 0, "seed": 0}

    def send(system: str, prompt: str) -> str:
        headers.clear()
        try:
            answer = client.chat(model=model, messages=_messages(system, prompt), options=options)
            return _whole(answer.done_reason, answer.message.content)
        except ollama.ResponseError as error:
            raise _status(error.status_code, error.error, headers.get("retry-after")) from error
        except httpx.TimeoutException as error:
            raise _silent(limits) from error
        except (httpx.HTTPError, ConnectionError) as error:
            raise Refused(brief(error), passing=True) from error
        except (ValueError, AttributeError) as error:  # no JSON, or JSON of another shape
            raise _unreadable(brief(error)) from error

    return send


def _anthropic(model: str, url: str | None, limits: CallLimits) -> Send:
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
            f"anthropic cannot be used: {brief(error)}", fix="set ANTHROPIC_API_KEY"
        ) from error

    def send(system: str, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        try:
            # No temperature: the newer models refuse sampling parameters.
            answer = client.messages.create(
                model=model, max_tokens=limits.max_tokens, system=system, messages=messages
            )
            if answer.stop_reason == "refusal":
                raise Refused("the model declined", passing=False)
            parts = [part.text for part in answer.content if part.type == "text"]
            return _whole(answer.stop_reason, "".join(parts))
        except anthropic.APITimeoutError as error:
            raise _silent(limits) from error
        except anthropic.APIStatusError as error:
            wait = error.response.headers.get("retry-after")
            raise _status(error.status_code, error.message, wait) from error
        except anthropic.APIConnectionError as error:
            raise Refused(brief(error.__cause__ or error), passing=True) from error
        except (anthropic.APIResponseValidationError, ValueError) as error:
            raise _unreadable(brief(error)) from error
        except (AttributeError, TypeError) as error:
            # The client hands on whatever the server sent, a string or an object without content.
            raise _unreadable("not a message") from error
        except anthropic.AnthropicError as error:  # no key, found out at the first request
            raise Refused(brief(error), passing=False) from error

    return send


def _openai(model: str, url: str | None, limits: CallLimits) -> Send:
    base = (url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1").rstrip("/")
    opener = urllib.request.build_opener(_NoRedirect)
    # Local servers know only max_tokens, OpenAI's newer models only the other.
    options = {("max_tokens" if url else "max_completion_tokens"): limits.max_tokens}

    def send(system: str, prompt: str) -> str:
        body = {"model": model, "messages": _messages(system, prompt), **options}
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
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _silent(limits) from error
            raise Refused(brief(error.reason), passing=True) from error
        except TimeoutError as error:
            raise _silent(limits) from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise _unreadable(brief(error)) from error
        except (OSError, http.client.HTTPException) as error:
            raise Refused(brief(error), passing=True) from error

    return send


def _memopt(model: str, url: str | None, limits: CallLimits) -> Send:
    if not model or url:
        raise ConfigurationError(
            f"memopt at {url!r} is no bundle" if url else "memopt without a bundle is asked",
            fix="write memopt:FOLDER, or set consolidation.llm_model to the bundle's folder",
        )
    require("llguidance", extra="structured", why="summarise with a bundle")
    require("jinja2", extra="chat", why="summarise with a bundle")
    from memopt.runtimes.configured import open_configured
    from memopt.runtimes.engines.generator import Generator

    opened = open_bundle(model)
    if opened.task.name not in Generator.tasks:
        raise ConfigurationError(
            f"{model} has task {opened.task.name}", fix="give a bundle of text-generation"
        )
    engines: list[Generator] = []  # opened when it is first needed, and kept

    def send(system: str, prompt: str) -> str:
        messages = _messages(system + _AS_FACTS, prompt)
        try:
            if not engines:
                engines.append(open_configured(Generator, opened))
            answer = engines[0].chat(messages, schema=_FACTS, max_new_tokens=limits.max_tokens)
        except MemoptError as error:
            raise Refused(error.problem, passing=False) from error
        if answer.finish != "stop":
            raise Refused(f"no whole answer within {limits.max_tokens} tokens", passing=False)
        facts = [fact.strip() for fact in json.loads(answer.text)["facts"]]
        # Each once, and each a sentence.
        return " ".join(f"{fact.rstrip('.')}." for fact in dict.fromkeys(facts) if fact)

    return send


BACKENDS: dict[str, Callable[[str, str | None, CallLimits], Send]] = {
    "ollama": _ollama,
    "anthropic": _anthropic,
    "openai": _openai,
    "memopt": _memopt,
}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Whoever answers with a redirect would be sent the texts and the key at another address."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none: the answer is then an HTTPError of its status."""
        return


def _messages(system: str, prompt: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


def _silent(limits: CallLimits) -> Refused:
    return Refused(f"no answer within {limits.timeout_s:g} s", passing=True)


def _unreadable(why: str) -> Refused:
    return Refused(f"unreadable answer: {why}", passing=True)


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
    memopt.memory.lifecycle.backends.Refused: the answer is not whole: the server says 'length'
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


def _status(status: int, text: object, retry_after: str | None) -> Refused:
    if 300 <= status < 400:
        return Refused(
            f"HTTP {status}: redirects are not followed, give the address itself", passing=False
        )
    passing = status in _PASSING or status >= 500
    return Refused(f"HTTP {status}: {brief(text)}", passing=passing, wait=_seconds(retry_after))


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
