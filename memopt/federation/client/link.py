"""The client's connection: frames over one Flight exchange, with a deadline on every step."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
from pyarrow.ipc import IpcReadOptions

from memopt.errors import ConfigurationError
from memopt.federation.failures import SyncFailure
from memopt.federation.limits import Limits, strict_json
from memopt.federation.trust.authority import expired
from memopt.federation.wire import protocol
from memopt.federation.wire.channel import Channel
from memopt.federation.wire.tls import TlsFiles

BROKEN = (flight.FlightError, pa.ArrowException, OSError)


class _Watchdog:
    """Cancels a call that makes no step in time: Flight's own timeout covers a whole stream."""

    def __init__(self, cancel: Any) -> None:
        self._cancel = cancel
        self._wake = threading.Condition()
        self._deadline = float("inf")
        self._closed = False
        self.fired = False
        self._thread = threading.Thread(target=self._run, name="sync-deadline", daemon=True)
        self._thread.start()

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        with self._wake:
            self._deadline = time.monotonic() + seconds
            self._wake.notify()
        try:
            yield
        finally:
            with self._wake:
                self._deadline = float("inf")

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()

    def _run(self) -> None:
        with self._wake:
            while not self._closed:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    self.fired = True
                    self._deadline = float("inf")
                    self._cancel()
                    continue
                # Step ends do not notify: waking late at most repeats this check.
                self._wake.wait(None if left == float("inf") else left)


class ServerLink:
    """Where a server is and how to reach it; each call is a connection of its own.

    Args:
        host, port: the server.
        tls: certificate files; None is a plain transport.
        timeout: seconds that one step may take.
        limits: what is believed of the server.
    """

    def __init__(
        self, host: str, port: int, *, tls: TlsFiles | None, timeout: float, limits: Limits
    ) -> None:
        self.host, self.port = host, port
        self.timeout = timeout
        self.limits = limits
        self._tls = tls
        self._context = tls.client_context() if tls else None

    def probe(self, seconds: float) -> None:
        """Open and close a connection, to fail early and with the real reason.

        gRPC reports every failure to connect alike, an expired certificate as an unreachable
        host, and would accept TLS 1.2 from the server.
        """
        try:
            with socket.create_connection((self.host, self.port), timeout=seconds) as plain:
                if self._context is None:
                    return
                with self._context.wrap_socket(plain, server_hostname=self.host) as secure:
                    # In TLS 1.3 the server judges our certificate after our handshake is over:
                    # its verdict, or its HTTP/2 settings, is the first thing it sends.
                    if not secure.recv(1):
                        raise self._turned_away()
        except ssl.SSLEOFError as error:
            raise self._turned_away() from error
        except ssl.SSLError as error:
            raise _tls_failure(error, f"{self.host}:{self.port}") from error
        except OSError as error:
            reason = "no answer" if isinstance(error, TimeoutError) else str(error.strerror)
            raise SyncFailure(
                "unavailable",
                f"cannot connect to {self.host}:{self.port} ({reason})",
                fix="check that the server runs and the address is right",
            ) from error

    def _turned_away(self) -> SyncFailure:
        where = f"{self.host}:{self.port} closed the connection during the TLS handshake"
        if self._tls and (problem := expired(self._tls.certificate)):
            return SyncFailure(
                "unauthenticated", f"{where}: {problem}", fix="run: memopt sync issue"
            )
        return SyncFailure(
            "unavailable", where, fix="check that its authority issued our certificate"
        )

    def _broke(self, error: BaseException) -> SyncFailure:
        failure = translate(error)
        if self._tls is None and failure.code == "unavailable" and failure.fix is None:
            failure.fix = "if the server uses TLS, leave --plain out"
        return failure

    @contextmanager
    def client(self, *, ends: float = float("inf")) -> Iterator[Any]:
        """Yield a Flight client on a fresh connection; ``ends`` as in :meth:`exchange`."""
        seconds, tls = _left(self.timeout, ends), self._tls
        self.probe(seconds)
        options = [
            # Without this, clients of one process share a connection, and a broken one its backoff.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", self.limits.message_bytes),
            # The time one attempt to connect may take (20 s otherwise): a peer that accepts and
            # then is silent is given up in time.
            ("grpc.min_reconnect_backoff_ms", max(1000, int(seconds * 1000))),
        ]
        try:
            client = flight.FlightClient(
                f"{'grpc+tls' if tls else 'grpc'}://{_bracket(self.host)}:{self.port}",
                tls_root_certs=tls and tls.ca.read_bytes(),
                cert_chain=tls and tls.certificate.read_bytes(),
                private_key=tls and tls.key.read_bytes(),
                generic_options=options,
            )
        except BROKEN as error:
            raise translate(error) from error
        try:
            yield client
        finally:
            client.close()

    @contextmanager
    def exchange(self, *, ends: float = float("inf")) -> Iterator[Exchange]:
        """Open an exchange; whatever breaks inside becomes a SyncFailure.

        Args:
            ends: when the whole of it must be over, in ``time.monotonic()``.
        """
        with self.client(ends=ends) as client:
            try:
                descriptor = flight.FlightDescriptor.for_command(protocol.COMMAND)
                writer, reader = client.do_exchange(descriptor, _no_batches())
            except BROKEN as error:
                raise self._broke(error) from error
            watchdog = _Watchdog(reader.cancel)
            exchange = Exchange(
                reader, writer, self.limits, watchdog=watchdog, timeout=self.timeout, ends=ends
            )
            try:
                yield exchange
                exchange.finish()
            except BROKEN as error:
                if watchdog.fired:
                    raise SyncFailure(
                        "timeout", f"no step forward within {exchange.waiting:g} s"
                    ) from error
                raise self._broke(error) from error
            finally:
                watchdog.close()
                reader.cancel()
                # Closed here, or the destructor does it and prints that the call was cancelled.
                with suppress(*BROKEN):
                    writer.close()

    def act(
        self, name: str, request: Mapping[str, Any], *, ends: float = float("inf")
    ) -> dict[str, Any]:
        """Call a Flight action and return its JSON answer; ``ends`` as in :meth:`exchange`."""
        with self.client(ends=ends) as client:
            try:
                results = list(
                    client.do_action(
                        flight.Action(name, json.dumps(request).encode()),
                        flight.FlightCallOptions(timeout=_left(self.timeout, ends)),
                    )
                )
            except BROKEN as error:
                raise self._broke(error) from error
        if len(results) != 1:
            raise SyncFailure("malformed", f"action {name} gave {len(results)} answers")
        try:
            return strict_json(results[0].body.to_pybytes(), what=f"the answer to {name}")
        except SyncFailure as error:
            # An action's answer has no checksum: on a plain wire this may be a flipped bit.
            raise SyncFailure("corrupt", error.problem) from error


