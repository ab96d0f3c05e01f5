"""A push and a pull across their attempts: what is kept when the connection breaks."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memopt.federation.client.link import Exchange
from memopt.federation.client.manager import DeltaSyncManager
from memopt.federation.delta.arrays import Array
from memopt.federation.delta.compute import Delta
from memopt.federation.delta.settings import DeltaSettings
from memopt.federation.failures import SyncFailure
from memopt.federation.limits import Limits, check_count, check_hash, check_keys
from memopt.federation.trust.signing import (
    NO_HASH,
    Manifest,
    Signed,
    SigningKey,
    Trust,
    parse_signed,
)
from memopt.federation.trust.vault import Appending
from memopt.federation.wire import protocol

Progress = Callable[[int, int], None]
# What a slow server may need to decode and store, on top of the timeout.
_COMMIT_BYTES_PER_SECOND = 5e6


class PushJob:
    """One push across its attempts."""

    def __init__(
        self,
        timeout: float,
        manager: DeltaSyncManager,
        weights: dict[str, Array],
        key: SigningKey,
        node: str,
        full: bool,
        settings: DeltaSettings | None,
        progress: Progress | None,
    ) -> None:
        self._timeout = timeout
        self._manager = manager
        self._weights = weights
        self._key, self._node = key, node
        self._full = full
        self._settings = settings
        self._progress = progress or (lambda done, total: None)
        self._based = ""
        self._signed: Signed | None = None
        self.delta: Delta | None = None
        self.sequence = 0
        self.moved = self.resumed = 0

    def fall_back(self) -> bool:
        """Send everything from now on; False when that was tried already."""
        again, self._full = not self._full, True
        self.delta = None
        return again

    def run(self, exchange: Exchange) -> None:
        """Make one attempt."""
        manager = self._manager
        exchange.send(protocol.HELLO, {"operation": "push", "adapter": manager.adapter})
        state = exchange.receive(protocol.STATE).fields
        server = (
            check_count("sequence", state.get("sequence"), 1 << 53),
            check_hash("weights_hash", state.get("weights_hash")),
            check_hash("digest", state.get("digest")),
        )
        if (
            manager.recover(server[2])
            and self.delta is not None
            and (manager.state.weights_hash == self.delta.new_hash)
        ):
            # The acknowledgement of an earlier attempt was lost: this push has arrived.
            self.sequence = server[0]
            exchange.send(protocol.BYE)
            return
        delta = self._delta(server)
        if delta.kind == "delta" and not delta.sent:
            manager.keep(self._weights)
            exchange.send(protocol.BYE)
            return
        # The same manifest in every attempt: should an earlier one arrive late, it is this one.
        signed = self._signed = self._signed or self._sign(delta, server)
        manager.begin(signed, delta, self._weights)
        exchange.send(protocol.OFFER, {"signed": signed.to_json()})
        self._transfer(exchange, delta)
        self.sequence = signed.manifest.sequence
        manager.confirm()

    def _delta(self, server: tuple[int, str, str]) -> Delta:
        """Return the delta for the server's head; the same one as long as the head is the same."""
        if self.delta is None or self._based != server[2]:
            mine = self._manager.state
            full = self._full or (mine.sequence, mine.weights_hash) != server[:2]
            self.delta = self._manager.delta(
                self._weights, full=full or server[0] == 0, settings=self._settings
            )
            self._based, self._signed = server[2], None
            self.moved = 0
        return self.delta

    def _sign(self, delta: Delta, server: tuple[int, str, str]) -> Signed:
        return self._key.sign(
            Manifest(
                adapter=self._manager.adapter,
                node=self._node,
                kind=delta.kind,
                sequence=server[0] + 1,
                base_hash=server[1] if server[0] else NO_HASH,
                new_hash=delta.new_hash,
                previous=server[2],
                payload_sha256=hashlib.sha256(delta.payload).hexdigest(),
                payload_bytes=len(delta.payload),
                time=int(time.time()),
            )
        )

    def _transfer(self, exchange: Exchange, delta: Delta) -> None:
        payload, total = memoryview(delta.payload), len(delta.payload)
        within = self._timeout + total / _COMMIT_BYTES_PER_SECOND
        frame = exchange.receive(protocol.RESUME, protocol.DONE, within=within)
        if frame.kind == protocol.DONE:
            return
        sent = acknowledged = check_count("offset", frame.fields.get("offset"), total)
        self.resumed = max(self.resumed, acknowledged)
        self._progress(acknowledged, total)
        while acknowledged < total:
            # A window of chunks on the way; writing all before reading blocks past 16 MiB.
            while sent < total and sent - acknowledged < protocol.WINDOW_BYTES:
                chunk = payload[sent : sent + protocol.CHUNK_BYTES]
                exchange.send(protocol.CHUNK, {"offset": sent}, chunk)
                sent += len(chunk)
            frame = exchange.receive(protocol.ACK)
            reached = check_count("offset", frame.fields.get("offset"), sent)
            if reached <= acknowledged:
                raise SyncFailure("out-of-order", "an acknowledgement does not move on")
            acknowledged = reached
            self.moved = max(self.moved, acknowledged)
            self._progress(acknowledged, total)
        exchange.receive(protocol.DONE, within=within)


