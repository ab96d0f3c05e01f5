"""kill -9 in the middle of writing: what was acknowledged is there, once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content

# Adds, counts accesses, and condenses ten memories into one, over and over; says what is done.
_WRITER = """
import sys, numpy as np
from datetime import datetime
from memopt.memory.model import rows
from memopt.memory.model.schema import Content, NewMemory
from memopt.memory.memory_store import MemoryStore
store = MemoryStore(sys.argv[1])
for start in range(int(sys.argv[2]), 100_000, 20):
    batch = [
        NewMemory(content=Content(text=str(n)), embedding=np.arange(n + 1, n + 5))
        for n in range(start, start + 20)
    ]
    ids = store.add(batch).ids
    print(start, flush=True)
    store.search(np.ones(4), top_k=5)
    store.flush()
    columns = {
        "memory_id": [f"summary {start}"],
        "timestamp": datetime(2026, 1, 1),
        "tier": "long_term",
        "summary": " ".join(str(n) for n in range(start, start + 10)),
        "source_memory_ids": [list(ids[:10])],
    }
    store.commit(rows.new_rows(np.eye(1, 4, dtype=np.float32), columns), None, ids[:10])
"""


def test_a_killed_writer_loses_and_repeats_nothing(tmp_path: Path) -> None:
    """Every acknowledged text is a memory or in one summary, never both, and writing goes on."""
    store = MemoryStore(tmp_path, dim=4)
    acknowledged: list[int] = []
    for first, steps in ((0, 2), (10_000, 7)):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, tmp_path, str(first)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        acknowledged += [int(writer.stdout.readline()) for _ in range(steps)]
        writer.kill()
        acknowledged += [int(line) for line in writer.stdout if line.endswith("\n")]
        writer.wait()
    found: list[str] = []
    ids: list[str] = []
    for batch in store.scan(columns=["memory_id", "text", "summary"]):
        ids += batch["memory_id"].to_pylist()
        found += [text for text in batch["text"].to_pylist() if text is not None]
        found += [n for text in batch["summary"].to_pylist() if text for n in text.split()]
    assert len(ids) == len(set(ids)) == store.count()
    assert len(found) == len(set(found))
    assert {str(n) for start in acknowledged for n in range(start, start + 20)} <= set(found)
    # Nothing a reader can reach was left half done.
    assert len(store.get_many(ids)) == len(ids)
    assert store.search(np.ones(4), top_k=50)
    assert store.content_id(Content(text=str(acknowledged[-1] + 15))) in ids
