"""TLS 1.3 with client certificates, roles, signatures, keys and the audit log."""

from __future__ import annotations

import datetime
import socket
import ssl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pyarrow.flight as flight
import pytest

from memopt.errors import ConfigurationError
from memopt.federation.delta.arrays import weights_hash
from memopt.federation.failures import SyncFailure
from memopt.federation.limits import strict_json
from memopt.federation.server.server import SyncServer
from memopt.federation.trust.audit import AuditLog, check_audit
from memopt.federation.trust.authority import init_ca, issue, node_of
from memopt.federation.trust.manifest import NO_HASH, VersionManifest, parse_signed
from memopt.federation.trust.nodes import Node, Trust, add_trusted
from memopt.federation.trust.signing import SigningKey
from memopt.federation.wire.tls import TlsFiles
from tests.federation.conftest import lora


@pytest.fixture
def secure(fleet, tmp_path: Path) -> Iterator[SyncServer]:
    """A server with TLS and client certificates."""
    with fleet.server(tmp_path / "store", tls=fleet.tls("server")) as server:
        yield server


def test_push_and_pull_over_mutual_tls(fleet, secure, tmp_path: Path) -> None:
    """A node with push and one with pull get what their roles allow, by certificate."""
    fleet.client(secure.port, "alice").push(
        fleet.manager(tmp_path / "a"), lora(), key=fleet.keys["alice"], node="alice"
    )
    bob = fleet.client(secure.port, "bob")
    pulled = bob.pull(fleet.manager(tmp_path / "b"), trust=fleet.trust)
    assert weights_hash(pulled.weights) == weights_hash(lora())
    with pytest.raises(SyncFailure, match="'bob' may not push") as caught:
        bob.push(fleet.manager(tmp_path / "c"), lora(1), key=fleet.keys["bob"], node="bob")
    assert caught.value.code == "forbidden"


def test_certificate_and_signature_must_name_the_same_node(fleet, secure, tmp_path) -> None:
    """Carol's certificate with Alice's key pushes nothing, nor an unknown key with Alice's."""
    carol = fleet.client(secure.port, "carol")
    with pytest.raises(SyncFailure, match="certificate of 'carol', manifest of 'alice'"):
        carol.push(fleet.manager(tmp_path / "a"), lora(), key=fleet.keys["alice"], node="alice")
    alice = fleet.client(secure.port, "alice")
    with pytest.raises(SyncFailure, match="is not trusted") as caught:
        alice.push(fleet.manager(tmp_path / "b"), lora(), key=SigningKey.generate(), node="alice")
    assert caught.value.code == "unknown-signer"
    assert alice.status() == []


def test_a_tls_1_2_client_is_refused(fleet, secure) -> None:
    """The handshake fails for a client that offers at most TLS 1.2, and succeeds with 1.3."""
    for version, good in ((ssl.TLSVersion.TLSv1_2, False), (ssl.TLSVersion.TLSv1_3, True)):
        context = ssl.create_default_context(cafile=str(fleet.tls("alice").ca))
        context.load_cert_chain(fleet.tls("alice").certificate, fleet.tls("alice").key)
        context.set_alpn_protocols(["h2"])
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = version
        with socket.create_connection(("localhost", secure.port)) as plain:
            if good:
                with context.wrap_socket(plain, server_hostname="localhost") as tls:
                    assert tls.version() == "TLSv1.3"
                    assert tls.recv(1)
                continue
            with pytest.raises((ssl.SSLError, ConnectionResetError)):
                context.wrap_socket(plain, server_hostname="localhost")


