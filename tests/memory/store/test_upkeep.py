"""Upkeep: many small commits leave few files, lose nothing, and disturb nobody who reads."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest

from memopt.memory.graph.association import AssociationGraph
from memopt.memory.lifecycle import consolidation as condense
from memopt.memory.lifecycle.consolidation import consolidate
from memopt.memory.lifecycle.plan import ConsolidationRecipe
from memopt.memory.lifecycle.verify import verify
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, NewMemory
from memopt.memory.privacy.keys import AesGcm
from memopt.memory.search import vector_index as indexing
from memopt.memory.store import database as connection
from memopt.memory.store import upkeep
from memopt.memory.store.locking import unless_read
from tests.memory.kit import DIM
from tests.memory.search.test_vector_index import fill


def one(at: int) -> NewMemory:
    """A small memory with its own text, picture bytes and vector."""
    vector = np.random.default_rng(at).normal(size=DIM)
    return NewMemory(content=Content(text=f"note {at}"), embedding=vector, memory_id=f"n{at:04}")


def files(store: MemoryStore, name: str = "memories") -> list[int]:
    """Rows of each file of a table."""
    found = store.database.fetch(store.database.query(name).select([]).with_row_id())[
        "_rowid"
    ].to_numpy()
    return sorted(np.unique(found >> 32, return_counts=True)[1].tolist())


def content(store: MemoryStore) -> list[dict[str, object]]:
    """Every row, in the order of the ids."""
    table = store.cells.unpack(store.rows([f"n{at:04}" for at in range(200)]))
    return sorted(table.to_pylist(), key=lambda row: str(row["memory_id"]))


def folder_size(path: Path) -> int:
    """Bytes of all files; what vanishes meanwhile does not count."""
    sizes = []
    for file in path.rglob("*"):
        try:
            sizes.append(file.stat().st_size if file.is_file() else 0)
        except FileNotFoundError:
            continue
    return sum(sizes)


@pytest.mark.slow
def test_memories_added_one_at_a_time_stay_in_few_files(tmp_path: Path) -> None:
    """As an agent adds them; nothing is asked for, and every memory and link is there."""
    with MemoryStore(tmp_path / "s", dim=DIM) as store:
        graph = AssociationGraph(store)
        most = 0
        for at in range(150):
            store.add(one(at))
            most = max(most, len(files(store)))
        graph.close()
    with MemoryStore(tmp_path / "s", dim=DIM) as store:
        # Looks are taken in a thread, so that a fast writer is ahead of them by a few dozen.
        assert most <= 3 * upkeep.MOST_FILES
        assert len(files(store)) < upkeep._FEW
        assert len(files(store, "edges")) < upkeep._FEW
        report = verify(store, [f"n{at:04}" for at in range(150)])
        assert report.problems == {}
        assert store.count() == 150
        for at in (0, 77, 149):
            assert store.search(one(at).embedding, top_k=1)[0].memory.memory_id == f"n{at:04}"


def test_processes_that_add_one_each_are_looked_after_too(tmp_path: Path) -> None:
    """As `memopt memory add` does: none of them makes many commits, all together do."""
    with MemoryStore(tmp_path / "s", dim=DIM, background=False) as store:
        for at in range(upkeep._FEW - 1):
            store.add(one(at))
        assert len(files(store)) == upkeep._FEW - 1
    script = (
        "import sys; from tests.memory.kit import DIM\n"
        "from tests.memory.store.test_upkeep import one\n"
        "from memopt.memory.memory_store import MemoryStore\n"
        "with MemoryStore(sys.argv[1], dim=DIM) as store: store.add(one(100))"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "s")], check=True)
    assert files(MemoryStore(tmp_path / "s", dim=DIM)) == [upkeep._FEW]


@pytest.mark.parametrize("encrypted", [False, True])
def test_of_a_large_table_only_small_files_are_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encrypted: bool
) -> None:
    """The large file stays; every column, count and link of the others is as before."""
    monkeypatch.setattr(upkeep, "_WHOLE_BYTES", 1)
    cipher = AesGcm((b"k" * 32,)) if encrypted else None
    with MemoryStore(tmp_path / "s", dim=DIM, background=False, cipher=cipher) as store:
        AssociationGraph(store)
        store.add([one(at) for at in range(100, 200)])
        for at in range(40):
            store.add(one(at))
        store.touch(["n0003"] * 5)
        store.flush()
        store.delete(["n0007"])
        before, links = content(store), store.links(["n0003"])
        monkeypatch.setattr(upkeep, "_PART_ROWS", 16)
        store.upkeep.tidy()
        assert files(store) == [7, 16, 16, 100]
        assert content(store) == before
        assert store.links(["n0003"]) == links
        assert verify(store).problems == {}
        found = store.search(one(3).embedding, top_k=1)[0]
        assert (found.memory.text, found.memory.access_count) == ("note 3", 5)
        if not encrypted:
            assert store.search(text="note 31", top_k=1)[0].memory.memory_id == "n0031"


def test_a_killed_look_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL between two parts of small files: each row is there once."""
    with MemoryStore(tmp_path / "s", dim=DIM, background=False) as store:
        for at in range(40):
            store.add(one(at))
    script = (
        "import os, signal, sys; from memopt.memory.store import upkeep\n"
        "from tests.memory.kit import DIM\n"
        "from memopt.memory.memory_store import MemoryStore\n"
        "upkeep._WHOLE_BYTES, upkeep._PART_ROWS = 0, 16\n"
        "store, left = MemoryStore(sys.argv[1], dim=DIM, background=False), 2\n"
        "take = store.database.take\n"
        "def counted(ids):\n"
        "    global left\n"
        "    left -= 1\n"
        "    return take(ids) if left else os.kill(os.getpid(), signal.SIGKILL)\n"
        "store.database.take = counted\n"
        "store.upkeep.tidy()"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "s")], check=False)
    assert done.returncode == -9
    with MemoryStore(tmp_path / "s", dim=DIM, background=False) as store:
        assert verify(store, [f"n{at:04}" for at in range(40)]).problems == {}
        assert files(store) == [1] * 24 + [16]


