"""One call that brings a server to a node's weights."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from memopt.errors import ConfigurationError
from memopt.federation.client import session
from memopt.settings import FederationSection as DeltaSyncConfig

if TYPE_CHECKING:
    from memopt.federation.delta.arrays import Weights

__all__ = ["DeltaSyncConfig", "DeltaSyncManager", "SyncMetrics"]


@dataclass(frozen=True, slots=True)
class SyncMetrics:
    """What one sync did; ``compression_ratio`` is full float32 bytes over bytes sent."""

    sync_id: str
    sync_type: str  # full, delta or nothing
    data_size_bytes: int
    transfer_time_ms: float
    compression_ratio: float | None
    success: bool


class DeltaSyncManager:
    """Pushes weights as ``memopt sync push`` does.

    Args:
        config: the settings of section ``federation``.
        flight_endpoint: ``grpc://HOST:PORT`` (loopback) or ``grpc+tls://HOST:PORT``.
        node: who signs.
        keys: folder of the node's keys (``memopt sync keygen``).
        state: folder that remembers what the server has.
    """

    def __init__(
        self,
        config: DeltaSyncConfig,
        flight_endpoint: str = "grpc://localhost:8815",
        *,
        node: str = "node",
        keys: str | Path = "keys",
        state: str | Path = "sync-state",
    ) -> None:
        url = urlsplit(flight_endpoint)
        if url.scheme not in ("grpc", "grpc+tls") or not url.netloc:
            raise ConfigurationError(
                f"flight_endpoint is {flight_endpoint!r}", fix="write grpc+tls://HOST:PORT"
            )
        self.config, self.state, self.node = config, Path(state), node
        self._files = session.NodeFiles(folder=Path(keys), node=node)
        tls = self._files.tls(plain=url.scheme == "grpc")
        self._client = session.client_of(url.netloc, config, tls=tls)

    async def sync_weights(self, current_weights: Weights, target_node: str) -> SyncMetrics:
        """Bring ``target_node``, an adapter of the server, to these weights.

        Raises:
            SyncError: refused, or still failing after the retries; it falls back to full by itself.
        """
        return await asyncio.to_thread(self._push, current_weights, target_node)

    def _push(self, weights: Weights, adapter: str) -> SyncMetrics:
        settings = session.delta_settings(self.config)
        with session.open_state(self.state, adapter, settings) as manager:
            report = self._client.push(
                manager,
                weights,
                key=self._files.signing_key(),
                node=self.node,
                full=session.sends_all(self.config),
            )
        sent = report.payload_bytes
        return SyncMetrics(
            sync_id=f"{adapter}-{report.sequence}",
            sync_type=report.kind,
            data_size_bytes=sent,
            transfer_time_ms=report.seconds * 1000,
            compression_ratio=report.fp32_bytes / sent if sent else None,
            success=True,
        )
