"""``memopt sync`` on real files, a real server process and mutual TLS."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from memopt.cli import main
from memopt.federation.delta.adapters import CONFIG_TENSOR, read_weights, write_weights
from memopt.federation.delta.arrays import weights_hash


@dataclass
class Done:
    """What a command printed."""

    stdout: str
    stderr: str


@pytest.fixture
def sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Run ``memopt sync`` in this process, in tmp_path, and check its exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, code: int = 0) -> Done:
        monkeypatch.setattr(sys, "argv", ["memopt", "sync", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        done = Done(*capsys.readouterr())
        assert (stopped.value.code or 0) == code, done
        return done

    return run


def adapter(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = {
        f"q.lora_{x}.weight": rng.normal(size=(8, 64) if x == "A" else (64, 8)).astype("float32")
        for x in "AB"
    }
    return {**weights, CONFIG_TENSOR: np.frombuffer(b'{"r": 8}', np.uint8)}


def test_a_fleet_by_command_line(sync, tmp_path: Path) -> None:
    """Authority, keys, serve, push, pull, diff, status, history, rollback: the whole way round."""
    sync("init-ca")
    sync("issue", "server", "--host", "localhost")
    sync("issue", "alice")
    sync("keygen", "alice", *("--role", "push", "--role", "pull", "--role", "admin"))
    for number in (1, 2):
        write_weights(tmp_path / f"a{number}", adapter(number))
    server = subprocess.Popen(
        [sys.executable, "-m", "memopt", "sync", "serve", "store", "--port", "0"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        port = server.stdout.readline().split(" (")[0].rpartition(":")[2]
        where = ("--node", "alice", "--server", f"localhost:{port}")
        for number in (1, 2):
            done = sync("push", f"a{number}", "--adapter", "lora", *where, "--json")
            assert json.loads(done.stdout)["sequence"] == number
        table = sync("pull", "out", "--adapter", "lora", *where, "--state", "b").stdout
        assert "version 2" in table
        assert (tmp_path / "out" / "adapter_config.json").read_text() == '{"r": 8}'
        versions = json.loads(sync("history", "lora", *where, "--json").stdout)
        assert [v["trusted"] for v in versions] == ["yes", "yes"]
        sync("rollback", "lora", "--to", "1", *where)
        sync("pull", "out", "--adapter", "lora", *where, "--state", "b")
        assert weights_hash(read_weights(tmp_path / "out")) == weights_hash(adapter(1))
        assert "rollback" in sync("status", *where).stdout
        bad = sync("push", "nothere", "--adapter", "x", *where, code=1)
        assert "no weights at 'nothere'" in bad.stderr
    finally:
        server.terminate()
        assert server.wait(timeout=30) == 0


def test_diff_needs_no_network(sync, tmp_path: Path) -> None:
    """`diff` lists each tensor's change and what each codec would send."""
    for number in (1, 2):
        write_weights(tmp_path / f"a{number}", adapter(number))
    document = json.loads(sync("diff", "a1", "a2", "--json").stdout)
    codecs = {c["codec"]: c for c in document["codecs"]}
    assert codecs["lossless"]["error"] == 0
    assert codecs["int4"]["bytes"] < codecs["int8"]["bytes"] < codecs["fp16"]["bytes"]
    assert {t["action"] for t in document["tensors"]} == {"sent", "unchanged"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("push", "a", "--adapter", "x", "--node", "n"), 2, "ca.pem is missing"),
        (("push", "a", "--adapter", "x", "--node", "../n", "--plain"), 1, "node name"),
        (("serve", "s", "--plain", "--host", "0.0.0.0"), 2, "trust.json cannot be read"),
        (("issue", "alice"), 2, "init-ca"),
        (("status", "--node", "n", "--plain", "--server", "nowhere"), 2, "not host:port"),
        (("diff", "a", "b"), 1, "no weights at 'a'"),
        (("push", "a", "--adapter", "x", "--node", "n", "--plain", "--codec", "int9"), 2, "int8"),
        (("push", "a", "--adapter", "x", "--node", "n", "--plain", "--levels", "0"), 2, "levels=0"),
        (("push", "a", "--adapter", "x", "--node", "n", "--plain", "--deadline", "0"), 2, "deadl"),
        (("pull", ".", "--adapter", "x", "--node", "n", "--plain"), 2, "trust.json cannot be read"),
        (("pull", "w.parquet", "--adapter", "x", "--node", "n", "--plain"), 2, "is a folder"),
    ],
)
def test_wrong_use_is_one_clear_line(sync, arguments, code, words) -> None:
    """Missing keys, bad names and addresses exit with one line that says what to do."""
    Path("w.parquet").mkdir()
    assert words in sync(*arguments, code=code).stderr
