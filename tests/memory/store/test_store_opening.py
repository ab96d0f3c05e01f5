"""Opening: a store is made once, whole, and nothing else is taken for one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from memopt.errors import ConsolidationError, InputError
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import FORMAT_VERSION, Content, NewMemory
from memopt.memory.store.locking import WriterLock


class Named:
    """An embedder of a given name."""

    dim = 4

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id

    def embed(self, items: Sequence[Content]) -> NDArray[np.float32]:
        return np.eye(4, dtype=np.float32)[: len(items)]


def memory(text: str = "a", dim: int = 4) -> NewMemory:
    return NewMemory(content=Content(text=text), embedding=np.ones(dim, np.float32))


def test_a_store_keeps_its_dimension_and_model(tmp_path: Path) -> None:
    """Reopened without arguments it is the same; another dimension is refused."""
    MemoryStore(tmp_path / "s", embedder=Named("m")).add(memory())
    with MemoryStore(tmp_path / "s") as again:
        assert (again.dim, again.meta.model_id, again.count()) == (4, "m", 1)
    with pytest.raises(InputError, match="vectors of 4 dimensions, not 8"):
        MemoryStore(tmp_path / "s", dim=8)
    assert MemoryStore(tmp_path / "default").dim == 768
    assert MemoryStore(f"file://{tmp_path / 's'}").count() == 1


def test_a_path_that_is_no_store_is_refused(tmp_path: Path) -> None:
    """A file, a folder with other things, a missing folder to read from: one clear line each."""
    file = tmp_path / "notes.txt"
    file.write_text("x")
    with pytest.raises(ConsolidationError, match=r"notes.txt is a file, not a memory store"):
        MemoryStore(file)
    with pytest.raises(ConsolidationError, match=r"holds 'notes\.txt'"):
        MemoryStore(tmp_path)
    with pytest.raises(ConsolidationError, match="is no memory store"):
        MemoryStore(tmp_path / "absent", create=False)
    with pytest.raises(ConsolidationError, match="cannot be made"):
        MemoryStore(file / "below")
    with pytest.raises(InputError, match="dim is 0"):
        MemoryStore(tmp_path / "new", dim=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


def test_a_newer_format_is_refused_naming_both(tmp_path: Path) -> None:
    """Nothing is guessed about a store that a newer memopt wrote."""
    MemoryStore(tmp_path, dim=4)
    meta = json.loads((tmp_path / "memory.json").read_text())
    newer = FORMAT_VERSION + 1
    (tmp_path / "memory.json").write_text(json.dumps({**meta, "format": newer, "shiny": True}))
    with pytest.raises(
        ConsolidationError, match=f"store format {newer}, this memopt reads up to {FORMAT_VERSION}"
    ):
        MemoryStore(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"dim": 4}', '{"format": 1, "dim": "x"}', '{"format": 1, "dim": 0}']
)
def test_a_damaged_meta_file_is_one_error(tmp_path: Path, text: str) -> None:
    """A cut or edited memory.json is named, and is not overwritten by a new one."""
    MemoryStore(tmp_path, dim=4).add(memory())
    (tmp_path / "memory.json").write_text(text)
    with pytest.raises(ConsolidationError, match=r"memory.json is damaged"):
        MemoryStore(tmp_path)
    assert (tmp_path / "memory.json").read_text() == text


def test_a_creation_cut_short_is_finished(tmp_path: Path) -> None:
    """Empty tables without memory.json are completed; tables with rows are left alone."""
    MemoryStore(tmp_path, dim=4)
    (tmp_path / "memory.json").unlink()
    store = MemoryStore(tmp_path, dim=5)
    store.add(memory(dim=5))
    (tmp_path / "memory.json").unlink()
    with pytest.raises(ConsolidationError, match="with rows and no memory"):
        MemoryStore(tmp_path, dim=5)


def test_a_lost_table_is_named(tmp_path: Path) -> None:
    """A store without its memories is damaged, not empty."""
    MemoryStore(tmp_path, dim=4).add(memory())
    (tmp_path / "memories.lance").rename(tmp_path.parent / "elsewhere")
    with pytest.raises(ConsolidationError, match="its table 'memories' cannot be opened"):
        MemoryStore(tmp_path)


def test_vectors_of_another_model_are_refused(tmp_path: Path) -> None:
    """Adding, finding and searching with another model than the store's says which is which."""
    MemoryStore(tmp_path, embedder=Named("first")).add(NewMemory(content=Content(text="a")))
    other = MemoryStore(tmp_path, embedder=Named("second"))
    for attempt in (
        lambda: other.add(NewMemory(content=Content(text="b"))),
        lambda: other.find(Content(text="a")),
        lambda: other.search(np.ones(4), model_id="second"),
    ):
        with pytest.raises(InputError, match="holds vectors of 'first', not of 'second'"):
            attempt()
    assert len(other.search(np.ones(4), model_id="first")) == 1
    assert other.count() == 1


