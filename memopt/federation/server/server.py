"""The sync server: an Arrow Flight service over a store of signed versions.

``DoExchange`` carries pushes and pulls (:mod:`memopt.federation.wire.protocol`); ``list_flights``,
``get_flight_info``, ``do_get`` and ``do_action`` are plain Flight, so that any client can look.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memopt.federation.limits import Limits
from memopt.federation.server.desk import Desk
from memopt.federation.server.gate import SyncGate
from memopt.federation.server.ledger import Ledger
from memopt.federation.server.orders import Signer
from memopt.federation.server.service import FlightService
from memopt.federation.server.store import Store
from memopt.federation.server.tickets import Tickets
from memopt.federation.server.uploads import Uploads
from memopt.federation.trust.audit import AuditLog
from memopt.federation.trust.nodes import Trust
from memopt.federation.trust.signing import SigningKey
from memopt.federation.trust.vault import Vault
from memopt.federation.wire.tls import TlsFiles, check_plain


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How a server is run.

    Attributes:
        trust: who may do what.
        host, port: where to listen; port 0 takes a free one (see :attr:`SyncServer.port`).
        tls: certificate files; None is a plain transport, which is refused off loopback unless
            ``insecure`` is said.
        limits: what is believed of clients.
        idle_seconds: after which a silent connection is closed.
        dictionaries: zstd dictionaries by SHA-256.
        keep: versions kept for history and rollback.
        key: Ed25519 key that signs what the server makes itself (aggregation), and its node name.
        vault: seals the store's payloads and weights under a key.

    Raises:
        ConfigurationError: plain transport off loopback.
    """

    trust: Trust
    host: str = "127.0.0.1"
    port: int = 0
    tls: TlsFiles | None = None
    insecure: bool = False
    limits: Limits | None = None
    idle_seconds: float = 60.0
    dictionaries: Mapping[str, bytes] | None = None
    keep: int = 200
    key: SigningKey | None = None
    node: str = "server"
    vault: Vault | None = None

    def __post_init__(self) -> None:
        if self.tls is None and not self.insecure:
            check_plain(self.host, f"a plain transport on {self.host} lets anyone read and listen")


class SyncServer:
    """A running server; use it as a context manager or call :meth:`close`.

    Args:
        folder: the store.
        options: the fields of :class:`ServerOptions`, by name.

    Raises:
        ConfigurationError: plain transport off loopback, unusable files or address.
    """

    def __init__(self, folder: str | Path, **options: Any) -> None:
        chosen = ServerOptions(**options)
        self.trust = chosen.trust
        context = chosen.tls.server_context() if chosen.tls else None
        limits = chosen.limits or Limits()
        tickets = Tickets(limits)
        self.store = Store(
            folder,
            limits,
            dictionaries=chosen.dictionaries,
            keep=chosen.keep,
            vault=chosen.vault,
        )
        self._audit = AuditLog(self.store.folder / "audit.log")
        uploads = Uploads(self.store.incoming, limits, self.store.vault)
        ledger = Ledger(store=self.store, trust=chosen.trust, audit=self._audit)
        signer = Signer(node=chosen.node, key=chosen.key)
        self._flight = FlightService(Desk(ledger, uploads, tickets, signer))
        try:
            self._gate = SyncGate(
                chosen.host,
                chosen.port,
                inner=self._flight.path,
                tickets=tickets,
                context=context,
                limits=limits,
                idle_seconds=chosen.idle_seconds,
                on_refused=lambda line: self._audit.write("connection-refused", problem=line[:300]),
            )
        except BaseException:
            self._flight.close()
            self.store.close()
            raise
        self.host, self.port = chosen.host, self._gate.port

    def __enter__(self) -> SyncServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop: drop connections, end running calls, release the store."""
        self._gate.close()
        self._flight.close()
        self._audit.close()
        self.store.close()

    def wait(self) -> None:
        """Block until the process is told to stop."""
        self._flight.wait()
