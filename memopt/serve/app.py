"""The ASGI application: routes, bodies, answers, and what happens when a client goes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from memopt.extras import require
from memopt.serve.exchange import ARROW, Reply, Service
from memopt.serve.failures import Refusal, refusal_of
from memopt.serve.guard import Admission, Guard, error_body, send_refusal
from memopt.serve.hosting import Host
from memopt.serve.routes import ROUTES, Route, openapi
from memopt.serve.telemetry import Telemetry
from memopt.serve.texts import dumped

log = logging.getLogger("memopt.serve")
# A request that takes longer than this is watched for a client that goes.
_WATCHED_SECONDS = 0.1
_POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"


def make_app(
    host: Host,
    *,
    access: Admission | None = None,
    origins: tuple[str, ...] = (),
    lazy: bool = False,
    memories: Any = None,
) -> Any:
    """Return the application.

    Args:
        host: the models.
        access: who may ask; everybody on this machine where it is None.
        origins: of pages elsewhere whose scripts may ask (CORS); none.
        lazy: open models when they are first asked for, not at the start.
        memories: the :class:`memopt.serve.memories.Memories` of /v1/memories, None for none.

    Raises:
        MissingExtra: Starlette, msgspec or prometheus-client is not installed.
    """
    applications = require("starlette.applications", extra="serve", why="serve")
    routing = require("starlette.routing", extra="serve", why="serve")
    require("msgspec", extra="serve", why="read requests")
    telemetry = Telemetry(host)
    ready = asyncio.Event()

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        if not lazy:
            for model in host.models.values():
                async with host.use(model):
                    log.info("%s is open", model.name)
        ready.set()
        yield
        ready.clear()
        await host.close()

    routes = [
        routing.Route(
            route.path, _Endpoint(route, host, telemetry, memories), methods=[route.method]
        )
        for route in ROUTES
    ]
    routes.append(routing.Route("/ready", _Ready(ready), methods=["GET"]))
    routes.append(routing.Route("/openapi.json", _Constant(dumped(openapi()), "application/json")))
    for path, name, kind in (
        ("/", "page.html", "text/html; charset=utf-8"),
        ("/page.js", "page.js", "text/javascript; charset=utf-8"),
        ("/ask.js", "ask.js", "text/javascript; charset=utf-8"),
        ("/page.css", "page.css", "text/css; charset=utf-8"),
        ("/page.svg", "page.svg", "image/svg+xml"),
    ):
        data = Path(__file__).with_name(name).read_bytes()
        routes.append(routing.Route(path, _Constant(data, kind)))
    app = applications.Starlette(
        routes=routes, lifespan=lifespan, exception_handlers={404: _unrouted, 405: _unrouted}
    )
    whole: Any = Guard(
        app,
        access=access or Admission(),
        body_bytes=host.limits.body_bytes,
        telemetry=telemetry,
    )
    if origins:
        cors = require("starlette.middleware.cors", extra="serve", why="serve")
        whole = cors.CORSMiddleware(
            whole, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"]
        )
    return whole


async def _unrouted(request: Any, error: Any) -> Any:
    """Say of a path or a method that there is none, as the routes say what is wrong."""
    responses = require("starlette.responses", extra="serve", why="serve")
    wrong = f"no route {request.url.path}" if error.status_code == 404 else "no such method"
    refusal = Refusal(error.status_code, wrong, kind="not_found_error", fix="see /openapi.json")
    body = error_body(refusal, request.url.path)
    return responses.Response(body, refusal.status, error.headers, "application/json")


class _Endpoint:
    """One route as ASGI."""

    def __init__(self, route: Route, host: Host, telemetry: Telemetry, memories: Any) -> None:
        import msgspec

        self._route = route
        self._host = host
        self._telemetry = telemetry
        self._memories = memories
        self._decoder: Any = msgspec.json.Decoder(route.takes) if route.takes else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Read the body, answer, and stop answering when the client goes."""
        scope["memopt.route"] = self._route.path
        try:
            headers = dict(scope["headers"])
            arrow = self._route.arrow and ARROW.encode() in headers.get(b"accept", b"")
            exchange = Service(
                host=self._host,
                telemetry=self._telemetry,
                wants_arrow=arrow,
                client=scope.get("memopt.client", ""),
                memories=self._memories,
            )
            arguments = list(scope["path_params"].values())
            if self._decoder is not None:
                arguments.append(await self._body(scope, receive, headers))
            answer = await _unless_gone(
                self._route.answer(exchange, *arguments),
                receive,
                self._host.limits.seconds,
            )
            if answer is not None:
                await _send(answer, receive, send)
        except Exception as error:
            told = refusal_of(error)
            if told.status >= 500 and not isinstance(error, Refusal | TimeoutError):
                log.exception("%s failed", self._route.path)
            await send_refusal(told, send, self._route.path)

    async def _body(self, scope: Any, receive: Any, headers: dict[bytes, bytes]) -> Any:
        import msgspec

        assert self._decoder is not None
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if self._route.form and kind == b"multipart/form-data":
            return await _form(scope, receive, self._host.limits.body_bytes)
        if kind != b"application/json":
            # Also: a page elsewhere can send other kinds without being asked whether it may.
            raise Refusal(415, f"the body is {kind.decode('latin-1')[:60]!r}",
                          fix="send Content-Type: application/json")  # fmt: skip
        if coding := headers.get(b"content-encoding", b""):
            # Not unpacked: a small body could become any size.
            raise Refusal(415, f"the body has Content-Encoding {coding.decode('latin-1')[:60]!r}",
                          fix="send it as it is")  # fmt: skip
        data = await _read(receive, self._host.limits.body_bytes)
        try:
            return self._decoder.decode(data)
        except msgspec.ValidationError as error:
            raise Refusal(422, str(error)) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Refusal(400, f"the body is no JSON: {error}") from error


