"""A push and a pull across their attempts: what is kept when the connection breaks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from memopt.federation.client.link import Exchange
from memopt.federation.client.manager import DeltaSyncManager
from memopt.federation.delta.arrays import Array
from memopt.federation.delta.compute import Delta
from memopt.federation.delta.settings import DeltaSettings
from memopt.federation.failures import SyncFailure
from memopt.federation.limits import Limits, check_count, check_hash, check_keys
from memopt.federation.trust.manifest import (
    MAX_SEQUENCE,
    NO_HASH,
    Head,
    Signed,
    VersionManifest,
    parse_signed,
)
from memopt.federation.trust.nodes import Trust
from memopt.federation.trust.signing import SigningKey
from memopt.federation.trust.vault import Appending
from memopt.federation.wire import protocol
from memopt.federation.wire.channel import receive_chunks, send_chunks
from memopt.progress import Progress, silent

# What a slow server may need to decode and store, on top of the timeout.
_COMMIT_BYTES_PER_SECOND = 5e6
_MAX_ITEMS = 1000


@dataclass(slots=True, kw_only=True)
class PushJob:
    """One push across its attempts: what is pushed, by whom and how."""

    manager: DeltaSyncManager
    weights: dict[str, Array]
    key: SigningKey
    node: str
    timeout: float
    full: bool = False
    settings: DeltaSettings | None = None
    progress: Progress = silent
    head: Head = field(default_factory=Head)  # of the server, that the delta is made for
    delta: Delta | None = None
    signed: Signed | None = None
    sequence: int = 0
    moved: int = 0
    resumed: int = 0

    def fall_back(self) -> bool:
        """Send everything from now on; False when that was tried already."""
        again, self.full = not self.full, True
        self.delta = None
        return again

    def run(self, exchange: Exchange) -> None:
        """Make one attempt."""
        manager, weights = self.manager, self.weights
        exchange.send(protocol.HELLO, {"operation": "push", "adapter": manager.adapter})
        state = exchange.receive(protocol.STATE).fields
        head = Head(
            sequence=check_count("sequence", state.get("sequence"), MAX_SEQUENCE),
            weights_hash=check_hash("weights_hash", state.get("weights_hash")),
            digest=check_hash("digest", state.get("digest")),
        )
        arrived = manager.recover(head.digest) and self.delta is not None
        if arrived and self.delta and manager.state.weights_hash == self.delta.new_hash:
            # The acknowledgement of an earlier attempt was lost: this push has arrived.
            self.sequence = head.sequence
            exchange.send(protocol.BYE)
            return
        delta = self._delta(head)
        if delta.kind == "delta" and not delta.sent:
            manager.keep(weights)
            exchange.send(protocol.BYE)
            return
        # The same manifest in every attempt: should an earlier one arrive late, it is this one.
        signed = self.signed = self.signed or self._sign(delta, head)
        manager.begin(signed, delta, weights)
        exchange.send(protocol.OFFER, {"signed": signed.to_json()})
        self._transfer(exchange, delta.payload)
        self.sequence = signed.manifest.sequence
        manager.confirm()

    def _delta(self, head: Head) -> Delta:
        """Return the delta for the server's head; the same one as long as the head is the same."""
        if self.delta is None or self.head.digest != head.digest:
            mine = self.manager.state
            same = (mine.sequence, mine.weights_hash) == (head.sequence, head.weights_hash)
            full = self.full or not same or head.sequence == 0
            self.delta = self.manager.delta(self.weights, full=full, settings=self.settings)
            self.head, self.signed = head, None
            self.moved = 0
        return self.delta

    def _sign(self, delta: Delta, head: Head) -> Signed:
        return self.key.sign(
            VersionManifest.following(
                head,
                adapter=self.manager.adapter,
                node=self.node,
                kind=delta.kind,
                new_hash=delta.new_hash,
                payload=delta.payload,
            )
        )

    def _transfer(self, exchange: Exchange, payload: bytes) -> None:
        total = len(payload)
        within = self.timeout + total / _COMMIT_BYTES_PER_SECOND
        frame = exchange.receive(protocol.RESUME, protocol.DONE, within=within)
        if frame.kind == protocol.DONE:
            return
        offset = check_count("offset", frame.fields.get("offset"), total)
        self.resumed = max(self.resumed, offset)
        self.progress(offset, total)

        def reached(there: int) -> None:
            self.moved = max(self.moved, there)
            self.progress(there, total)

        size, view = protocol.CHUNK_BYTES, memoryview(payload)
        parts = (view[start : start + size] for start in range(offset, total, size))
        send_chunks(exchange, parts, offset, total, reached)
        exchange.receive(protocol.DONE, within=within)


@dataclass(frozen=True, slots=True)
class PlanItem:
    """One version of a plan, and the file that brings it."""

    signed: Signed
    size: int
    sha256: str
    full: bool


