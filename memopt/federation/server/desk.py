"""What the server answers, whatever brings the question: pushes, pulls and actions."""

from __future__ import annotations

import contextlib
import threading
from functools import partial
from typing import Any

from memopt.federation.failures import SyncFailure
from memopt.federation.limits import check_adapter, check_keys, strict_json
from memopt.federation.server import orders
from memopt.federation.server.ledger import Ledger
from memopt.federation.server.pull import send_versions
from memopt.federation.server.push import receive_version
from memopt.federation.server.tickets import Identity, Tickets
from memopt.federation.server.uploads import Uploads
from memopt.federation.wire import protocol
from memopt.federation.wire.channel import Channel
from memopt.metrics import count

ACTIONS = (
    ("status", "the newest version of every adapter, or of one: {adapter}"),
    ("history", "the signed manifests of an adapter: {adapter}"),
    ("rollback", "make an old version the newest: {signed} manifest of kind rollback"),
    ("aggregate", "average adapters into one, signed by the server: {signed, request}"),
)
# Orders are small: the largest names 1,024 adapters of 100 characters.
ACTION_BYTES = 256 * 1024


class Desk:
    """Answers callers, each known by the name of its connection (``peer``).

    Args:
        ledger, uploads: what is kept.
        tickets: who is on which connection.
        signer: signs what the server makes itself.
    """

    def __init__(
        self, ledger: Ledger, uploads: Uploads, tickets: Tickets, signer: orders.Signer
    ) -> None:
        self.ledger = ledger
        self.tickets = tickets
        self._uploads = uploads
        self._signer = signer
        self._streams = threading.BoundedSemaphore(ledger.store.limits.streams)

    def caller(self, peer: str, role: str | None, adapter: str | None) -> Identity:
        """Return who calls; with TLS the node must have ``role`` (any role for None)."""
        identity = self.tickets.identity(peer)
        if identity.node is not None:
            self.ledger.trust.allow(identity.node, role, adapter)
        return identity

    def visible(self, peer: str) -> list[str]:
        """Return the adapters that the caller may look at."""
        identity = self.caller(peer, None, None)
        names = self.ledger.store.adapters()
        if identity.node is None:
            return names
        node = self.ledger.trust.nodes().get(identity.node)
        return [name for name in names if node is not None and node.may(None, name)]

    def refuse(self, peer: str, event: str, error: SyncFailure) -> None:
        """Count and log a refusal."""
        count("memopt_sync_refusals_total", code=error.code)
        node = None
        with contextlib.suppress(SyncFailure):
            node = self.tickets.identity(peer).node
        self.ledger.audit.write(
            f"{event}-refused", node=node, code=error.code, problem=error.problem
        )

    def exchange(self, peer: str, channel: Channel) -> None:
        """Serve one push or pull."""
        if not self._streams.acquire(blocking=False):
            limit = self.ledger.store.limits.streams
            raise SyncFailure("busy", f"{limit} transfers are running")
        try:
            self._exchange(peer, channel)
        finally:
            self._streams.release()

    def _exchange(self, peer: str, channel: Channel) -> None:
        hello = channel.receive(protocol.HELLO).fields
        operation = hello.get("operation")
        busy = partial(self.tickets.busy, peer)
        if operation == "push":
            check_keys("hello", hello, ("operation", "adapter"))
            adapter = check_adapter(hello["adapter"])
            identity = self.caller(peer, "push", adapter)
            receive_version(self.ledger, self._uploads, channel, adapter, identity, busy)
        elif operation == "pull":
            check_keys("hello", hello, ("operation", "adapter", "sequence", "weights_hash"))
            adapter = check_adapter(hello["adapter"])
            node = self.caller(peer, "pull", adapter).node
            sequence = send_versions(self.ledger.store, channel, adapter, hello, busy)
            self.ledger.audit.write("pull", adapter=adapter, node=node, sequence=sequence)
        else:
            raise SyncFailure("malformed", "hello asks neither for push nor pull")

    def act(self, peer: str, name: str, body: bytes) -> dict[str, Any]:
        """Answer one action."""
        if len(body) > ACTION_BYTES:
            raise SyncFailure("too-large", f"the action's body is over {ACTION_BYTES} bytes")
        request = strict_json(body or b"{}", what=f"action {name[:40]!r}")
        store, ledger = self.ledger.store, self.ledger
        if name == "status" and "adapter" not in request:
            return {"adapters": [self._describe(n) for n in self.visible(peer)]}
        if name in ("status", "history"):
            adapter = check_adapter(request.get("adapter"))
            self.caller(peer, None, adapter)
            if name == "status":
                return {"adapters": [self._describe(adapter)]}
            signed = [store.signed(adapter, s).to_json() for s in store.sequences(adapter)]
            return {"adapter": adapter, "versions": signed}
        if name == "rollback":
            check_keys("rollback", request, ("signed",))
            return orders.rollback(ledger, self.tickets.identity(peer), request["signed"])
        if name == "aggregate":
            identity = self.tickets.identity(peer)
            return orders.average(ledger, self._uploads, self._signer, identity, request)
        raise SyncFailure("malformed", f"unknown action {name[:40]!r}")

    def _describe(self, adapter: str) -> dict[str, Any]:
        store = self.ledger.store
        head = store.head(adapter)
        if not head.sequence:
            return {"adapter": adapter, "sequence": 0}
        manifest = store.signed(adapter, head.sequence).manifest
        return {
            "adapter": adapter,
            "sequence": head.sequence,
            "weights_hash": head.weights_hash,
            "digest": head.digest,
            "node": manifest.node,
            "kind": manifest.kind,
            "time": manifest.time,
            "payload_bytes": manifest.payload_bytes,
            "versions": len(store.sequences(adapter)),
        }
