"""Who may ask, how often and how much: keys, rates, sizes, hosts; and a line of log a request."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from memopt.errors import ConfigurationError
from memopt.serve.failures import Refusal

log = logging.getLogger("memopt.serve")
# Asked for by those who have no key: whether it lives, and the page that asks for one.
OPEN = ("/health", "/ready", "/", "/page.js", "/ask.js", "/page.css", "/page.svg")
_CLIENTS = 10_000  # whose rates are remembered


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """Who may ask. ``keys`` is SHA-256 of a key -> its name; none lets everybody in.

    ``rate`` is requests a second for each key, or each address where there are no keys; 0 is any.
    """

    keys: Mapping[bytes, str] = field(default_factory=dict)
    rate: float = 0.0
    loopback: bool = True  # the server is bound to an address of this machine alone


def read_keys(path: Path) -> dict[bytes, str]:
    """Read a file of API keys, one a line, ``name:key`` or the key alone.

    Raises:
        ConfigurationError: it cannot be read, others can read it, or it holds a short key.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigurationError(f"{path} can be read by others", fix=f"chmod 600 {path}")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"no keys in {path}: {error}", fix="check the path") from error
    keys = {}
    for number, line in enumerate((text.strip() for text in lines), start=1):
        if not line or line.startswith("#"):
            continue
        name, colon, key = line.partition(":")
        name, key = (name, key) if colon else (f"key {number}", name)
        if len(key) < 16:
            raise ConfigurationError(
                f"the key in line {number} of {path} has {len(key)} characters",
                fix="use 16 or more: openssl rand -hex 24",
            )
        keys[hashlib.sha256(key.encode()).digest()] = name
    if not keys:
        raise ConfigurationError(f"{path} holds no key", fix="write one a line")
    return keys


class Guard:
    """ASGI middleware in front of a Starlette application's routes."""

    def __init__(
        self, app: Any, *, access: Admission, body_bytes: int, telemetry: Any = None
    ) -> None:
        self._app = app
        self._access = access
        self._body_bytes = body_bytes
        self._telemetry = telemetry
        self._run, self._requests = secrets.token_hex(4), itertools.count(1)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Let a request through, or refuse it; see :class:`Admission`."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 0
        headers = dict(scope["headers"])
        request = f"{self._run}-{next(self._requests):x}"
        who = ""

        async def told(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request.encode())]
            await send(message)

        try:
            who = self._admit(scope, headers)
            scope["memopt.client"] = who or _address(scope)
            await self._app(scope, receive, told)
        except Refusal as refusal:
            await send_refusal(refusal, told, scope["path"])
        finally:
            seconds = time.perf_counter() - begin
            route = scope.get("memopt.route") or self._route(scope)
            if self._telemetry is not None:
                self._telemetry.requested(route)
                self._telemetry.answered(route, status or 499, seconds)
            if log.isEnabledFor(logging.INFO):
                log.info(
                    json.dumps(
                        {
                            "request": request,
                            "method": scope["method"],
                            "route": route,
                            "status": status or 499,
                            "ms": round(seconds * 1e3, 2),
                            "key": who,
                        }
                    )
                )

    def _admit(self, scope: Any, headers: Mapping[bytes, bytes]) -> str:
        """Return the name of the key that asks, "" for none.

        Raises:
            Refusal: 401 no such key, 403 a foreign host, 413 too large, 429 too often.
        """
        access = self._access
        if access.loopback and not access.keys and not _local(headers.get(b"host", b"")):
            # A page elsewhere whose name was pointed at this machine.
            raise Refusal(403, "the Host header names another machine", kind="permission_error")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._body_bytes:
            raise Refusal(413, f"the body may have {self._body_bytes} bytes")
        if scope["path"] in OPEN:
            return ""
        who = self._key(headers) if access.keys else ""
        if access.rate:
            self._take(who or _address(scope))
        return who

    def _route(self, scope: Any) -> str:
        """Return the route that a request was for which no route got to see."""
        for route in self._app.routes:
            match, _ = route.matches(scope)
            if match.value:
                return str(route.path)
        return "other"  # a path that no route has is a client's own words: it makes no label

    def _key(self, headers: Mapping[bytes, bytes]) -> str:
        given = headers.get(b"x-api-key", b"")
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer":
            given = token.strip()
        digest, name = hashlib.sha256(given).digest(), ""
        for known, owner in self._access.keys.items():
            if hmac.compare_digest(known, digest):
                name = owner  # all are compared: how long it takes says nothing
        if not name:
            raise Refusal(
                401,
                "no such API key",
                kind="authentication_error",
                fix="send Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return name

    def _take(self, who: str) -> None:
        """Take a token from a client's bucket, which holds a second's worth."""
        rate, now = self._access.rate, time.monotonic()
        most = max(1.0, rate)
        left, at = self._buckets.pop(who, (most, now))
        left = min(most, left + (now - at) * rate)
        self._buckets[who] = (left - 1 if left >= 1 else left, now)
        if len(self._buckets) > _CLIENTS:
            self._buckets.popitem(last=False)
        if left < 1:
            wait = max(1, round((1 - left) / rate + 0.5))
            raise Refusal(429, f"more than {rate:g} requests a second", kind="rate_limit_error",
                          headers={"Retry-After": str(wait)})  # fmt: skip


def _address(scope: Any) -> str:
    """Return the address that a request comes from, "" where there is none."""
    return str((scope.get("client") or ("",))[0])


def _local(host: bytes) -> bool:
    """Say whether a Host header names this machine's loopback.

    >>> _local(b"localhost:8080"), _local(b"[::1]:80"), _local(b"evil.example"), _local(b"")
    (True, True, False, True)
    """
    name = host.decode("latin-1").lower()
    name = name[1 : name.find("]")] if name.startswith("[") else name.partition(":")[0]
    if name in ("", "localhost", "testserver"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


async def send_refusal(refusal: Refusal, send: Any, path: str) -> None:
    """Send an error."""
    data = error_body(refusal, path)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
    headers += [(k.lower().encode(), v.encode()) for k, v in refusal.headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


def error_body(refusal: Refusal, path: str) -> bytes:
    """Return an error as the clients of that route know it: OpenAI's form, or TEI's."""
    if path.startswith("/v1/"):
        body: dict[str, Any] = {
            "error": {
                "message": str(refusal),
                "type": refusal.kind,
                "param": None,
                "code": refusal.status,
            }
        }
    else:
        body = {"error": str(refusal), "error_type": refusal.kind}
    return json.dumps(body).encode()
