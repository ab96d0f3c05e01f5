"""An admin's signed orders: an old version made the newest, an average made by the server."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memopt.errors import ConfigurationError
from memopt.federation.delta.aggregate import Aggregate, aggregate
from memopt.federation.delta.arrays import require_same
from memopt.federation.delta.codecs import INT8_LEVELS
from memopt.federation.delta.compute import compute_delta
from memopt.federation.delta.factors import AggregateSettings
from memopt.federation.delta.settings import CODEC_NAMES, DeltaSettings
from memopt.federation.failures import SyncFailure
from memopt.federation.limits import canonical_json, check_adapter, check_keys
from memopt.federation.server.ledger import Ledger
from memopt.federation.server.tickets import Identity
from memopt.federation.server.uploads import Uploads
from memopt.federation.trust.manifest import Signed, VersionManifest
from memopt.federation.trust.signing import SigningKey

_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_MAX_INPUTS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Signer:
    """The key and the name under which the server signs what it makes itself."""

    node: str
    key: SigningKey | None


def rollback(ledger: Ledger, identity: Identity, value: object) -> dict[str, Any]:
    """Commit a signed rollback: the weights of an old version as the newest."""
    # A rollback's signature asks for the role admin.
    signed = ledger.verify(value, identity)
    manifest = signed.manifest
    if manifest.kind != "rollback" or manifest.payload_sha256 != _EMPTY_SHA256:
        raise SyncFailure("malformed", "the manifest is not a rollback's")
    with ledger.store.locked(manifest.adapter):
        if not ledger.has(manifest):
            weights = ledger.store.weights(manifest.adapter, manifest.target)
            require_same(manifest.new_hash, weights, what=f"version {manifest.target}")
            ledger.commit("rollback", signed, None, weights)
    return {"sequence": manifest.sequence, "digest": manifest.digest()}


def average(
    ledger: Ledger,
    uploads: Uploads,
    signer: Signer,
    identity: Identity,
    message: Mapping[str, Any],
) -> dict[str, Any]:
    """Average the newest versions of several adapters into one, signed by the server's key.

    ``message`` is an admin's signed order, and what the order is: its hash is the order's
    ``payload_sha256``, and the version the order follows must still be the newest. So the server
    signs nothing for somebody without a key, on a plain transport as little as with TLS.
    """
    check_keys("aggregate", message, ("signed", "request"))
    order = ledger.verify(message["signed"], identity).manifest
    body = canonical_json(message["request"])
    if order.kind != "aggregate" or order.payload_sha256 != hashlib.sha256(body).hexdigest():
        raise SyncFailure("malformed", "the order is not signed for this request")
    request = _check_request(message["request"])
    if signer.key is None:
        raise SyncFailure(
            "forbidden",
            "the server has no signing key, so it cannot make versions",
            fix="run: memopt sync keygen NODE --role push, NODE being the --node of serve",
        )
    result = _average(ledger, order, request)
    signed = _commit(ledger, uploads, signer.node, signer.key, order, result, request["codec"])
    return {
        "sequence": signed.manifest.sequence,
        "digest": signed.manifest.digest(),
        "by": order.node,
        "error": result.error,
        "left_out": list(result.left_out),
        "clipped": list(result.clipped),
    }


def _check_request(value: object) -> dict[str, Any]:
    request = check_keys("aggregate request", value, ("inputs", "weights", "settings", "codec"))
    if request["codec"] not in CODEC_NAMES[:-1]:
        raise SyncFailure("unknown-codec", "the codec of the aggregate is unknown")
    inputs = request["inputs"]
    if not isinstance(inputs, list) or not 0 < len(inputs) <= _MAX_INPUTS:
        raise SyncFailure("malformed", f"inputs is not a list of 1 to {_MAX_INPUTS} adapters")
    if not isinstance(request["settings"], dict):
        raise SyncFailure("malformed", "settings is not an object")
    return request


def _average(ledger: Ledger, order: VersionManifest, request: Mapping[str, Any]) -> Aggregate:
    clients = []
    for name in request["inputs"]:
        # An average shows what it is made of: the admin must be allowed to read each input.
        ledger.trust.allow(order.node, "pull", check_adapter(name))
        clients.append(ledger.store.weights(name, ledger.store.newest(name)))
    try:
        settings = AggregateSettings.from_dict(request["settings"])
    except ConfigurationError as error:
        raise SyncFailure("malformed", error.problem, fix=error.fix) from error
    return aggregate(clients, request["weights"], settings)


def _commit(
    ledger: Ledger,
    uploads: Uploads,
    node: str,
    key: SigningKey,
    order: VersionManifest,
    result: Aggregate,
    codec: str,
) -> Signed:
    with ledger.store.locked(order.adapter):
        ledger.has(order)
        head = ledger.store.head(order.adapter)
        # Made anew from all clients each time: what this delta leaves out is in the next one.
        held = ledger.store.weights(order.adapter, head.sequence)
        chosen = DeltaSettings(codec=codec, levels=INT8_LEVELS, delta_threshold=0)
        delta = compute_delta(held, result.weights, chosen)
        signed = key.sign(
            VersionManifest.following(
                head,
                adapter=order.adapter,
                node=node,
                kind=delta.kind,
                new_hash=delta.new_hash,
                payload=delta.payload,
            )
        )
        ledger.trust.verify(signed, fresh=True)
        path = uploads.scratch(delta.payload)
        ledger.commit("aggregate", signed, path, delta.received, by=order.node)
    return signed
