"""Broken networks, killed processes, full disks: real processes and sockets, no wrong weights."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.chaos import ChaosProxy, Fault
from memopt.federation.delta.arrays import weights_hash
from memopt.federation.failures import SyncFailure
from memopt.federation.server.store import Store
from memopt.federation.trust.nodes import Trust
from memopt.federation.wire import protocol
from tests.federation.conftest import lora, step


def noise(mib: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights that do not compress."""
    rng = np.random.default_rng(seed)
    return {"w": rng.integers(0, 2**32, size=mib << 18, dtype="uint32")}


def test_a_server_killed_at_every_tenth_of_a_transfer(
    fleet, process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 at each 10 % of one push: it resumes every time and the weights are right."""
    # In lock step no tenth is passed over while acknowledgements of a window come in.
    monkeypatch.setattr(protocol, "WINDOW_BYTES", protocol.CHUNK_BYTES)
    server, weights = process(), noise(24)
    kills: list[int] = []

    def progress(done: int, total: int) -> None:
        tenth = 10 * done // total
        if 0 < tenth < 10 and tenth not in kills:
            kills.append(tenth)
            server.kill()
            server.start()

    sender = fleet.manager(tmp_path / "a", codec="lossless", level=-5)
    client = fleet.client(server.port, max_retries=8)
    report = client.push(sender, weights, key=fleet.keys["alice"], node="alice", progress=progress)
    assert kills == list(range(1, 10))
    assert report.attempts >= len(kills) + 1
    assert report.resumed_bytes > 0.7 * report.payload_bytes
    pulled = client.pull(fleet.manager(tmp_path / "b"), trust=fleet.trust)
    assert weights_hash(pulled.weights) == weights_hash(weights)
    # Of all those servers no socket is left but the last one's; and none after it has stopped.
    last = Path((tmp_path / "store" / "socket").read_text())
    assert (last / "flight").is_socket()
    server.stop()
    assert not last.exists()


def test_a_server_killed_at_every_tenth_of_a_pull(
    fleet, process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 at each 10 % of one pull: it resumes from its own bytes, not from the beginning."""
    monkeypatch.setattr(protocol, "WINDOW_BYTES", protocol.CHUNK_BYTES)
    server, weights = process(), noise(12)
    client = fleet.client(server.port, max_retries=8)
    sender = fleet.manager(tmp_path / "a", codec="lossless", level=-5)
    client.push(sender, weights, key=fleet.keys["alice"], node="alice")
    kills, moves = [], [0]

    def progress(done: int, total: int) -> None:
        assert done > moves[-1], "what has arrived is never fetched again"
        moves.append(done)
        tenth = 10 * done // total
        if 0 < tenth < 10 and tenth not in kills:
            kills.append(tenth)
            server.kill()
            server.start()

    receiver = fleet.manager(tmp_path / "b")
    pulled = client.pull(receiver, trust=fleet.trust, progress=progress)
    assert kills == list(range(1, 10))
    assert pulled.attempts >= len(kills) + 1
    assert weights_hash(pulled.weights) == weights_hash(weights)


def test_kill_9_while_committing_leaves_whole_versions(tmp_path: Path) -> None:
    """Whenever a committing process is killed, each version that is there is complete and right."""
    script = Path(__file__).parent / "commit_for_ever.py"
    chance = random.Random(0)
    folder = tmp_path / "store"
    last = 0
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        # So many commits, and a moment into the next one, wherever that falls.
        for _ in range(1 + chance.randint(2, 6)):
            assert process.stdout.readline()
        time.sleep(chance.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        store = Store(folder)
        there = store.sequences("lora")
        assert there == list(range(1, len(there) + 1))
        for sequence in there[-6:]:
            store.weights("lora", sequence)  # checks the signed hash
        assert not list(folder.glob("adapters/*/.*"))
        store.close()
        assert len(there) >= last
        last = len(there)
    assert last > 6


def test_an_upload_that_became_a_version_is_not_written_again(tmp_path: Path) -> None:
    """Killed between the rename and the removal of the upload: one file had two names."""
    script = Path(__file__).parent / "commit_for_ever.py"
    folder = tmp_path / "store"
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    while not (folder / "adapters/lora/00000002").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    payload = folder / "adapters/lora/00000001/payload.bin"
    upload, unfinished = folder / "incoming/x.part", folder / "incoming/y.part"
    upload.unlink(missing_ok=True)
    os.link(payload, upload)
    unfinished.write_bytes(b"half")

    with contextlib.closing(Store(folder)) as store:
        assert not upload.exists()
        assert unfinished.read_bytes() == b"half"
        upload.write_bytes(b"another")
        assert store.vault.sha256(payload) == store.signed("lora", 1).manifest.payload_sha256


def test_a_killed_client_resumes_where_it_was(fleet, process, tmp_path: Path) -> None:
    """A client process killed half-way is started again and sends only the rest."""
    from memopt.federation.delta.adapters import write_weights

    server = process()
    fleet.keys["alice"].save(fleet.folder / "alice.sign.key")
    write_weights(tmp_path / "w.safetensors", noise(16))
    with ChaosProxy(
        ("127.0.0.1", server.port), lambda n: Fault(kind="delay", seconds=0.02)
    ) as slow:
        command = [
            *(sys.executable, "-m", "memopt", "sync", "push", str(tmp_path / "w.safetensors")),
            *("--adapter", "lora", "--node", "alice", "--plain", "--codec", "lossless"),
            *("--keys", str(fleet.folder), "--state", str(tmp_path / "state"), "--server"),
        ]
        process = subprocess.Popen([*command, f"127.0.0.1:{slow.port}"])
        part = tmp_path / "store" / "incoming"
        while sum(p.stat().st_size for p in part.glob("*/*.part")) < 6 << 20:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
    done = subprocess.run(
        [*command, f"127.0.0.1:{server.port}", "--json"], capture_output=True, text=True, check=True
    )
    assert '"attempts": 1' in done.stdout
    assert '"resumed_bytes": 0' not in done.stdout
    pulled = fleet.client(server.port).pull(fleet.manager(tmp_path / "b"), trust=fleet.trust)
    assert weights_hash(pulled.weights) == weights_hash(noise(16))


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("kind", ["drop", "truncate", "flip", "duplicate", "stall", "delay"])
def test_a_bad_network_is_survived(fleet, plain, tmp_path: Path, kind, direction) -> None:
    """Each fault, early and in the middle, in either direction: the push and pull come through."""
    places = {2: 300, 4: 900, 6: 5_000, 8: 40_000}
    # Every operation opens a probe (odd) and a connection (even); only the latter is hurt.

    def choose(number: int) -> Fault:
        at = places.get(number, -1)
        kindly = kind if at >= 0 else "none"
        return Fault(kind=kindly, at=at, direction=direction, bit=3, seconds=0.01)

    weights = lora(1, layers=8, size=256)
    with ChaosProxy(("127.0.0.1", plain.port), choose) as proxy:
        client = fleet.client(proxy.port, timeout=1.0)
        sender = fleet.manager(tmp_path / "a", codec="lossless")
        client.push(sender, weights, key=fleet.keys["alice"], node="alice")
        pulled = client.pull(fleet.manager(tmp_path / "b"), trust=fleet.trust)
    assert weights_hash(pulled.weights) == weights_hash(weights)
    assert [v.manifest.sequence for v in fleet.client(plain.port).history("lora")] == [1]


def test_a_replayed_connection_changes_nothing(fleet, plain, tmp_path: Path) -> None:
    """All bytes a client sent, sent again by someone else, commit nothing."""
    with ChaosProxy(("127.0.0.1", plain.port), record=True) as proxy:
        client = fleet.client(proxy.port)
        sender = fleet.manager(tmp_path / "a", codec="lossless")
        for seed in range(2):
            client.push(sender, lora(seed), key=fleet.keys["alice"], node="alice")
        recorded = [bytes(data) for data in proxy.recorded.values() if len(data) > 1000]
    assert len(recorded) == 2
    for data in recorded:
        with socket.create_connection(("127.0.0.1", plain.port)) as thief:
            thief.sendall(data)
            thief.settimeout(1.0)
            try:
                while thief.recv(65536):
                    pass
            except TimeoutError:
                pass
    versions = fleet.client(plain.port).history("lora")
    assert [v.manifest.sequence for v in versions] == [1, 2]
    log = (tmp_path / "store" / "audit.log").read_text()
    assert '"code":"replay"' in log


def test_a_replayed_manifest_is_refused(fleet, plain, tmp_path: Path) -> None:
    """An old signed manifest offered again is refused as a replay, a re-dated one by signature."""
    from dataclasses import replace

    from tests.federation.test_sync import exchange

    sender = fleet.manager(tmp_path / "a", codec="lossless")
    client = fleet.client(plain.port)
    for seed in range(2):
        client.push(sender, lora(seed), key=fleet.keys["alice"], node="alice")
    hello = protocol.encode(protocol.HELLO, {"operation": "push", "adapter": "lora"})
    signed = plain.store.signed("lora", 1)
    old = protocol.encode(protocol.OFFER, {"signed": signed.to_json()})
    assert exchange(plain.port, hello, old).code == "replay"
    forged = replace(signed, manifest=replace(signed.manifest, sequence=3))
    offer = protocol.encode(protocol.OFFER, {"signed": forged.to_json()})
    assert exchange(plain.port, hello, offer).code == "bad-signature"


def test_a_stalled_client_is_shown_the_door(fleet, tmp_path: Path) -> None:
    """A client that goes silent amid its upload is dropped; others are served meanwhile."""

    def stall(number: int) -> Fault:
        return Fault(kind="stall", at=1 << 20) if number == 2 else Fault()

    failed: list[SyncFailure] = []
    with (
        fleet.server(tmp_path / "store", idle_seconds=1.0) as server,
        ChaosProxy(("127.0.0.1", server.port), stall) as proxy,
        fleet.manager(tmp_path / "slow", "slow", codec="lossless") as slow,
    ):

        def push() -> None:
            # Patient enough to stay until the server ends it.
            client = fleet.client(proxy.port, timeout=30.0, max_retries=0)
            try:
                client.push(slow, noise(4), key=fleet.keys["alice"], node="alice")
            except SyncFailure as error:
                failed.append(error)

        stalled = threading.Thread(target=push)
        stalled.start()
        while not proxy.faults:
            assert stalled.is_alive()
            time.sleep(0.01)
        client = fleet.client(server.port)
        client.push(fleet.manager(tmp_path / "a"), lora(), key=fleet.keys["alice"], node="alice")
        stalled.join(timeout=30)
        assert [error.code for error in failed] == ["unavailable"]
        assert "no data for 1 s" in (tmp_path / "store" / "audit.log").read_text()
        # What had come before is there for the next attempt.
        report = client.push(slow, noise(4), key=fleet.keys["alice"], node="alice")
        assert report.sequence == 1


def test_a_silent_connection_is_shown_the_door(fleet, tmp_path: Path) -> None:
    """A connection that only opens HTTP/2 and says no more is closed after the idle time."""
    with (
        fleet.server(tmp_path / "store", idle_seconds=1.0) as server,
        socket.create_connection(("127.0.0.1", server.port)) as silent,
    ):
        silent.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        silent.settimeout(10)
        while silent.recv(4096):
            pass


def test_a_stalled_server_ends_in_a_timeout(fleet, tmp_path: Path) -> None:
    """A peer that accepts and never answers costs one timeout per attempt, then a clear error."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = fleet.client(silent.getsockname()[1], timeout=0.5, max_retries=1)
        with pytest.raises(SyncFailure) as caught:
            client.push(
                fleet.manager(tmp_path / "a"), lora(), key=fleet.keys["alice"], node="alice"
            )
        assert caught.value.retryable


def test_a_full_disk_is_told_and_the_server_goes_on(fleet, process, tmp_path: Path) -> None:
    """With no room for the upload the client hears so; smaller pushes go on working."""
    server = process(shell="ulimit -f 2048")  # 2 MiB per file: write fails as on a full disk
    client = fleet.client(server.port, max_retries=1)
    with pytest.raises(SyncFailure, match="the disk is full") as caught:
        client.push(fleet.manager(tmp_path / "a"), noise(8), key=fleet.keys["alice"], node="alice")
    assert caught.value.code == "storage"
    weights = lora()
    client.push(
        fleet.manager(tmp_path / "c", "small"), weights, key=fleet.keys["alice"], node="alice"
    )
    pulled = client.pull(fleet.manager(tmp_path / "d", "small"), trust=fleet.trust)
    assert weights_hash(pulled.weights) == weights_hash(weights)
    assert client.status("lora")[0]["sequence"] == 0


def test_a_full_file_system(fleet, tmp_path: Path) -> None:
    """The same on a file system of 3 MiB that really is full (needs the right to mount)."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        with fleet.server(folder / "store") as server:
            client = fleet.client(server.port, max_retries=0)
            sender = fleet.manager(tmp_path / "a")
            with pytest.raises(SyncFailure, match="the disk is full"):
                client.push(sender, noise(2), key=fleet.keys["alice"], node="alice")
            weights = lora()
            client.push(
                fleet.manager(tmp_path / "b", "x"), weights, key=fleet.keys["alice"], node="alice"
            )
            assert server.store.sequences("x") == [1]
            assert server.store.sequences("lora") == []
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_lost_acknowledgement_is_settled_later(fleet, plain, tmp_path: Path) -> None:
    """Crash between the server's commit and the client's note of it: the next push goes on."""
    from memopt.federation.client.manager import DeltaSyncManager

    client, weights = fleet.client(plain.port), lora(layers=8, size=128)
    key = fleet.keys["alice"]

    class Crash(Exception):
        pass

    class Crashing(DeltaSyncManager):
        def confirm(self) -> None:
            raise Crash

    from memopt.federation.delta.settings import DeltaSettings

    with fleet.manager(tmp_path / "a", codec="int8") as sender:
        client.push(sender, weights, key=key, node="alice")
    second = step(weights, 1)
    with Crashing(tmp_path / "a", "lora", DeltaSettings(codec="int8")) as sender:
        with pytest.raises(Crash):
            client.push(sender, second, key=key, node="alice")
        assert sender.state.sequence == 1
    with fleet.manager(tmp_path / "a", codec="int8") as sender:
        report = client.push(sender, step(second, 2), key=key, node="alice")
        assert (report.kind, report.sequence) == ("delta", 3)
        assert weights_hash(sender.weights()) == weights_hash(plain.store.weights("lora", 3))


def test_twenty_rounds_with_random_faults(fleet, tmp_path: Path) -> None:
    """Random faults on every second connection: nearly all rounds succeed, none is wrong."""
    sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
    try:
        from sync_faults import run
    finally:
        sys.path.pop(0)
    result = run(rounds=20, seed=1, folder=tmp_path)
    assert result.wrong == 0
    assert result.succeeded >= 19
    assert result.faults > 7


def test_the_trust_file_is_read_again_when_it_changes(fleet, plain, tmp_path: Path) -> None:
    """Removing a node from the trust file stops its next push without a restart."""
    client = fleet.client(plain.port)
    sender = fleet.manager(tmp_path / "a")
    client.push(sender, lora(), key=fleet.keys["alice"], node="alice")
    text = fleet.trust_file.read_text()
    try:
        fleet.trust_file.write_text('{"nodes": {}}')
        with pytest.raises(SyncFailure, match="is not trusted"):
            client.push(sender, lora(5), key=fleet.keys["alice"], node="alice")
    finally:
        fleet.trust_file.write_text(text)
    assert isinstance(plain.trust, Trust)
    assert threading.active_count() < 100
