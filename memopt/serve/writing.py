"""Routes for models that write: completions and chats, whole or as they are written."""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from memopt.runtimes.engines.writer import Generation
from memopt.serve import schemas
from memopt.serve.exchange import Reply, Service
from memopt.serve.failures import Refusal, refusal_of
from memopt.serve.hosting import Hosted
from memopt.tasks.table import Task

_END = object()


def _writes(task: Task) -> bool:
    return task.name in ("text-generation", "text2text-generation")


async def completions(x: Service, body: schemas.CompletionRequest) -> Reply:
    """What follows a prompt."""
    model = x.find(body.model, _writes, "/v1/completions")
    options = _options(body, body.max_tokens)
    name = f"cmpl-{secrets.token_hex(12)}"

    def prompt(engine: Any) -> tuple[str, Mapping[str, Any]]:
        return body.prompt, {}

    def shaped(text: str, finish: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}

    return await _written(x, model, prompt, options, body.stream, name, "text_completion", shaped)


async def chat(x: Service, body: schemas.ChatRequest) -> Reply:
    """The next message of a conversation."""
    model = x.find(body.model, lambda t: t.name == "text-generation", "/v1/chat/completions")
    options = _options(body, body.max_completion_tokens or body.max_tokens or 512)
    options |= _form(body.response_format)
    messages = [_message(number, message) for number, message in enumerate(body.messages)]
    name = f"chatcmpl-{secrets.token_hex(12)}"
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    part = "delta" if body.stream else "message"

    def prompt(engine: Any) -> tuple[str, Mapping[str, Any]]:
        return engine.chat_prompt(messages), {"keep": engine.opening(messages)}

    def shaped(text: str, finish: str | None) -> dict[str, Any]:
        said = {"role": "assistant", "content": text} if text or not body.stream else {}
        return {"index": 0, part: said, "logprobs": None, "finish_reason": finish}

    return await _written(x, model, prompt, options, body.stream, name, kind, shaped)


def _options(body: Any, most: int) -> dict[str, Any]:
    options: dict[str, Any] = {"max_new_tokens": most, "exact": False}
    if body.temperature > 0:
        options |= {"temperature": body.temperature, "top_p": body.top_p}
        if body.seed is not None:
            options["seed"] = body.seed
    if body.stop:
        options["stop"] = body.stop
    return options


def _form(wanted: dict[str, Any] | None) -> dict[str, Any]:
    kind = (wanted or {}).get("type", "text")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"schema": {"type": "object"}}
    schema = ((wanted or {}).get("json_schema") or {}).get("schema")
    if kind != "json_schema" or not isinstance(schema, dict):
        raise Refusal(400, f"response_format {json.dumps(wanted)[:100]} is not known",
                      fix="text, json_object or json_schema with a schema")  # fmt: skip
    return {"schema": schema}


def _message(number: int, message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its parts of type text put together."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) else None for p in content]
        if not all(isinstance(part, str) for part in parts):
            raise Refusal(400, f"message {number} has a part that is no text")
        return {**message, "content": "".join(map(str, parts))}
    return message


async def _written(
    x: Service,
    model: Hosted,
    prompt: Callable[[Any], tuple[str, Mapping[str, Any]]],
    options: dict[str, Any],
    stream: bool,
    name: str,
    kind: str,
    shaped: Callable[[str, str | None], dict[str, Any]],
) -> Reply:
    """Return a text, or its pieces as they are written, in OpenAI's envelope."""
    about = {"id": name, "object": kind, "created": int(time.time()), "model": model.name}
    pieces = _pieces(x, model, prompt, options)
    if not stream:
        written = [piece async for piece in pieces]
        last: Generation = written.pop()
        usage = _usage(last)
        return Reply(json={**about, "choices": [shaped(last.text, _finish(last))], "usage": usage})
    first = await anext(pieces)  # what is wrong with the request is told before the stream begins

    async def events() -> AsyncIterator[Any]:
        piece: Any = first
        try:
            while not isinstance(piece, Generation):
                yield {**about, "choices": [shaped(piece, None)]}
                piece = await anext(pieces)
            yield {**about, "choices": [shaped("", _finish(piece))], "usage": _usage(piece)}
        except Exception as error:  # noqa: BLE001 - the status is sent: it goes into the stream
            told = refusal_of(error)
            yield {"error": {"message": str(told), "type": told.kind, "code": told.status}}
        finally:
            await pieces.aclose()

    return Reply(events=events())


async def _pieces(
    x: Service,
    model: Hosted,
    prompt: Callable[[Any], tuple[str, Mapping[str, Any]]],
    options: dict[str, Any],
) -> Any:
    """Yield the pieces of a text and then its Generation; closed early, the writing ends.

    The text is written in a thread of its own: the engine writes one at a time, and one that waits
    for its turn holds up no other request.
    """
    async with x.host.use(model) as opened:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        stop = threading.Event()

        def tell(value: Any) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, value)

        def write() -> None:
            try:
                text, further = prompt(opened.engine)
                pieces = opened.engine.stream(text, cancel=stop, **{**options, **further})
                while True:
                    tell(next(pieces))
            except StopIteration as end:
                tell(end.value)
            except Exception as error:  # noqa: BLE001 - whoever asked gets it
                tell(error)
            finally:
                tell(_END)

        thread = threading.Thread(target=write, name="memopt-write", daemon=True)
        begin = time.monotonic()
        thread.start()
        ended = False
        try:
            while (value := await queue.get()) is not _END:
                if isinstance(value, Exception):
                    raise value
                yield value
            ended = True
        finally:
            stop.set()
            if not ended:  # the engine is in use until the thread is behind its token
                while await queue.get() is not _END:
                    pass
            x.telemetry.computed(model.name, 0.0, time.monotonic() - begin)


def _finish(written: Generation) -> str:
    return "length" if written.finish == "length" else "stop"


def _usage(written: Generation) -> dict[str, int]:
    read, wrote = written.prompt_tokens, len(written.tokens)
    return {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}
