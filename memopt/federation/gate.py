"""The door of the server: TLS 1.3 with client certificates in front of Flight on loopback.

pyarrow's own TLS server also takes TLS 1.2 and has no setting against it, so Python's ``ssl``
terminates TLS here (the relay), checks what comes in (:mod:`guard`) and passes it to a plain
Flight server that listens on a random loopback port. The node's identity crosses by the source
port of the relay's connection: it is registered before the first byte and removed before the
port is free again, and the server serves nobody whose port is not registered, so another process
on the machine gains nothing by connecting to the inner port.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from memopt.errors import ConfigurationError
from memopt.federation.authority import node_of
from memopt.federation.failures import SyncFailure
from memopt.federation.guard import StreamGuard
from memopt.federation.limits import Limits
from memopt.metrics import count

_READ = 256 * 1024
_HANDSHAKE_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who is on a connection; ``node`` is None where the transport proves nothing (plain)."""

    node: str | None
    expires: float = float("inf")  # end of the certificate, Unix seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files of one end: the authority, the certificate and its key."""

    ca: Path
    certificate: Path
    key: Path

    def server_context(self) -> ssl.SSLContext:
        """Return a context that takes TLS 1.3 and certificates of the authority, nothing else."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.set_alpn_protocols(["h2"])
        # A resumed session would skip the certificate, its end of validity included.
        context.num_tickets = 0
        self._load(context)
        return context

    def client_context(self) -> ssl.SSLContext:
        """Return the other end's context: TLS 1.3, the server's host name checked."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols(["h2"])
        self._load(context)
        return context

    def _load(self, context: ssl.SSLContext) -> None:
        try:
            context.load_verify_locations(self.ca)
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigurationError(
                f"TLS files {self.certificate}, {self.key}, {self.ca} cannot be used ({error})",
                fix="run: memopt sync init-ca, then memopt sync issue",
            ) from error


