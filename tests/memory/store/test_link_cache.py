"""Links in memory: always what the table says, whoever wrote it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from memopt.memory.graph.association import AssociationGraph
from memopt.memory.graph.retriever import MultimodalRetriever
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, NewMemory

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DIM = 8


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path / "store", dim=DIM, clock=lambda: NOW) as opened:
        yield opened


def add(store: MemoryStore, names: list[str], seed: int = 0) -> None:
    vectors = np.random.default_rng(seed).normal(size=(len(names), DIM))
    store.add(
        [
            NewMemory(content=Content(text=n), embedding=v, memory_id=n, timestamp=NOW)
            for n, v in zip(names, vectors, strict=True)
        ]
    )


def in_table(store: MemoryStore) -> dict[tuple[str, str], float]:
    table = store.database.table("edges").to_arrow()
    pairs = zip(table["source"].to_pylist(), table["target"].to_pylist(), strict=True)
    return dict(zip(pairs, table["weight"].to_pylist(), strict=True))


def in_memory(graph: AssociationGraph, names: list[str]) -> dict[tuple[str, str], float]:
    around = graph.links.current()
    assert around is not None
    best: dict[tuple[str, str], float] = {}
    sources, targets, weights, _ = around(names)
    for source, target, weight in zip(sources, targets, weights.tolist(), strict=True):
        best[source, target] = max(weight, best.get((source, target), 0.0))
    return best


def test_what_this_process_writes_is_followed(store: MemoryStore) -> None:
    """Adding, recalling together, deleting and adding again, without reading the table anew."""
    graph = AssociationGraph(store)
    names = [f"m{at}" for at in range(12)]
    add(store, names[:6])
    graph.links.read()
    add(store, names[6:], seed=1)
    graph.retrieved(["m0", "m5", "m7"])
    graph.flush()
    store.delete(["m3", "m8"])
    add(store, ["m3"], seed=2)
    assert in_memory(graph, names) == pytest.approx(in_table(store))
    assert any("m3" in pair for pair in in_memory(graph, names))
    assert not any("m8" in pair for pair in in_memory(graph, names))


def test_what_another_process_writes_is_read_anew(store: MemoryStore, tmp_path: Path) -> None:
    """Until then the table is asked, so that the answer is never old."""
    graph = AssociationGraph(store)
    add(store, ["a", "b"])
    graph.links.read()
    with MemoryStore(tmp_path / "store", dim=DIM, clock=lambda: NOW) as other:
        AssociationGraph(other)
        add(other, ["c"], seed=3)
    assert graph.links.current() is None
    assert set(graph.around(["c"])[1]) == {"a", "b"}
    while graph.links.current() is None:
        time.sleep(0.05)
    assert in_memory(graph, ["a", "b", "c"]) == pytest.approx(in_table(store))


def test_retrieval_is_the_same_from_memory_and_from_the_table(store: MemoryStore) -> None:
    """The scores too."""
    graph = AssociationGraph(store)
    retriever = MultimodalRetriever(store, graph)
    add(store, [f"m{at}" for at in range(60)])
    query = np.ones(DIM)

    def answers() -> list[tuple[str, float]]:
        found = retriever.retrieve(vector=query, top_k=5, touch=False)
        return [(result.memory.memory_id, result.final_score) for result in found]

    graph.links.closing()
    graph.links._links = None
    from_table = answers()
    graph.links.closing()
    graph.links.read()
    assert graph.links.current() is not None
    assert answers() == from_table


def test_a_large_graph_is_not_held(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table answers then."""
    monkeypatch.setattr("memopt.memory.store.link_cache.MOST_LINKS", 2)
    graph = AssociationGraph(store)
    add(store, ["a", "b", "c"])
    graph.links.read()
    assert graph.links.current() is None
    assert len(graph.around(["a"])[1]) == 2


def test_rows_that_moved_are_found_all_the_same(store: MemoryStore) -> None:
    """Where rows lay is remembered with the links; deleting and compacting moves them."""
    graph = AssociationGraph(store)
    retriever = MultimodalRetriever(store, graph)
    add(store, [f"m{at}" for at in range(60)])
    query = np.ones(DIM)

    def answers() -> list[str]:
        found = retriever.retrieve(vector=query, top_k=3, alpha=0.1, beta=0.9, touch=False)
        return [result.memory.memory_id for result in found]

    graph.links.read()
    before = answers()
    held = graph.links.current()
    assert held is not None
    seen = held.row_ids(before)
    assert set(seen) == set(before)
    store.delete([f"m{at}" for at in range(60) if f"m{at}" not in before][:20])
    expected = answers()
    store.optimize()
    assert answers() == expected
    graph.links.closing()
    graph.links.read()
    held = graph.links.current()
    assert held is not None
    assert held.row_ids(before) != seen
    assert answers() == expected
