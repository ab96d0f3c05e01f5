"""The Flight methods of the sync server, on a private socket; each hands over at once."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.flight as flight

from memopt.federation.delta.arrays import Weights, dtype_name, raw
from memopt.federation.failures import SyncFailure
from memopt.federation.limits import check_adapter
from memopt.federation.wire import protocol

if TYPE_CHECKING:
    from memopt.federation.server.server import SyncServer

ACTIONS = (
    ("status", "the newest version of every adapter, or of one: {adapter}"),
    ("history", "the signed manifests of an adapter: {adapter}"),
    ("rollback", "make an old version the newest: {signed} manifest of kind rollback"),
    ("aggregate", "average adapters into one, signed by the server: {signed, request}"),
)
# Rows of do_get hold at most this much of a tensor, far from gRPC's message limit.
_GET_BYTES = 2 << 20
# A Unix socket's path has at most 103 bytes on every system; our folder and a peer's name take 48.
_MAX_SOCKET_FOLDER, _SOCKET_PREFIX = 55, "memopt-"
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
    """Flight as pyarrow has it, in front of a :class:`~.server.SyncServer`."""

    def __init__(self, server: SyncServer) -> None:
        self._folder = _socket_folder(server.store.folder / "socket")
        self.path = self._folder / "flight"
        super().__init__(f"grpc+unix://{quote(str(self.path))}")
        self._server = server

    def close(self) -> None:
        """Shut down, and remove the socket."""
        self.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        with self._server.guarded(context, "exchange"):
            self._server.gate.identity(context.peer())
        self._server.exchange(context, descriptor.command or b"", reader, writer)

    def do_action(self, context: Any, action: Any) -> Iterator[Any]:
        known = action.type in dict(ACTIONS)
        with self._server.guarded(context, action.type if known else "action"):
            result = self._server.act(context, action.type, action.body.to_pybytes())
        return iter([flight.Result(json.dumps(result).encode())])

    def list_actions(self, context: Any) -> list[tuple[str, str]]:
        with self._server.guarded(context, "actions"):
            self._server.caller(context, None, None)
        return list(ACTIONS)

    def list_flights(self, context: Any, criteria: bytes) -> Iterator[Any]:
        with self._server.guarded(context, "list"):
            infos = [self._server.info(name) for name in self._server.visible(context)]
        return iter(infos)

    def get_flight_info(self, context: Any, descriptor: Any) -> Any:
        with self._server.guarded(context, "info"):
            path = descriptor.path or [b""]
            adapter = check_adapter(path[0].decode("utf-8", "replace"))
            self._server.caller(context, "pull", adapter)
            return self._server.info(adapter)

    def do_get(self, context: Any, ticket: Any) -> Any:
        with self._server.guarded(context, "get"):
            adapter, sequence = self._server.ticket(ticket.ticket)
            # Before the adapter is looked up: who may not read it does not learn whether it exists.
            node = self._server.caller(context, "pull", adapter).node
            sequence = sequence or self._server.newest(adapter)
            weights = self._server.store.weights(adapter, sequence)
            self._server.audit.write("get", adapter=adapter, sequence=sequence, node=node)
        return flight.GeneratorStream(WEIGHTS_SCHEMA, weight_rows(weights))


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
