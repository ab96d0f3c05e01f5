"""Push and pull over a real server: versions, fallbacks, plain Flight clients, bad messages."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest

from memopt.federation.client.client import SyncClient
from memopt.federation.delta.arrays import raw, weights_hash
from memopt.federation.failures import SyncFailure
from memopt.federation.limits import Limits
from memopt.federation.trust.authority import issue
from memopt.federation.trust.nodes import Node, Trust
from memopt.federation.trust.signing import SigningKey
from memopt.federation.wire import protocol
from memopt.federation.wire.tls import TlsFiles

from .conftest import lora, step


def test_ten_rounds_leave_both_ends_with_the_same_bits(fleet, plain, tmp_path: Path) -> None:
    """After each push and pull sender and receiver hold weights of one hash, lossy codec or not."""
    client = fleet.client(plain.port)
    sender = fleet.manager(tmp_path / "a", codec="int4")
    receiver = fleet.manager(tmp_path / "b")
    weights = lora()
    kinds = []
    for number in range(10):
        pushed = client.push(sender, weights, key=fleet.keys["alice"], node="alice")
        pulled = client.pull(receiver, trust=fleet.trust)
        kinds.append(pulled.kind)
        assert pulled.sequence == pushed.sequence == number + 1
        assert weights_hash(pulled.weights) == weights_hash(sender.weights())
        weights = step(weights, number)
    assert kinds == ["full"] + ["delta"] * 9


def test_what_was_skipped_arrives_later(fleet, plain, tmp_path: Path) -> None:
    """A change under the threshold waits on disk and is sent by a push that asks for all of it."""
    client, weights = fleet.client(plain.port), lora()
    with fleet.manager(tmp_path / "a", codec="lossless") as sender:
        client.push(sender, weights, key=fleet.keys["alice"], node="alice")
        small = step(weights, 1, size=1e-4)
        report = client.push(sender, small, key=fleet.keys["alice"], node="alice")
        assert (report.kind, report.skipped, report.sequence) == ("nothing", 8, 1)
    # Another process, and the caller's weights are gone: the residual is on disk.
    with fleet.manager(tmp_path / "a", codec="lossless", delta_threshold=0) as sender:
        assert weights_hash(sender.target()) == weights_hash(small)
        name = next(iter(small))
        assert np.abs(sender.residual()[name]).max() > 0
        client.push(sender, sender.target(), key=fleet.keys["alice"], node="alice")
        assert sender.state.residual_sha256 == ""
    pulled = client.pull(fleet.manager(tmp_path / "b"), trust=fleet.trust)
    assert weights_hash(pulled.weights) == weights_hash(small)


def test_a_wrong_base_is_answered_with_everything(fleet, plain, tmp_path: Path) -> None:
    """A node that is behind the server sends full by itself; a refused delta falls back too."""
    client = fleet.client(plain.port)
    one, two = fleet.manager(tmp_path / "a"), fleet.manager(tmp_path / "b")
    for manager, node, seed in ((one, "alice", 0), (two, "carol", 1), (one, "alice", 2)):
        report = client.push(manager, lora(seed), key=fleet.keys[node], node=node)
        assert report.kind == "full"
    assert report.sequence == 3


def test_new_removed_reshaped_and_retyped_tensors_travel(fleet, plain, tmp_path: Path) -> None:
    """The set of tensors may change between versions in every way."""
    client, weights = fleet.client(plain.port), lora(layers=8)
    sender, receiver = fleet.manager(tmp_path / "a"), fleet.manager(tmp_path / "b")
    client.push(sender, weights, key=fleet.keys["alice"], node="alice")
    client.pull(receiver, trust=fleet.trust)
    names = sorted(weights)
    changed = dict(weights)
    del changed[names[0]]
    changed[names[1]] = weights[names[1]].reshape(-1)
    changed[names[2]] = weights[names[2]].astype("float16")
    changed["new"] = np.ones(3)
    report = client.push(sender, changed, key=fleet.keys["alice"], node="alice")
    actions = {t.name: t.action for t in report.tensors}
    assert report.kind == "delta"
    assert actions == {
        names[0]: "removed",
        names[1]: "replaced",
        names[2]: "replaced",
        "new": "added",
    }
    pulled = client.pull(receiver, trust=fleet.trust)
    assert weights_hash(pulled.weights) == weights_hash(changed)


def roll_back(fleet, client, target: int, node: str = "alice") -> int:
    return client.rollback("lora", target, key=fleet.keys[node], node=node, trust=fleet.trust)


def test_a_rollback_is_a_new_version_that_all_follow(fleet, plain, tmp_path: Path) -> None:
    """An admin's rollback moves forward in number; pushes and pulls go on from it."""
    client, receiver = fleet.client(plain.port), fleet.manager(tmp_path / "b")
    sender = fleet.manager(tmp_path / "a", codec="lossless")
    for seed in range(3):
        client.push(sender, lora(seed), key=fleet.keys["alice"], node="alice")
    client.pull(receiver, trust=fleet.trust)
    assert roll_back(fleet, client, 1) == 4
    pulled = client.pull(receiver, trust=fleet.trust)
    assert (pulled.sequence, weights_hash(pulled.weights)) == (4, weights_hash(lora(0)))
    assert client.push(sender, lora(9), key=fleet.keys["alice"], node="alice").sequence == 5
    with pytest.raises(SyncFailure, match="no version 77"):
        roll_back(fleet, client, 77)
    with pytest.raises(SyncFailure, match="may not admin"):
        roll_back(fleet, client, 1, "carol")


