"""The door of the server: TLS 1.3 with client certificates in front of Flight on a private socket.

pyarrow's own TLS server also takes TLS 1.2 and has no setting against it, so Python's ``ssl``
terminates TLS here, the bytes are looked at (``guard``) and passed on (``relay``) to a plain
Flight server. That one listens on a Unix socket in a folder only its owner may enter, so no other
user of the machine can go round the gate. The node's identity crosses by the name of the relay's
end of the connection, a random ticket: it is registered before the first byte is passed on, and the
server serves nobody whose ticket is not.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import secrets
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from memopt.background import BackgroundTask
from memopt.errors import ConfigurationError
from memopt.federation.failures import SyncFailure
from memopt.federation.limits import Limits
from memopt.federation.server.guard import StreamGuard
from memopt.federation.server.relay import READ_BYTES, End, relay
from memopt.federation.server.tickets import Identity, Tickets
from memopt.federation.trust.authority import node_of
from memopt.metrics import count

_HANDSHAKE_SECONDS = 10.0
# Handshakes under way at once: the next one takes the place of the oldest of the address that has
# most of them. An honest one takes milliseconds, so that only silent ones get old.
_HANDSHAKES, _BACKLOG = 256, 512
# Lines of the audit log for refused connections: anyone can cause them.
_REFUSALS_AT_ONCE, _REFUSALS_PER_SECOND = 20, 1.0


class SyncGate:
    """Accepts connections and relays them to the Flight server on a private socket.

    Args:
        host, port: where to listen; port 0 takes a free one.
        inner: path of the Flight server's Unix socket, in a folder that only its owner may enter.
        tickets: where who is on a connection is written down.
        context: TLS, or None for a plain transport.
        limits: connections, calls and message size.
        idle_seconds: a connection that sends nothing for so long is closed, unless the server is
            at work for it (``busy``).
        on_refused: called with one line for connections that were turned away.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        inner: Path,
        tickets: Tickets,
        context: ssl.SSLContext | None,
        limits: Limits,
        idle_seconds: float = 60.0,
        on_refused: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._inner = inner
        self._context = context
        self._limits = limits
        self._idle = idle_seconds
        self._refusals = _Refusals(on_refused)
        self._tickets = tickets
        # In the order they came: who has not said who they are yet, and from where.
        self._pending: dict[asyncio.Task[None], str] = {}
        try:
            self._listeners = _listen(host, port)
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {host}:{port} ({error.strerror or error})",
                fix="choose another address or port",
            ) from error
        self.port: int = self._listeners[0].getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._task = BackgroundTask(
            self._run, "sync-gate", on_error=lambda error: self._refuse(f"the gate ended: {error}")
        )
        self._task.start()

    def close(self) -> None:
        """Stop listening and drop every connection."""
        if self._task.busy:
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._task.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        # A transport reports here what it cannot tell its connection: one line each.
        self._loop.set_exception_handler(
            lambda loop, context: self._refuse(
                str(context.get("exception") or context.get("message"))
            )
        )
        accepting = [self._loop.create_task(self._accept(each)) for each in self._listeners]
        try:
            self._loop.run_forever()
        finally:
            for each in self._listeners:
                each.close()
            # Each relay must get to its end, where it drops its two connections: Flight's shutdown
            # waits for the calls on them.
            tasks = asyncio.all_tasks(self._loop)
            for task in (*accepting, *tasks):
                task.cancel()
            if tasks:
                self._loop.run_until_complete(asyncio.wait(tasks, timeout=5))
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()

    def _refuse(self, line: str) -> None:
        count("memopt_sync_refused_connections_total")
        self._refusals.tell(line)

    async def _accept(self, listener: socket.socket) -> None:
        serving: set[asyncio.Task[None]] = set()
        while True:
            try:
                plain, address = await self._loop.sock_accept(listener)
            except OSError as error:
                # Out of descriptors, or the peer is gone already: neither may end the service.
                self._refuse(f"a connection could not be accepted ({error.strerror})")
                await asyncio.sleep(0.1)
                continue
            if len(self._pending) >= _HANDSHAKES:
                self._make_room()
            task = self._loop.create_task(self._serve(plain))
            self._pending[task] = _network(address[0])
            serving.add(task)
            task.add_done_callback(serving.discard)

    def _make_room(self) -> None:
        most, _ = Counter(self._pending.values()).most_common(1)[0]
        oldest = next(task for task, network in self._pending.items() if network == most)
        del self._pending[oldest]
        oldest.cancel()
        self._refuse(f"a silent connection from {most} made room for the next one")

    async def _spoken(self, plain: socket.socket) -> None:
        """Wait for the first byte: whoever says nothing costs a socket and no more."""
        ready = asyncio.Event()
        self._loop.add_reader(plain, ready.set)
        try:
            async with asyncio.timeout(_HANDSHAKE_SECONDS):
                await ready.wait()
        except BaseException:
            self._loop.remove_reader(plain)
            plain.close()
            raise
        self._loop.remove_reader(plain)

    async def _serve(self, plain: socket.socket) -> None:
        task = asyncio.current_task()
        assert task is not None
        ticket = secrets.token_hex(16)
        guard = StreamGuard(self._limits.message_bytes, self._limits.connection_streams)
        ends: list[End] = []
        try:
            try:
                await self._spoken(plain)
                ends.append(await self._shake_hands(plain))
            finally:
                self._pending.pop(task, None)
            self._tickets.add(ticket, self._identify(ends[0][1]))
            inner = self._connect_inner(ticket)
            ends.append(await asyncio.open_unix_connection(sock=inner, limit=READ_BYTES))
            await relay(ends[0], ends[1], guard, self._alive(ticket))
        except SyncFailure as error:
            self._refuse(error.problem)
        except ssl.SSLError as error:
            self._refuse(str(error))
        except OSError as error:
            if not ends:
                # TLS 1.2, no certificate, a port scan.
                self._refuse(f"the TLS handshake failed ({error})")
            else:
                # A peer that went away was not refused; its upload stays for it to resume.
                count("memopt_sync_broken_connections_total")
        finally:
            self._tickets.remove(ticket)
            for _, writer in reversed(ends):
                # At once: a peer that does not read must not keep a socket.
                writer.transport.abort()

    async def _shake_hands(self, plain: socket.socket) -> End:
        reader = asyncio.StreamReader(limit=READ_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await self._loop.connect_accepted_socket(
            lambda: protocol,
            plain,
            ssl=self._context,
            ssl_handshake_timeout=_HANDSHAKE_SECONDS if self._context else None,
        )
        return reader, asyncio.StreamWriter(transport, protocol, reader, self._loop)

    def _connect_inner(self, ticket: str) -> socket.socket:
        """Connect to Flight from an address that is the ticket: what Flight calls the peer."""
        inner = socket.socket(socket.AF_UNIX)
        path = self._inner.with_name(ticket)
        try:
            inner.bind(str(path))
            inner.connect(str(self._inner))
            inner.setblocking(False)
        except OSError:
            inner.close()
            raise
        finally:
            path.unlink(missing_ok=True)
        return inner

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

    def _alive(self, ticket: str) -> Callable[[float, float], None]:
        """Return what judges a connection by its silence and its age, both in seconds."""

        def judge(silence: float, age: float) -> None:
            if self._tickets.is_busy(ticket):
                return
            if silence > self._idle:
                raise SyncFailure("timeout", f"no data for {self._idle:g} s")
            if age > self._limits.connection_seconds:
                raise SyncFailure("timeout", "the connection is too old; what it did resumes")

        return judge


class _Refusals:
    """Tells of refused connections, but not so often that a port scan fills the audit log."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._left = float(_REFUSALS_AT_ONCE)
        self._at = time.monotonic()
        self._untold = 0

    def tell(self, line: str) -> None:
        now = time.monotonic()
        self._left = min(_REFUSALS_AT_ONCE, self._left + (now - self._at) * _REFUSALS_PER_SECOND)
        self._at = now
        if self._left < 1:
            self._untold += 1
            return
        self._left -= 1
        more, self._untold = self._untold, 0
        self._tell(f"{line} (and {more} more before)" if more else line)


def _network(host: str) -> str:
    """Return what one owner holds: an IPv4 address, or the /64 of an IPv6 address.

    >>> _network("2001:db8::1"), _network("192.0.2.7")
    ('2001:db8::/64', '192.0.2.7')
    """
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((address, 64), strict=False))


def _listen(host: str, port: int) -> list[socket.socket]:
    """Return a listening socket for each address of ``host``, all on one port."""
    listeners: list[socket.socket] = []
    problem: OSError | None = None
    for family, _, _, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        try:
            taken = listeners[0].getsockname()[1] if listeners else address[1]
            listener = socket.create_server((address[0], taken), family=family, backlog=_BACKLOG)
        except OSError as error:
            # localhost is often ::1 too, on a machine that has no IPv6.
            problem = error
            continue
        listener.setblocking(False)
        listeners.append(listener)
    if problem is not None and (not listeners or problem.errno == errno.EADDRINUSE):
        for each in listeners:
            each.close()
        raise problem
    return listeners
