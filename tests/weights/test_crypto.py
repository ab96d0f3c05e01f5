"""Weights at rest: right key, wrong key, changed bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memopt.errors import WeightsError
from memopt.weights.crypto import decrypt_file, encrypt_file

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