class PullJob:
    """One pull across its attempts; bytes already here are kept in a file of the state folder."""

    def __init__(
        self,
        timeout: float,
        limits: Limits,
        manager: DeltaSyncManager,
        trust: Trust,
        progress: Progress | None,
    ) -> None:
        self._limits = limits
        self._manager = manager
        self._trust = trust
        self._progress = progress or (lambda done, total: None)
        self._timeout = timeout
        self._full = False
        self.moved = self.bytes = self.versions = 0
        self.kind = "nothing"

    def fall_back(self) -> bool:
        """Ask for everything from now on; False when that was tried already."""
        again, self._full = not self._full, True
        return again

    def run(self, exchange: Exchange) -> None:
        """Make one attempt."""
        manager, mine = self._manager, self._manager.state
        exchange.send(
            protocol.HELLO,
            {
                "operation": "pull",
                "adapter": manager.adapter,
                "sequence": 0 if self._full else mine.sequence,
                "weights_hash": NO_HASH if self._full else mine.weights_hash,
            },
        )
        # The server may have to rebuild and pack everything first.
        plan = exchange.receive(protocol.PLAN, within=4 * self._timeout).fields
        items = self._check_plan(plan)
        done, total = 0, sum(size for _, size, _, _ in items)
        weights = manager.weights()
        newest: Signed | None = None
        for number, (signed, size, sha256, full) in enumerate(items):
            data = self._fetch(exchange, number, size, sha256, done, total)
            kind = "full" if full else "delta"
            weights = manager.decode(signed, data, {} if full else weights, kind=kind)
            newest = signed
            done += size
        if newest is not None:
            manager.adopt(newest, weights)
            self.kind = "full" if items[-1][3] else "delta"
            self.bytes, self.versions = total, len(items)
        exchange.send(protocol.BYE)
        for path in manager.folder.glob("*.incoming"):
            path.unlink(missing_ok=True)

    def _check_plan(self, plan: dict[str, Any]) -> list[tuple[Signed, int, str, bool]]:
        """Verify the whole chain before a byte of it is fetched."""
        rows = plan.get("items")
        if not isinstance(rows, list) or len(rows) > 1000:
            raise SyncFailure("malformed", "the plan is not a list of at most 1000 items")
        mine = self._manager.state
        sequence, base, digest = mine.sequence, mine.weights_hash, mine.digest
        items = []
        for row in rows:
            check_keys("plan item", row, ("signed", "bytes", "sha256", "full"))
            signed, full = parse_signed(row["signed"], self._limits), row["full"] is True
            manifest = signed.manifest
            if manifest.adapter != self._manager.adapter:
                raise SyncFailure("forbidden", f"a version of {manifest.adapter!r} was offered")
            self._verify(signed, full=full)
            if manifest.kind == "aggregate":
                raise SyncFailure("forbidden", "an order was offered as a version")
            if manifest.sequence <= sequence:
                raise SyncFailure(
                    "replay",
                    f"the server offers version {manifest.sequence}, this node has {sequence}",
                    fix="if the server was reset on purpose, remove this node's state folder",
                )
            size = check_count("bytes", row["bytes"], self._limits.payload_bytes)
            sha256 = check_hash("sha256", row["sha256"])
            follows = (manifest.sequence, manifest.base_hash) == (sequence + 1, base)
            same = (manifest.payload_bytes, manifest.payload_sha256) == (size, sha256)
            if not full and not (follows and same and manifest.previous == digest):
                raise SyncFailure("malformed", "the offered deltas do not form a chain")
            items.append((signed, size, sha256, full))
            sequence, base, digest = manifest.sequence, manifest.new_hash, manifest.digest()
        return items

    def _verify(self, signed: Signed, *, full: bool) -> None:
        """Refuse a version that nobody trusted signed.

        On the way to the newest one this may be a version of a key that was rotated out since, or
        of a node that lost its role: then the newest alone is asked for, whole.
        """
        try:
            self._trust.verify(signed, fresh=False)
        except SyncFailure as error:
            if full or self._full or error.code not in ("unknown-signer", "forbidden"):
                raise
            raise SyncFailure("need-full", error.problem, fix=error.fix) from error

    def _fetch(
        self, exchange: Exchange, number: int, size: int, sha256: str, done: int, total: int
    ) -> bytes:
        """Return one item, going on from what an earlier attempt left."""
        path: Path = self._manager.folder / f"{sha256}.incoming"
        with Appending(path, self._manager.vault) as file:
            if file.size > size:
                file.clear()
            exchange.send(protocol.GET, {"item": number, "offset": file.size})
            while (offset := file.size) < size:
                frame = exchange.receive(protocol.CHUNK)
                if frame.fields.get("offset") != offset or not len(frame.body):
                    raise SyncFailure("out-of-order", "a chunk is not the next one")
                if offset + len(frame.body) > size:
                    raise SyncFailure("too-large", "the server sends more than it announced")
                file.append(frame.body)
                self.moved = max(self.moved, done + file.size)
                self._progress(done + file.size, total)
                exchange.send(protocol.ACK, {"offset": file.size})
        data = self._manager.vault.read(path)
        if hashlib.sha256(data).hexdigest() != sha256:
            path.unlink(missing_ok=True)
            self.moved = 0
            raise SyncFailure("corrupt", "the received payload does not match its hash")
        return data
