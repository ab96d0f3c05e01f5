"""The Flight methods of the sync server, on a private socket; each hands over at once."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.flight as flight

from memopt.errors import MemoptError
from memopt.federation.delta.arrays import Weights, dtype_name, raw
from memopt.federation.failures import SyncFailure
from memopt.federation.limits import check_adapter, check_count, strict_json
from memopt.federation.server.desk import ACTIONS, Desk
from memopt.federation.wire import protocol
from memopt.federation.wire.channel import Channel

# Rows of do_get hold at most this much of a tensor, far from gRPC's message limit.
_GET_BYTES = 2 << 20
# A Unix socket's path has at most 103 bytes on every system; our folder and a peer's name take 48.
_MAX_SOCKET_FOLDER, _SOCKET_PREFIX = 55, "memopt-"
_BROKEN = (flight.FlightError, pa.ArrowException, OSError)
WEIGHTS_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("dtype", pa.string()),
        ("shape", pa.list_(pa.int64())),
        ("offset", pa.int64()),
        ("data", pa.binary()),
    ]
)


class FlightService(flight.FlightServerBase):  # type: ignore[misc]
    """Flight as pyarrow has it, in front of a :class:`~.desk.Desk`."""

    def __init__(self, desk: Desk) -> None:
        self._store = desk.ledger.store
        self._folder = _socket_folder(self._store.folder / "socket")
        self.path = self._folder / "flight"
        super().__init__(f"grpc+unix://{quote(str(self.path))}")
        self._desk = desk

    def close(self) -> None:
        """Shut down, and remove the socket."""
        self.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        peer = context.peer()
        with self._guarded(peer, "exchange"):
            self._desk.tickets.identity(peer)
        channel = Channel(reader, writer, self._store.limits)
        try:
            if descriptor.command != protocol.COMMAND:
                # Flight's descriptor is outside our checksum: on a plain wire, a flipped bit.
                raise SyncFailure("corrupt", "the exchange is not for memopt-sync")
            self._desk.exchange(peer, channel)
        except _BROKEN as error:
            # The client is gone: what it sent so far stays for it to resume.
            self._desk.ledger.audit.write("exchange-broken", problem=str(error)[:200])
        except Exception as error:  # noqa: BLE001 - told to the client and to the audit log
            failure = _failure(error)
            self._desk.refuse(peer, "exchange", failure)
            with contextlib.suppress(*_BROKEN):
                channel.send(protocol.ERROR, protocol.encode_error(failure))
                # Ending the call with the client's window still on the way would reset the stream,
                # and the client might never read why.
                channel.drain(2 * protocol.WINDOW_BYTES)

    def do_action(self, context: Any, action: Any) -> Iterator[Any]:
        known = action.type in dict(ACTIONS)
        with self._guarded(context.peer(), action.type if known else "action"):
            result = self._desk.act(context.peer(), action.type, action.body.to_pybytes())
        return iter([flight.Result(json.dumps(result).encode())])

    def list_actions(self, context: Any) -> list[tuple[str, str]]:
        with self._guarded(context.peer(), "actions"):
            self._desk.caller(context.peer(), None, None)
        return list(ACTIONS)

    def list_flights(self, context: Any, criteria: bytes) -> Iterator[Any]:
        with self._guarded(context.peer(), "list"):
            infos = [self._info(name) for name in self._desk.visible(context.peer())]
        return iter(infos)

    def get_flight_info(self, context: Any, descriptor: Any) -> Any:
        with self._guarded(context.peer(), "info"):
            path = descriptor.path or [b""]
            adapter = check_adapter(path[0].decode("utf-8", "replace"))
            self._desk.caller(context.peer(), "pull", adapter)
            return self._info(adapter)

    def do_get(self, context: Any, ticket: Any) -> Any:
        with self._guarded(context.peer(), "get"):
            request = strict_json(ticket.ticket, what="ticket")
            adapter = check_adapter(request.get("adapter"))
            sequence = check_count("sequence", request.get("sequence", 0), 1 << 53)
            # Before the adapter is looked up: who may not read it does not learn whether it exists.
            node = self._desk.caller(context.peer(), "pull", adapter).node
            sequence = sequence or self._store.newest(adapter)
            weights = self._store.weights(adapter, sequence)
            self._desk.ledger.audit.write("get", adapter=adapter, sequence=sequence, node=node)
        return flight.GeneratorStream(WEIGHTS_SCHEMA, weight_rows(weights))

    def _info(self, adapter: str) -> Any:
        """Return the FlightInfo of an adapter's newest version."""
        sequence = self._store.newest(adapter)
        ticket = flight.Ticket(json.dumps({"adapter": adapter, "sequence": sequence}).encode())
        return flight.FlightInfo(
            WEIGHTS_SCHEMA,
            flight.FlightDescriptor.for_path(adapter),
            [flight.FlightEndpoint(ticket, [])],
            -1,
            -1,
        )

    @contextlib.contextmanager
    def _guarded(self, peer: str, event: str) -> Iterator[None]:
        """Audit and translate failures; anything unforeseen becomes one error, not a crash."""
        try:
            yield
        except Exception as error:
            failure = _failure(error)
            self._desk.refuse(peer, event, failure)
            raise flight_error(failure) from error


def _failure(error: Exception) -> SyncFailure:
    """Return what a client hears of an error: of one that is not its own never paths or values."""
    if isinstance(error, SyncFailure):
        return error
    if isinstance(error, MemoptError):
        return SyncFailure("unavailable", f"the server cannot do this: {error.problem}")
    return SyncFailure("unavailable", f"the server failed ({type(error).__name__})")


def weight_rows(weights: Weights) -> Iterator[Any]:
    """Yield weights as record batches of :data:`WEIGHTS_SCHEMA`."""
    for name, array in sorted(weights.items()):
        data = raw(array)
        for offset in range(0, max(data.size, 1), _GET_BYTES):
            part = data[offset : offset + _GET_BYTES].tobytes()
            row = ([name], [dtype_name(array)], [list(array.shape)], [offset], [part])
            yield pa.record_batch(
                [pa.array(v, f.type) for v, f in zip(row, WEIGHTS_SCHEMA, strict=True)],
                schema=WEIGHTS_SCHEMA,
            )


def _socket_folder(note: Path) -> Path:
    """Make a folder that only its owner may enter, on a file system that has sockets.

    Args:
        note: file of the store that names the folder, for the next server to remove it after a
            kill: the store's lock says that its server is gone.
    """
    temporary = tempfile.gettempdir()
    if len(temporary) > _MAX_SOCKET_FOLDER:
        temporary = "/tmp"
    if note.is_file():
        old = Path(note.read_text(encoding="utf-8"))
        # Never trust a file with what to remove: only what this function made.
        if old.parent == Path(temporary) and old.name.startswith(_SOCKET_PREFIX):
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_SOCKET_PREFIX, dir=temporary))
    note.write_text(str(folder), encoding="utf-8")
    return folder


def flight_error(error: SyncFailure) -> Exception:
    details = json.dumps(protocol.encode_error(error)).encode()
    kind = {
        "unauthenticated": flight.FlightUnauthenticatedError,
        "forbidden": flight.FlightUnauthorizedError,
        "unavailable": flight.FlightUnavailableError,
        "busy": flight.FlightUnavailableError,
    }.get(error.code, flight.FlightServerError)
    raised: Exception = kind(str(error), details)
    return raised
