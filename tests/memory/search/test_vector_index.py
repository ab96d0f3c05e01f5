"""The vector index: recall is measured, fresh rows are found, a bad index is not used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from memopt.memory.memory_store import MemoryStore
from memopt.memory.search import vector_index as module
from tests.memory.kit import DIM


def fill(store: MemoryStore, count: int, start: int = 0) -> np.ndarray:
    """Add memories with random vectors; return the vectors."""
    vectors = np.random.default_rng(start).normal(size=(count, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM)
    names = [f"m{start + at}" for at in range(count)]
    store.add_arrow(pa.table({"memory_id": names, "text": names, "joint_embedding": column}))
    return vectors


def test_recall_is_measured_and_fresh_rows_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least 0.95 at ten on random vectors, the hardest kind; new rows at once."""
    monkeypatch.setattr(module, "MIN_ROWS", 1000)
    with MemoryStore(tmp_path / "s", dim=DIM, background=False) as store:
        index = store.index
        assert index.ensure() is None
        vectors = fill(store, 3000)
        state = index.ensure()
        assert state is not None
        assert state.cells > 0
        assert state.recall >= 0.95
        assert store.index.last_state() == state
        right = 0
        for query in vectors[:50]:
            exact = {f"m{at}" for at in np.argsort(-(vectors @ query))[:10]}
            right += len(exact & {key for key, _ in store.candidates(query, top_k=10)})
        assert right >= 0.93 * 500
        fresh = fill(store, 5, start=10_000)
        for at, vector in enumerate(fresh):
            assert store.candidates(vector, top_k=1)[0][0] == f"m{10_000 + at}"


def test_an_index_below_the_recall_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Search is then exact, and the state says so."""
    monkeypatch.setattr(module, "MIN_ROWS", 1000)
    monkeypatch.setattr(module, "_SETTINGS", ((1, 1),))
    with MemoryStore(tmp_path / "s", dim=DIM, background=False) as store:
        vectors = fill(store, 2000)
        state = store.index.ensure()
        assert state is not None
        assert state.cells == 0
        exact = {f"m{at}" for at in np.argsort(-(vectors @ vectors[3]))[:10]}
        assert {key for key, _ in store.candidates(vectors[3], top_k=10)} == exact


def test_additions_start_a_build_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without anybody asking; close() waits for it."""
    monkeypatch.setattr(module, "MIN_ROWS", 1000)
    with MemoryStore(tmp_path / "s", dim=DIM) as store:
        fill(store, 1500)
        store.index.closing()
        state = store.index.last_state()
        assert state is not None
        assert state.rows == 1500


def test_what_another_process_built_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its checked settings; until it is noticed search is exact."""
    monkeypatch.setattr(module, "MIN_ROWS", 1000)
    with MemoryStore(tmp_path / "s", dim=DIM, background=False) as reader:
        vectors = fill(reader, 1500)
        assert reader.index.state is None
        with MemoryStore(tmp_path / "s", background=False) as other:
            built = other.index.ensure()
        exact = {f"m{at}" for at in np.argsort(-(vectors @ vectors[3]))[:10]}
        assert {key for key, _ in reader.candidates(vectors[3], top_k=10)} == exact
        monkeypatch.setattr(module, "_LOOK_S", 0.0)
        assert built is not None
        assert reader.index.state == built


def test_short_lived_writers_keep_the_index_fresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each adds less than calls for a build while it runs; closing takes it in where it is due."""
    monkeypatch.setattr(module, "MIN_ROWS", 1000)
    for start in range(0, 1200, 60):
        with MemoryStore(tmp_path / "s", dim=DIM) as store:
            fill(store, 60, start=start)
    state = store.index.last_state()
    assert state is not None
    assert state.rows >= 1000
