"""Who is on which connection: the gate writes it down, the server looks it up by Flight's peer."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from memopt.federation.failures import SyncFailure
from memopt.federation.limits import Limits

# Inside, a caller may be silent: the server is at work for it.
Busy = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who is on a connection; ``node`` is None where the transport proves nothing (plain)."""

    node: str | None
    expires: float = float("inf")  # end of the certificate, Unix seconds

    def require_valid(self) -> Identity:
        """Raise ``unauthenticated`` when the certificate has ended; return the identity."""
        if self.expires < time.time():
            raise SyncFailure("unauthenticated", "the client's certificate has expired meanwhile")
        return self


class Tickets:
    """The identities of the open connections, each under the random ticket of its connection.

    Args:
        limits: connections in all, and those of one node.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._identities: dict[str, Identity] = {}
        self._busy: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, ticket: str, identity: Identity) -> None:
        """Let a connection in.

        Raises:
            SyncFailure: there are as many as there may be.
        """
        with self._lock:
            # Checked and added at once: two connections cannot both be the last allowed one.
            theirs = [i for i in self._identities.values() if i.node == identity.node]
            if len(self._identities) >= self._limits.connections:
                raise SyncFailure("busy", f"more than {self._limits.connections} connections")
            if identity.node and len(theirs) >= self._limits.node_connections:
                raise SyncFailure(
                    "busy",
                    f"node {identity.node!r} has {self._limits.node_connections} connections",
                )
            self._identities[ticket] = identity

    def remove(self, ticket: str) -> None:
        """Forget a connection, if it is there."""
        with self._lock:
            self._identities.pop(ticket, None)

    def identity(self, peer: str) -> Identity:
        """Return who is behind the inner connection ``peer`` (as ``ServerCallContext.peer()``).

        Raises:
            SyncFailure: the connection did not come through the gate, or its certificate ended.
        """
        with self._lock:
            identity = self._identities.get(_ticket(peer))
        if identity is None:
            raise SyncFailure("unauthenticated", "this connection did not come through the gate")
        return identity.require_valid()

    @contextlib.contextmanager
    def busy(self, peer: str) -> Iterator[None]:
        """While inside, the connection ``peer`` may be silent: the server is working for it."""
        ticket = _ticket(peer)
        with self._lock:
            self._busy[ticket] += 1
        try:
            yield
        finally:
            with self._lock:
                self._busy[ticket] -= 1
                if not self._busy[ticket]:
                    del self._busy[ticket]

    def is_busy(self, ticket: str) -> bool:
        """Whether the server is at work for the connection of this ticket."""
        return ticket in self._busy


def _ticket(peer: str) -> str:
    """Return the last part of a peer's name, ``unix:/folder/ticket``."""
    return peer.rpartition("/")[2]