def test_an_empty_store_takes_the_first_model(tmp_path: Path) -> None:
    """Before the first vector any model may come; after unnamed vectors none may."""
    MemoryStore(tmp_path / "a", dim=4)
    MemoryStore(tmp_path / "a", embedder=Named("m")).add(NewMemory(content=Content(text="a")))
    assert MemoryStore(tmp_path / "a").meta.model_id == "m"
    MemoryStore(tmp_path / "b", dim=4).add(memory())
    with pytest.raises(InputError, match="of 'an unnamed model', not of 'm'"):
        MemoryStore(tmp_path / "b", embedder=Named("m")).find(Content(text="a"))


def test_a_store_at_a_uri_works_the_same(tmp_path: Path) -> None:
    """Without a folder there is no lock file: merges keep adds idempotent, meta is a table."""
    uri = f"shared-memory://{tmp_path.name}"
    with pytest.raises(ConsolidationError, match="is no memory store"):
        MemoryStore(uri, create=False)
    with MemoryStore(uri, embedder=Named("m")) as store:
        ids = store.add([NewMemory(content=Content(text=text)) for text in "ab"]).ids
        again = MemoryStore(uri, create=False)
        assert (again.dim, again.meta.model_id) == (4, "m")
        assert again.add([memory("a"), memory("c")]).added == 1
        store.search(np.ones(4), top_k=3)
    assert again.get(ids[0]).access_count == 1
    with pytest.raises(ConsolidationError, match="are gone"):
        again.commit(deletes=[ids[0], "nobody"])
    again.commit(deletes=[ids[0]])
    assert (store.count(), store.search(text="c")[0].memory.text) == (2, "c")
    with pytest.raises(InputError, match="holds vectors of 'm', not of 'other'"):
        MemoryStore(uri, embedder=Named("other")).find(Content(text="a"))


def test_an_open_store_notices_that_the_model_changed(tmp_path: Path) -> None:
    """After another process moved the store, an old query vector is refused, not compared."""
    store = MemoryStore(tmp_path, embedder=Named("old"))
    store.add(NewMemory(content=Content(text="a")))
    MemoryStore(tmp_path).database.write_meta(model_id="new")
    with pytest.raises(InputError, match="holds vectors of 'new', not of 'old'"):
        store.find(Content(text="a"))
    with pytest.raises(InputError, match="holds vectors of 'new', not of 'old'"):
        store.add(NewMemory(content=Content(text="b")))


_ADD = """
import sys, numpy as np
from memopt.memory.model.schema import Content, NewMemory
from memopt.memory.memory_store import MemoryStore
folder, first = sys.argv[1], int(sys.argv[2])
added = 0
with MemoryStore(folder, dim=4) as store:
    for start in range(first, first + 40, 10):
        batch = [
            NewMemory(content=Content(text=str(n)), embedding=np.ones(4) * (n + 1))
            for n in range(start, start + 10)
        ]
        added += store.add(batch).added
        hits = store.search(np.ones(4), top_k=5)
print(added)
"""


