"""A node's files in one folder, and what the command line does with them.

<keys>/ca.pem              the authority
<keys>/<node>.pem, .key    certificate and its key (memopt sync issue)
<keys>/<node>.sign.key     Ed25519 signing key (memopt sync keygen)
<keys>/trust.json          who may do what
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from memopt.config import load_config
from memopt.errors import ConfigurationError, SyncError
from memopt.federation.client.client import PullReport, PushReport, SyncClient
from memopt.federation.client.link import parse_address
from memopt.federation.client.manager import DeltaSyncManager
from memopt.federation.delta.arrays import Weights
from memopt.federation.delta.settings import DeltaSettings
from memopt.federation.trust.manifest import check_node
from memopt.federation.trust.nodes import Trust
from memopt.federation.trust.signing import SigningKey
from memopt.federation.trust.vault import Vault
from memopt.federation.wire.tls import TlsFiles
from memopt.progress import Progress
from memopt.sealing import KEY_VARIABLE, load_key
from memopt.settings import FederationSection


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFiles:
    """Where a node's keys and certificates are."""

    folder: Path
    node: str

    def __post_init__(self) -> None:
        check_node(self.node)

    def tls(self, *, plain: bool) -> TlsFiles | None:
        """Return the TLS files, None for a plain transport.

        Raises:
            ConfigurationError: a file is missing and ``plain`` was not said.
        """
        if plain:
            return None
        files = TlsFiles(
            ca=self.folder / "ca.pem",
            certificate=self.folder / f"{self.node}.pem",
            key=self.folder / f"{self.node}.key",
        )
        for path in (files.ca, files.certificate, files.key):
            if not path.is_file():
                raise ConfigurationError(
                    f"{path} is missing",
                    fix=f"run: memopt sync issue {self.node} --keys {self.folder}, or say --plain",
                )
        return files

    def signing_key(self) -> SigningKey:
        """Return the node's signing key."""
        return SigningKey.load(self.folder / f"{self.node}.sign.key")

    def trust(self) -> Trust:
        """Return the trust file of the folder."""
        return Trust(path=self.folder / "trust.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSession:
    """A client, its node's files and the settings in force."""

    client: SyncClient
    files: NodeFiles
    config: FederationSection

    def push(
        self, manager: DeltaSyncManager, new: Weights, *, full: bool, progress: Progress
    ) -> PushReport:
        """Push under the node's key; ``full``, or the configuration, sends everything."""
        return self.client.push(
            manager,
            new,
            key=self.files.signing_key(),
            node=self.files.node,
            full=full or sends_all(self.config),
            progress=progress,
        )

    def history(self, adapter: str) -> list[dict[str, Any]]:
        """Return an adapter's versions as plain JSON, and of each whether it is trusted."""
        trust, rows = self.files.trust(), []
        for signed in self.client.history(adapter):
            try:
                trust.verify(signed, fresh=False)
                verdict = "yes"
            except SyncError as error:
                verdict = f"NO: {error.problem}"
            digest = signed.manifest.digest()
            rows.append({**signed.to_json(), "digest": digest, "trusted": verdict})
        return rows


def connect(
    server: str, *, node: str, keys: str | Path, plain: bool, **options: Any
) -> NodeSession:
    """Return a client for ``host:port``, with the retries and the timeout of the configuration.

    Args:
        node, keys: who calls, and the folder of its files.
        plain: without TLS.
        options: others of SyncClient.
    """
    config = load_config().federation
    files = NodeFiles(folder=Path(keys), node=node)
    client = client_of(server, config, tls=files.tls(plain=plain), **options)
    return NodeSession(client=client, files=files, config=config)


def client_of(
    server: str, config: FederationSection, *, tls: TlsFiles | None, **options: Any
) -> SyncClient:
    """Return a client with the retries and the timeout of ``config``; options of SyncClient."""
    host, port = parse_address(server)
    return SyncClient(
        host,
        port,
        tls=tls,
        timeout=config.timeout_seconds,
        max_retries=config.max_retries,
        **options,
    )


def sends_all(config: FederationSection) -> bool:
    """Return whether every push is a full one."""
    return not config.enable_delta_sync


def delta_settings(config: FederationSection, **chosen: Any) -> DeltaSettings:
    """Return settings from the configuration, options that were given over it."""
    values: dict[str, Any] = {"delta_threshold": config.delta_threshold}
    if not config.compression_enabled:
        values |= {"codec": "lossless", "compress": False}
    given = {name: value for name, value in chosen.items() if value is not None}
    if "codec" not in given and {"max_error", "max_bytes"} & set(given):
        given["codec"] = "auto"
    return DeltaSettings(**(values | given))


def vault(key_file: Path | None) -> Vault:
    """Return what keeps weights at rest: under the key of a file, of the environment, or plain."""
    if key_file is None and not os.environ.get(KEY_VARIABLE):
        return Vault()
    return Vault(load_key(key_file))


def open_state(
    state: str | Path, adapter: str, settings: DeltaSettings, *, key_file: Path | None = None
) -> DeltaSyncManager:
    """Open this node's state of an adapter, under the key if there is one."""
    return DeltaSyncManager(state, adapter, settings, vault=vault(key_file))


def read_dictionary(path: Path | None) -> bytes:
    """Return a dictionary file's bytes, nothing for None.

    Raises:
        SyncError: the file cannot be read, or is empty: that would be no dictionary at all.
    """
    if path is None:
        return b""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SyncError(f"dictionary {path} cannot be read ({error.strerror})") from error
    if not data:
        raise SyncError(f"dictionary {path} is empty", fix="make one with: zstd --train FILES")
    return data


def report_json(report: PushReport | PullReport) -> dict[str, Any]:
    """Return a report as plain JSON: arrays left out, infinities as null."""
    names = (field.name for field in fields(report) if field.name != "weights")
    document = {name: getattr(report, name) for name in names}
    if "tensors" in document:
        document["tensors"] = [
            {k: None if v == float("inf") else v for k, v in asdict(t).items()}
            for t in document["tensors"]
        ]
    return document
