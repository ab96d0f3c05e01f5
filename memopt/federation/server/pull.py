"""The server's half of a pull: the signed chain the client lacks, or all of the newest version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memopt.federation.delta.arrays import total_bytes
from memopt.federation.failures import SyncFailure
from memopt.federation.limits import check_count, check_hash
from memopt.federation.server.store import Store
from memopt.federation.server.tickets import Busy
from memopt.federation.trust.manifest import Signed
from memopt.federation.trust.vault import Vault
from memopt.federation.wire import protocol
from memopt.federation.wire.channel import Channel, send_chunks

# A manifest is about 700 bytes of JSON: the plan stays far under the message limit.
_MAX_CHAIN = 500


@dataclass(frozen=True, slots=True)
class VersionFile:
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


def plan(store: Store, adapter: str, sequence: int, weights_hash: str) -> list[VersionFile]:
    """Return what brings a client at ``sequence`` up to date.

    Raises:
        SyncFailure: there is no version yet.
    """
    with store.locked(adapter):
        store.newest(adapter)
        head = store.head(adapter)
        if (head.sequence, head.weights_hash) == (sequence, weights_hash):
            return []
        chain = _chain(store, adapter, sequence, weights_hash, head.sequence)
        if chain is not None:
            size = sum(store.vault.size(item.file) for item in chain)
            if size <= total_bytes(store.weights(adapter, head.sequence)) // 2:
                return chain
        newest = store.signed(adapter, head.sequence)
        return [VersionFile(newest, store.snapshot(adapter, head.sequence), True)]


def _chain(
    store: Store, adapter: str, sequence: int, weights_hash: str, newest: int
) -> list[VersionFile] | None:
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
        items.append(VersionFile(signed, payload, False))
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
        parts = store.vault.parts(items[number].file, offset)
        send_chunks(channel, parts, offset, rows[number]["bytes"])
    return items[-1].signed.manifest.sequence if items else 0
