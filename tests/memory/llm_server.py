"""A local server that speaks the protocols of ollama, anthropic and OpenAI, well or badly."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PATHS = {"/api/chat": "ollama", "/v1/messages": "anthropic", "/v1/chat/completions": "openai"}


class Served(ThreadingHTTPServer):
    """Answers by ``script``, one entry per request, the last one for ever."""

    daemon_threads = True

    def __init__(self, script: list[str], text: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.text = script, text
        self.requests: list[dict[str, Any]] = []
        self.at: list[float] = []
        self.headers: list[dict[str, str]] = []

    def url(self, kind: str) -> str:
        return f"http://127.0.0.1:{self.server_port}" + ("/v1" if kind == "openai" else "")


@contextmanager
def serve(*script: str, text: str = "The door is red.") -> Iterator[Served]:
    server = Served(list(script), text)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Served

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append(body)
        self.server.headers.append(dict(self.headers))
        self.server.at.append(time.monotonic())
        step = self.server.script[min(len(self.server.requests), len(self.server.script)) - 1]
        kind = PATHS.get(self.path)
        if kind is None:
            self._reply(404, b"{}")
        elif step == "timeout":
            time.sleep(1.5)
        elif step == "garbage":
            self._reply(200, b"<html>not JSON")
        elif step == "shape":
            self._reply(200, b'{"unexpected": [1]}')
        elif step.startswith("30"):
            status, _, place = step.partition(":")
            self._reply(int(status), b"{}", {"location": place})
        elif step.startswith("429"):
            error = b'{"type": "error", "error": {"type": "rate_limit_error", "message": "slow"}}'
            self._reply(429, error, {"retry-after": step.partition(":")[2]})
        elif step.isdigit():
            self._reply(int(step), b'{"error": {"message": "broken", "type": "api_error"}}')
        else:
            text = "" if step == "empty" else self.server.text
            end = "length" if step == "cut" else "stop"
            self._reply(200, json.dumps(_answer(kind, body["model"], text, end)).encode())

    def _reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


def _answer(kind: str, model: str, text: str, end: str = "stop") -> dict[str, Any]:
    if kind == "ollama":
        return {
            "model": model,
            "created_at": "2026-05-01T12:00:00Z",
            "message": {"role": "assistant", "content": text},
            "done": True,
            "done_reason": end,
        }
    if kind == "anthropic":
        return {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [{"type": "text", "text": text}],
            "stop_reason": "end_turn" if end == "stop" else "max_tokens",
            "stop_sequence": None,
            "usage": {"input_tokens": 5, "output_tokens": 5},
        }
    message = {"role": "assistant", "content": text}
    return {
        "id": "chat-1",
        "object": "chat.completion",
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": end}],
    }