@dataclass(slots=True, kw_only=True)
class PullJob:
    """One pull across its attempts; bytes already here are kept in a file of the state folder."""

    manager: DeltaSyncManager
    trust: Trust
    limits: Limits
    timeout: float
    progress: Progress = silent
    full: bool = False
    kind: str = "nothing"
    moved: int = 0
    received: int = 0
    versions: int = 0

    def fall_back(self) -> bool:
        """Ask for everything from now on; False when that was tried already."""
        again, self.full = not self.full, True
        return again

    def run(self, exchange: Exchange) -> None:
        """Make one attempt."""
        manager, mine = self.manager, self.manager.state
        exchange.send(
            protocol.HELLO,
            {
                "operation": "pull",
                "adapter": manager.adapter,
                "sequence": 0 if self.full else mine.sequence,
                "weights_hash": NO_HASH if self.full else mine.weights_hash,
            },
        )
        # The server may have to rebuild and pack everything first.
        plan = exchange.receive(protocol.PLAN, within=4 * self.timeout).fields
        items = self._check_plan(plan)
        done, total = 0, sum(item.size for item in items)
        weights = manager.weights()
        for number, item in enumerate(items):
            data = self._fetch(exchange, number, item, done, total)
            kind = "full" if item.full else "delta"
            weights = manager.decode(item.signed, data, {} if item.full else weights, kind=kind)
            done += item.size
        if items:
            manager.adopt(items[-1].signed, weights)
            self.kind = "full" if items[-1].full else "delta"
            self.received, self.versions = total, len(items)
        exchange.send(protocol.BYE)
        for path in manager.folder.glob("*.incoming"):
            path.unlink(missing_ok=True)

    def _check_plan(self, plan: dict[str, Any]) -> list[PlanItem]:
        """Verify the whole chain before a byte of it is fetched."""
        rows = plan.get("items")
        if not isinstance(rows, list) or len(rows) > _MAX_ITEMS:
            raise SyncFailure("malformed", f"the plan is not a list of at most {_MAX_ITEMS} items")
        mine = self.manager.state
        head = Head(sequence=mine.sequence, weights_hash=mine.weights_hash, digest=mine.digest)
        items = []
        for row in rows:
            items.append(self._check_item(row, head))
            head = items[-1].signed.manifest.head()
        return items

    def _check_item(self, row: object, head: Head) -> PlanItem:
        """Return a row of the plan, which must lead on from ``head``."""
        fields = check_keys("plan item", row, ("signed", "bytes", "sha256", "full"))
        signed, full = parse_signed(fields["signed"], self.limits), fields["full"] is True
        manifest = signed.manifest
        if manifest.adapter != self.manager.adapter:
            raise SyncFailure("forbidden", f"a version of {manifest.adapter!r} was offered")
        self._verify(signed, full=full)
        if manifest.kind == "aggregate":
            raise SyncFailure("forbidden", "an order was offered as a version")
        if manifest.sequence <= head.sequence:
            raise SyncFailure(
                "replay",
                f"the server offers version {manifest.sequence}, this node has {head.sequence}",
                fix="if the server was reset on purpose, remove this node's state folder",
            )
        size = check_count("bytes", fields["bytes"], self.limits.payload_bytes)
        sha256 = check_hash("sha256", fields["sha256"])
        follows = (manifest.sequence, manifest.base_hash, manifest.previous) == (
            head.sequence + 1,
            head.weights_hash,
            head.digest,
        )
        same = (manifest.payload_bytes, manifest.payload_sha256) == (size, sha256)
        if not full and not (follows and same):
            raise SyncFailure("malformed", "the offered deltas do not form a chain")
        return PlanItem(signed, size, sha256, full)

    def _verify(self, signed: Signed, *, full: bool) -> None:
        """Refuse a version that nobody trusted signed.

        On the way to the newest one this may be a version of a key that was rotated out since, or
        of a node that lost its role: then the newest alone is asked for, whole.
        """
        try:
            self.trust.verify(signed, fresh=False)
        except SyncFailure as error:
            if full or self.full or error.code not in ("unknown-signer", "forbidden"):
                raise
            raise SyncFailure("need-full", error.problem, fix=error.fix) from error

    def _fetch(
        self, exchange: Exchange, number: int, item: PlanItem, done: int, total: int
    ) -> bytes:
        """Return one item, going on from what an earlier attempt left."""

        def reached(there: int) -> None:
            self.moved = max(self.moved, done + there)
            self.progress(done + there, total)

        path = self.manager.folder / f"{item.sha256}.incoming"
        with Appending(path, self.manager.vault) as file:
            if file.size > item.size:
                file.clear()
            exchange.send(protocol.GET, {"item": number, "offset": file.size})
            receive_chunks(exchange, file, item.size, reached)
        data = self.manager.vault.read(path)
        if hashlib.sha256(data).hexdigest() != item.sha256:
            path.unlink(missing_ok=True)
            self.moved = 0
            raise SyncFailure("corrupt", "the received payload does not match its hash")
        return data
