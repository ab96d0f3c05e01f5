"""Keys and the envelope that weights, memories and sync states are sealed in."""

from __future__ import annotations

import pytest

from memopt.errors import ConfigurationError
from memopt.sealing import (
    KEY_VARIABLE,
    NONCE_BYTES,
    TAG_BYTES,
    Envelope,
    WrongKey,
    load_key,
    write_key,
)

KEY, OTHER = bytes(range(32)), bytes(32)


def test_an_envelope_opens_with_its_key_and_what_it_is_bound_to() -> None:
    """Another key, another place, a changed or a missing byte: none of them opens it."""
    sealed = Envelope(KEY).seal(b"weights", b"row 1")
    assert Envelope(KEY).open(sealed, b"row 1") == b"weights"
    assert len(sealed) == NONCE_BYTES + len(b"weights") + TAG_BYTES
    assert sealed != Envelope(KEY).seal(b"weights", b"row 1")
    for key, data, bound in (
        (OTHER, sealed, b"row 1"),
        (KEY, sealed, b"row 2"),
        (KEY, sealed, None),
        (KEY, sealed[:-1], b"row 1"),
        (KEY, sealed[:5], b"row 1"),
        (KEY, b"", None),
        *((KEY, sealed[:n] + bytes([sealed[n] ^ 1]) + sealed[n + 1 :], b"row 1") for n in (0, 20)),
    ):
        with pytest.raises(WrongKey):
            Envelope(key).open(data, bound)
    with pytest.raises(ConfigurationError, match="not 16"):
        Envelope(bytes(16))


def test_a_new_key_is_private_and_never_overwritten(tmp_path) -> None:
    """What write_key makes, load_key reads; others may not, and it stays."""
    write_key(tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    key = load_key(tmp_path / "key")
    with pytest.raises(ConfigurationError, match="exists already"):
        write_key(tmp_path / "key")
    assert load_key(tmp_path / "key") == key
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


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
