"""Signed manifests: who may put which weights where, checked before a byte is applied.

Ed25519 (RFC 8032) over the canonical JSON of the manifest. The trust file names, for every node,
its public keys, its roles and the adapters it may touch; the node's name is the one in its
certificate. Sequence, base hash and the digest of the version before make replay and rollback
visible.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from memopt.errors import ConfigurationError
from memopt.extras import require
from memopt.federation.failures import SyncFailure
from memopt.federation.limits import (
    Limits,
    canonical_json,
    check_adapter,
    check_count,
    check_hash,
    check_keys,
    strict_json,
)
from memopt.files import atomic_path, open_plain

FORMAT = 1
ROLES = ("push", "pull", "admin")
# The last is an order to the server, never a version: its "payload" is the request it goes with.
KINDS = ("delta", "full", "rollback", "aggregate")
_ROLE_OF = {"delta": "push", "full": "push", "rollback": "admin", "aggregate": "admin"}
NO_HASH = "0" * 64
_DOMAIN = b"memopt sync manifest 1\0"
_WHY = "sign and check weight deltas"
# A push signed longer ago than this is not taken: time for a big transfer over a thin line.
MAX_AGE_SECONDS = 24 * 3600
# Clocks of a fleet under NTP are within seconds; five minutes is Kerberos' old tolerance.
MAX_SKEW_SECONDS = 300
_MAX_SEQUENCE = 1 << 53  # what every JSON reader holds exactly


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
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

    def digest(self) -> str:
        """Return the SHA-256 that names this version."""
        return hashlib.sha256(_DOMAIN + canonical_json(asdict(self))).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """A manifest, the public key (64 hex digits) and the signature (128 hex digits)."""

    manifest: Manifest
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
    raw = check_keys("manifest", outer["manifest"], [f.name for f in fields(Manifest)])
    if raw["format"] != FORMAT or type(raw["format"]) is not int:
        raise SyncFailure("unknown-version", f"manifest format {raw['format']!r:.40} is not 1")
    check_adapter(raw["adapter"])
    check_node(raw["node"])
    if raw["kind"] not in KINDS:
        raise SyncFailure("malformed", "manifest kind is unknown")
    for name in ("base_hash", "new_hash", "previous", "payload_sha256"):
        check_hash(name, raw[name])
    check_count("sequence", raw["sequence"], _MAX_SEQUENCE)
    check_count("payload_bytes", raw["payload_bytes"], limits.payload_bytes)
    check_count("time", raw["time"], _MAX_SEQUENCE)
    check_count("target", raw["target"], _MAX_SEQUENCE)
    if raw["sequence"] < 1 or (raw["kind"] == "rollback") != (raw["target"] > 0):
        raise SyncFailure("malformed", "manifest sequence or target does not suit its kind")
    key = check_hash("key", outer["key"])
    signature = outer["signature"]
    if not isinstance(signature, str) or len(signature) != 128:
        raise SyncFailure("malformed", "signature is not 128 hex digits")
    check_hash("signature", signature[:64])
    check_hash("signature", signature[64:])
    return Signed(manifest=Manifest(**raw), key=key, signature=signature)


def check_node(name: object) -> str:
    """Return ``name`` when it can name a node (the same characters as an adapter id)."""
    try:
        return check_adapter(name)
    except SyncFailure as error:
        raise SyncFailure("malformed", error.problem.replace("adapter id", "node name")) from None


# ------------------------------------------------------------------------------------------ keys


class SigningKey:
    """An Ed25519 private key; :meth:`public` is what the trust file lists."""

    def __init__(self, private: Any) -> None:
        self._private = private

    @classmethod
    def generate(cls) -> SigningKey:
        """Make a new key from the system's random source."""
        return cls(_ed25519().Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: str | Path) -> SigningKey:
        """Read a PEM private key.

        Raises:
            ConfigurationError: no such file, not an Ed25519 key, or others may read it.
        """
        path = Path(path)
        serialization = require(
            "cryptography.hazmat.primitives.serialization", extra="federation", why=_WHY
        )
        check_private(path)
        try:
            private = serialization.load_pem_private_key(path.read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigurationError(
                f"signing key {path} cannot be read ({error})", fix="run: memopt sync keygen"
            ) from error
        if not isinstance(private, _ed25519().Ed25519PrivateKey):
            raise ConfigurationError(f"{path} is not an Ed25519 key", fix="run: memopt sync keygen")
        return cls(private)

    def save(self, path: str | Path, *, new: bool = False) -> None:
        """Write the key as PEM (PKCS 8), readable by its owner only.

        Args:
            new: refuse (ConfigurationError) to take the place of a key that is there.
        """
        serialization = require(
            "cryptography.hazmat.primitives.serialization", extra="federation", why=_WHY
        )
        pem = self._private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write_private(Path(path), pem, new=new)

    def public(self) -> str:
        """Return the public key as 64 hex digits."""
        raw: bytes = self._private.public_key().public_bytes_raw()
        return raw.hex()

    def sign(self, manifest: Manifest) -> Signed:
        """Return the manifest with this key's signature."""
        signature: bytes = self._private.sign(_DOMAIN + canonical_json(asdict(manifest)))
        return Signed(manifest=manifest, key=self.public(), signature=signature.hex())


def _ed25519() -> Any:
    return require(
        "cryptography.hazmat.primitives.asymmetric.ed25519", extra="federation", why=_WHY
    )


def check_private(path: Path) -> None:
    """Raise ConfigurationError when others may read a secret; one that is not there passes."""
    if path.is_file() and path.stat().st_mode & 0o077:
        raise ConfigurationError(
            f"private key {path} can be read by others", fix=f"run: chmod 600 {path}"
        )


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep other processes (and threads) from changing a folder of keys meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = open_plain(folder / ".keys.lock")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_private(path: Path, data: bytes, *, new: bool = False) -> None:
    """Write a secret so that at no moment anyone but its owner can read it.

    Args:
        new: a file that is there already is kept.

    Raises:
        ConfigurationError: with ``new``, there is one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        if not new:
            temporary.replace(path)
            return
        try:
            # Unlike a rename, a second name is refused where there is a file.
            os.link(temporary, path)
        except FileExistsError:
            raise ConfigurationError(
                f"{path} exists already", fix="remove it first if it is to go"
            ) from None
    finally:
        temporary.unlink(missing_ok=True)


def signature_holds(signed: Signed) -> bool:
    """Return whether the signature is the key's over exactly this manifest."""
    invalid = require("cryptography.exceptions", extra="federation", why=_WHY).InvalidSignature
    try:
        public = _ed25519().Ed25519PublicKey.from_public_bytes(bytes.fromhex(signed.key))
        public.verify(
            bytes.fromhex(signed.signature), _DOMAIN + canonical_json(asdict(signed.manifest))
        )
    except (invalid, ValueError):
        return False
    return True


# ----------------------------------------------------------------------------------------- trust


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What one node may do."""

    roles: tuple[str, ...]
    keys: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ("*",)  # shell patterns

    def may(self, role: str | None, adapter: str | None) -> bool:
        """Return whether the node has the role (any, for None) for the adapter (any, for None)."""
        named = adapter is None or any(fnmatch.fnmatchcase(adapter, p) for p in self.adapters)
        return named and (bool(self.roles) if role is None else role in self.roles)


class Trust:
    """The nodes that are trusted; a file behind it is read again when it changes.

    >>> trust = Trust({"edge-1": Node(roles=("pull",))})
    >>> trust.allow("edge-1", "push", "lora")
    Traceback (most recent call last):
    ...
    memopt.federation.failures.SyncFailure: node 'edge-1' may not push 'lora'; add the role ...
    """

    def __init__(self, nodes: dict[str, Node] | None = None, *, path: Path | None = None) -> None:
        self._nodes = dict(nodes or {})
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._lock = threading.Lock()
        if path is not None:
            self.nodes()

    def nodes(self) -> dict[str, Node]:
        """Return the nodes, read anew when the file changed.

        Raises:
            ConfigurationError: the file is missing or not a trust file.
        """
        if self._path is None:
            return self._nodes
        with self._lock:
            try:
                stat = self._path.stat()
                # The inode too: a file renamed into place may have the old one's time and size.
                stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
                if stat.st_mode & 0o002:
                    raise ConfigurationError(
                        f"trust file {self._path} can be changed by anyone",
                        fix=f"run: chmod o-w {self._path}",
                    )
                if stamp != self._stamp:
                    self._nodes = _parse_trust(self._path.read_bytes(), str(self._path))
                    self._stamp = stamp
            except OSError as error:
                raise ConfigurationError(
                    f"trust file {self._path} cannot be read ({error.strerror})",
                    fix="run: memopt sync keygen NODE --trust FILE --role push",
                ) from error
            return self._nodes

    def allow(self, node: str, role: str | None, adapter: str | None) -> None:
        """Raise ``forbidden`` unless ``node`` has ``role`` (any, for None) for ``adapter``."""
        known = self.nodes().get(node)
        if known is None:
            raise SyncFailure(
                "forbidden", f"node {node!r} is not in the trust file", fix="add it there"
            )
        if not known.may(role, adapter):
            what = "" if adapter is None else f" {adapter!r}"
            raise SyncFailure(
                "forbidden",
                f"node {node!r} may not {role or 'look at'}{what}",
                fix="add the role to its entry",
            )

    def verify(self, signed: Signed, *, fresh: bool, now: float | None = None) -> None:
        """Raise unless an allowed key of the manifest's node signed it and the node has the role.

        Args:
            signed: the manifest and its signature.
            fresh: refuse one signed more than a day ago (a push; a pulled version may be old).
            now: Unix time, for tests.
        """
        manifest = signed.manifest
        known = self.nodes().get(manifest.node)
        if known is None or signed.key not in known.keys:
            raise SyncFailure(
                "unknown-signer",
                f"key {signed.key[:16]} of node {manifest.node!r} is not trusted",
                fix="add it to the trust file: memopt sync keygen prints it",
            )
        if not signature_holds(signed):
            raise SyncFailure("bad-signature", "the manifest's signature does not hold")
        self.allow(manifest.node, _ROLE_OF[manifest.kind], manifest.adapter)
        now = time.time() if now is None else now
        if manifest.time > now + MAX_SKEW_SECONDS:
            raise SyncFailure(
                "stale",
                f"the manifest is dated {manifest.time - now:.0f} s ahead",
                fix="set clocks",
            )
        if fresh and manifest.time < now - MAX_AGE_SECONDS:
            raise SyncFailure(
                "stale", f"the manifest was signed {now - manifest.time:.0f} s ago", fix="push anew"
            )


def add_trusted(
    path: str | Path,
    node: str,
    *,
    key: str | None = None,
    roles: tuple[str, ...] = (),
    adapters: tuple[str, ...] = (),
) -> None:
    """Add a node, or a key and roles to a node, in the trust file (made when it is not there)."""
    path = Path(path)
    check_node(node)
    for role in roles:
        if role not in ROLES:
            raise ConfigurationError(f"unknown role {role!r}", fix="known: " + ", ".join(ROLES))
    # Two at once would each write the file as they had read it, and one node would be gone.
    with one_at_a_time(path.parent):
        _add_trusted(path, node, key, roles, adapters)


def _add_trusted(
    path: Path,
    node: str,
    key: str | None,
    roles: tuple[str, ...],
    adapters: tuple[str, ...],
) -> None:
    nodes = _parse_trust(path.read_bytes(), str(path)) if path.exists() else {}
    old = nodes.get(node, Node(roles=(), keys=(), adapters=adapters or ("*",)))
    nodes[node] = Node(
        roles=tuple(r for r in ROLES if r in old.roles or r in roles),
        keys=(*old.keys, *([key] if key and key not in old.keys else [])),
        adapters=adapters or old.adapters,
    )
    import json

    document = {"nodes": {name: asdict(node) for name, node in sorted(nodes.items())}}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _parse_trust(data: bytes, origin: str) -> dict[str, Node]:
    try:
        document = check_keys(origin, strict_json(data, what=origin), ("nodes",))
        nodes = {}
        for name, raw in check_keys(origin, document["nodes"], list(document["nodes"])).items():
            check_node(name)
            entry = check_keys(f"{origin}: {name}", raw, ("roles", "keys", "adapters"))
            for field in entry:
                if not isinstance(entry[field], list) or not all(
                    isinstance(v, str) for v in entry[field]
                ):
                    raise SyncFailure("malformed", f"{origin}: {name}.{field} is not a list")
            if unknown := set(entry["roles"]) - set(ROLES):
                raise SyncFailure("malformed", f"{origin}: {name} has unknown roles {unknown}")
            for key in entry["keys"]:
                check_hash(f"{origin}: {name}: key", key)
            nodes[name] = Node(**{field: tuple(entry[field]) for field in entry})
    except SyncFailure as error:
        raise ConfigurationError(error.problem, fix="see docs/federation.md, Trust") from error
    return nodes
