"""The sync client: one object per server; push and pull retry, resume and fall back to full."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from memopt.errors import ConfigurationError
from memopt.federation.client.jobs import PullJob, PushJob
from memopt.federation.client.link import ServerLink
from memopt.federation.client.manager import DeltaSyncManager
from memopt.federation.client.retries import Retries
from memopt.federation.delta.arrays import Array, Weights, check_weights
from memopt.federation.delta.compute import TensorReport
from memopt.federation.delta.settings import DeltaSettings
from memopt.federation.failures import SyncFailure
from memopt.federation.limits import (
    Limits,
    canonical_json,
    check_adapter,
    check_count,
    check_hash,
    check_tensor_name,
)
from memopt.federation.trust.manifest import (
    KINDS,
    NO_HASH,
    Head,
    Signed,
    VersionManifest,
    check_node,
    parse_signed,
)
from memopt.federation.trust.nodes import Trust
from memopt.federation.trust.signing import SigningKey
from memopt.federation.wire.tls import TlsFiles, check_plain
from memopt.metrics import count, errors
from memopt.progress import Progress, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReport:
    """What a push did; sizes in bytes, time in seconds."""

    adapter: str
    sequence: int
    kind: str  # delta | full | nothing
    sent: int
    skipped: int
    payload_bytes: int
    fp32_bytes: int
    saving: float
    error: float  # relative L2 error of the update that the receivers get
    seconds: float
    attempts: int
    resumed_bytes: int  # of the payload, what earlier attempts had brought already
    tensors: tuple[TensorReport, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PullReport:
    """What a pull brought."""

    adapter: str
    sequence: int
    versions: int  # versions applied; 0 when up to date
    kind: str  # delta | full | nothing
    payload_bytes: int
    seconds: float
    attempts: int
    weights_hash: str
    weights: dict[str, Array]


class SyncClient:
    """Talks to one server.

    Args:
        host, port: the server.
        tls: certificate files; None is a plain transport, for loopback or ``insecure``.
        timeout: seconds a single step may take.
        max_retries: further attempts after a failure that may pass; an attempt that moved the
            transfer on does not count.
        deadline: seconds that a whole push, pull or action may take, retries included; None for
            as long as it moves on.
        insecure: allow the plain transport to another machine.
        limits: what is believed of the server.
        seed: of the jitter, for tests.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        tls: TlsFiles | None = None,
        timeout: float = 30.0,
        max_retries: int = 3,
        deadline: float | None = None,
        insecure: bool = False,
        limits: Limits | None = None,
        seed: int | None = None,
    ) -> None:
        if tls is None and not insecure:
            check_plain(host, f"a plain transport to {host} can be read and changed on the way")
        self.limits = limits or Limits()
        self._link = ServerLink(host, port, tls=tls, timeout=timeout, limits=self.limits)
        if deadline is not None and not deadline > 0:
            raise ConfigurationError(f"deadline={deadline} is not positive")
        self._retries = Retries(most=max_retries, deadline=deadline, chance=random.Random(seed))

    # ------------------------------------------------------------------------------------- push

    def push(
        self,
        manager: DeltaSyncManager,
        weights: Weights,
        *,
        key: SigningKey,
        node: str,
        full: bool = False,
        settings: DeltaSettings | None = None,
        progress: Progress = silent,
    ) -> PushReport:
        """Bring the server to ``weights`` (or near them, the rest carried forward).

        Args:
            manager: this node's state of the adapter.
            weights: what the receivers should hold.
            key, node: who signs.
            full: send everything whatever changed.
            settings: other settings than the manager's, for this push.
            progress: called with (bytes acknowledged, bytes in all).

        Raises:
            SyncFailure: refused, or still failing after the retries.
        """
        for name in weights:
            # What the server would refuse is known before anything is sent.
            check_tensor_name(name, self.limits)
        job = PushJob(
            manager=manager,
            weights=check_weights(weights),
            key=key,
            node=node,
            timeout=self._link.timeout,
            full=full,
            settings=settings,
            progress=progress,
        )
        started = time.perf_counter()
        attempts = self._run(job)
        delta = job.delta
        assert delta is not None
        idle = job.sequence == 0
        # Their quotient is what deltas save.
        count("memopt_sync_sent_bytes_total", 0 if idle else len(delta.payload))
        count("memopt_sync_full_bytes_total", delta.fp32_bytes)
        return PushReport(
            adapter=manager.adapter,
            sequence=job.sequence or manager.state.sequence,
            kind="nothing" if idle else delta.kind,
            sent=0 if idle else delta.sent,
            skipped=delta.skipped,
            payload_bytes=0 if idle else len(delta.payload),
            fp32_bytes=delta.fp32_bytes,
            saving=1.0 if idle else delta.saving,
            error=delta.error,
            seconds=time.perf_counter() - started,
            attempts=attempts,
            resumed_bytes=job.resumed,
            tensors=delta.tensors,
        )

    # ------------------------------------------------------------------------------------- pull

    def pull(
        self, manager: DeltaSyncManager, *, trust: Trust, progress: Progress = silent
    ) -> PullReport:
        """Bring this node's state to the server's newest version.

        Every version is verified against ``trust``; a version older than this node's, or another
        one of the same number, is refused.

        Raises:
            SyncFailure: refused, nothing there, or still failing after the retries.
        """
        job = PullJob(
            manager=manager,
            trust=trust,
            limits=self.limits,
            timeout=self._link.timeout,
            progress=progress,
        )
        started = time.perf_counter()
        attempts = self._run(job)
        return PullReport(
            adapter=manager.adapter,
            sequence=manager.state.sequence,
            versions=job.versions,
            kind=job.kind,
            payload_bytes=job.received,
            seconds=time.perf_counter() - started,
            attempts=attempts,
            weights_hash=manager.state.weights_hash,
            weights=manager.weights(),
        )

    # ---------------------------------------------------------------------------------- actions

    def status(self, adapter: str | None = None) -> list[dict[str, Any]]:
        """Return the newest version of every adapter that this node may see, or of one."""
        request = {"adapter": adapter} if adapter else {}
        rows = _objects(self._act("status", lambda: request), "adapters")
        for row in rows:
            check_adapter(row.get("adapter"))
            for name in ("sequence", "payload_bytes", "time", "versions"):
                check_count(name, row.get(name, 0), 1 << 53)
            for name in ("weights_hash", "digest"):
                check_hash(name, row.get(name, NO_HASH))
            if row.get("kind", "full") not in KINDS:
                raise SyncFailure("malformed", "a version's kind is unknown")
            check_node(row.get("node", "none"))
        return rows

    def history(self, adapter: str) -> list[Signed]:
        """Return the signed manifests of an adapter, oldest first.

        They are checked for form; whether to believe one, :meth:`Trust.verify` says.
        """
        answer = self._act("history", lambda: {"adapter": adapter})
        versions = [parse_signed(version, self.limits) for version in _objects(answer, "versions")]
        for signed in versions:
            if signed.manifest.adapter != adapter:
                raise SyncFailure("forbidden", f"a version of {signed.manifest.adapter!r} came")
        return versions

    def rollback(
        self, adapter: str, target: int, *, key: SigningKey, node: str, trust: Trust
    ) -> int:
        """Make version ``target`` the newest again, under a new number; return that number.

        What is signed is the hash of the target's weights: its own signature is checked against
        ``trust`` first, so that no server can have an admin sign weights of its choice.

        Raises:
            SyncFailure: no such version, one that nobody trusted signed, or not an admin.
        """

        def order() -> dict[str, Any]:
            versions = {v.manifest.sequence: v for v in self.history(adapter)}
            if target not in versions:
                raise SyncFailure(
                    "not-found", f"adapter {adapter!r} has no version {target}", fix="see history"
                )
            trust.verify(versions[target], fresh=False)
            wanted = versions[target].manifest.new_hash
            head = versions[max(versions)].manifest.head()
            manifest = VersionManifest.following(
                head, adapter=adapter, node=node, kind="rollback", new_hash=wanted, target=target
            )
            return {"signed": key.sign(manifest).to_json()}

        return check_count("sequence", self._act("rollback", order).get("sequence"), 1 << 53)

    def aggregate(
        self,
        adapter: str,
        inputs: list[str],
        *,
        key: SigningKey,
        node: str,
        weights: list[float] | None = None,
        settings: dict[str, Any] | None = None,
        codec: str = "int8",
    ) -> dict[str, Any]:
        """Have the server average ``inputs`` into ``adapter`` (role admin).

        Args:
            adapter: the adapter the result is a version of.
            inputs: the adapters to average, their newest versions; the node must be allowed to
                pull each of them.
            key, node: who signs the order; the version that comes of it is signed by the server.
            weights: sample counts, equal by default.
            settings: fields of :class:`memopt.federation.delta.aggregate.AggregateSettings`.
            codec: how the result is sent to those who pull it.

        Returns:
            sequence, digest, error (of the low-rank result), left_out and clipped (client numbers).
        """
        request = {
            "inputs": inputs,
            "weights": weights,
            "settings": settings or {},
            "codec": codec,
        }

        def order() -> dict[str, Any]:
            versions = self.history(adapter)
            head = versions[-1].manifest.head() if versions else Head()
            body = canonical_json(request)
            manifest = VersionManifest.following(
                head, adapter=adapter, node=node, kind="aggregate", payload=body
            )
            return {"signed": key.sign(manifest).to_json(), "request": request}

        answer = self._act("aggregate", order)
        check_count("sequence", answer.get("sequence"), 1 << 53)
        if type(answer.get("error")) not in (int, float):
            raise SyncFailure("malformed", "the server's error of the average is not a number")
        for name in ("left_out", "clipped"):
            if not isinstance(answer.get(name), list):
                raise SyncFailure("malformed", f"the server's {name} is not a list")
            for number in answer[name]:
                check_count(name, number, len(inputs) - 1)
        return answer

    def _act(self, name: str, request: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Ask until there is an answer; an order is made anew each time, on the newest version."""
        answers: list[dict[str, Any]] = []
        # The request may ask something itself: it has its own retries, outside of these.
        self._retries.run(lambda ends: answers.append(self._link.act(name, request(), ends=ends)))
        return answers[0]

    def _run(self, job: PushJob | PullJob) -> int:
        """Run a job to its end; return the number of attempts."""

        def attempt(ends: float) -> None:
            with self._link.exchange(ends=ends) as exchange:
                job.run(exchange)

        with errors("sync"):
            return self._retries.run(attempt, job)


def _objects(answer: dict[str, Any], name: str) -> list[dict[str, Any]]:
    rows = answer.get(name)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SyncFailure("malformed", f"the server's {name} are not a list of objects")
    return rows