class Exchange(Channel):
    """The client's side of an exchange, each step under the deadline."""

    # A flipped bit can make a batch of a message: the same request may well succeed again.
    peer, batch_code = "server", "corrupt"

    def __init__(
        self,
        reader: Any,
        writer: Any,
        limits: Limits,
        *,
        watchdog: _Watchdog,
        timeout: float,
        ends: float,
    ) -> None:
        super().__init__(reader, writer, limits)
        self._watchdog = watchdog
        self._timeout = timeout
        self._ends = ends
        self.waiting = timeout

    def send(self, kind: int, fields: Mapping[str, Any] | None = None, body: Any = b"") -> None:
        with self._step(self._timeout):
            super().send(kind, fields, body)

    def receive(self, *kinds: int, within: float | None = None) -> protocol.Message:
        """Read one message of these kinds, within so many seconds; an ERROR message is raised."""
        with self._step(within or self._timeout):
            return super().receive(*kinds)

    def finish(self) -> None:
        """Say that nothing more is sent, and let the server end its side."""
        with self._step(self._timeout):
            self._writer.done_writing()
            with suppress(StopIteration):
                while True:
                    self._reader.read_chunk()

    @contextmanager
    def _step(self, seconds: float) -> Iterator[None]:
        self.waiting = _left(seconds, self._ends)
        with self._watchdog.within(self.waiting):
            yield


def _no_batches() -> Any:
    """Return call options under which Arrow reads no column of a record batch.

    None comes from an honest server. A lying one could send 8 MiB that inflate to gigabytes: with
    only a field asked for that no schema has, Arrow gives up at the schema.
    """
    return flight.FlightCallOptions(read_options=IpcReadOptions(included_fields=[(1 << 31) - 1]))


def _left(seconds: float, ends: float) -> float:
    """Return how long a step may take: ``seconds``, or less when the whole must be over sooner."""
    left = min(seconds, ends - time.monotonic())
    if left <= 0:
        raise SyncFailure("timeout", "the time for all of it is used up")
    return left


def translate(error: BaseException) -> SyncFailure:
    """Return the failure that a Flight error stands for."""
    details = getattr(error, "extra_info", None)
    if details:
        # Details that are not ours are something between us and the server speaking.
        with suppress(SyncFailure):
            return protocol.decode_error(strict_json(details, what="an error"))
    if isinstance(error, flight.FlightTimedOutError):
        return SyncFailure("timeout", "the server did not answer in time")
    line = " ".join(str(error).split())
    return SyncFailure("unavailable", f"the connection broke ({line[:160]})")


def parse_address(address: str) -> tuple[str, int]:
    """Split ``host:port`` (or ``[::1]:port``).

    >>> parse_address("localhost:8815")
    ('localhost', 8815)
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigurationError(f"{address!r} is not host:port", fix="like localhost:8815")
    return host, int(port)


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _tls_failure(error: ssl.SSLError, where: str) -> SyncFailure:
    reason = (error.reason or str(error)).lower().replace("_", " ")
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = f"its certificate: {error.verify_message}"
    return SyncFailure(
        "unauthenticated",
        f"no trusted TLS 1.3 connection to {where} ({reason})",
        fix="check both certificates and the authority: memopt sync issue makes new ones",
    )
