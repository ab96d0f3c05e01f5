"""Attackers with a signature, with a role, with a certificate, and with none."""

from __future__ import annotations

import hashlib
import json
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest
from pyarrow.ipc import IpcWriteOptions

from benchmarks.chaos import ChaosProxy, Fault
from memopt.errors import ConfigurationError
from memopt.federation.delta.arrays import weights_hash
from memopt.federation.delta.compute import compute_delta, full_payload
from memopt.federation.delta.payload import Compressor
from memopt.federation.delta.settings import DeltaSettings
from memopt.federation.failures import SyncFailure
from memopt.federation.limits import Limits, canonical_json
from memopt.federation.server.server import SyncServer
from memopt.federation.trust.authority import issue
from memopt.federation.trust.manifest import NO_HASH, VersionManifest
from memopt.federation.trust.nodes import Node, Trust, add_trusted
from memopt.federation.trust.signing import SigningKey
from memopt.federation.wire import protocol
from tests.federation.conftest import lora, step
from tests.federation.test_sync import exchange

HELLO = protocol.encode(protocol.HELLO, {"operation": "push", "adapter": "lora"})
WEIGHTS = {"a": np.arange(300, dtype="float32")}


@pytest.fixture
def secure(fleet, tmp_path: Path) -> Iterator[SyncServer]:
    """A server with TLS and client certificates."""
    with fleet.server(tmp_path / "store", tls=fleet.tls("server")) as server:
        yield server


def raw_client(fleet, port: int, node: str) -> flight.FlightClient:
    """pyarrow's own client with a node's certificate."""
    files = fleet.tls(node)
    return flight.FlightClient(
        f"grpc+tls://localhost:{port}",
        tls_root_certs=files.ca.read_bytes(),
        cert_chain=files.certificate.read_bytes(),
        private_key=files.key.read_bytes(),
        generic_options=[("grpc.use_local_subchannel_pool", 1)],
    )


def manifest(payload: bytes, **changes: Any) -> VersionManifest:
    values: dict[str, Any] = {
        "adapter": "lora",
        "node": "alice",
        "kind": "full",
        "sequence": 1,
        "base_hash": NO_HASH,
        "new_hash": "1" * 64,
        "previous": NO_HASH,
        "payload_sha256": hashlib.sha256(payload).hexdigest(),
        "payload_bytes": len(payload),
        "time": int(time.time()),
    }
    return VersionManifest(**(values | changes))


def offer(fleet, manifest: VersionManifest) -> bytes:
    signed = fleet.keys["alice"].sign(manifest).to_json()
    return protocol.encode(protocol.OFFER, {"signed": signed})


# ------------------------------------------------------------------- payloads that are well signed


def dressed(text: bytes, bodies: bytes = b"", *, claimed: int | None = None) -> bytes:
    """A payload with this table, its hash right."""
    stored = Compressor().table(text)
    head = struct.pack("<HII", 1, len(stored), len(text) if claimed is None else claimed)
    body = b"MEMOPT-DELTA" + head + stored + bodies
    return body + hashlib.sha256(body).digest()


def table(*rows: list[Any], **changes: Any) -> bytes:
    fields = {"kind": "full", "dictionary": "", "tensors": list(rows)}
    return dressed(canonical_json(fields | changes), bytes(4 * len(rows)))


def row(**changes: Any) -> list[Any]:
    fields = {"name": "a", "operation": 0, "dtype": "float32", "shape": [1]}
    fields |= {"codec": 0, "stored": 4, "compressed": 0, "param": 0}
    return list((fields | changes).values())


def bomb() -> bytes:
    """A body of a few bytes that inflates to 64 MiB, announced as what it should be: 4 bytes."""
    body = Compressor(19).body(np.zeros(1 << 26, np.uint8))[0]
    text = {"kind": "full", "dictionary": "", "tensors": [row(stored=len(body), compressed=1)]}
    return dressed(canonical_json(text), body)


def unknown_version() -> bytes:
    body = full_payload(WEIGHTS).payload[:-32]
    body = body[:12] + struct.pack("<H", 9) + body[14:]
    return body + hashlib.sha256(body).digest()