def test_processes_make_and_fill_one_store_together(tmp_path: Path) -> None:
    """Three writers with overlapping rows lose nothing and store nothing twice."""
    folder = tmp_path / "s"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _ADD, folder, str(first)], stdout=subprocess.PIPE, text=True
        )
        for first in (0, 20, 40)
    ]
    outputs = [writer.communicate(timeout=120)[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    store = MemoryStore(folder, create=False)
    texts = [text for batch in store.scan(columns=["text"]) for text in batch["text"].to_pylist()]
    assert sorted(texts, key=int) == [str(n) for n in range(80)]
    assert sum(int(output) for output in outputs) == 80
    accesses = [batch["access_count"].to_pylist() for batch in store.scan(columns=["access_count"])]
    assert sum(count for part in accesses for count in part) == 3 * 4 * 5


def test_threads_share_one_store(tmp_path: Path) -> None:
    """Adds, searches and touches of several threads on one object keep every row."""
    store = MemoryStore(tmp_path, dim=4)

    def work(number: int) -> int:
        added = store.add([memory(f"{number} {n}") for n in range(5)]).added
        store.search(np.ones(4), top_k=3)
        return added

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(8))) == 40
    store.close()
    assert (store.count(), store.stats().accesses) == (40, 24)


_FILL = """
import resource, signal, sys, numpy as np
from memopt.memory.model.schema import Content, NewMemory
from memopt.memory.memory_store import MemoryStore
store = MemoryStore(sys.argv[1], dim=4)
store.add(NewMemory(content=Content(text="kept"), embedding=np.ones(4)))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
noise = np.random.default_rng(0).bytes(400_000).hex()
try:
    store.add(NewMemory(content=Content(text=noise), embedding=np.ones(4)))
except Exception as error:
    print(type(error).__name__, str(error).count(chr(10)), error)
print(store.count(), store.search(np.ones(4))[0].memory.text)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_write_that_fails_is_one_error_and_changes_nothing(tmp_path: Path) -> None:
    """When the disk takes no more, the store says so and keeps what it had."""
    done = subprocess.run(
        [sys.executable, "-c", _FILL, tmp_path / "s"], capture_output=True, text=True, timeout=120
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("ConsolidationError 0 ")
    assert "could not be changed" in first
    assert second == "1 kept"
    assert MemoryStore(tmp_path / "s").add(memory("more")).added == 1


def test_a_damaged_data_file_is_one_error(tmp_path: Path) -> None:
    """A file that was cut is named as the store's damage, not as a traceback of the engine."""
    MemoryStore(tmp_path, dim=4).add(memory())
    (data,) = tmp_path.glob("memories.lance/data/*.lance")
    data.write_bytes(data.read_bytes()[:50])
    store = MemoryStore(tmp_path)
    for attempt in (
        lambda: store.search(np.ones(4)),
        lambda: store.get("x"),
        lambda: list(store.scan()),
    ):
        with pytest.raises(ConsolidationError, match="could not be read"):
            attempt()


def test_two_open_stores_of_one_thread_can_nest(tmp_path: Path) -> None:
    """Writing through one store inside the lock of another of the same folder does not block."""
    first, second = MemoryStore(tmp_path, dim=4), MemoryStore(f"{tmp_path}/.")
    with first.database.exclusive():
        second.add(memory())
    assert first.count() == 1


def test_the_lock_of_a_killed_writer_is_free(tmp_path: Path) -> None:
    """A waiting writer gives up with the reason, and goes on as soon as the holder dies."""
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from memopt.memory.store.locking import WriterLock\n"
        "with WriterLock(Path(sys.argv[1])).held():\n"
        "    print('held', flush=True)\n    time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        impatient = WriterLock(tmp_path, patience=0.2)
        with pytest.raises(ConsolidationError, match="held by another writer"), impatient.held():
            pytest.fail("two writers held the lock")
    finally:
        holder.kill()
        holder.wait()
    with WriterLock(tmp_path, patience=5).held():
        pass
