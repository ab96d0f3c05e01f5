"""Forgetting: afterwards no file of the store holds the text, the picture or the vector."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from memopt.memory.erase import erase, expire, forget
from memopt.memory.graph import AssociationGraph
from memopt.memory.schema import Content, NewMemory
from memopt.memory.store import MemoryStore
from memopt.memory.verify import verify
from tests.memory.kit import DIM, Hashing, files_with, note, png

NOW = datetime(2026, 1, 1, tzinfo=UTC)
# Random words: dictionary and entropy coding cannot shorten what a byte search looks for.
SECRET = "zq7vxk2jwp9 hb4nmt6rlc8 df3gys5"


def test_forgotten_bytes_are_in_no_file(tmp_path: Path) -> None:
    """Text, image bytes and embedding, after being updated, found and linked."""
    vector = np.random.default_rng(1).normal(size=DIM).astype(np.float32)
    vector /= np.linalg.norm(vector)
    with MemoryStore(tmp_path / "s", embedder=Hashing()) as store:
        AssociationGraph(store)
        store.add([note(f"something else number {at}") for at in range(300)])
        content = Content(text=SECRET, vision=png(7))
        store.add(NewMemory(content=content, embedding=vector, memory_id="secret"))
        store.update("secret", category="private")
        store.optimize()
        stored = store.get("secret").joint_embedding
        assert stored is not None
        needles = [SECRET.encode(), SECRET.split()[0].encode(), png(7), stored.tobytes()]
        # The search can see what is there: each is in some file before.
        assert all(files_with(tmp_path / "s", needle) for needle in needles)
        result = forget(store, ["secret"])
        assert result.memories == 1
        assert [files_with(tmp_path / "s", needle) for needle in needles] == [[], [], [], []]
        assert verify(store).problems == {}
        assert store.count() == 300
        assert store.search(text="number 7", top_k=1)[0].memory.text is not None


def test_expired_memories_go_the_same_way(tmp_path: Path) -> None:
    """By their own time, without being named."""
    now = [NOW]
    with MemoryStore(tmp_path / "s", embedder=Hashing(), clock=lambda: now[0]) as store:
        store.add([note("stays"), note(SECRET, expires_at=NOW + timedelta(days=1))])
        assert expire(store) == 0
        now[0] += timedelta(days=2)
        assert expire(store) == 1
        erase(store)
        assert files_with(tmp_path / "s", SECRET.encode()) == []
        assert store.count() == 1


def test_summaries_of_a_forgotten_memory_go_too(tmp_path: Path) -> None:
    """They repeat it in other words."""
    from memopt.memory import rows

    with MemoryStore(tmp_path / "s", embedder=Hashing()) as store:
        store.add([note("a"), note("b")])
        columns = {
            "memory_id": ["summary"],
            "timestamp": NOW,
            "tier": "long_term",
            "summary": f"a and {SECRET}",
            "source_memory_ids": [["a", "b"]],
            "source_count": 2,
            "model_id": "hashing",
        }
        store.commit(inserts=rows.new_rows(store.embed([Content(text="x")]), columns))
        assert forget(store, ["a"]).memories == 2
        assert files_with(tmp_path / "s", SECRET.encode()) == []
        assert store.count() == 1
