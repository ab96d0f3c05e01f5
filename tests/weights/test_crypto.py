"""Weights at rest: right key, wrong key, changed bytes, key sources."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memopt.errors import ConfigurationError, WeightsError
from memopt.weights.crypto import (
    KEY_VARIABLE,
    decrypt_file,
    encrypt_file,
    encrypt_parquet,
    load_key,
    read_encrypted_parquet,
)
from memopt.weights.writer import write_weights

KEY, OTHER = bytes(range(32)), bytes(32)


@pytest.mark.parametrize("size", [0, 1, 4 << 20, (4 << 20) + 1, 9_000_000])
def test_a_file_comes_back_as_it_was(tmp_path: Path, size: int) -> None:
    """AES-GCM round trip at the segment borders."""
    data = np.random.default_rng(0).bytes(size)
    (tmp_path / "w").write_bytes(data)
    digest = encrypt_file(tmp_path / "w", tmp_path / "e", KEY)
    if size > 100:
        assert data[:100] not in (tmp_path / "e").read_bytes()
    decrypt_file(tmp_path / "e", tmp_path / "back", KEY, sha256=digest)
    assert (tmp_path / "back").read_bytes() == data


def test_every_change_is_noticed_and_nothing_is_written(tmp_path: Path) -> None:
    """A flipped bit anywhere, a cut, swapped segments, a wrong key or hash: refused, no output."""
    (tmp_path / "w").write_bytes(np.random.default_rng(0).bytes((8 << 20) + 100))
    encrypt_file(tmp_path / "w", tmp_path / "e", KEY)
    good = (tmp_path / "e").read_bytes()
    head, piece = 35, (4 << 20) + 16
    swapped = good[:head] + good[head + piece : head + 2 * piece] + good[head : head + piece]
    bad = [good[:-1], good[: head + piece], swapped + good[head + 2 * piece :], b"", good + b"x"]
    for place in (0, 12, 20, 30, 36, piece, len(good) - 1):
        changed = bytearray(good)
        changed[place] ^= 1
        bad.append(bytes(changed))
    for data in bad:
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(WeightsError):
            decrypt_file(tmp_path / "bad", tmp_path / "out", KEY)
    with pytest.raises(WeightsError, match="wrong key"):
        decrypt_file(tmp_path / "e", tmp_path / "out", OTHER)
    with pytest.raises(WeightsError, match="other weights"):
        decrypt_file(tmp_path / "e", tmp_path / "out", KEY, sha256="0" * 64)
    assert not (tmp_path / "out").exists()


def test_parquet_modular_encryption_needs_the_key(tmp_path: Path) -> None:
    """A weight file under AES-256 opens with its key only, and its SHA-256 is checked."""
    import pyarrow.parquet as pq

    weights = {"layer.weight": np.arange(5000, dtype="float32").reshape(50, 100)}
    write_weights(tmp_path / "w.parquet", weights)
    digest = encrypt_parquet(tmp_path / "w.parquet", tmp_path / "e.parquet", KEY)
    plain = pq.read_table(tmp_path / "w.parquet")
    assert read_encrypted_parquet(tmp_path / "e.parquet", KEY, sha256=digest).equals(plain)
    names = read_encrypted_parquet(tmp_path / "e.parquet", KEY, columns=["weight_name"])
    assert names.column_names == ["weight_name"]
    with pytest.raises(OSError, match=r"(?i)encrypt"):
        pq.read_table(tmp_path / "e.parquet")
    with pytest.raises(WeightsError, match="wrong key"):
        read_encrypted_parquet(tmp_path / "e.parquet", OTHER)
    changed = bytearray((tmp_path / "e.parquet").read_bytes())
    changed[len(changed) // 2] ^= 1
    (tmp_path / "bad.parquet").write_bytes(changed)
    with pytest.raises(WeightsError):
        read_encrypted_parquet(tmp_path / "bad.parquet", KEY)
    with pytest.raises(WeightsError, match="SHA-256"):
        read_encrypted_parquet(tmp_path / "bad.parquet", KEY, sha256=digest)


def test_keys_come_from_the_environment_or_a_private_file(tmp_path, monkeypatch) -> None:
    """Hex and base64 are read; a short key, an open file or no key is one clear line."""
    import base64

    monkeypatch.setenv(KEY_VARIABLE, KEY.hex())
    assert load_key() == KEY
    monkeypatch.setenv(KEY_VARIABLE, "abc")
    with pytest.raises(ConfigurationError, match="256-bit") as caught:
        load_key()
    assert "abc" not in str(caught.value)
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(ConfigurationError, match="no key"):
        load_key()
    path = tmp_path / "key"
    path.write_text(base64.b64encode(KEY).decode() + "\n")
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        load_key(path)
    path.chmod(0o600)
    assert load_key(path) == KEY
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_key(tmp_path / "none")