def test_any_flight_client_can_look(fleet, plain, tmp_path: Path) -> None:
    """list_flights, get_flight_info, do_get and do_action work with nothing but pyarrow."""
    weights = lora()
    sender = fleet.manager(tmp_path / "a")
    fleet.client(plain.port).push(sender, weights, key=fleet.keys["alice"], node="alice")
    with flight.FlightClient(("127.0.0.1", plain.port)) as client:
        (listed,) = client.list_flights()
        info = client.get_flight_info(flight.FlightDescriptor.for_path("lora"))
        table = client.do_get(info.endpoints[0].ticket).read_all()
        assert listed.descriptor.path == [b"lora"]
        rows = {row["name"]: row for row in table.to_pylist()}
        for name, array in weights.items():
            assert rows[name]["data"] == raw(array).tobytes()
            assert (rows[name]["dtype"], rows[name]["shape"]) == ("float32", list(array.shape))
        (status,) = client.do_action(flight.Action("status", b"{}"))
        assert json.loads(status.body.to_pybytes())["adapters"][0]["sequence"] == 1
        assert {a.type for a in client.list_actions()} >= {"status", "history", "rollback"}
        with pytest.raises(flight.FlightServerError, match="has no version"):
            client.get_flight_info(flight.FlightDescriptor.for_path("other"))


