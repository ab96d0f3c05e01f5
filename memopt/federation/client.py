"""The sync client: one object per server; push and pull retry, resume and fall back to full."""

from __future__ import annotations

import hashlib
import random
import time
from dataclasses import dataclass
from typing import Any, TypeVar

from memopt.federation.arrays import Array, Weights, check_weights
from memopt.federation.delta import DeltaSettings, TensorReport
from memopt.federation.failures import SyncFailure
from memopt.federation.gate import TlsFiles
from memopt.federation.jobs import Progress, PullJob, PushJob
from memopt.federation.limits import Limits
from memopt.federation.link import Link
from memopt.federation.manager import DeltaSyncManager
from memopt.federation.signing import Manifest, SigningKey, Trust
from memopt.metrics import count

Result = TypeVar("Result")
# Waiting grows from a fifth of a second to ten; full jitter keeps a fleet from coming in step
# (Brooker 2015, "Exponential Backoff And Jitter").
_BACKOFF_SECONDS, _BACKOFF_CEILING = 0.2, 10.0


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
        insecure: bool = False,
        limits: Limits | None = None,
        seed: int | None = None,
    ) -> None:
        from memopt.errors import ConfigurationError
        from memopt.federation.server import LOOPBACK

        if tls is None and host not in LOOPBACK and not insecure:
            raise ConfigurationError(
                f"a plain transport to {host} can be read and changed on the way",
                fix="give --cert, --key and --ca, or say --insecure",
            )
        self.limits = limits or Limits()
        self._link = Link(host, port, tls=tls, timeout=timeout, limits=self.limits)
        self._retries = max_retries
        self._random = random.Random(seed)

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
        progress: Progress | None = None,
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
        job = PushJob(
            self._link.timeout,
            manager,
            check_weights(weights),
            key,
            node,
            full,
            settings,
            progress,
        )
        started = time.perf_counter()
        attempts = self._persist(job)
        delta = job.delta
        assert delta is not None
        idle = job.sequence == 0
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
        self, manager: DeltaSyncManager, *, trust: Trust, progress: Progress | None = None
    ) -> PullReport:
        """Bring this node's state to the server's newest version.

        Every version is verified against ``trust``; a version older than this node's, or another
        one of the same number, is refused.

        Raises:
            SyncFailure: refused, nothing there, or still failing after the retries.
        """
        job = PullJob(self._link.timeout, self.limits, manager, trust, progress)
        started = time.perf_counter()
        attempts = self._persist(job)
        return PullReport(
            adapter=manager.adapter,
            sequence=manager.state.sequence,
            versions=job.versions,
            kind=job.kind,
            payload_bytes=job.bytes,
            seconds=time.perf_counter() - started,
            attempts=attempts,
            weights_hash=manager.state.weights_hash,
            weights=manager.weights(),
        )

    # ---------------------------------------------------------------------------------- actions

    def status(self, adapter: str | None = None) -> list[dict[str, Any]]:
        """Return the newest version of every adapter, or of one."""
        request = {"adapter": adapter} if adapter else {}
        answer: list[dict[str, Any]] = self._link.act("status", request)["adapters"]
        return answer

    def history(self, adapter: str) -> list[dict[str, Any]]:
        """Return the signed manifests of an adapter, oldest first."""
        answer: list[dict[str, Any]] = self._link.act("history", {"adapter": adapter})["versions"]
        return answer

    def rollback(self, adapter: str, target: int, *, key: SigningKey, node: str) -> int:
        """Make version ``target`` the newest again, under a new number; return that number.

        Raises:
            SyncFailure: no such version, or the node is not an admin.
        """
        versions = {v["manifest"]["sequence"]: v for v in self.history(adapter)}
        if target not in versions:
            raise SyncFailure(
                "not-found", f"adapter {adapter!r} has no version {target}", fix="see history"
            )
        head = versions[max(versions)]
        signed = key.sign(
            Manifest(
                adapter=adapter,
                node=node,
                kind="rollback",
                sequence=head["manifest"]["sequence"] + 1,
                base_hash=head["manifest"]["new_hash"],
                new_hash=versions[target]["manifest"]["new_hash"],
                previous=head["digest"],
                payload_sha256=hashlib.sha256(b"").hexdigest(),
                payload_bytes=0,
                time=int(time.time()),
                target=target,
            )
        )
        return int(self._link.act("rollback", {"signed": signed.to_json()})["sequence"])

    def aggregate(
        self,
        adapter: str,
        inputs: list[str],
        *,
        weights: list[float] | None = None,
        settings: dict[str, Any] | None = None,
        codec: str = "int8",
    ) -> dict[str, Any]:
        """Have the server average ``inputs`` into ``adapter`` (role admin).

        Args:
            adapter: the adapter the result is a version of.
            inputs: the adapters to average, their newest versions.
            weights: sample counts, equal by default.
            settings: fields of :class:`memopt.federation.aggregate.AggregateSettings`.
            codec: how the result is sent to those who pull it.
        """
        return self._link.act(
            "aggregate",
            {
                "adapter": adapter,
                "inputs": inputs,
                "weights": weights,
                "settings": settings or {},
                "codec": codec,
            },
        )

    # ---------------------------------------------------------------------------------- retries

    def _persist(self, job: PushJob | PullJob) -> int:
        """Run the job until it succeeds, fails for good, or used up its retries."""
        attempts = failures = 0
        while True:
            attempts += 1
            before = job.moved
            try:
                with self._link.exchange() as exchange:
                    job.run(exchange)
                return attempts
            except SyncFailure as error:
                if error.code == "wrong-base" and job.fall_back():
                    continue
                if not error.retryable:
                    raise
                failures = 1 if job.moved > before else failures + 1
                if failures > self._retries:
                    raise
                count("memopt_sync_retries_total", code=error.code)
            ceiling = min(_BACKOFF_CEILING, _BACKOFF_SECONDS * 2 ** (failures - 1))
            time.sleep(self._random.uniform(0, ceiling))
