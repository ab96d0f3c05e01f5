"""The sync server: an Arrow Flight service over a store of signed versions.

``DoExchange`` carries pushes and pulls (:mod:`memopt.federation.wire.protocol`); ``list_flights``,
``get_flight_info``, ``do_get`` and ``do_action`` are plain Flight, so that any client can look.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from memopt.errors import ConfigurationError, MemoptError
from memopt.federation.failures import SyncFailure
from memopt.federation.limits import Limits, check_adapter, check_count, check_keys, strict_json
from memopt.federation.server.gate import Gate, Identity, TlsFiles
from memopt.federation.server.pull import send_versions
from memopt.federation.server.push import aggregate_version, rollback_version, take_push
from memopt.federation.server.service import WEIGHTS_SCHEMA, FlightService, flight_error
from memopt.federation.server.store import Store
from memopt.federation.server.uploads import Uploads
from memopt.federation.trust.audit import AuditLog
from memopt.federation.trust.signing import Trust
from memopt.federation.trust.vault import Vault
from memopt.federation.wire import protocol
from memopt.metrics import count

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Orders are small: the largest names 1,024 adapters of 100 characters.
ACTION_BYTES = 256 * 1024


class Channel:
    """One side of an exchange: frames out, frames in."""

    def __init__(self, reader: Any, writer: Any, limits: Limits) -> None:
        self._reader = reader
        self._writer = writer
        self._limits = limits

    def send(self, kind: int, fields: Mapping[str, Any] | None = None, body: Any = b"") -> None:
        """Write one message; blocks while the peer does not read (backpressure)."""
        self._writer.write_metadata(pa.py_buffer(protocol.encode(kind, dict(fields or {}), body)))

    def receive(self, *kinds: int) -> protocol.Frame:
        """Read one message of the given kinds.

        Raises:
            SyncFailure: the peer went away, or sent something else.
        """
        try:
            chunk = self._reader.read_chunk()
        except StopIteration:
            raise SyncFailure("unavailable", "the peer ended the exchange") from None
        batch = SyncFailure("malformed", "the peer sent a record batch")
        return protocol.take(chunk, kinds, self._limits, batch)

    def drain(self, most: int) -> None:
        """Read and drop what the peer still sends, until it ends its side."""
        with contextlib.suppress(StopIteration):
            while most > 0:
                chunk = self._reader.read_chunk()
                most -= len(chunk.app_metadata or b"") + 1


class SyncServer:
    """A running server; use it as a context manager or call :meth:`close`.

    Args:
        folder: the store.
        trust: who may do what.
        host, port: where to listen; port 0 takes a free one (see :attr:`port`).
        tls: certificate files; None is a plain transport, which is refused off loopback unless
            ``insecure`` is said.
        limits: what is believed of clients.
        idle_seconds: after which a silent connection is closed.
        dictionaries: zstd dictionaries by SHA-256.
        key: Ed25519 key that signs what the server makes itself (aggregation), and its node name.
        vault: seals the store's payloads and weights under a key.

    Raises:
        ConfigurationError: plain transport off loopback, unusable files or address.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        trust: Trust,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: TlsFiles | None = None,
        insecure: bool = False,
        limits: Limits | None = None,
        idle_seconds: float = 60.0,
        dictionaries: Mapping[str, bytes] | None = None,
        keep: int = 200,
        key: Any = None,
        node: str = "server",
        vault: Vault | None = None,
    ) -> None:
        if tls is None and host not in LOOPBACK and not insecure:
            raise ConfigurationError(
                f"a plain transport on {host} lets anyone read and listen",
                fix="use certificates (memopt sync issue) and leave --plain out, or say --insecure",
            )
        self.limits = limits or Limits()
        self.trust = trust
        self.key, self.node = key, node
        context = tls.server_context() if tls else None
        self.store = Store(folder, self.limits, dictionaries=dictionaries, keep=keep, vault=vault)
        self.audit = AuditLog(self.store.folder / "audit.log")
        self.uploads = Uploads(self.store.incoming, self.limits, self.store.vault)
        self._streams = threading.BoundedSemaphore(self.limits.streams)
        self._flight = FlightService(self)
        try:
            self.gate = Gate(
                host,
                port,
                inner=self._flight.path,
                context=context,
                limits=self.limits,
                idle_seconds=idle_seconds,
                on_refused=lambda line: self.audit.write("connection-refused", problem=line[:300]),
            )
        except BaseException:
            self._flight.close()
            self.store.close()
            raise
        self.host, self.port = host, self.gate.port

    def __enter__(self) -> SyncServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop: drop connections, end running calls, release the store."""
        self.gate.close()
        self._flight.close()
        self.audit.close()
        self.store.close()

    def wait(self) -> None:
        """Block until the process is told to stop."""
        self._flight.wait()

    # ---------------------------------------------------------------------------- called by Flight

    def caller(self, context: Any, role: str | None, adapter: str | None) -> Identity:
        """Return who calls; with TLS the node must have ``role`` (any role for None)."""
        identity = self.gate.identity(context.peer())
        if identity.node is not None:
            self.trust.allow(identity.node, role, adapter)
        return identity

    def visible(self, context: Any) -> list[str]:
        """Return the adapters that the caller may look at."""
        identity = self.caller(context, None, None)
        names = self.store.adapters()
        if identity.node is None:
            return names
        node = self.trust.nodes().get(identity.node)
        return [name for name in names if node is not None and node.may(None, name)]

    @contextlib.contextmanager
    def guarded(self, context: Any, event: str) -> Iterator[None]:
        """Audit and translate failures; anything unforeseen becomes one error, not a crash."""
        try:
            yield
        except SyncFailure as error:
            self._refused(context, event, error)
            raise flight_error(error) from error
        except Exception as error:
            failure = _unforeseen(error)
            self._refused(context, event, failure)
            raise flight_error(failure) from error

    def _refused(self, context: Any, event: str, error: SyncFailure) -> None:
        count("memopt_sync_refusals_total", code=error.code)
        node = None
        with contextlib.suppress(SyncFailure):
            node = self.gate.identity(context.peer()).node
        self.audit.write(f"{event}-refused", node=node, code=error.code, problem=error.problem)

    def exchange(self, context: Any, command: bytes, reader: Any, writer: Any) -> None:
        """Serve one push or pull; a failure is told to the client in an ERROR message."""
        channel = Channel(reader, writer, self.limits)
        try:
            if command != protocol.COMMAND:
                # Flight's descriptor is outside our checksum: on a plain wire, a flipped bit.
                raise SyncFailure("corrupt", "the exchange is not for memopt-sync")
            if not self._streams.acquire(blocking=False):
                raise SyncFailure("busy", f"{self.limits.streams} transfers are running")
            try:
                self._exchange(context, channel)
            finally:
                self._streams.release()
        except (flight.FlightError, pa.ArrowException, OSError) as error:
            # The client is gone: what it sent so far stays for it to resume.
            self.audit.write("exchange-broken", problem=str(error)[:200])
        except Exception as error:  # noqa: BLE001 - told to the client and to the audit log
            failure = error if isinstance(error, SyncFailure) else _unforeseen(error)
            self._refused(context, "exchange", failure)
            with contextlib.suppress(flight.FlightError, pa.ArrowException, OSError):
                channel.send(protocol.ERROR, protocol.encode_error(failure))
                # Ending the call with the client's window still on the way would reset the stream,
                # and the client might never read why.
                channel.drain(2 * protocol.WINDOW_BYTES)

    def _exchange(self, context: Any, channel: Channel) -> None:
        hello = channel.receive(protocol.HELLO).fields
        operation = hello.get("operation")
        if operation == "push":
            check_keys("hello", hello, ("operation", "adapter"))
            adapter = check_adapter(hello["adapter"])
            identity = self.caller(context, "push", adapter)
            take_push(self, channel, adapter, identity, self._busy(context))
        elif operation == "pull":
            check_keys("hello", hello, ("operation", "adapter", "sequence", "weights_hash"))
            adapter = check_adapter(hello["adapter"])
            node = self.caller(context, "pull", adapter).node
            sequence = send_versions(self.store, channel, adapter, hello, self._busy(context))
            self.audit.write("pull", adapter=adapter, node=node, sequence=sequence)
        else:
            raise SyncFailure("malformed", "hello asks neither for push nor pull")

    def _busy(self, context: Any) -> Callable[[], contextlib.AbstractContextManager[None]]:
        return lambda: self.gate.busy(context.peer())

    def act(self, context: Any, name: str, body: bytes) -> dict[str, Any]:
        """Answer one action."""
        if len(body) > ACTION_BYTES:
            raise SyncFailure("too-large", f"the action's body is over {ACTION_BYTES} bytes")
        request = strict_json(body or b"{}", what=f"action {name[:40]!r}")
        if name == "status":
            if "adapter" not in request:
                return {"adapters": [self._describe(n) for n in self.visible(context)]}
            adapter = check_adapter(request["adapter"])
            self.caller(context, None, adapter)
            return {"adapters": [self._describe(adapter)]}
        if name == "history":
            adapter = check_adapter(request.get("adapter"))
            self.caller(context, None, adapter)
            signed = [self.store.signed(adapter, s) for s in self.store.sequences(adapter)]
            return {"adapter": adapter, "versions": [s.to_json() for s in signed]}
        if name == "rollback":
            check_keys("rollback", request, ("signed",))
            return rollback_version(self, self.gate.identity(context.peer()), request["signed"])
        if name == "aggregate":
            return aggregate_version(self, self.gate.identity(context.peer()), request)
        raise SyncFailure("malformed", f"unknown action {name[:40]!r}")

    def _describe(self, adapter: str) -> dict[str, Any]:
        head = self.store.head(adapter)
        if not head.sequence:
            return {"adapter": adapter, "sequence": 0}
        manifest = self.store.signed(adapter, head.sequence).manifest
        return {
            "adapter": adapter,
            "sequence": head.sequence,
            "weights_hash": head.weights_hash,
            "digest": head.digest,
            "node": manifest.node,
            "kind": manifest.kind,
            "time": manifest.time,
            "payload_bytes": manifest.payload_bytes,
            "versions": len(self.store.sequences(adapter)),
        }

    def ticket(self, data: bytes) -> tuple[str, int]:
        """Return adapter and sequence (0: the newest) of ``{"adapter"[, "sequence"]}``."""
        request = strict_json(data, what="ticket")
        adapter = check_adapter(request.get("adapter"))
        return adapter, check_count("sequence", request.get("sequence", 0), 1 << 53)

    def newest(self, adapter: str) -> int:
        """Return the number of an adapter's newest version."""
        sequence = self.store.head(adapter).sequence
        if not sequence:
            raise SyncFailure("not-found", f"adapter {adapter!r} has no version yet")
        return sequence

    def info(self, adapter: str) -> Any:
        """Return the FlightInfo of an adapter's newest version."""
        sequence = self.newest(adapter)
        ticket = flight.Ticket(json.dumps({"adapter": adapter, "sequence": sequence}).encode())
        return flight.FlightInfo(
            WEIGHTS_SCHEMA,
            flight.FlightDescriptor.for_path(adapter),
            [flight.FlightEndpoint(ticket, [])],
            -1,
            -1,
        )


def _unforeseen(error: Exception) -> SyncFailure:
    """Return what a client hears of an error that is not its own: never paths or values."""
    if isinstance(error, MemoptError):
        return SyncFailure("unavailable", f"the server cannot do this: {error.problem}")
    return SyncFailure("unavailable", f"the server failed ({type(error).__name__})")
