"""Real servers, keys and certificates for the federation tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from memopt.federation.client.client import SyncClient
from memopt.federation.client.manager import DeltaSyncManager
from memopt.federation.delta.settings import DeltaSettings
from memopt.federation.server.server import SyncServer
from memopt.federation.trust.authority import init_ca, issue
from memopt.federation.trust.nodes import Trust, add_trusted
from memopt.federation.trust.signing import SigningKey
from memopt.federation.wire.tls import TlsFiles


class Fleet:
    """Keys, trust and certificates of a server and its nodes; servers and clients on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys: dict[str, SigningKey] = {}
        self.seed = 0
        for node, roles in (
            ("alice", ("push", "pull", "admin")),
            ("carol", ("push", "pull")),
            ("bob", ("pull",)),
            ("server", ("push",)),
        ):
            self.keys[node] = SigningKey.generate()
            add_trusted(self.trust_file, node, key=self.keys[node].public(), roles=roles)
        init_ca(folder)
        issue(folder, "server", ca=folder, hosts=["localhost", "127.0.0.1"])
        for node in ("alice", "bob", "carol"):
            issue(folder, node, ca=folder)

    @property
    def trust_file(self) -> Path:
        return self.folder / "trust.json"

    @property
    def trust(self) -> Trust:
        return Trust(path=self.trust_file)

    def tls(self, node: str) -> TlsFiles:
        return TlsFiles(
            ca=self.folder / "ca.pem",
            certificate=self.folder / f"{node}.pem",
            key=self.folder / f"{node}.key",
        )

    def server(self, store: Path, **options: object) -> SyncServer:
        options = {"trust": self.trust, "key": self.keys["server"], **options}
        return SyncServer(store, **options)  # type: ignore[arg-type]

    def client(self, port: int, node: str | None = None, **options: object) -> SyncClient:
        """A client on plain loopback, or with ``node``'s certificate."""
        options = {"timeout": 10.0, "max_retries": 6, "seed": 0, **options}
        if node is not None:
            return SyncClient("localhost", port, tls=self.tls(node), **options)  # type: ignore[arg-type]
        return SyncClient("127.0.0.1", port, **options)  # type: ignore[arg-type]

    def manager(self, folder: Path, adapter: str = "lora", **settings: object) -> DeltaSyncManager:
        return DeltaSyncManager(folder, adapter, DeltaSettings(**settings))  # type: ignore[arg-type]


class Process:
    """``memopt sync serve`` as a process of its own, to be killed."""

    def __init__(self, fleet: Fleet, store: Path, *, port: int = 0, shell: str = "") -> None:
        self._arguments = [
            *(sys.executable, "-m", "memopt", "sync", "serve", str(store), "--plain"),
            *("--keys", str(fleet.folder), "--port"),
        ]
        self._shell = shell
        self.port = port
        self.start()

    def start(self) -> None:
        command = [*self._arguments, str(self.port)]
        if self._shell:
            command = ["bash", "-c", f'{self._shell}; exec "$0" "$@"', *command]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("serving"), line + self.process.stdout.read()
        self.port = int(line.split(" (")[0].rpartition(":")[2])

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=20)


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """Keys and certificates, made once."""
    return Fleet(tmp_path_factory.mktemp("fleet"))


@pytest.fixture
def plain(fleet: Fleet, tmp_path: Path) -> Iterator[SyncServer]:
    """A server on plain loopback."""
    with fleet.server(tmp_path / "store") as server:
        yield server


@pytest.fixture
def process(fleet: Fleet, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start ``memopt sync serve`` processes that are stopped at the end."""
    started: list[Process] = []

    def start(**options: object) -> Process:
        started.append(Process(fleet, tmp_path / "store", **options))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for each in started:
        each.stop()


def lora(seed: int = 0, layers: int = 4, size: int = 64) -> dict[str, np.ndarray]:
    """A small LoRA adapter, B not zero."""
    rng = np.random.default_rng(seed)
    return {
        f"model.layers.{i}.q_proj.lora_{x}.weight": rng.normal(
            size=(8, size) if x == "A" else (size, 8)
        ).astype("float32")
        for i in range(layers)
        for x in "AB"
    }


def step(weights: dict[str, np.ndarray], seed: int, size: float = 0.05) -> dict[str, np.ndarray]:
    """One training step's worth of change."""
    rng = np.random.default_rng(seed)
    return {
        name: (array + rng.normal(size=array.shape) * size).astype(array.dtype)
        for name, array in weights.items()
    }
