"""Weights at rest under a key: nothing in the clear on disk, and everything still works."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.errors import ConfigurationError
from memopt.federation.client.manager import DeltaSyncManager
from memopt.federation.delta.arrays import weights_hash
from memopt.federation.delta.settings import DeltaSettings
from memopt.federation.failures import SyncFailure
from memopt.federation.trust.vault import PART_BYTES, Appending, Vault
from tests.federation.conftest import lora, step

KEY, OTHER = b"k" * 32, b"o" * 32


def in_the_clear(folder: Path, weights: dict[str, np.ndarray]) -> list[Path]:
    """Files below ``folder`` with a run of a tensor's bytes, or with a tensor's name."""
    needles = [array.tobytes()[64:128] for array in weights.values()] + [b"lora_A.weight"]
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and any(needle in path.read_bytes() for needle in needles)
    ]


def manager(folder: Path, key: bytes | None, **settings: object) -> DeltaSyncManager:
    return DeltaSyncManager(
        folder,
        "lora",
        DeltaSettings(**settings),  # type: ignore[arg-type]
        vault=Vault(key),
    )


def test_rounds_under_keys_leave_nothing_in_the_clear(fleet, tmp_path: Path) -> None:
    """Server and nodes each under their own key: same bits at the end, only ciphertext kept."""
    weights = lora()
    server, one, two = tmp_path / "store", tmp_path / "a", tmp_path / "b"
    with fleet.server(server, vault=Vault(KEY)) as running:
        client = fleet.client(running.port)
        with manager(one, OTHER, codec="lossless") as sender, manager(two, KEY) as receiver:
            for number in range(5):
                client.push(sender, weights, key=fleet.keys["alice"], node="alice")
                pulled = client.pull(receiver, trust=fleet.trust)
                assert weights_hash(pulled.weights) == weights_hash(sender.weights())
                weights = step(weights, number, size=(0.05, 1e-4)[number % 2])
            # Something is below the threshold and waits: the residual is sealed too.
            assert sender.state.residual_sha256
            fresh = client.pull(manager(tmp_path / "c", None), trust=fleet.trust)
            assert weights_hash(fresh.weights) == weights_hash(sender.weights())
            everything = {**weights, **{f"held {n}": a for n, a in sender.weights().items()}}
    assert in_the_clear(tmp_path / "c", everything), "the check must see what is in the clear"
    for folder in (server, one, two):
        assert list(folder.rglob("sealed"))
        assert not in_the_clear(folder, everything)


def test_old_versions_are_rebuilt_under_a_key(fleet, tmp_path: Path) -> None:
    """A restarted server gives back every version from sealed payloads."""
    weights, hashes = lora(), []
    with (
        fleet.server(tmp_path / "store", vault=Vault(KEY)) as running,
        manager(tmp_path / "a", None) as sender,
    ):
        for number in range(5):
            client = fleet.client(running.port)
            client.push(sender, weights, key=fleet.keys["alice"], node="alice")
            hashes.append(sender.state.weights_hash)
            weights = step(weights, number)
    with fleet.server(tmp_path / "store", vault=Vault(KEY)) as running:
        for sequence, expected in enumerate(hashes, 1):
            assert weights_hash(running.store.weights("lora", sequence)) == expected


@pytest.mark.parametrize(("key", "says"), [(None, "no key was given"), (OTHER, "does not open")])
def test_a_sealed_folder_wants_its_key(fleet, tmp_path: Path, key, says: str) -> None:
    """Without the key or with another one a server and a node say so and change nothing."""
    fleet.server(tmp_path / "store", vault=Vault(KEY)).close()
    manager(tmp_path / "a", KEY).close()
    for opening in (
        lambda: fleet.server(tmp_path / "store", vault=Vault(key)),
        lambda: manager(tmp_path / "a", key),
    ):
        with pytest.raises(ConfigurationError, match=says):
            opening()
    # The refusal let go of the folders.
    fleet.server(tmp_path / "store", vault=Vault(KEY)).close()
    manager(tmp_path / "a", KEY).close()


def test_a_plain_store_that_gets_a_key_is_sealed(fleet, tmp_path: Path) -> None:
    """Versions from before are sealed when the store is opened with a key for the first time."""
    weights, store = lora(), tmp_path / "store"
    with fleet.server(store) as running, manager(tmp_path / "a", None) as sender:
        client = fleet.client(running.port)
        for number in range(3):
            client.push(sender, weights, key=fleet.keys["alice"], node="alice")
            weights = step(weights, number)
        held, expected = sender.weights(), sender.state.weights_hash
    assert in_the_clear(store, held)
    with fleet.server(store, vault=Vault(KEY)) as running:
        assert not in_the_clear(store, held)
        pulled = fleet.client(running.port).pull(manager(tmp_path / "b", None), trust=fleet.trust)
        assert weights_hash(pulled.weights) == expected


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    """Any byte of any record changed, two records exchanged: refused."""
    path, vault = tmp_path / "w", Vault(KEY)
    vault.write(path, [b"a" * 100, b"b" * 100])
    right = path.read_bytes()
    for at in range(0, len(right), 7):
        wrong = bytearray(right)
        wrong[at] ^= 1
        path.write_bytes(wrong)
        try:
            found = vault.read(path)
        except SyncFailure:
            continue
        # A length that points past the end cuts the file short; the hash of the content tells.
        assert found in (b"", b"a" * 100) or not vault.sealed(path)
    half = (len(right) - 12) // 2
    path.write_bytes(right[:12] + right[12 + half :] + right[12 : 12 + half])
    with pytest.raises(SyncFailure, match="cannot be decrypted"):
        vault.read(path)


@given(
    pieces=st.lists(st.binary(min_size=1, max_size=300), max_size=6),
    offset=st.integers(0, 2000),
    cut=st.integers(0, 40),
    sealed=st.booleans(),
)
def test_pieces_come_back_from_any_offset(tmp_path_factory, pieces, offset, cut, sealed) -> None:
    """What was appended is read whole and from any offset; a torn last piece is cut off."""
    path = tmp_path_factory.mktemp("vault") / "w"
    vault, whole = Vault(KEY if sealed else None), b"".join(pieces)
    for piece in pieces:
        with Appending(path, vault) as file:
            file.append(piece)
    if pieces:
        assert (vault.size(path), vault.read(path)) == (len(whole), whole)
        assert b"".join(vault.parts(path, offset)) == whole[offset:]
    if sealed and pieces:
        os.truncate(path, max(0, path.stat().st_size - cut))
        with Appending(path, vault) as file:
            kept = whole if not cut else b"".join(pieces[:-1])
            assert file.size <= len(kept)
            kept = kept[: file.size]
            file.append(b"more")
        assert vault.read(path) == kept + b"more"


def test_large_content_is_handed_out_in_parts(tmp_path: Path) -> None:
    """No part is larger than what fits a message."""
    data = np.random.default_rng(0).bytes(3 * PART_BYTES + 5)
    for vault in (Vault(), Vault(KEY)):
        vault.write(tmp_path / "w", [data])
        parts = list(vault.parts(tmp_path / "w", PART_BYTES // 2))
        assert max(map(len, parts)) <= PART_BYTES
        assert b"".join(parts) == data[PART_BYTES // 2 :]


def test_the_key_comes_from_a_file(fleet, tmp_path: Path) -> None:
    """``--key-file`` on serve, push and pull; a file that others may read is refused."""
    from memopt.federation.client.session import vault

    path = tmp_path / "key"
    path.write_text(KEY.hex())
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        vault(path)
    path.chmod(0o600)
    assert vault(path) == Vault(KEY)


def test_the_key_comes_from_the_environment(monkeypatch) -> None:
    """``MEMOPT_WEIGHTS_KEY`` seals by itself; without it files are plain."""
    from memopt.federation.client.session import vault

    monkeypatch.delenv("MEMOPT_WEIGHTS_KEY", raising=False)
    assert vault(None) == Vault()
    monkeypatch.setenv("MEMOPT_WEIGHTS_KEY", KEY.hex())
    assert vault(None) == Vault(KEY)
