"""TLS 1.3 with certificates on both ends, and where a plain transport is allowed."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from memopt.errors import ConfigurationError
from memopt.sealing import check_private

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_plain(host: str, problem: str) -> None:
    """Refuse (ConfigurationError) a plain transport off loopback; ``problem`` says what of it."""
    if host not in LOOPBACK:
        raise ConfigurationError(
            problem,
            fix="use certificates (memopt sync issue) and leave --plain out, or say --insecure",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files of one end: the authority, the certificate and its key."""

    ca: Path
    certificate: Path
    key: Path

    def server_context(self) -> ssl.SSLContext:
        """Return a context that takes TLS 1.3 and certificates of the authority, nothing else."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.set_alpn_protocols(["h2"])
        # A resumed session would skip the certificate, its end of validity included.
        context.num_tickets = 0
        self._load(context)
        return context

    def client_context(self) -> ssl.SSLContext:
        """Return the other end's context: TLS 1.3, the server's host name checked."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols(["h2"])
        self._load(context)
        return context

    def _load(self, context: ssl.SSLContext) -> None:
        check_private(self.key)
        try:
            context.load_verify_locations(self.ca)
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigurationError(
                f"TLS files {self.certificate}, {self.key}, {self.ca} cannot be used ({error})",
                fix="run: memopt sync init-ca, then memopt sync issue",
            ) from error