async def _read(receive: Any, most: int) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "the client went")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise Refusal(413, f"the body may have {most} bytes")
        if not message.get("more_body"):
            return b"".join(parts)


async def _form(scope: Any, receive: Any, most: int) -> Any:
    """Return a form's files as a request for media."""
    import base64

    from memopt.serve.schemas import MediaRequest

    requests = require("starlette.requests", extra="serve", why="serve")
    require("python_multipart", extra="serve", why="read forms")
    data = await _read(receive, most)

    async def again() -> dict[str, Any]:
        return {"type": "http.request", "body": data, "more_body": False}

    try:
        async with requests.Request(scope, again).form(max_part_size=most) as form:
            urls = []
            for _, part in form.multi_items():
                if not isinstance(part, str):
                    body = base64.b64encode(await part.read()).decode()
                    urls.append(f"data:{part.content_type or ''};base64,{body}")
            return MediaRequest(input=urls, model=str(form.get("model") or ""))
    except Exception as error:
        raise Refusal(400, "the form cannot be read") from error


async def _unless_gone(work: Awaitable[Reply], receive: Any, seconds: float) -> Reply | None:
    """Return the answer, or None when the client went first: then nothing more is computed.

    Raises:
        TimeoutError: it took longer than ``seconds``.
    """
    loop, own = asyncio.get_running_loop(), asyncio.current_task()
    assert own is not None
    gone: asyncio.Future[Any] | None = None

    def watch() -> None:
        nonlocal gone
        gone = asyncio.ensure_future(_disconnected(receive))
        gone.add_done_callback(lambda future: future.cancelled() or own.cancel())

    # Most are answered before: those cost no task of their own.
    later = loop.call_later(_WATCHED_SECONDS, watch)
    try:
        async with asyncio.timeout(seconds):
            return await work
    except asyncio.CancelledError:
        if gone is None or not gone.done():
            raise  # the server is stopping
        own.uncancel()
        return None
    finally:
        later.cancel()
        if gone is not None:
            gone.cancel()


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(answer: Reply, receive: Any, send: Any) -> None:
    if answer.events is not None:
        await _stream(answer.events, receive, send)
        return
    if answer.arrow is not None:
        body, kind = _arrow(answer.arrow), ARROW
    elif answer.text is not None:
        body, kind = answer.text, answer.media_type
    else:
        body, kind = dumped(answer.json), answer.media_type
    await _whole(send, answer.status, body, kind)


async def _whole(
    send: Any, status: int, body: bytes, kind: str, *more: tuple[bytes, bytes]
) -> None:
    headers = [
        (b"content-type", kind.encode()),
        (b"content-length", b"%d" % len(body)),
        (b"x-content-type-options", b"nosniff"),
        *more,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _stream(events: AsyncIterator[Any], receive: Any, send: Any) -> None:
    """Send values as server-sent events, until the client goes; [DONE] ends them, as OpenAI's."""
    headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        async for value in events:
            if gone.done():
                return
            data = b"data: " + dumped(value) + b"\n\n"
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
    finally:
        gone.cancel()
        await events.aclose()  # type: ignore[attr-defined]


def _arrow(vectors: Any) -> bytes:
    import numpy as np

    from memopt.runtimes.vectors import to_arrow

    pa = require("pyarrow", extra="arrow", why="answer in Arrow")
    rows = to_arrow(np.ascontiguousarray(vectors, dtype=np.float32))
    table = pa.table({"vector": rows})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


class _Constant:
    """A file of the page, or the OpenAPI document, as ASGI."""

    def __init__(self, body: bytes, kind: str) -> None:
        self._body, self._kind = body, kind

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["memopt.route"] = scope["path"]
        await _whole(
            send, 200, self._body, self._kind, (b"content-security-policy", _POLICY.encode())
        )


class _Ready:
    """Whether requests are answered, as ASGI: apart from whether the process lives."""

    def __init__(self, ready: asyncio.Event) -> None:
        self._ready = ready

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["memopt.route"] = "/ready"
        status = 200 if self._ready.is_set() else 503
        await _whole(send, status, dumped({"ready": self._ready.is_set()}), "application/json")