HOSTILE = {
    "a shape of 2^40": (table(row(shape=[1 << 40])), "too-large"),
    "a shape whose product wraps": (table(row(shape=[1 << 32, 1 << 32])), "too-large"),
    "a negative dimension": (table(row(shape=[-4])), "malformed"),
    "a boolean dimension": (table(row(shape=[True])), "malformed"),
    "a fractional dimension": (table(row(shape=[1.5])), "malformed"),
    "nine dimensions": (table(row(shape=[1] * 9)), "malformed"),
    "a name twice": (table(row(), row()), "malformed"),
    "a path for a name": (table(row(name="../../etc/passwd")), "malformed"),
    "an absolute path": (table(row(name="/etc/passwd")), "malformed"),
    "no name": (table(row(name="")), "malformed"),
    "a control character": (table(row(name="a\u0000b")), "malformed"),
    "a name of 600 bytes": (table(row(name="a" * 600)), "too-large"),
    "a number for a name": (table(row(name=5)), "malformed"),
    "an unknown codec": (table(row(codec=99)), "unknown-codec"),
    "an unknown dtype": (table(row(dtype="complex64")), "malformed"),
    "an unknown operation": (table(row(operation=7)), "too-large"),
    "a change without a base": (
        table(row(operation=1, codec=1), kind="delta"),
        "malformed",
    ),
    "a body longer than the file": (table(row(stored=1 << 40)), "too-large"),
    "bodies that do not add up": (table(row(stored=3)), "malformed"),
    "an unknown dictionary": (table(row(), dictionary="f" * 64), "unknown-dictionary"),
    "an unknown kind": (table(row(), kind="patch"), "malformed"),
    "an unknown field": (table(row(), more=1), "malformed"),
    "too few fields": (table(row()[:5]), "malformed"),
    "another kind than signed": (table(row(), kind="delta"), "malformed"),
    "a table that is no JSON": (dressed(b"{"), "malformed"),
    "a table that claims 4 GiB": (dressed(b"{}", claimed=(1 << 32) - 1), "too-large"),
    "a table with a key twice": (dressed(b'{"kind": 1, "kind": 2}'), "malformed"),
    "a table of half a million lists": (
        dressed(b'{"a":[' + b"[]," * 500_000 + b"1]}"),
        "too-large",
    ),
    "a body that is a bomb": (bomb(), "malformed"),
    "an unknown version": (unknown_version(), "unknown-version"),
    "not a payload": (bytes(100), "malformed"),
    "other weights than signed": (full_payload(WEIGHTS).payload, "wrong-result"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_signed_payload_is_believed_nothing(fleet, plain, what: str) -> None:
    """A pusher's own signature does not help: typed refusal, nothing kept, the server goes on."""
    payload, code = HOSTILE[what]
    chunk = protocol.encode(protocol.CHUNK, {"offset": 0}, payload)
    assert exchange(plain.port, HELLO, offer(fleet, manifest(payload)), chunk).code == code
    assert plain.store.adapters() == []
    assert list(plain.store.incoming.glob("**/*.part")) == []
    assert fleet.client(plain.port).status() == []


def test_an_unknown_protocol_version_is_named(plain) -> None:
    """A frame of another version with a right checksum is refused as that."""
    import zlib

    body = HELLO[:3] + b"\x07" + HELLO[4:-4]
    assert exchange(plain.port, body + struct.pack("<I", zlib.crc32(body))).code == (
        "unknown-version"
    )


def test_a_wrong_base_is_answered_with_need_full(fleet, plain, tmp_path: Path) -> None:
    """The server says need-full to a delta of another base; the client then sends everything."""
    sender, client = fleet.manager(tmp_path / "a", codec="int8"), fleet.client(plain.port)
    client.push(sender, WEIGHTS, key=fleet.keys["alice"], node="alice")
    head = plain.store.head("lora")
    delta = compute_delta({"b": np.ones(3)}, {"b": np.ones(3) * 2}, DeltaSettings(full_ratio=9))
    for changes in ({"base_hash": "e" * 64}, {"base_hash": head.weights_hash}):
        # Once the manifest tells of another base, once only the payload does.
        made = manifest(delta.payload, kind="delta", sequence=2, previous=head.digest, **changes)
        chunk = protocol.encode(protocol.CHUNK, {"offset": 0}, delta.payload)
        assert exchange(plain.port, HELLO, offer(fleet, made), chunk).code == "need-full"

    class Confused(type(sender)):  # type: ignore[misc]
        """A node whose delta is made for another base than it says."""

        def delta(self, new: Any, *, full: bool = False, settings: Any = None) -> Any:
            return super().delta(new, full=True) if full else delta

    sender.close()
    with Confused(tmp_path / "a", "lora") as sender:
        new = {"a": WEIGHTS["a"] * 2}
        report = client.push(sender, new, key=fleet.keys["alice"], node="alice")
    assert (report.kind, report.sequence, report.attempts) == ("full", 2, 2)
    assert weights_hash(plain.store.weights("lora", 2)) == weights_hash(new)


# ------------------------------------------------------------------------- roles and who sees what


def test_a_node_sees_only_the_adapters_that_its_patterns_name(fleet, secure, tmp_path) -> None:
    """Listing, status, history, info, get and pull of another team's adapter show nothing."""
    issue(fleet.folder, "dave", ca=fleet.folder)
    add_trusted(fleet.trust_file, "dave", roles=("pull",), adapters=("team-*",))
    alice = fleet.client(secure.port, "alice")
    for name in ("lora", "team-x"):
        alice.push(
            fleet.manager(tmp_path / "a", name), lora(), key=fleet.keys["alice"], node="alice"
        )
    dave = fleet.client(secure.port, "dave", max_retries=0)
    assert [row["adapter"] for row in dave.status()] == ["team-x"]
    assert len(dave.history("team-x")) == 1
    dave.pull(fleet.manager(tmp_path / "d", "team-x"), trust=fleet.trust)
    for look in (
        lambda: dave.status("lora"),
        lambda: dave.history("lora"),
        lambda: dave.pull(fleet.manager(tmp_path / "d2"), trust=fleet.trust),
    ):
        with pytest.raises(SyncFailure) as caught:
            look()
        assert caught.value.code == "forbidden"
    with raw_client(fleet, secure.port, "dave") as client:
        assert [f.descriptor.path for f in client.list_flights()] == [[b"team-x"]]
        for name in ("lora", "not-there"):
            # The same answer for both: who may not read does not learn what is there.
            with pytest.raises(flight.FlightUnauthorizedError, match="may not pull"):
                client.do_get(flight.Ticket(json.dumps({"adapter": name}).encode())).read_all()
            with pytest.raises(flight.FlightUnauthorizedError, match="may not pull"):
                client.get_flight_info(flight.FlightDescriptor.for_path(name))


def test_a_node_without_roles_and_one_that_is_not_trusted_see_nothing(fleet, secure) -> None:
    """A certificate of the authority alone opens nothing."""
    add_trusted(fleet.trust_file, "erin")
    for node in ("erin", "frank"):
        issue(fleet.folder, node, ca=fleet.folder)
        with raw_client(fleet, secure.port, node) as client:
            for call in (
                lambda c=client: list(c.list_flights()),
                lambda c=client: list(c.list_actions()),
                lambda c=client: list(c.do_action(flight.Action("status", b"{}"))),
            ):
                with pytest.raises(flight.FlightUnauthorizedError):
                    call()


def test_do_put_and_other_methods_take_nothing(fleet, plain, tmp_path: Path) -> None:
    """There is one way in, DoExchange; the others end in an error and leave nothing behind."""
    client = flight.FlightClient(("127.0.0.1", plain.port))
    batch = pa.record_batch({"x": [1, 2, 3]})
    with pytest.raises((flight.FlightError, pa.ArrowException)):  # noqa: PT012
        writer, _ = client.do_put(flight.FlightDescriptor.for_path("lora"), batch.schema)
        writer.write_batch(batch)
        writer.close()
    client.close()
    assert fleet.client(plain.port).status() == []


def test_only_an_admins_signature_has_the_server_average(fleet, plain, tmp_path: Path) -> None:
    """Without the role, without a trusted key, or with an old order, nothing is averaged."""
    fleet.client(plain.port).push(
        fleet.manager(tmp_path / "a", "one"), lora(), key=fleet.keys["alice"], node="alice"
    )
    carol = fleet.client(plain.port, max_retries=0)
    with pytest.raises(SyncFailure, match="'carol' may not admin"):
        carol.aggregate("sum", ["one"], key=fleet.keys["carol"], node="carol")
    stranger = fleet.client(plain.port, max_retries=0)
    with pytest.raises(SyncFailure) as caught:
        stranger.aggregate("sum", ["one"], key=SigningKey.generate(), node="alice")
    assert caught.value.code == "unknown-signer"
    # An order is good once, and only for the request that it was signed for.
    request = {"inputs": ["one"], "weights": None, "settings": {}, "codec": "int8"}
    body = canonical_json(request)
    order = manifest(body, adapter="sum", kind="aggregate", new_hash=NO_HASH)
    signed = fleet.keys["alice"].sign(order).to_json()

    def ask(request: dict[str, Any]) -> str:
        data = json.dumps({"signed": signed, "request": request}).encode()
        with flight.FlightClient(("127.0.0.1", plain.port)) as client:
            try:
                list(client.do_action(flight.Action("aggregate", data)))
            except flight.FlightError as error:
                return str(json.loads(error.extra_info)["code"])
        return "done"

    assert ask(request | {"inputs": ["one", "one"]}) == "malformed"
    assert ask(request) == "done"
    assert ask(request) == "conflict"
    # An order is no version either.
    hello = protocol.encode(protocol.HELLO, {"operation": "push", "adapter": "sum"})
    assert exchange(plain.port, hello, offer(fleet, order)).code == "malformed"


def test_an_average_is_made_of_what_the_admin_may_read(fleet, secure, tmp_path: Path) -> None:
    """An admin of one team cannot have another team's adapter averaged into its own."""
    issue(fleet.folder, "gina", ca=fleet.folder)
    key = SigningKey.generate()
    add_trusted(
        fleet.trust_file, "gina", key=key.public(), roles=("pull", "admin"), adapters=("team-*",)
    )
    fleet.client(secure.port, "alice").push(
        fleet.manager(tmp_path / "a"), lora(), key=fleet.keys["alice"], node="alice"
    )
    with pytest.raises(SyncFailure, match="'gina' may not pull 'lora'"):
        fleet.client(secure.port, "gina", max_retries=0).aggregate(
            "team-x", ["lora"], key=key, node="gina"
        )


def test_a_lying_server_cannot_have_an_admin_sign_its_weights(fleet, plain, tmp_path) -> None:
    """Before an admin signs an old version's hash that version's own signature is checked."""
    client, sender = fleet.client(plain.port), fleet.manager(tmp_path / "a", codec="lossless")
    for seed in range(2):
        client.push(sender, lora(seed), key=fleet.keys["alice"], node="alice")
    # What a server would do that shows version 1 with weights of its own choice.
    path = tmp_path / "store" / "adapters" / "lora" / "00000001" / "manifest.json"
    shown = json.loads(path.read_text())
    shown["manifest"]["new_hash"] = "d" * 64
    path.write_text(json.dumps(shown))
    with pytest.raises(SyncFailure) as caught:
        client.rollback("lora", 1, key=fleet.keys["alice"], node="alice", trust=fleet.trust)
    assert caught.value.code == "bad-signature"


def test_a_lying_server_cannot_fill_a_clients_memory(fleet, tmp_path: Path) -> None:
    """A record batch of a server, here some KB that inflate to 64 MiB, is not even looked into."""

    class Lying(flight.FlightServerBase):
        def do_exchange(self, context, descriptor, reader, writer) -> None:
            reader.read_chunk()
            batch = pa.record_batch({"x": pa.nulls(1 << 20, pa.binary(64))})
            writer.begin(batch.schema, options=IpcWriteOptions(compression="zstd"))
            writer.write_with_metadata(batch, pa.py_buffer(HELLO))

    with Lying(("127.0.0.1", 0)) as server:
        client = fleet.client(server.port, max_retries=0)
        with pytest.raises(SyncFailure, match="Out of bounds field index"):
            client.pull(fleet.manager(tmp_path / "a"), trust=fleet.trust)


def test_trust_that_is_taken_away_during_an_upload_counts(fleet, plain, tmp_path: Path) -> None:
    """A node removed from the trust file while its chunks come in commits nothing."""
    text = fleet.trust_file.read_text()
    rng = np.random.default_rng(0)
    weights = {"w": rng.integers(0, 2**32, size=3 << 20, dtype="uint32")}

    def progress(done: int, total: int) -> None:
        if 0 < done < total:
            fleet.trust_file.write_text('{"nodes": {}}')

    try:
        with pytest.raises(SyncFailure, match="is not trusted"):
            fleet.client(plain.port).push(
                fleet.manager(tmp_path / "a", codec="lossless", level=-5),
                weights,
                key=fleet.keys["alice"],
                node="alice",
                progress=progress,
            )
    finally:
        fleet.trust_file.write_text(text)
    assert plain.store.adapters() == []


def test_secrets_and_trust_that_others_can_touch_are_refused(fleet, tmp_path: Path) -> None:
    """A TLS key or an authority's key others may read, a trust file others may change: an error."""
    issue(tmp_path, "server", ca=fleet.folder, hosts=["localhost"])
    (tmp_path / "server.key").chmod(0o640)
    from memopt.federation.wire.tls import TlsFiles

    files = TlsFiles(
        ca=fleet.folder / "ca.pem",
        certificate=tmp_path / "server.pem",
        key=tmp_path / "server.key",
    )
    with pytest.raises(ConfigurationError, match="chmod 600"):
        files.server_context()
    (tmp_path / "ca.pem").write_bytes((fleet.folder / "ca.pem").read_bytes())
    (tmp_path / "ca.key").write_bytes((fleet.folder / "ca.key").read_bytes())
    (tmp_path / "ca.key").chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        issue(tmp_path, "x", ca=tmp_path)
    add_trusted(tmp_path / "t.json", "x", roles=("push",))
    (tmp_path / "t.json").chmod(0o666)
    with pytest.raises(ConfigurationError, match="can be changed by anyone"):
        Trust(path=tmp_path / "t.json")
    assert Node(roles=()).may(None, "lora") is False


def test_stores_and_states_are_their_owners(fleet, tmp_path: Path) -> None:
    """What a server and a node keep is in folders that nobody else may enter."""
    with fleet.server(tmp_path / "store"), fleet.manager(tmp_path / "state") as manager:
        assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700
        assert manager.folder.stat().st_mode & 0o777 == 0o700


# ------------------------------------------------------------------------------------ hoarders


def test_connections_that_never_shake_hands_do_not_keep_others_out(fleet, secure) -> None:
    """A hundred open sockets that say nothing leave room for who comes after them."""
    hoard = [socket.create_connection(("localhost", secure.port)) for _ in range(100)]
    try:
        assert fleet.client(secure.port, "alice").status() == []
    finally:
        for each in hoard:
            each.close()


def test_one_node_cannot_take_all_connections(fleet, tmp_path: Path) -> None:
    """Over its own share a node is turned away; another node still gets in."""
    limits = Limits(node_connections=3)
    context = fleet.tls("bob").client_context()
    held: list[ssl.SSLSocket] = []
    with fleet.server(tmp_path / "store", tls=fleet.tls("server"), limits=limits) as server:
        try:
            for number in range(5):
                plain = socket.create_connection(("localhost", server.port))
                held.append(context.wrap_socket(plain, server_hostname="localhost"))
                held[-1].settimeout(10)
                # Who is let in hears HTTP/2 settings; who is not, the end.
                try:
                    heard = held[-1].recv(1)
                except (ssl.SSLError, ConnectionResetError):
                    heard = b""
                assert bool(heard) == (number < 3)
            assert fleet.client(server.port, "alice").status() == []
        finally:
            for each in held:
                each.close()


def test_an_old_connection_ends_and_its_upload_resumes(fleet, tmp_path: Path) -> None:
    """A connection has a longest life; a push that outlives it goes on over the next one."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.integers(0, 2**32, size=2 << 20, dtype="uint32")}
    limits, incoming = Limits(), tmp_path / "store" / "incoming"

    def next_connection(number: int) -> Fault:
        if not any(part.stat().st_size for part in incoming.glob("**/*.part")):
            # However slow this machine is, one of them lives long enough to bring something.
            object.__setattr__(limits, "connection_seconds", 0.5 * number)
            return Fault(kind="delay", seconds=0.02)
        # Something is there to resume, and the rest may take its time.
        object.__setattr__(limits, "connection_seconds", 3600.0)
        return Fault()

    with (
        fleet.server(tmp_path / "store", limits=limits) as server,
        ChaosProxy(("127.0.0.1", server.port), next_connection) as slow,
    ):
        report = fleet.client(slow.port, max_retries=50).push(
            fleet.manager(tmp_path / "a", codec="lossless", level=-5),
            weights,
            key=fleet.keys["alice"],
            node="alice",
        )
        assert report.attempts > 1
        assert report.resumed_bytes > 0
        assert weights_hash(server.store.weights("lora", 1)) == weights_hash(weights)


def test_a_port_scan_does_not_fill_the_audit_log(fleet, secure, tmp_path: Path) -> None:
    """Of many refused connections the log tells with some lines and a number."""
    for _ in range(60):
        with socket.create_connection(("localhost", secure.port)) as scan:
            scan.sendall(b"GET / HTTP/1.1\r\n\r\n")
            scan.settimeout(10)
            try:
                while scan.recv(100):
                    pass
            except ConnectionResetError:
                pass
    log, lines = tmp_path / "store" / "audit.log", [""]
    while "more before)" not in lines[-1]:
        # About once a second one more line is due, with the number of those left out.
        time.sleep(0.3)
        with socket.create_connection(("localhost", secure.port)) as scan:
            scan.sendall(b"GET / HTTP/1.1\r\n\r\n")
            scan.recv(100)
        lines = log.read_text().splitlines()
    assert len(lines) < 50


def test_a_round_has_a_deadline_over_all_its_attempts(fleet, tmp_path: Path, monkeypatch) -> None:
    """Steps that each come in time do not make a round endless; what arrived is resumed later."""
    monkeypatch.setattr(protocol, "CHUNK_BYTES", 128 * 1024)
    monkeypatch.setattr(protocol, "WINDOW_BYTES", 256 * 1024)
    rng = np.random.default_rng(0)
    weights = {"w": rng.integers(0, 2**32, size=2 << 20, dtype="uint32")}
    with fleet.server(tmp_path / "store") as server:
        with (
            ChaosProxy(
                ("127.0.0.1", server.port), lambda n: Fault(kind="delay", seconds=0.04)
            ) as slow,
            fleet.manager(tmp_path / "a", codec="lossless", level=-5) as sender,
            pytest.raises(SyncFailure, match="not done within 2 s") as caught,
        ):
            fleet.client(slow.port, deadline=2.0).push(
                sender, weights, key=fleet.keys["alice"], node="alice"
            )
        assert caught.value.code == "timeout"
        with fleet.manager(tmp_path / "a", codec="lossless", level=-5) as sender:
            report = fleet.client(server.port).push(
                sender, weights, key=fleet.keys["alice"], node="alice"
            )
        assert report.resumed_bytes > 0
    with pytest.raises(ConfigurationError, match="deadline"):
        fleet.client(1, deadline=0)


def test_a_pull_falls_back_to_everything(fleet, plain, tmp_path: Path) -> None:
    """A delta that does not give the signed weights here is answered by fetching all of them."""
    client, weights = fleet.client(plain.port), lora(size=256)
    sender = fleet.manager(tmp_path / "a", codec="int8")
    receiver = fleet.manager(tmp_path / "b")
    client.push(sender, weights, key=fleet.keys["alice"], node="alice")
    client.pull(receiver, trust=fleet.trust)
    client.push(sender, step(weights, 1), key=fleet.keys["alice"], node="alice")
    # A flipped bit in memory: the base is not what its hash says.
    name = next(iter(receiver.weights()))
    receiver.weights()[name] = receiver.weights()[name] + 1
    pulled = client.pull(receiver, trust=fleet.trust)
    assert (pulled.kind, pulled.attempts) == ("full", 2)
    assert weights_hash(pulled.weights) == weights_hash(sender.weights())
