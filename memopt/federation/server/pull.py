"""The server's half of a pull: the signed chain the client lacks, or all of the newest version."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.federation.delta.arrays import total_bytes
from memopt.federation.failures import SyncFailure
from memopt.federation.limits import check_count, check_hash
from memopt.federation.trust.signing import Signed
from memopt.federation.trust.vault import Vault
from memopt.federation.wire import protocol

if TYPE_CHECKING:
    from memopt.federation.server.server import Channel
    from memopt.federation.server.store import Store

# A manifest is about 700 bytes of JSON: the plan stays far under the message limit.
_MAX_CHAIN = 500
Busy = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to send: a version, and the file that brings it."""

    signed: Signed
    file: Path
    full: bool

    def describe(self, vault: Vault) -> dict[str, Any]:
        """Return the item's row of the plan."""
        known = self.signed.manifest.payload_sha256
        return {
            "signed": self.signed.to_json(),
            "bytes": vault.size(self.file),
            "sha256": vault.sha256(self.file) if self.full else known,
            "full": self.full,
        }


def plan(store: Store, adapter: str, sequence: int, weights_hash: str) -> list[Item]:
    """Return what brings a client at ``sequence`` up to date.

    Raises:
        SyncFailure: there is no version yet.
    """
    with store.locked(adapter):
        head = store.head(adapter)
        if not head.sequence:
            raise SyncFailure(
                "not-found", f"adapter {adapter!r} has no version yet", fix="push one first"
            )
        if (head.sequence, head.weights_hash) == (sequence, weights_hash):
            return []
        chain = _chain(store, adapter, sequence, weights_hash, head.sequence)
        if chain is not None:
            size = sum(store.vault.size(item.file) for item in chain)
            if size <= total_bytes(store.weights(adapter, head.sequence)) // 2:
                return chain
        newest = store.signed(adapter, head.sequence)
        return [Item(newest, store.snapshot(adapter, head.sequence), True)]


def _chain(
    store: Store, adapter: str, sequence: int, weights_hash: str, newest: int
) -> list[Item] | None:
    if not 0 < sequence < newest or newest - sequence > _MAX_CHAIN:
        return None
    if sequence not in store.sequences(adapter):
        return None
    if store.signed(adapter, sequence).manifest.new_hash != weights_hash:
        return None
    items = []
    for number in range(sequence + 1, newest + 1):
        signed, payload = store.signed(adapter, number), store.payload(adapter, number)
        if payload is None or signed.manifest.kind != "delta":
            return None
        items.append(Item(signed, payload, False))
    return items


def send_versions(
    store: Store, channel: Channel, adapter: str, hello: Mapping[str, Any], busy: Busy
) -> int:
    """Send the plan, then whatever the client gets of it, until it says BYE; return the version
    that the plan leads to, 0 when the client was up to date."""
    sequence = check_count("sequence", hello["sequence"], 1 << 53)
    weights_hash = check_hash("weights_hash", hello["weights_hash"])
    with busy():
        items = plan(store, adapter, sequence, weights_hash)
        rows = [item.describe(store.vault) for item in items]
    channel.send(protocol.PLAN, {"items": rows})
    while (frame := channel.receive(protocol.GET, protocol.BYE)).kind != protocol.BYE:
        if not items:
            raise SyncFailure("malformed", "there is nothing to get")
        number = check_count("item", frame.fields.get("item"), len(items) - 1)
        offset = check_count("offset", frame.fields.get("offset"), rows[number]["bytes"])
        _send_file(
            channel, store.vault.parts(items[number].file, offset), offset, rows[number]["bytes"]
        )
    return items[-1].signed.manifest.sequence if items else 0


def _send_file(channel: Channel, parts: Iterator[bytes], offset: int, total: int) -> None:
    acknowledged = offset
    while acknowledged < total:
        while offset < total and offset - acknowledged < protocol.WINDOW_BYTES:
            data = next(parts, b"")
            if not data or offset + len(data) > total:
                raise SyncFailure("storage", "a payload on the server changed its length")
            channel.send(protocol.CHUNK, {"offset": offset}, data)
            offset += len(data)
        frame = channel.receive(protocol.ACK)
        reached = check_count("offset", frame.fields.get("offset"), offset)
        if reached <= acknowledged:
            raise SyncFailure("out-of-order", "an acknowledgement does not move on")
        acknowledged = reached