class Gate:
    """Accepts connections and relays them to the Flight server on loopback.

    Args:
        host, port: where to listen; port 0 takes a free one.
        inner: loopback port of the Flight server.
        context: TLS, or None for a plain transport.
        limits: connections and message size.
        idle_seconds: a connection that sends nothing for so long is closed, unless the server is
            at work for it (``busy``).
        on_refused: called with one line for each connection that was turned away.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        inner: int,
        context: ssl.SSLContext | None,
        limits: Limits,
        idle_seconds: float = 60.0,
        on_refused: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._inner = inner
        self._context = context
        self._limits = limits
        self._idle = idle_seconds
        self._on_refused = on_refused
        self._identities: dict[str, Identity] = {}
        self._busy: dict[str, int] = {}
        self._open = 0
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        started: threading.Event = threading.Event()
        problem: list[OSError] = []
        self._thread = threading.Thread(
            target=self._run, args=(host, port, started, problem), name="sync-gate", daemon=True
        )
        self._thread.start()
        started.wait()
        if problem:
            raise ConfigurationError(
                f"cannot listen on {host}:{port} ({problem[0].strerror or problem[0]})",
                fix="choose another address or port",
            ) from problem[0]

    def identity(self, peer: str) -> Identity:
        """Return who is behind the inner connection ``peer`` (as ``ServerCallContext.peer()``).

        Raises:
            SyncFailure: the connection did not come through the gate, or its certificate ended.
        """
        with self._lock:
            identity = self._identities.get(peer)
        if identity is None:
            raise SyncFailure("unauthenticated", "this connection did not come through the gate")
        if identity.expires < time.time():
            raise SyncFailure("unauthenticated", "the client's certificate has expired meanwhile")
        return identity

    @contextlib.contextmanager
    def busy(self, peer: str):  # type: ignore[no-untyped-def]
        """While inside, the connection ``peer`` may be silent: the server is working for it."""
        with self._lock:
            self._busy[peer] = self._busy.get(peer, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._busy[peer] -= 1
                if not self._busy[peer]:
                    del self._busy[peer]

    def close(self) -> None:
        """Stop listening and drop every connection."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=10)

    def _run(self, host: str, port: int, started: threading.Event, problem: list[OSError]) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            server = self._loop.run_until_complete(
                asyncio.start_server(
                    self._serve,
                    host,
                    port,
                    ssl=self._context,
                    ssl_handshake_timeout=_HANDSHAKE_SECONDS if self._context else None,
                    limit=4 * _READ,
                    backlog=512,
                )
            )
            self.port: int = server.sockets[0].getsockname()[1]
        except OSError as error:
            problem.append(error)
            started.set()
            return
        self._loop.set_exception_handler(self._quiet)
        started.set()
        try:
            self._loop.run_forever()
        finally:
            server.close()
            # Each relay must get to its end, where it drops its two connections: Flight's shutdown
            # waits for the calls on them.
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self._loop.run_until_complete(asyncio.wait(tasks, timeout=5))
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()

    def _quiet(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        # Handshakes that fail (TLS 1.2, no certificate, a port scan) end up here: one line each.
        self._refuse(str(context.get("exception") or context.get("message")))

    def _refuse(self, line: str) -> None:
        count("memopt_sync_refused_connections_total")
        self._on_refused(line)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        key = ""
        upstream: asyncio.StreamWriter | None = None
        self._open += 1
        try:
            if self._open > self._limits.connections:
                raise SyncFailure("busy", f"more than {self._limits.connections} connections")
            identity = self._identify(writer)
            down, upstream = await asyncio.open_connection(
                "127.0.0.1", self._inner, limit=4 * _READ
            )
            address, port = upstream.get_extra_info("sockname")[:2]
            key = f"ipv4:{address}:{port}"
            with self._lock:
                self._identities[key] = identity
            await self._relay(key, reader, writer, down, upstream)
        except SyncFailure as error:
            self._refuse(error.problem)
        except (OSError, asyncio.IncompleteReadError):
            # A peer that went away was not refused; its upload, if any, stays for it to resume.
            count("memopt_sync_broken_connections_total")
        finally:
            self._open -= 1
            with self._lock:
                self._identities.pop(key, None)
            for stream in (upstream, writer):
                if stream is not None:
                    # abort, not close: a peer that does not read must not keep the socket.
                    stream.transport.abort()

    def _identify(self, writer: asyncio.StreamWriter) -> Identity:
        if self._context is None:
            return Identity(node=None)
        if writer.get_extra_info("ssl_object").selected_alpn_protocol() != "h2":
            raise SyncFailure("malformed", "the client does not offer HTTP/2")
        certificate = writer.get_extra_info("peercert") or {}
        return Identity(
            node=node_of(certificate),
            expires=float(ssl.cert_time_to_seconds(certificate["notAfter"])),
        )

    async def _relay(
        self,
        key: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        down: asyncio.StreamReader,
        upstream: asyncio.StreamWriter,
    ) -> None:
        guard = StreamGuard(self._limits.message_bytes)
        last = time.monotonic()

        async def inwards() -> None:
            nonlocal last
            while data := await reader.read(_READ):
                last = time.monotonic()
                guard.feed(data)
                upstream.write(data)
                await upstream.drain()

        async def outwards() -> None:
            nonlocal last
            while data := await down.read(_READ):
                writer.write(data)
                await writer.drain()

        async def watch() -> None:
            nonlocal last
            while time.monotonic() - last < self._idle:
                await asyncio.sleep(min(1.0, self._idle / 4))
                if self._busy.get(key):
                    last = time.monotonic()
            raise SyncFailure("timeout", f"no data for {self._idle:g} s")

        tasks = [asyncio.ensure_future(c()) for c in (inwards, outwards, watch)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if tasks[1] in done or tasks[0] in done:
                # What the server has sent last (a status, GOAWAY) still goes out.
                await asyncio.wait({tasks[1]}, timeout=1.0)
                if writer.can_write_eof():
                    await writer.drain()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
