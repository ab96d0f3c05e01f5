"""What a signer states about a version, and the form that is believed of a peer."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, fields
from typing import Any

from memopt.federation.failures import SyncFailure
from memopt.federation.limits import (
    Limits,
    canonical_json,
    check_adapter,
    check_count,
    check_hash,
    check_keys,
)

FORMAT = 1
# The last is an order to the server, never a version: its "payload" is the request it goes with.
KINDS = ("delta", "full", "rollback", "aggregate")
NO_HASH = "0" * 64
_DOMAIN = b"memopt sync manifest 1\0"
MAX_SEQUENCE = 1 << 53  # what every JSON reader holds exactly


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The newest version of an adapter; sequence 0 when there is none."""

    sequence: int = 0
    weights_hash: str = NO_HASH
    digest: str = NO_HASH


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionManifest:
    """What the signer states about one version of one adapter."""

    adapter: str
    node: str
    kind: str
    sequence: int
    base_hash: str  # weights before; NO_HASH for the first
    new_hash: str  # weights after
    previous: str  # digest of the manifest before; NO_HASH for the first
    payload_sha256: str
    payload_bytes: int
    time: int  # Unix seconds
    target: int = 0  # rollback: the version whose weights come back
    format: int = FORMAT

    @classmethod
    def following(
        cls,
        head: Head,
        *,
        adapter: str,
        node: str,
        kind: str,
        new_hash: str = NO_HASH,
        payload: bytes = b"",
        target: int = 0,
    ) -> VersionManifest:
        """Return what is stated, now, about the version after ``head``."""
        return cls(
            adapter=adapter,
            node=node,
            kind=kind,
            sequence=head.sequence + 1,
            base_hash=head.weights_hash if head.sequence else NO_HASH,
            new_hash=new_hash,
            previous=head.digest,
            payload_sha256=hashlib.sha256(payload).hexdigest(),
            payload_bytes=len(payload),
            time=int(time.time()),
            target=target,
        )

    def text(self) -> bytes:
        """Return the bytes that are signed."""
        return _DOMAIN + canonical_json(asdict(self))

    def digest(self) -> str:
        """Return the SHA-256 that names this version."""
        return hashlib.sha256(self.text()).hexdigest()

    def head(self) -> Head:
        """Return the version as the newest one."""
        return Head(sequence=self.sequence, weights_hash=self.new_hash, digest=self.digest())


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """A manifest, the public key (64 hex digits) and the signature (128 hex digits)."""

    manifest: VersionManifest
    key: str
    signature: str

    def to_json(self) -> dict[str, Any]:
        """Return the plain JSON object."""
        return asdict(self)


def parse_signed(value: object, limits: Limits | None = None) -> Signed:
    """Check every field of a signed manifest from a peer; the signature is checked elsewhere.

    Raises:
        SyncFailure: a field is missing, unknown, of a wrong type or out of range.
    """
    limits = limits or Limits()
    outer = check_keys("signed manifest", value, ("manifest", "key", "signature"))
    raw = check_keys("manifest", outer["manifest"], [f.name for f in fields(VersionManifest)])
    if raw["format"] != FORMAT or type(raw["format"]) is not int:
        raise SyncFailure("unknown-version", f"manifest format {raw['format']!r:.40} is not 1")
    check_adapter(raw["adapter"])
    check_node(raw["node"])
    if raw["kind"] not in KINDS:
        raise SyncFailure("malformed", "manifest kind is unknown")
    for name in ("base_hash", "new_hash", "previous", "payload_sha256"):
        check_hash(name, raw[name])
    check_count("sequence", raw["sequence"], MAX_SEQUENCE)
    check_count("payload_bytes", raw["payload_bytes"], limits.payload_bytes)
    check_count("time", raw["time"], MAX_SEQUENCE)
    check_count("target", raw["target"], MAX_SEQUENCE)
    if raw["sequence"] < 1 or (raw["kind"] == "rollback") != (raw["target"] > 0):
        raise SyncFailure("malformed", "manifest sequence or target does not suit its kind")
    key = check_hash("key", outer["key"])
    signature = outer["signature"]
    if not isinstance(signature, str) or len(signature) != 128:
        raise SyncFailure("malformed", "signature is not 128 hex digits")
    check_hash("signature", signature[:64])
    check_hash("signature", signature[64:])
    return Signed(manifest=VersionManifest(**raw), key=key, signature=signature)


def check_node(name: object) -> str:
    """Return ``name`` when it can name a node (the same characters as an adapter id)."""
    try:
        return check_adapter(name)
    except SyncFailure as error:
        raise SyncFailure("malformed", error.problem.replace("adapter id", "node name")) from None