@pytest.mark.slow
def test_256_mib_pass_without_deadlock(fleet, plain, tmp_path: Path) -> None:
    """A payload far past Flight's 16 MiB of buffers goes through, acknowledged in a window."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.integers(0, 2**32, size=64 << 20, dtype="uint32")}
    client = fleet.client(plain.port, timeout=60.0)
    sender = fleet.manager(tmp_path / "a", codec="lossless", level=-5)
    unacknowledged = []
    report = client.push(
        sender,
        weights,
        key=fleet.keys["alice"],
        node="alice",
        progress=lambda done, total: unacknowledged.append(done),
    )
    assert report.payload_bytes > 256 << 20
    assert report.attempts == 1
    assert max(np.diff(unacknowledged)) <= protocol.WINDOW_BYTES
    pulled = client.pull(fleet.manager(tmp_path / "b"), trust=fleet.trust)
    assert pulled.weights_hash == sender.state.weights_hash


def test_a_hundred_clients_at_once(fleet, tmp_path: Path) -> None:
    """A hundred nodes, each with its own certificate and key, push at the same moment over TLS;
    some pull at once, and every version is right."""
    keys = {f"node-{number}": SigningKey.generate() for number in range(100)}
    trust = Trust({n: Node(roles=("push", "pull"), keys=(k.public(),)) for n, k in keys.items()})
    failed, start = [], threading.Barrier(100)
    for node in keys:
        issue(tmp_path / "keys", node, ca=fleet.folder)

    def work(number: int, port: int) -> None:
        node, weights = f"node-{number}", lora(number, layers=2, size=16)
        try:
            files = TlsFiles(
                ca=fleet.folder / "ca.pem",
                certificate=tmp_path / "keys" / f"{node}.pem",
                key=tmp_path / "keys" / f"{node}.key",
            )
            client = SyncClient(
                "localhost", port, tls=files, seed=number, timeout=60.0, max_retries=6
            )
            start.wait()
            with fleet.manager(tmp_path / "a", node) as sender:
                client.push(sender, weights, key=keys[node], node=node)
            if number % 10:
                return
            with fleet.manager(tmp_path / "b", node) as receiver:
                pulled = client.pull(receiver, trust=trust)
                assert weights_hash(pulled.weights) == weights_hash(weights)
        except Exception as error:  # noqa: BLE001 - collected and asserted on below
            failed.append((number, error))

    with fleet.server(tmp_path / "store", trust=trust, tls=fleet.tls("server")) as server:
        threads = [threading.Thread(target=work, args=(n, server.port)) for n in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        for number, node in enumerate(keys):
            held = server.store.weights(node, 1)
            assert weights_hash(held) == weights_hash(lora(number, layers=2, size=16))
            assert server.store.signed(node, 1).manifest.node == node


def test_two_writers_of_one_adapter_never_mix(fleet, plain, tmp_path: Path) -> None:
    """Racing writers get conflicts and retry; every version on the server is one of the pushes."""
    pushed: list[str] = []

    def work(node: str) -> None:
        client = fleet.client(plain.port, max_retries=20, seed=hash(node) % 100)
        with fleet.manager(tmp_path / node) as manager:
            weights = lora(len(node))
            for number in range(5):
                weights = step(weights, number)
                client.push(manager, weights, key=fleet.keys[node], node=node)
                pushed.append(weights_hash(manager.weights()))

    threads = [threading.Thread(target=work, args=(n,)) for n in ("alice", "carol")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hashes = [v.manifest.new_hash for v in fleet.client(plain.port).history("lora")]
    assert sorted(hashes) == sorted(pushed)
    assert len(hashes) == 10


def exchange(port: int, *messages: bytes, command: bytes = protocol.COMMAND) -> SyncFailure:
    """Send raw messages and return the server's refusal."""
    with flight.FlightClient(("127.0.0.1", port)) as client:
        writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(command))
        for message in messages:
            writer.write_metadata(pa.py_buffer(message))
        writer.done_writing()
        while True:
            chunk = reader.read_chunk()
            frame = protocol.decode(memoryview(chunk.app_metadata), Limits())
            if frame.kind == protocol.ERROR:
                writer.close()
                return protocol.decode_error(frame.fields)