def test_a_client_refuses_a_tls_1_2_server(fleet, tmp_path: Path) -> None:
    """Our client does not talk to a server that has nothing newer than TLS 1.2."""
    files = fleet.tls("server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(files.certificate, files.key)
    import threading

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            plain, _ = listener.accept()
            try:
                context.wrap_socket(plain, server_side=True)
            except OSError:
                plain.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(SyncFailure, match=r"no trusted TLS 1\.3 connection"):
            fleet.client(listener.getsockname()[1], "alice").status()


@pytest.mark.parametrize("case", ["expired", "other authority", "not a node", "future"])
def test_bad_certificates_are_refused_with_the_reason(fleet, secure, tmp_path, case) -> None:
    """Expired, foreign, future and nameless certificates get no further than the handshake."""
    ca = fleet.folder
    if case == "other authority":
        ca = tmp_path / "other"
        init_ca(ca)
    starts = None
    if case == "future":
        starts = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    certificate, key = issue(
        tmp_path, "alice", ca=ca, days=-1 if case == "expired" else 9, starts=starts
    )
    if case == "not a node":
        certificate, key = _nameless(tmp_path, fleet.folder)
    files = TlsFiles(ca=fleet.folder / "ca.pem", certificate=certificate, key=key)
    from memopt.federation.client.client import SyncClient

    client = SyncClient("localhost", secure.port, tls=files, max_retries=0, timeout=5)
    with pytest.raises(SyncFailure) as caught:
        client.status()
    words = {"expired": "expired on", "future": "not valid yet"}
    assert words.get(case, "closed the connection") in str(caught.value) or case == "not a node"
    assert caught.value.code in ("unauthenticated", "unavailable")


def _nameless(folder: Path, ca: Path) -> tuple[Path, Path]:
    """A certificate of the right authority that names no memopt node."""
    from memopt.federation.trust import authority

    certificate = folder / "nameless.pem"
    old, authority.PREFIX = authority.PREFIX, "spiffe://elsewhere/"
    try:
        made, key = issue(folder, "nameless", ca=ca)
    finally:
        authority.PREFIX = old
    assert made == certificate
    return certificate, key


def test_a_server_certificate_for_another_host_is_refused(fleet, tmp_path: Path) -> None:
    """The client checks the host name, and takes no client-only certificate for a server's."""
    issue(tmp_path, "elsewhere", ca=fleet.folder, hosts=["example.org"])
    for node in ("elsewhere", "alice"):
        folder = tmp_path if node == "elsewhere" else fleet.folder
        files = TlsFiles(
            ca=fleet.folder / "ca.pem",
            certificate=folder / f"{node}.pem",
            key=folder / f"{node}.key",
        )
        with fleet.server(tmp_path / node, tls=files) as server:
            client = fleet.client(server.port, "alice", max_retries=0)
            with pytest.raises(SyncFailure, match=r"no trusted TLS 1\.3 connection"):
                client.status()


def test_no_certificate_and_the_way_round_the_gate_give_nothing(fleet, secure) -> None:
    """Without a certificate nothing; behind the gate no port, but a socket of the owner's only."""
    root = (fleet.folder / "ca.pem").read_bytes()
    with (
        flight.FlightClient(f"grpc+tls://localhost:{secure.port}", tls_root_certs=root) as client,
        pytest.raises(flight.FlightError),
    ):
        list(client.list_flights())
    inner = secure._flight.path
    listening = {c.laddr for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"}
    assert {port for _, port in listening} == {secure.port}
    assert inner.parent.stat().st_mode & 0o777 == 0o700
    # Even the owner gets nothing there without the gate's ticket.
    with flight.FlightClient(f"grpc+unix://{inner}") as client:
        with pytest.raises(flight.FlightUnauthenticatedError, match="come through the gate"):
            list(client.do_action(flight.Action("status", b"{}")))
        with pytest.raises(flight.FlightUnauthenticatedError):
            list(client.list_flights())


def test_plain_transport_stays_on_loopback(fleet, tmp_path: Path) -> None:
    """Neither end goes plain to another machine unless insecure is said."""
    with pytest.raises(ConfigurationError, match="--insecure"):
        fleet.server(tmp_path / "store", host="0.0.0.0")
    from memopt.federation.client.client import SyncClient

    with pytest.raises(ConfigurationError, match="--insecure"):
        SyncClient("example.org", 1)
    with fleet.server(tmp_path / "store", host="0.0.0.0", insecure=True) as server:
        assert fleet.client(server.port).status() == []


def manifest(**changes: object) -> VersionManifest:
    values = {
        "adapter": "lora",
        "node": "alice",
        "kind": "delta",
        "sequence": 1,
        "base_hash": NO_HASH,
        "new_hash": "1" * 64,
        "previous": NO_HASH,
        "payload_sha256": "2" * 64,
        "payload_bytes": 10,
        "time": 1_000_000,
    }
    return VersionManifest(**{**values, **changes})  # type: ignore[arg-type]


def test_any_changed_field_breaks_the_signature() -> None:
    """Each field of the manifest is under the signature."""
    key = SigningKey.generate()
    trust = Trust({n: Node(roles=("push", "admin"), keys=(key.public(),)) for n in ("alice", "x")})
    signed = key.sign(manifest())
    trust.verify(signed, fresh=True, now=1_000_000)
    for changes in (
        {"adapter": "other"},
        {"node": "x"},
        {"kind": "full"},
        {"sequence": 2},
        {"base_hash": "3" * 64},
        {"new_hash": "3" * 64},
        {"previous": "3" * 64},
        {"payload_sha256": "3" * 64},
        {"payload_bytes": 11},
        {"time": 1_000_001},
    ):
        forged = replace(signed, manifest=manifest(**changes))
        with pytest.raises(SyncFailure) as caught:
            trust.verify(forged, fresh=True, now=1_000_000)
        assert caught.value.code == "bad-signature"


def test_old_and_future_signatures_are_stale() -> None:
    """A push signed days ago or dated ahead is refused; a pulled version may be old."""
    key = SigningKey.generate()
    trust = Trust({"alice": Node(roles=("push",), keys=(key.public(),))})
    signed = key.sign(manifest())
    trust.verify(signed, fresh=False, now=1_000_000 + 10**7)
    for now in (1_000_000 + 10**7, 1_000_000 - 10**4):
        with pytest.raises(SyncFailure) as caught:
            trust.verify(signed, fresh=True, now=now)
        assert caught.value.code == "stale"


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": "../etc"},
        {"adapter": None},
        {"node": "a/b"},
        {"kind": "patch"},
        {"sequence": 0},
        {"sequence": -1},
        {"sequence": True},
        {"sequence": 2**70},
        {"base_hash": "Z" * 64},
        {"payload_bytes": 2**60},
        {"payload_bytes": 1.5},
        {"time": "now"},
        {"target": 3},
        {"format": 2},
        {"extra": 1},
    ],
)
def test_malformed_manifests_are_refused(changes: dict[str, object]) -> None:
    """Every field of a manifest is checked for type and range."""
    raw = SigningKey.generate().sign(manifest()).to_json()
    assert parse_signed(raw).manifest == manifest()
    raw["manifest"].update(changes)
    with pytest.raises(SyncFailure):
        parse_signed(raw)


