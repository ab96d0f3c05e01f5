"""The server's half of a push: admit the signed manifest, take the chunks, check, commit."""

from __future__ import annotations

import hashlib
from pathlib import Path

from memopt.federation.delta.arrays import require_same
from memopt.federation.delta.payload import KINDS
from memopt.federation.failures import SyncFailure
from memopt.federation.server.ledger import Ledger
from memopt.federation.server.tickets import Busy, Identity
from memopt.federation.server.uploads import Uploads
from memopt.federation.trust.manifest import Signed, VersionManifest
from memopt.federation.wire import protocol
from memopt.federation.wire.channel import Channel, receive_chunks
from memopt.metrics import count


def receive_version(
    ledger: Ledger,
    uploads: Uploads,
    channel: Channel,
    adapter: str,
    identity: Identity,
    busy: Busy,
) -> None:
    """Serve one push from STATE to DONE."""
    head, limits = ledger.store.head(adapter), ledger.store.limits
    channel.send(
        protocol.STATE,
        {
            "sequence": head.sequence,
            "weights_hash": head.weights_hash,
            "digest": head.digest,
            "payload_bytes": limits.payload_bytes,
            "total_bytes": limits.total_bytes,
        },
    )
    offer = channel.receive(protocol.OFFER, protocol.BYE)
    if offer.kind == protocol.BYE:
        return
    signed = ledger.verify(offer.fields.get("signed"), identity, adapter)
    manifest = signed.manifest
    if manifest.kind not in KINDS:
        raise SyncFailure("malformed", f"{manifest.kind} is an action, not a push")
    already = ledger.has(manifest)
    if not already:
        with uploads.open(manifest) as upload:
            channel.send(protocol.RESUME, {"offset": upload.size})
            receive_chunks(channel, upload, manifest.payload_bytes)
            with busy():
                already = _finish(ledger, identity, signed, upload.path)
    fields = {"sequence": manifest.sequence, "digest": manifest.digest(), "already": already}
    channel.send(protocol.DONE, fields)


def _finish(ledger: Ledger, identity: Identity, signed: Signed, path: Path) -> bool:
    """Commit a whole upload; return whether its version was there already."""
    manifest = signed.manifest
    # Read once: what is hashed is what is decoded.
    payload = ledger.store.vault.read(path)
    if hashlib.sha256(payload).hexdigest() != manifest.payload_sha256:
        path.unlink(missing_ok=True)
        raise SyncFailure("corrupt", "the payload does not match its signed hash")
    with ledger.store.locked(manifest.adapter):
        # An upload may take hours: the signer may have lost its trust, the certificate ended.
        ledger.trust.verify(signed, fresh=False)
        identity.require_valid()
        # Another push may have come in while this one was on the wire.
        if ledger.has(manifest):
            path.unlink(missing_ok=True)
            return True
        _commit(ledger, signed, path, payload)
    count("memopt_sync_pushes_total", kind=manifest.kind)
    return False


def _commit(ledger: Ledger, signed: Signed, path: Path, payload: bytes) -> None:
    manifest: VersionManifest = signed.manifest
    try:
        base = ledger.store.weights(manifest.adapter, manifest.sequence - 1)
        weights = ledger.store.decode(payload, base, kind=manifest.kind)
        require_same(manifest.new_hash, weights, what="the pushed weights")
    except SyncFailure as error:
        # It will never decode to anything else: keep nothing of it.
        if error.code not in ("storage", "not-found"):
            path.unlink(missing_ok=True)
        raise
    ledger.commit("push", signed, path, weights)
