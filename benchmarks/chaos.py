"""A bad network for tests: a TCP proxy that drops, delays, truncates, flips, doubles and stalls."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

FAULTS = ("none", "drop", "delay", "truncate", "flip", "duplicate", "stall")
_READ = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to one connection, at byte ``at`` of one direction (``up``: to the server).

    drop: both ends see a reset. truncate: the rest of the direction is swallowed, then closed.
    flip: bit ``bit`` of that byte is inverted. duplicate: the piece at that byte is sent twice.
    delay: every piece waits ``seconds``. stall: nothing more is passed on, the sockets stay open.
    """

    kind: str = "none"
    at: int = 0
    direction: str = "up"
    bit: int = 0
    seconds: float = 0.0


class ChaosProxy:
    """Listens on a free loopback port and passes to ``target``, one fault per connection.

    Args:
        target: host and port of the server; may be changed while running.
        choose: called with the connection's number, returns its fault.
        record: keep what clients sent, one bytes object per connection, for replaying.
    """

    def __init__(
        self,
        target: tuple[str, int],
        choose: Callable[[int], Fault] = lambda number: Fault(),
        *,
        record: bool = False,
    ) -> None:
        self.target = target
        self._choose = choose
        self._record = record
        self.recorded: dict[int, bytearray] = {}
        self.faults = 0
        self._number = 0
        self._closed = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="chaos", daemon=True).start()

    def __enter__(self) -> ChaosProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop and drop every connection."""
        self._closed.set()
        self._listener.close()
        with self._lock:
            for each in list(self._sockets):
                _reset(each)

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._number += 1
            fault = self._choose(self._number)
            try:
                server = socket.create_connection(self.target, timeout=5)
                server.settimeout(None)
            except OSError:
                _reset(client)
                continue
            with self._lock:
                self._sockets |= {client, server}
            number = self._number
            for source, sink, direction in ((client, server, "up"), (server, client, "down")):
                threading.Thread(
                    target=self._pump, args=(number, source, sink, direction, fault), daemon=True
                ).start()

    def _pump(
        self, number: int, source: socket.socket, sink: socket.socket, way: str, fault: Fault
    ) -> None:
        mine = fault if fault.direction == way else Fault()
        passed = 0
        done = False
        try:
            while data := source.recv(_READ):
                if self._record and way == "up":
                    self.recorded.setdefault(number, bytearray()).extend(data)
                here = mine.at - passed
                hit = not done and 0 <= here < len(data)
                passed += len(data)
                if mine.kind == "delay":
                    time.sleep(mine.seconds)
                elif hit and mine.kind != "none":
                    done = True
                    self.faults += 1
                    if not self._strike(mine, data, here, sink):
                        return
                    continue
                sink.sendall(data)
        except OSError:
            # Breaking connections is what this proxy is for: either side may be gone.
            return
        finally:
            if not (done and mine.kind == "stall"):
                for each in (source, sink):
                    _reset(each)
                    with self._lock:
                        self._sockets.discard(each)

    def _strike(self, fault: Fault, data: bytes, here: int, sink: socket.socket) -> bool:
        """Do the fault to this piece; False ends the connection."""
        if fault.kind == "flip":
            changed = bytearray(data)
            changed[here] ^= 1 << (fault.bit % 8)
            sink.sendall(changed)
            return True
        if fault.kind == "duplicate":
            sink.sendall(data + data[here:])
            return True
        sink.sendall(data[:here])
        if fault.kind == "stall":
            self._closed.wait()
        return False


def _reset(each: socket.socket) -> None:
    # shutdown wakes a thread that is blocked in recv on this socket; close alone does not.
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()