HELLO = protocol.encode(protocol.HELLO, {"operation": "push", "adapter": "lora"})
PULL = {"operation": "pull", "adapter": "lora", "sequence": 0, "weights_hash": "0" * 64}


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([b""], "unavailable"),
        ([b"\0" * 40], "corrupt"),
        ([HELLO[:-1]], "corrupt"),
        ([b"MSY\2" + HELLO[4:]], "corrupt"),
        ([protocol.encode(protocol.ACK, {"offset": 1})], "out-of-order"),
        ([protocol.encode(protocol.HELLO, {"operation": "erase"})], "malformed"),
        ([protocol.encode(protocol.HELLO, {"operation": ["push"]})], "malformed"),
        ([protocol.encode(protocol.HELLO, {"operation": "push", "adapter": "../x"})], "malformed"),
        ([protocol.encode(protocol.HELLO, {"operation": "push", "adapter": 5})], "malformed"),
        ([protocol.encode(protocol.HELLO, {"operation": "push"})], "malformed"),
        ([protocol.encode(protocol.HELLO, PULL)], "not-found"),
        ([protocol.encode(protocol.HELLO, PULL | {"sequence": -1})], "malformed"),
        ([protocol.encode(protocol.HELLO, PULL | {"sequence": 2**80})], "too-large"),
        ([protocol.encode(protocol.HELLO, PULL | {"weights_hash": "x"})], "malformed"),
        ([HELLO, protocol.encode(protocol.OFFER, {})], "malformed"),
        ([HELLO, protocol.encode(protocol.OFFER, {"signed": [1]})], "malformed"),
        ([HELLO, protocol.encode(protocol.CHUNK, {"offset": 0}, b"x")], "out-of-order"),
        ([HELLO, HELLO], "out-of-order"),
    ],
)
def test_malformed_messages_are_refused_and_the_server_stays(plain, messages, code) -> None:
    """Every message out of place gives a typed refusal, and the next client is served."""
    assert exchange(plain.port, *messages).code == code
    assert exchange(plain.port, protocol.encode(protocol.HELLO, PULL)).code == "not-found"


def test_other_commands_actions_and_tickets_are_refused(plain) -> None:
    """Unknown commands, actions and tickets are refused in the same typed way."""
    assert exchange(plain.port, HELLO, command=b"other").code == "corrupt"
    with flight.FlightClient(("127.0.0.1", plain.port)) as client:
        for action in (
            flight.Action("format-disk", b"{}"),
            flight.Action("history", b"[1"),
            flight.Action("history", b'{"adapter": "../x"}'),
            flight.Action("status", b'{"adapter": {}, "adapter": {}}'),
            flight.Action("rollback", b'{"signed": 5}'),
            flight.Action("aggregate", b'{"adapter": "x"}'),
        ):
            with pytest.raises(flight.FlightServerError):
                list(client.do_action(action))
        with pytest.raises(flight.FlightServerError):
            client.do_get(flight.Ticket(b"\xff")).read_all()
        assert list(client.list_flights()) == []


# The server may still say why, before its side is gone too.
ENDED = (flight.FlightError, pa.ArrowException, StopIteration)


def read_to_the_end(reader: flight.FlightStreamReader) -> None:
    """Read what a server says until the exchange ends, one way or another (raises)."""
    while True:
        reader.read_chunk()


def test_a_message_over_the_limit_never_reaches_the_server(fleet, tmp_path: Path) -> None:
    """The guard ends a connection whose message announces more than the limit, batches too."""
    limits = Limits(message_bytes=1 << 20)
    with fleet.server(tmp_path / "store", limits=limits) as server:
        with flight.FlightClient(("127.0.0.1", server.port)) as client:
            descriptor = flight.FlightDescriptor.for_command(protocol.COMMAND)
            writer, reader = client.do_exchange(descriptor)
            with pytest.raises(ENDED):  # noqa: PT012
                writer.write_metadata(pa.py_buffer(bytes(2 << 20)))
                read_to_the_end(reader)
        with flight.FlightClient(("127.0.0.1", server.port)) as client:
            batch = pa.record_batch({"x": list(range(1000))})
            writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(b"x"))
            with pytest.raises(ENDED):  # noqa: PT012
                writer.begin(batch.schema)
                writer.write_batch(batch)
                read_to_the_end(reader)
        assert exchange(server.port, protocol.encode(protocol.HELLO, PULL)).code == "not-found"
        log = (tmp_path / "store" / "audit.log").read_text()
        assert "message of 2097" in log
        assert "record batches are not taken" in log