def test_roles_can_be_limited_to_adapters(tmp_path: Path) -> None:
    """A node's roles hold for the adapters its patterns name."""
    add_trusted(tmp_path / "t.json", "alice", roles=("push",), adapters=("team-*",))
    trust = Trust(path=tmp_path / "t.json")
    trust.allow("alice", "push", "team-a")
    with pytest.raises(SyncFailure, match="may not push 'other'"):
        trust.allow("alice", "push", "other")


def test_damaged_trust_files_and_keys_name_the_problem(tmp_path: Path) -> None:
    """A trust file or key that cannot be used is one clear line."""
    for text in ("", "{}", '{"nodes": {"a": {}}}', '{"nodes": {"a/b": {}}}', "[1]"):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(ConfigurationError):
            Trust(path=tmp_path / "t.json")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Trust(path=tmp_path / "none.json")
    SigningKey.generate().save(tmp_path / "k")
    (tmp_path / "k").chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        SigningKey.load(tmp_path / "k")
    init_ca(tmp_path / "ca")
    with pytest.raises(ConfigurationError, match="exists already"):
        init_ca(tmp_path / "ca")


def test_a_certificate_with_two_nodes_names_none() -> None:
    """Exactly one node may be in a certificate."""
    names = (("URI", "spiffe://memopt/a"), ("URI", "spiffe://memopt/b"))
    with pytest.raises(SyncFailure, match="2 memopt nodes"):
        node_of({"subjectAltName": names})


def test_the_audit_log_shows_tampering(tmp_path: Path) -> None:
    """A changed, removed or cut line shows in the chain; a restart goes on with it."""
    path = tmp_path / "audit.log"
    for restart in range(2):
        log = AuditLog(path)
        for number in range(3):
            log.write("push", sequence=number, restart=restart)
        log.close()
    assert check_audit(path) == []
    lines = path.read_bytes().splitlines(keepends=True)
    assert strict_json(lines[0], what="entry")["event"] == "push"
    path.write_bytes(b"".join(lines[:2] + lines[3:]))
    assert check_audit(path) == ["line 3 does not follow line 2"]
    path.write_bytes(lines[0] + lines[1].replace(b"push", b"pull") + lines[2])
    assert check_audit(path) == ["line 3 does not follow line 2"]
