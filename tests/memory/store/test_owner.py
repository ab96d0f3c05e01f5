"""The files of a store are its owner's."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from memopt.errors import ConfigurationError
from memopt.memory.io.models import Models, read_models, write_models
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, NewMemory


def test_a_store_is_its_owners(tmp_path: Path) -> None:
    """Made under umask 022, and made so again when a wider one is written to."""
    before = os.umask(0o022)
    try:
        folder = tmp_path / "s"
        with MemoryStore(folder, dim=2) as store:
            write_models(store.place.local, Models(text="m"))
        for path in (folder, folder / "memory.json", folder / "models.json"):
            assert path.stat().st_mode & 0o077 == 0, path
        folder.chmod(0o755)
        (folder / "memory.json").chmod(0o644)
        with MemoryStore(folder) as store:
            store.add(NewMemory(content=Content(text="a"), embedding=np.ones(2)))
        for path in (folder, folder / "memory.json"):
            assert path.stat().st_mode & 0o077 == 0, path
    finally:
        os.umask(before)


@pytest.mark.parametrize("name", ["memory.json", "models.json"])
def test_no_file_of_a_store_is_read_through_a_link(name: str, tmp_path: Path) -> None:
    """Whoever put it there could have another file read."""
    folder = tmp_path / "s"
    with MemoryStore(folder, dim=2) as store:
        write_models(store.place.local, Models(text="m"))
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(ConfigurationError, match="is a link"):
        read_models(folder) if name == "models.json" else MemoryStore(folder)
