"""Moving to another model: no row lost, resumable, the wrong model refused."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memopt.errors import InputError
from memopt.memory.lifecycle.verify import verify
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content
from memopt.memory.store.reembed import TABLE
from tests.memory.kit import Hashing, note

ROOT = Path(__file__).parents[3]
# Embeds with the second model and dies, without a word, at the given call.
KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from memopt.memory.store import reembed as module
from memopt.memory.memory_store import MemoryStore
from tests.memory.kit import Hashing

class Dying(Hashing):
    calls = 0
    def embed(self, items):
        Dying.calls += 1
        if Dying.calls > {calls}:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().embed(items)

module._CHUNK = 50
if {calls} > 90:
    def replace(move, table):
        os.kill(os.getpid(), signal.SIGKILL)
    module.Move._replace = replace
with MemoryStore({path!r}, embedder=Hashing("old")) as store:
    store.reembed(Dying("new", 24))
"""


@pytest.mark.parametrize("calls", [0, 2, 99])
def test_a_kill_loses_nothing_and_the_next_run_completes(tmp_path: Path, calls: int) -> None:
    """Before the first chunk, in the middle, and between the last chunk and the swap."""
    path = tmp_path / "s"
    with MemoryStore(path, embedder=Hashing("old")) as store:
        ids = store.add([note(f"text {at}") for at in range(200)]).ids
    code = KILLED.format(root=str(ROOT), path=str(path), calls=calls)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if calls < 90:
        with MemoryStore(path, embedder=Hashing("old")) as store:
            assert store.find(Content(text="text 7"))[0].memory.text == "text 7"
    else:
        with (
            MemoryStore(path, embedder=Hashing("old")) as store,
            pytest.raises(InputError, match="moving to new"),
        ):
            store.find(Content(text="text 7"))
    with MemoryStore(path) as store:
        assert store.reembed(Hashing("new", 24)) == 200
    with MemoryStore(path, embedder=Hashing("new", 24)) as store:
        assert store.find(Content(text="text 7"))[0].memory.text == "text 7"
        assert verify(store, ids).problems == {}
        assert TABLE not in store.database.connection.list_tables().tables
    with (
        MemoryStore(path, embedder=Hashing("old")) as store,
        pytest.raises(InputError, match="holds vectors of 'new'"),
    ):
        store.find(Content(text="text 7"))


def test_what_is_added_meanwhile_is_moved_too(tmp_path: Path) -> None:
    """The new model sees a memory that another writer adds during the run."""
    path = tmp_path / "s"

    class Meanwhile(Hashing):
        added = False

        def embed(self, items: object) -> object:  # type: ignore[override]
            if not self.added:
                self.added = True
                with MemoryStore(path, embedder=Hashing("old")) as other:
                    other.add(note("late"))
                    other.update("text-1", text="changed")
            return super().embed(items)  # type: ignore[arg-type]

    with MemoryStore(path, embedder=Hashing("old")) as store:
        store.add([note("text 0"), note("text 1")])
        assert store.reembed(Meanwhile("new")) == 3
    with MemoryStore(path, embedder=Hashing("new")) as store:
        for text in ("late", "changed", "text 0"):
            hit = store.find(Content(text=text), top_k=1)[0]
            assert (hit.memory.text, round(hit.score, 3)) == (text, 1.0)
