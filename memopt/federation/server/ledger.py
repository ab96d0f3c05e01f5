"""Which version comes next: a signed manifest is believed, compared with the newest, committed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from memopt.federation.delta.arrays import Array
from memopt.federation.failures import SyncFailure
from memopt.federation.server.store import Store
from memopt.federation.server.tickets import Identity
from memopt.federation.trust.audit import AuditLog
from memopt.federation.trust.manifest import Signed, VersionManifest, parse_signed
from memopt.federation.trust.nodes import Trust


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """The versions, who may add one, and the log of those that were added."""

    store: Store
    trust: Trust
    audit: AuditLog

    def verify(self, value: object, identity: Identity, adapter: str | None = None) -> Signed:
        """Return the signed manifest that a caller sent.

        Raises:
            SyncFailure: it is for another adapter than ``adapter``, or not trusted.
        """
        signed = parse_signed(value, self.store.limits)
        manifest = signed.manifest
        if adapter is not None and manifest.adapter != adapter:
            raise SyncFailure("forbidden", f"the manifest is for adapter {manifest.adapter!r}")
        if identity.node is not None and identity.node != manifest.node:
            raise SyncFailure(
                "forbidden",
                f"certificate of {identity.node!r}, manifest of {manifest.node!r}",
                fix="push with the node's own certificate and key",
            )
        self.trust.verify(signed, fresh=True)
        return signed

    def has(self, manifest: VersionManifest) -> bool:
        """Return whether a manifest is the newest version already; False when it can be the next.

        Raises:
            SyncFailure: it is neither.
        """
        head = self.store.head(manifest.adapter)
        number = manifest.sequence
        if head.digest == manifest.digest():
            return True
        if number <= head.sequence:
            if self._was_here(manifest):
                raise SyncFailure(
                    "replay",
                    f"version {number} was committed before, the newest is {head.sequence}",
                )
            raise SyncFailure(
                "conflict", f"version {number} is taken, the newest is {head.sequence}"
            )
        if number != head.sequence + 1 or manifest.previous != head.digest:
            raise SyncFailure("conflict", f"version {number} does not follow {head.sequence}")
        if manifest.base_hash != head.weights_hash:
            here = head.weights_hash[:16]
            raise SyncFailure(
                "need-full",
                f"the delta is made for {manifest.base_hash[:16]}, here is {here}",
                fix="send the full weights",
            )
        return False

    def commit(
        self,
        event: str,
        signed: Signed,
        payload: Path | None,
        weights: dict[str, Array],
        **more: object,
    ) -> None:
        """Make the next version and log it; the caller holds the adapter and checked everything.

        Args:
            event, more: what the log calls it, and what else its entry says.
        """
        self.store.commit(signed, payload, weights)
        manifest = signed.manifest
        self.audit.write(
            event,
            adapter=manifest.adapter,
            node=manifest.node,
            sequence=manifest.sequence,
            kind=manifest.kind,
            digest=manifest.digest(),
            payload_bytes=manifest.payload_bytes,
            **more,
        )

    def _was_here(self, manifest: VersionManifest) -> bool:
        if manifest.sequence not in self.store.sequences(manifest.adapter):
            return False
        old = self.store.signed(manifest.adapter, manifest.sequence).manifest
        return old.digest() == manifest.digest()
