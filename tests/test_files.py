"""Files of ours: opened as themselves, never through what somebody put in their place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from memopt.bundle import _locked
from memopt.errors import ConfigurationError
from memopt.federation.client.manager import DeltaSyncManager
from memopt.federation.server.store import Store
from memopt.files import atomic_path, open_plain
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, NewMemory
from memopt.memory.store.locking import LOCK_FILE, READ_FILE, WriterLock, reading


def _bundle(folder: Path) -> None:
    with _locked(folder):
        pass


def _writer(folder: Path) -> None:
    with WriterLock(folder).held():
        pass


def _reader(folder: Path) -> None:
    with reading(folder):
        pass


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("lock", lambda folder: Store(folder).close()),
        ("a/lock", lambda folder: DeltaSyncManager(folder, "a").close()),
        (".memopt.lock", _bundle),
        (LOCK_FILE, _writer),
        (READ_FILE, _reader),
    ],
)
@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "pipe"])
def test_a_lock_is_opened_as_itself(
    tmp_path: Path, name: str, use: Callable[[Path], None], kind: str
) -> None:
    """What lies there instead is refused in one line, and what a link names is untouched."""
    victim, lock = tmp_path / "victim", tmp_path / "place" / name
    lock.parent.mkdir(parents=True)
    if kind != "dangling":
        victim.write_text("precious\n")
    if kind == "folder":
        lock.mkdir()
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to(victim)
    before = victim.read_text() if victim.exists() else None
    with pytest.raises(ConfigurationError, match="plain file") as caught:
        use(tmp_path / "place")
    assert str(lock) in str(caught.value)
    assert (victim.read_text() if victim.exists() else None) == before


def test_a_store_with_a_link_for_a_lock_writes_nothing(tmp_path: Path) -> None:
    """The memory store asks for its lock before every change."""
    store = MemoryStore(tmp_path / "s", dim=4)
    (tmp_path / "victim").write_text("precious\n")
    (tmp_path / "s" / LOCK_FILE).unlink()
    (tmp_path / "s" / LOCK_FILE).symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigurationError, match="is a link"):
        store.add(NewMemory(content=Content(text="a"), embedding=np.ones(4)))
    assert (tmp_path / "victim").read_text() == "precious\n"


def test_a_file_of_ours_is_its_owners(tmp_path: Path) -> None:
    """Whatever the umask lets through, a private file is private; another is not."""
    old = os.umask(0)
    try:
        os.close(open_plain(tmp_path / "lock"))
        with atomic_path(tmp_path / "secret", 0o600) as path:
            path.write_text("x")
        with atomic_path(tmp_path / "open") as path:
            path.write_text("x")
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"lock": 0o600, "secret": 0o600, "open": 0o666}
