"""Key files a user names may be links, as Kubernetes mounts secrets; none is written through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from memopt.errors import ConfigurationError
from memopt.federation.trust.signing import SigningKey
from memopt.memory.privacy.keys import read_cipher
from memopt.sealing import check_private, load_key, write_key


def mounted(folder: Path, name: str, data: bytes) -> Path:
    """A secret as it is mounted: name -> ..data/name, ..data -> a folder with a time."""
    real = folder / "..2026_11_27"
    real.mkdir()
    (real / name).write_bytes(data)
    (real / name).chmod(0o400)
    (folder / "..data").symlink_to(real.name)
    (folder / name).symlink_to(Path("..data") / name)
    return folder / name


def _pem(folder: Path) -> bytes:
    SigningKey.generate().save(folder / "made.key")
    return (folder / "made.key").read_bytes()


@pytest.mark.parametrize("read", [load_key, read_cipher, SigningKey.load, check_private])
def test_a_mounted_secret_is_read(tmp_path: Path, read: Callable[[Path], object]) -> None:
    """Every reader follows the links; what others may read behind them is refused."""
    signing = read in (SigningKey.load, check_private)
    key = mounted(tmp_path, "key", _pem(tmp_path) if signing else b"11" * 32)
    read(key)
    (tmp_path / "..data" / "key").chmod(0o440)
    with pytest.raises(ConfigurationError, match="can be read by others"):
        read(key)


def test_no_key_is_written_through_a_link(tmp_path: Path) -> None:
    """A new one refuses the name, one that replaces takes the place of the link itself."""
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / "link").symlink_to(other)
    with pytest.raises(ConfigurationError, match="exists already"):
        write_key(tmp_path / "link")
    with pytest.raises(ConfigurationError):
        SigningKey.generate().save(tmp_path / "link", new=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="exists already"):
        write_key(tmp_path / "dangling")
    SigningKey.generate().save(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink()
    assert other.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()