def test_weights_over_the_limits_are_refused_before_they_are_sent(fleet, tmp_path: Path) -> None:
    """A push whose payload or tensor count is over the server's limits is refused by name."""
    with fleet.server(tmp_path / "store", limits=Limits(payload_bytes=1000)) as server:
        client = fleet.client(server.port)
        with pytest.raises(SyncFailure, match="over the limit 1000"):
            client.push(
                fleet.manager(tmp_path / "a"), lora(), key=fleet.keys["alice"], node="alice"
            )
    with fleet.server(tmp_path / "store2", limits=Limits(tensors=3)) as server:
        client = fleet.client(server.port)
        with pytest.raises(SyncFailure, match="over the limit 3"):
            client.push(
                fleet.manager(tmp_path / "b"), lora(), key=fleet.keys["alice"], node="alice"
            )


def test_a_pull_refuses_what_is_not_signed_by_a_trusted_pusher(fleet, plain, tmp_path) -> None:
    """The receiver checks every manifest against its own trust file, whatever the server took."""
    client = fleet.client(plain.port)
    client.push(fleet.manager(tmp_path / "a"), lora(), key=fleet.keys["alice"], node="alice")
    stranger = Trust({"alice": Node(roles=("push",), keys=("0" * 64,))})
    with pytest.raises(SyncFailure, match="is not trusted"):
        client.pull(fleet.manager(tmp_path / "b"), trust=stranger)
    demoted = Trust({"alice": Node(roles=("pull",), keys=(fleet.keys["alice"].public(),))})
    with pytest.raises(SyncFailure, match="may not push"):
        client.pull(fleet.manager(tmp_path / "c"), trust=demoted)


def test_a_server_that_went_back_in_time_is_refused(fleet, tmp_path: Path) -> None:
    """A node that has version 3 takes neither version 2 nor another version 3."""
    receiver = fleet.manager(tmp_path / "b")
    for store, rounds in (("one", 3), ("two", 2), ("three", 3)):
        with fleet.server(tmp_path / store) as server:
            client = fleet.client(server.port)
            with fleet.manager(tmp_path / f"a-{store}", codec="lossless") as sender:
                for seed in range(rounds):
                    client.push(
                        sender, lora(seed + len(store)), key=fleet.keys["alice"], node="alice"
                    )
            if store == "one":
                client.pull(receiver, trust=fleet.trust)
                held = weights_hash(receiver.weights())
                continue
            with pytest.raises(SyncFailure, match="this node has 3") as caught:
                client.pull(receiver, trust=fleet.trust)
            assert caught.value.code == "replay"
    assert weights_hash(receiver.weights()) == held


def test_server_side_aggregation_is_signed_by_the_server(fleet, plain, tmp_path: Path) -> None:
    """An aggregate of two adapters is a version like any other, pulled and verified."""
    client = fleet.client(plain.port)
    for node in ("alice", "carol"):
        manager = fleet.manager(tmp_path / node, node)
        client.push(manager, lora(len(node)), key=fleet.keys[node], node=node)
    by_alice = {"key": fleet.keys["alice"], "node": "alice"}
    answer = client.aggregate("global", ["alice", "carol"], weights=[1, 3], **by_alice)
    assert answer["sequence"] == 1
    assert 0 < answer["error"] < 1
    receiver = fleet.manager(tmp_path / "b", "global")
    pulled = client.pull(receiver, trust=fleet.trust)
    assert set(pulled.weights) == set(lora())
    client.aggregate("global", ["alice", "carol"], weights=[2, 3], codec="int8", **by_alice)
    assert client.pull(receiver, trust=fleet.trust).kind == "delta"
    with pytest.raises(SyncFailure, match="unknown setting"):
        client.aggregate("global", ["alice"], settings={"methd": "product"}, **by_alice)
