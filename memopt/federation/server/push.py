"""The server's half of a push: admit the signed manifest, take the chunks, check, commit."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.errors import ConfigurationError
from memopt.federation.delta.arrays import require_same
from memopt.federation.delta.payload import KINDS
from memopt.federation.failures import SyncFailure
from memopt.federation.limits import canonical_json, check_adapter, check_count, check_keys
from memopt.federation.server.gate import Identity
from memopt.federation.server.store import storage
from memopt.federation.trust.signing import NO_HASH, Manifest, Signed, parse_signed
from memopt.federation.wire import protocol
from memopt.metrics import count

if TYPE_CHECKING:
    from memopt.federation.server.pull import Busy
    from memopt.federation.server.server import Channel, SyncServer

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()


def take_push(
    server: SyncServer, channel: Channel, adapter: str, identity: Identity, busy: Busy
) -> None:
    """Serve one push from STATE to DONE."""
    head = server.store.head(adapter)
    channel.send(
        protocol.STATE,
        {
            "sequence": head.sequence,
            "weights_hash": head.weights_hash,
            "digest": head.digest,
            "payload_bytes": server.limits.payload_bytes,
            "total_bytes": server.limits.total_bytes,
        },
    )
    offer = channel.receive(protocol.OFFER, protocol.BYE)
    if offer.kind == protocol.BYE:
        return
    signed = _verified(server, identity, adapter, offer.fields.get("signed"))
    manifest = signed.manifest
    if manifest.kind not in KINDS:
        raise SyncFailure("malformed", f"{manifest.kind} is an action, not a push")
    if _admit(server, manifest) == "done":
        _done(channel, manifest, already=True)
        return
    with server.uploads.open(manifest) as upload:
        channel.send(protocol.RESUME, {"offset": upload.size})
        while upload.size < manifest.payload_bytes:
            frame = channel.receive(protocol.CHUNK)
            offset = check_count("offset", frame.fields.get("offset"), manifest.payload_bytes)
            with storage("upload"):
                upload.append(offset, frame.body)
            channel.send(protocol.ACK, {"offset": upload.size})
        with busy():
            already = _finish(server, identity, signed, upload.path)
    _done(channel, manifest, already=already)


def _done(channel: Channel, manifest: Manifest, *, already: bool) -> None:
    fields = {"sequence": manifest.sequence, "digest": manifest.digest(), "already": already}
    channel.send(protocol.DONE, fields)


def _verified(server: SyncServer, identity: Identity, adapter: str | None, value: object) -> Signed:
    signed = parse_signed(value, server.limits)
    manifest = signed.manifest
    if adapter is not None and manifest.adapter != adapter:
        raise SyncFailure("forbidden", f"the manifest is for adapter {manifest.adapter!r}")
    if identity.node is not None and identity.node != manifest.node:
        raise SyncFailure(
            "forbidden",
            f"certificate of {identity.node!r}, manifest of {manifest.node!r}",
            fix="push with the node's own certificate and key",
        )
    server.trust.verify(signed, fresh=True)
    return signed


def _admit(server: SyncServer, manifest: Manifest) -> str:
    """Check a manifest against the newest version; "done" when it is that version already."""
    head = server.store.head(manifest.adapter)
    if head.digest == manifest.digest():
        return "done"
    if manifest.sequence <= head.sequence:
        if _was_here(server, manifest):
            raise SyncFailure(
                "replay",
                f"version {manifest.sequence} was committed before, the newest is {head.sequence}",
            )
        raise SyncFailure(
            "conflict", f"version {manifest.sequence} is taken, the newest is {head.sequence}"
        )
    if manifest.sequence != head.sequence + 1 or manifest.previous != head.digest:
        raise SyncFailure(
            "conflict", f"version {manifest.sequence} does not follow {head.sequence}"
        )
    if manifest.base_hash != head.weights_hash:
        raise SyncFailure(
            "need-full",
            f"the delta is made for {manifest.base_hash[:16]}, here is {head.weights_hash[:16]}",
            fix="send the full weights",
        )
    return "new"


def _was_here(server: SyncServer, manifest: Manifest) -> bool:
    if manifest.sequence not in server.store.sequences(manifest.adapter):
        return False
    old = server.store.signed(manifest.adapter, manifest.sequence).manifest
    return old.digest() == manifest.digest()


def _finish(server: SyncServer, identity: Identity, signed: Signed, path: Path) -> bool:
    manifest = signed.manifest
    # Read once: what is hashed is what is decoded.
    payload = server.store.vault.read(path)
    if hashlib.sha256(payload).hexdigest() != manifest.payload_sha256:
        path.unlink(missing_ok=True)
        raise SyncFailure("corrupt", "the payload does not match its signed hash")
    with server.store.locked(manifest.adapter):
        # An upload may take hours: the signer may have lost its trust, the certificate ended.
        server.trust.verify(signed, fresh=False)
        identity.require_valid()
        # Another push may have come in while this one was on the wire.
        if _admit(server, manifest) == "done":
            path.unlink(missing_ok=True)
            return True
        try:
            base = server.store.weights(manifest.adapter, manifest.sequence - 1)
            weights = server.store.decode(payload, base, kind=manifest.kind)
            require_same(manifest.new_hash, weights, what="the pushed weights")
        except SyncFailure as error:
            # It will never decode to anything else: keep nothing of it.
            if error.code not in ("storage", "not-found"):
                path.unlink(missing_ok=True)
            raise
        server.store.commit(signed, path, weights)
    count("memopt_sync_pushes_total", kind=manifest.kind)
    _record(server, "push", manifest)
    return False


def _record(server: SyncServer, event: str, manifest: Manifest, **more: object) -> None:
    server.audit.write(
        event,
        adapter=manifest.adapter,
        node=manifest.node,
        sequence=manifest.sequence,
        kind=manifest.kind,
        digest=manifest.digest(),
        payload_bytes=manifest.payload_bytes,
        **more,
    )


def rollback_version(server: SyncServer, identity: Identity, value: object) -> dict[str, Any]:
    """Commit a signed rollback: the weights of an old version as the newest."""
    # A rollback's signature asks for the role admin.
    signed = _verified(server, identity, None, value)
    manifest = signed.manifest
    if manifest.kind != "rollback" or manifest.payload_sha256 != EMPTY_SHA256:
        raise SyncFailure("malformed", "the manifest is not a rollback's")
    with server.store.locked(manifest.adapter):
        if _admit(server, manifest) == "new":
            weights = server.store.weights(manifest.adapter, manifest.target)
            require_same(manifest.new_hash, weights, what=f"version {manifest.target}")
            server.store.commit(signed, None, weights)
            _record(server, "rollback", manifest)
    return {"sequence": manifest.sequence, "digest": manifest.digest()}


def aggregate_version(
    server: SyncServer, identity: Identity, request: Mapping[str, Any]
) -> dict[str, Any]:
    """Average the newest versions of several adapters into one, signed by the server's key.

    ``request`` is an admin's signed order, and what the order is: its hash is the order's
    ``payload_sha256``, and the version the order follows must still be the newest. So the server
    signs nothing for somebody without a key, on a plain transport as little as with TLS.
    """
    from memopt.federation.delta.aggregate import AggregateSettings, aggregate
    from memopt.federation.delta.codecs import INT8_LEVELS
    from memopt.federation.delta.compute import compute_delta
    from memopt.federation.delta.settings import CODEC_NAMES, DeltaSettings

    check_keys("aggregate", request, ("signed", "request"))
    order = _verified(server, identity, None, request["signed"]).manifest
    body = canonical_json(request["request"])
    if order.kind != "aggregate" or order.payload_sha256 != hashlib.sha256(body).hexdigest():
        raise SyncFailure("malformed", "the order is not signed for this request")
    request = check_keys(
        "aggregate request", request["request"], ("inputs", "weights", "settings", "codec")
    )
    if request["codec"] not in CODEC_NAMES[:-1]:
        raise SyncFailure("unknown-codec", "the codec of the aggregate is unknown")
    if server.key is None:
        raise SyncFailure(
            "forbidden",
            "the server has no signing key, so it cannot make versions",
            fix="run: memopt sync keygen NODE --role push, NODE being the --node of serve",
        )
    adapter, inputs = order.adapter, request["inputs"]
    if not isinstance(inputs, list) or not inputs or len(inputs) > 1024:
        raise SyncFailure("malformed", "inputs is not a list of 1 to 1024 adapters")
    if not isinstance(request["settings"], dict):
        raise SyncFailure("malformed", "settings is not an object")
    clients = []
    for name in inputs:
        # An average shows what it is made of: the admin must be allowed to read each input.
        server.trust.allow(order.node, "pull", check_adapter(name))
        sequence = server.store.head(name).sequence
        if not sequence:
            raise SyncFailure("not-found", f"adapter {name!r} has no version yet")
        clients.append(server.store.weights(name, sequence))
    try:
        settings = AggregateSettings.from_dict(request["settings"])
    except ConfigurationError as error:
        raise SyncFailure("malformed", error.problem, fix=error.fix) from error
    result = aggregate(clients, request["weights"], settings)
    with server.store.locked(adapter):
        _admit(server, order)
        head = server.store.head(adapter)
        # Made anew from all clients each time: what this delta leaves out is in the next one.
        held = server.store.weights(adapter, head.sequence)
        chosen = DeltaSettings(codec=request["codec"], levels=INT8_LEVELS, delta_threshold=0)
        delta = compute_delta(held, result.weights, chosen)
        manifest = Manifest(
            adapter=adapter,
            node=server.node,
            kind=delta.kind,
            sequence=head.sequence + 1,
            base_hash=head.weights_hash if head.sequence else NO_HASH,
            new_hash=delta.new_hash,
            previous=head.digest,
            payload_sha256=hashlib.sha256(delta.payload).hexdigest(),
            payload_bytes=len(delta.payload),
            time=int(time.time()),
        )
        signed = server.key.sign(manifest)
        server.trust.verify(signed, fresh=True)
        path = server.uploads.scratch(delta.payload)
        server.store.commit(signed, path, delta.received)
    _record(server, "aggregate", manifest, by=order.node)
    return {
        "sequence": manifest.sequence,
        "digest": manifest.digest(),
        "by": order.node,
        "error": result.error,
        "left_out": list(result.left_out),
        "clipped": list(result.clipped),
    }
