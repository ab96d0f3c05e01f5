"""Jobs on Ray: the same bytes as here, on a cluster made for the job and on one that was there."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memopt.bundle import Bundle
from tests.jobs.kit import command, parts, run

pytest.importorskip("ray")


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real cluster of two cores, which asks for a token of its own."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Ray's sockets have longer paths than pytest's folders leave room for.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as home:
        log = Path(home) / "log"
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        ray += ["--num-cpus=2", f"--port={port}", f"--temp-dir={home}", "--disable-usage-stats"]
        with log.open("w") as out:
            head = subprocess.Popen(
                [*ray, "--include-dashboard=false"], stdout=out, stderr=out, start_new_session=True
            )
        try:
            end = time.monotonic() + 60
            while "runtime started" not in log.read_text():
                assert head.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.1)
            yield f"127.0.0.1:{port}"
        finally:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()


def test_ray_writes_the_same_bytes(
    source: Path, tmp_path: Path, minilm: Bundle, address: str
) -> None:
    """Two actors on the cluster, by its address, against one process here."""
    run(source, tmp_path / "local", minilm)
    more = ["--engine=ray", "--workers=2", f"--address={address}"]
    done = subprocess.run(
        command(source, tmp_path / "ray", minilm, *more), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert parts(tmp_path / "ray") == parts(tmp_path / "local")


def test_a_cluster_is_made_for_the_job(source: Path, tmp_path: Path, minilm: Bundle) -> None:
    """Where no address says which; and an address that is none is told at once."""
    run(source, tmp_path / "local", minilm)
    run(source, tmp_path / "ray", minilm, engine="ray", workers=2)
    assert parts(tmp_path / "ray") == parts(tmp_path / "local")
    more = ["--engine=ray", "--address=127.0.0.1:1"]
    done = subprocess.run(
        command(source, tmp_path / "none", minilm, *more), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: no Ray cluster at '127.0.0.1:1': "), done.stderr
