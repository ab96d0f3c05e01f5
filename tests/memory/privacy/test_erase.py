"""Forgetting: afterwards no file of the store holds the text, the picture or the vector."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from memopt.memory.graph.association import AssociationGraph
from memopt.memory.lifecycle.verify import verify
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, NewMemory
from memopt.memory.privacy.erase import erase, expire, forget
from tests.memory.kit import DIM, Hashing, files_with, note, png, wav

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


def test_indices_half_moved_vectors_and_events_are_erased_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text, sound and vectors, with a built index, an interrupted reembed and a quoting event."""
    monkeypatch.setattr("memopt.memory.search.vector_index.MIN_ROWS", 200)
    moved = Hashing("new", 24)
    with MemoryStore(tmp_path / "s", embedder=Hashing(), background=False) as store:
        content = Content(text=SECRET, audio=wav(7))
        store.add([*(note(f"number {at}") for at in range(300)), NewMemory(content=content)])
        (key,) = [hit.memory.memory_id for hit in store.find(content, top_k=1)]
        assert store.index.ensure() is not None

        def stop(done: int, _: int) -> None:
            if done > 256:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            store.reembed(moved, on_step=stop)
        store.event("refused", f"the answer was: {SECRET}", [key])
        old = store.get(key).joint_embedding
        assert old is not None
        new = moved.embed([content])[0]
        needles = [SECRET.encode(), wav(7), old.tobytes(), new.tobytes()]
        assert all(files_with(tmp_path / "s", needle) for needle in needles)
        forget(store, [key])
        assert [files_with(tmp_path / "s", needle) for needle in needles] == [[], [], [], []]
        assert store.events("refused")[0].detail == ""
        assert store.index.state is not None
        assert store.index.state.rows == 300
        assert store.reembed(moved) == 300


def test_expired_memories_go_the_same_way(tmp_path: Path) -> None:
    """By their own time, without being named; the picture and the vector too."""
    now = [NOW]
    with MemoryStore(tmp_path / "s", embedder=Hashing(), clock=lambda: now[0]) as store:
        content = Content(text=SECRET, vision=png(3))
        gone = NewMemory(content=content, expires_at=NOW + timedelta(days=1))
        store.add([note("stays"), gone])
        assert expire(store) == 0
        now[0] += timedelta(days=2)
        assert expire(store) == 1
        erase(store)
        vector = Hashing().embed([content])[0]
        for needle in (SECRET.encode(), png(3), vector.tobytes()):
            assert files_with(tmp_path / "s", needle) == []
        assert store.count() == 1


def test_summaries_of_a_forgotten_memory_go_too(tmp_path: Path) -> None:
    """They repeat it in other words."""
    from memopt.memory.model import rows

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
