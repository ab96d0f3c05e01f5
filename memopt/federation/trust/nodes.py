"""Who may put which weights where, checked before a byte is applied.

The trust file names, for every node, its public keys, its roles and the adapters it may touch; the
node's name is the one in its certificate. Sequence, base hash and the digest of the version before
make replay and rollback visible.
"""

from __future__ import annotations

import fnmatch
import json
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from memopt.errors import ConfigurationError
from memopt.federation.failures import SyncFailure
from memopt.federation.limits import check_hash, check_keys, strict_json
from memopt.federation.trust.manifest import Signed, check_node
from memopt.federation.trust.signing import one_at_a_time, signature_holds
from memopt.files import atomic_path

ROLES = ("push", "pull", "admin")
_ROLE_OF = {"delta": "push", "full": "push", "rollback": "admin", "aggregate": "admin"}
# A push signed longer ago than this is not taken: time for a big transfer over a thin line.
MAX_AGE_SECONDS = 24 * 3600
# Clocks of a fleet under NTP are within seconds; five minutes is Kerberos' old tolerance.
MAX_SKEW_SECONDS = 300


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
    document = {"nodes": {name: asdict(node) for name, node in sorted(nodes.items())}}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _parse_trust(data: bytes, origin: str) -> dict[str, Node]:
    try:
        document = check_keys(origin, strict_json(data, what=origin), ("nodes",))
        if not isinstance(document["nodes"], dict):
            raise SyncFailure("malformed", f"{origin}: nodes is not an object")
        nodes = {}
        for name, raw in document["nodes"].items():
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
