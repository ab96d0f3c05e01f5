"""Whoever may only read a store finds what is in it; nothing of it changes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, NewMemory
from memopt.memory.session import open_memory

# Long reading too: more reads than are held back, and links of more pairs.
READER = """
import sys
import numpy as np
from memopt.errors import MemoptError
from memopt.memory.privacy import access_log
from memopt.memory.graph import association as graph
from memopt.memory.store import access_counts as touches
from memopt.memory.privacy.access_log import read_log
from memopt.memory.model.schema import Content, NewMemory
from memopt.memory.session import open_memory

access_log.MOST_PENDING = graph.MOST_PENDING_PAIRS = touches.MOST_PENDING = 2
with open_memory(sys.argv[1], embed=False, create=False) as memory:
    for _ in range(3):
        found = memory.retriever.retrieve(vector=np.ones(768))
        assert len(found) == 3, found
    assert memory.store.search(text="sea")[0].memory.text == "the sea"
    assert memory.store.get(found[0].memory.memory_id).text
    read_log(memory.store)
    for change in (
        lambda: memory.store.add(NewMemory(content=Content(text="x"), embedding=np.ones(768))),
        lambda: memory.store.delete([found[0].memory.memory_id]),
    ):
        try:
            change()
        except MemoptError as error:
            assert "write as a user who may change the store" in str(error), error
        else:
            raise AssertionError("changed")
    memory.store.embedding.check_model(None)
assert not memory.store.counts.pending()
print("done")
"""


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder whose parents every user may enter; pytest's own are their owner's alone."""
    with tempfile.TemporaryDirectory(prefix="readers-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def place(public: Path) -> Path:
    place = public / "store"
    with open_memory(place, embed=False) as memory:
        for text in ("a red door", "the sea", "a letter"):
            memory.store.add(NewMemory(content=Content(text=text), embedding=np.ones(768)))
    return place


@pytest.fixture
def mounted(place: Path, tmp_path: Path) -> Iterator[Path]:
    """The store on a file system that takes no writes."""
    there = tmp_path / "mounted"
    there.mkdir()
    bind = ["mount", "--bind", str(place), str(there)]
    if os.geteuid() or subprocess.run(bind, capture_output=True).returncode:
        pytest.skip("a bind mount needs root and CAP_SYS_ADMIN")
    try:
        again = ["mount", "-o", "remount,ro,bind", str(there)]
        if subprocess.run(again, capture_output=True).returncode:
            pytest.skip("this machine makes no mount read-only")
        yield there
    finally:
        subprocess.run(["umount", str(there)], check=True)


def check(place: Path, *, before: tuple[str, ...] = ()) -> None:
    held = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    command = [*before, sys.executable, "-c", READER, str(place)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "HOME": "/tmp"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
    assert done.stderr.count("may only be read") == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == held


def test_a_read_only_file_system(mounted: Path) -> None:
    check(mounted)


@pytest.mark.usefixtures("unmeasured")
def test_another_user_who_may_only_read(place: Path) -> None:
    for path in (place, *place.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.geteuid():
        check(place)
        return
    check(place, before=("setpriv", "--reuid", "65534", "--clear-groups"))


@pytest.mark.usefixtures("unmeasured")
def test_an_empty_store_that_may_only_be_read_finds_nothing(public: Path) -> None:
    """A model that was never written down is no reason to fail where there is nothing to find."""
    place = public / "empty"
    MemoryStore(place, dim=2).close()
    (place / ".lock").unlink()
    code = (
        "import sys, numpy as np; from memopt.memory.memory_store import MemoryStore\n"
        "with MemoryStore(sys.argv[1]) as store:\n"
        "    print(store.search(np.ones(2), model_id='m'))"
    )
    for path in (place, *place.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    become = () if os.geteuid() else ("setpriv", "--reuid", "65534", "--clear-groups")
    command = [*become, sys.executable, "-c", code, str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
