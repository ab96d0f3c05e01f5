"""A store on an object store, over HTTP."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memopt.errors import ConsolidationError
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, NewMemory
from memopt.memory.session import open_memory

_WRITER = """
import sys, numpy as np
from memopt.memory.model.schema import Content, NewMemory
from memopt.memory.memory_store import MemoryStore
with MemoryStore("s3://bucket/notes") as store:
    print("ready", flush=True)
    sys.stdin.readline()
    added = 0
    for start in range(0, 25, 5):
        batch = [
            NewMemory(content=Content(text=str(n)), embedding=np.ones(4) * (n + 1))
            for n in range(start, start + 10)
        ]
        added += store.add(batch).added
    print(added)
"""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    path = Path(__file__).parents[1] / "s3_server.py"
    spec = spec_from_file_location("s3_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["s3_server"] = module
    spec.loader.exec_module(module)
    with module.s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def memory(text: str, *values: float) -> NewMemory:
    return NewMemory(content=Content(text=text), embedding=np.array(values))


def test_a_store_lives_in_a_bucket(bucket: Any) -> None:
    """Made, filled, searched, changed and opened again over the wire; nothing is kept locally."""
    with pytest.raises(ConsolidationError, match="is no memory store"):
        MemoryStore("s3://bucket/notes", create=False)
    with MemoryStore("s3://bucket/notes", dim=2) as store:
        ids = store.add([memory("a red door", 1, 0), memory("the sea", 0, 1)]).ids
        assert store.search(np.array([0.1, 1]))[0].memory.text == "the sea"
        store.update(ids[0], category="house")
        store.event("note", "hello")
    again = MemoryStore("s3://bucket/notes", create=False)
    assert (again.dim, again.get(ids[0]).category, again.get(ids[1]).access_count) == (
        2,
        "house",
        1,
    )
    assert again.search(text="red")[0].memory.memory_id == ids[0]
    assert again.delete([ids[0]]) == 1
    assert (again.count(), len(again.events()), again.stats().bytes_on_disk) == (1, 1, None)
    assert all(path.startswith("bucket/notes/") for path in bucket.objects)


def test_two_writers_without_a_lock_store_each_row_once(bucket: Any) -> None:
    """Merges of the same new ids at the same moment conflict, and one is repeated on the other."""
    store = MemoryStore("s3://bucket/notes", dim=4)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    counts = [int(writer.communicate(timeout=120)[0]) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    texts = [text for batch in store.scan(columns=["text"]) for text in batch["text"].to_pylist()]
    assert sorted(texts, key=int) == [str(n) for n in range(30)]
    assert sum(counts) == 30


def test_a_bucket_that_may_only_be_read_is_searched(
    bucket: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with open_memory("s3://bucket/notes", embed=False) as here:
        here.store.add(NewMemory(content=Content(text="a door"), embedding=np.ones(768)))
    before = set(bucket.objects)
    bucket.read_only = True
    with open_memory("s3://bucket/notes", embed=False, create=False) as here:
        assert len(here.retriever.retrieve(vector=np.ones(768))) == 1
        with pytest.raises(ConsolidationError, match="could not be changed"):
            here.store.add(NewMemory(content=Content(text="more"), embedding=np.ones(768)))
    assert set(bucket.objects) == before
    assert len([line for line in caplog.messages if "may only be read" in line]) == 1