def test_a_scan_keeps_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long export beside a busy writer sees what was there when it began."""
    monkeypatch.setattr(upkeep, "_KEEP", timedelta(milliseconds=1))
    with MemoryStore(tmp_path / "s", dim=DIM, background=False) as store:
        for at in range(40):
            store.add(one(at))
        # Columns are read row by row, so that most files are not open yet.
        scan = store.scan(columns=["memory_id", "text"], batch_size=1)
        seen = [next(scan)]
        with unless_read(tmp_path / "s") as unread:
            assert not unread
        store.delete([f"n{at:04}" for at in range(20)])
        store.optimize()
        seen += list(scan)
        assert sum(batch.num_rows for batch in seen) == 40
        with unless_read(tmp_path / "s") as unread:
            assert unread
        kept = folder_size(tmp_path / "s")
        store.optimize()
        assert folder_size(tmp_path / "s") < kept / 2


def test_a_search_whose_version_went_is_repeated(tmp_path: Path) -> None:
    """Lance says that a file is not found; the next try reads the version after."""
    store = MemoryStore(tmp_path / "s", dim=DIM, background=False)
    store.add(one(1))

    class Once:
        tries = 0

        async def to_arrow(self) -> object:
            self.tries += 1
            if self.tries == 1:
                raise RuntimeError("lance error: Not found: data/0101.lance")
            return await store.database.query().to_arrow()

    assert store.database.fetch(Once()).num_rows == 1


@pytest.mark.slow
def test_consolidation_takes_little_room_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of commits do not each leave a copy of the store behind."""
    monkeypatch.setattr(condense, "_COMMIT_ROWS", 4)
    start = datetime(2026, 1, 1, tzinfo=UTC)
    with MemoryStore(tmp_path / "s", dim=DIM, background=False, clock=lambda: start) as store:
        vectors = np.eye(DIM)
        noise = [np.random.default_rng(at).bytes(5000).hex() for at in range(400)]
        new = [
            NewMemory(
                content=Content(text=f"Person {at // 4} is in room {at // 4}. {noise[at]}"),
                embedding=vectors[at // 4 % DIM],
                category=f"c{at // 4 // DIM}",
            )
            for at in range(400)
        ]
        ids = store.add(new).ids
        store.touch(ids * 10)
        store.flush()
        store.optimize()
        before = folder_size(tmp_path / "s")
        sizes = []
        # Only what a summary says whole is dropped.
        recipe = ConsolidationRecipe(duty=1, originals="drop", batch_size=4, summary_length=50_000)
        done = consolidate(
            store, recipe, on_step=lambda *_: sizes.append(folder_size(tmp_path / "s"))
        )
        assert done.condensed == 400
        assert len(sizes) == 100
        # Summaries say all of it again; a copy at each commit would be 100 times as much.
        assert max(sizes) < 8 * before


def test_the_index_is_made_anew_for_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few memories in the cells of many: other cells, and below the least, exact search."""
    monkeypatch.setattr(indexing, "MIN_ROWS", 300)
    with MemoryStore(tmp_path / "s", dim=DIM, background=False) as store:
        fill(store, 2000)
        state = store.index.ensure()
        assert state is not None
        store.index.fit()
        assert store.index.state == state
        store.delete([f"m{at}" for at in range(1600)])
        store.index.fit()
        smaller = store.index.state
        assert smaller is not None
        assert (smaller.rows, smaller.cells) == (400, 20)
        store.delete([f"m{at}" for at in range(1600, 1900)])
        store.index.fit()
        assert store.index.state is not None
        assert store.index.state.cells == 0
        assert not [
            i for i in store.database.memories.list_indices() if "joint_embedding" in i.columns
        ]
        fill(store, 400, start=5000)
        again = store.index.ensure()
        assert again is not None
        assert (again.rows, again.cells) == (500, 22)


def test_caches_of_old_versions_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lance's own bounds are 7 GB: a process that writes all day would grow to that."""
    store = MemoryStore(tmp_path / "s", dim=DIM, background=False)
    index, metadata = connection._cache_bytes(store.place)
    assert (index, metadata) == (128 << 20, 64 << 20)
    large = tmp_path / "s" / "memories.lance" / "_indices" / "x"
    large.mkdir(parents=True)
    with (large / "auxiliary.idx").open("wb") as file:
        file.truncate(200 << 20)
    assert connection._cache_bytes(store.place)[0] >= 400 << 20

    class Small:
        total = 1 << 30

    monkeypatch.setattr(psutil, "virtual_memory", Small)
    assert connection._cache_bytes(store.place) == (128 << 20, 32 << 20)


def test_looks_run_beside_writers_and_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two writers, a reader, versions that go at once: nobody fails, nothing is lost."""
    monkeypatch.setattr(upkeep, "_KEEP", timedelta(milliseconds=1))
    monkeypatch.setattr(upkeep, "_LOOK", 2)
    monkeypatch.setattr(upkeep, "_FEW", 4)
    place = tmp_path / "s"
    over = threading.Event()

    def write(start: int) -> None:
        with MemoryStore(place, dim=DIM) as store:
            for at in range(start, start + 60):
                store.add(one(at))

    def read() -> int:
        rounds = 0
        with MemoryStore(place, dim=DIM) as store:
            while not over.is_set():
                store.search(one(1).embedding, top_k=5, touch=False)
                list(store.scan(columns=["memory_id"]))
                rounds += 1
        return rounds

    with ThreadPoolExecutor(3) as pool:
        reader = pool.submit(read)
        writers = [pool.submit(write, start) for start in (0, 500)]
        wait(writers)
        over.set()
        assert [writer.result() for writer in writers] == [None, None]
        assert reader.result() > 10
    expected = [f"n{at:04}" for at in (*range(60), *range(500, 560))]
    with MemoryStore(place, dim=DIM, background=False) as store:
        assert verify(store, expected).problems == {}
        assert len(files(store)) < 2 * upkeep._FEW
