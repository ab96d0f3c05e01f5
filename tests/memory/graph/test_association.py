"""The association graph: linked by time, meaning and recall; never to a missing memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memopt.memory.graph.association import CO_RETRIEVAL, AssociationGraph, GraphRecipe
from memopt.memory.graph.neighbours import close_in_meaning, close_in_time
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, NewMemory

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DIM = 8


def new(name: str, vector: np.ndarray, seconds: float = 0) -> NewMemory:
    """A memory of a given vector, seconds after NOW."""
    moment = NOW + timedelta(seconds=seconds)
    return NewMemory(content=Content(text=name), memory_id=name, embedding=vector, timestamp=moment)


def axis(number: int, lean: float = 0.0) -> np.ndarray:
    """A unit vector along an axis, leaning to the next one."""
    vector = np.zeros(DIM)
    vector[number], vector[(number + 1) % DIM] = 1, lean
    return vector / np.linalg.norm(vector)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path / "store", dim=DIM, clock=lambda: NOW) as opened:
        yield opened


def linked(store: MemoryStore, name: str) -> set[str]:
    return {link.linked_id for link in store.get(name).association_links}


def orphans(store: MemoryStore) -> set[str]:
    """Ends of links that are no memories."""
    edges = store.database.table("edges").to_arrow()
    ends = set(edges["source"].to_pylist()) | set(edges["target"].to_pylist())
    return ends - set(store.database.memories.to_arrow()["memory_id"].to_pylist())


def test_new_memories_are_linked_by_time_and_by_meaning(store: MemoryStore) -> None:
    """Within 300 seconds or above the similarity, whether added together or one by one."""
    AssociationGraph(store)
    store.add(new("a", axis(0)))
    store.add(new("soon", axis(2), 200))
    store.add(new("later", axis(4), 100_000))
    store.add([new("alike", axis(0, 0.1), 900_000), new("beside", axis(6), 900_010)])
    assert linked(store, "a") == {"soon", "alike"}
    assert linked(store, "later") == set()
    assert linked(store, "alike") == {"a", "beside"}


@pytest.mark.parametrize("end", [datetime.min, datetime.max], ids=["first", "last"])
def test_memories_at_the_ends_of_the_calendar_are_linked(store: MemoryStore, end: datetime) -> None:
    """Where there is no moment before, or after, to look from."""
    AssociationGraph(store)
    for number, name in enumerate(("a", "b")):
        memory = NewMemory(
            content=Content(text=name), memory_id=name, embedding=axis(number), timestamp=end
        )
        store.add(memory)
    assert linked(store, "a") == {"b"}


def test_deleting_a_memory_deletes_its_links(store: MemoryStore) -> None:
    """In both directions, with what is buffered."""
    graph = AssociationGraph(store)
    store.add([new(name, axis(0), at) for at, name in enumerate("abc")])
    graph.retrieved(["a", "b", "c"])
    store.delete(["b"])
    graph.flush()
    assert linked(store, "a") == {"c"}
    assert orphans(store) == set()


def test_recall_together_strengthens_a_link(store: MemoryStore) -> None:
    """Each time by the gain, up to 1; an edge is there once per direction."""
    graph = AssociationGraph(store, GraphRecipe(gain=0.2))
    store.add([new("a", axis(0)), new("b", axis(4), 10_000)])
    for _ in range(2):
        graph.retrieved(["a", "b"])
    graph.flush()
    graph.retrieved(["b", "a"])
    graph.flush()
    (link,) = store.get("a").association_links
    assert link.weight == pytest.approx(0.6)
    edges = store.database.table("edges").to_arrow()
    assert edges.num_rows == 2
    assert set(edges["kind"].to_pylist()) == {CO_RETRIEVAL}


def test_links_fade_and_weak_ones_go(tmp_path: Path) -> None:
    """After a half-life a link weighs half; below the floor it is dropped."""
    now = [NOW]
    with MemoryStore(tmp_path / "store", dim=DIM, clock=lambda: now[0]) as store:
        graph = AssociationGraph(store, GraphRecipe(half_life_days=10, floor=0.3))
        store.add([new("a", axis(0)), new("b", axis(0))])
        now[0] += timedelta(days=10)
        assert graph.around(["a"])[2].tolist() == pytest.approx([0.5])
        assert graph.decay() == 0
        now[0] += timedelta(days=10)
        assert graph.decay() == 1
        assert store.database.table("edges").count_rows() == 0


def test_building_anew_gives_the_incremental_graph(store: MemoryStore) -> None:
    """And links by co-retrieval stay, once."""
    graph = AssociationGraph(store)
    generator = np.random.default_rng(0)
    for at in range(30):
        store.add(new(f"m{at}", generator.normal(size=DIM), at * 120.0))
    incremental = {f"m{at}": linked(store, f"m{at}") for at in range(30)}
    graph.retrieved(["m0", "m29"])
    graph.flush()
    graph.build()
    for name, links in incremental.items():
        assert links <= linked(store, name)
    assert "m29" in linked(store, "m0")
    edges = store.database.table("edges").to_arrow().select(["source", "target"]).to_pylist()
    assert len(edges) == len({(edge["source"], edge["target"]) for edge in edges})


def test_cells_find_nearly_all_neighbours() -> None:
    """At least 95 % of the true neighbours above the threshold, in clustered data."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(60, 64))
    vectors = centres[generator.integers(0, 60, 3000)] + 0.4 * generator.normal(size=(3000, 64))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    pairs = close_in_meaning(vectors, 0.7, 5)
    found = set(zip(pairs.left.tolist(), pairs.right.tolist(), strict=True))
    exact = vectors @ vectors.T
    np.fill_diagonal(exact, -1)
    best = np.argsort(-exact, axis=1)[:, :5]
    right = {(i, int(j)) for i in range(3000) for j in best[i] if exact[i, j] > 0.7}
    assert len(right) > 5000
    assert len(found & right) >= 0.95 * len(right)


@given(st.lists(st.floats(0, 1e6), max_size=40), st.integers(1, 5))
def test_time_pairs_are_those_of_a_walk_along_the_sorted_times(
    seconds: list[float], most: int
) -> None:
    """Every pair is inside the window, and nobody has more than the next few."""
    pairs = close_in_time(np.array(seconds), 300, most)
    moments = np.array(seconds)
    gaps = np.abs(moments[pairs.left] - moments[pairs.right])
    assert (gaps <= 300).all()
    assert ((pairs.weight >= 0.5) & (pairs.weight <= 1)).all()
    assert (np.bincount(pairs.left, minlength=1) <= most).all()


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_the_graph_never_links_to_a_missing_memory(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever is added, recalled and deleted, in any order."""
    # A folder of its own for each example: hypothesis runs a failing one again.
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    names = [f"m{n}" for n in range(6)]
    with MemoryStore(folder, dim=DIM, clock=lambda: NOW) as store:
        graph = AssociationGraph(store)
        for _ in range(data.draw(st.integers(1, 6))):
            some = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
            step = data.draw(st.sampled_from(["add", "delete", "recall", "flush"]))
            if step == "add":
                store.add([new(name, axis(int(name[1]) % 3)) for name in some])
            elif step == "delete":
                store.delete(some)
            elif step == "recall":
                graph.retrieved(some)
            else:
                graph.flush()
            assert orphans(store) == set()


def test_links_go_with_their_memories_without_a_graph(tmp_path: Path) -> None:
    """A process that opened the store alone leaves no link to nothing either."""
    with MemoryStore(tmp_path / "s", dim=4) as store:
        graph = AssociationGraph(store)
        vectors = np.eye(4, dtype=np.float32)[[0, 0, 0]]
        new = [
            NewMemory(content=Content(text=key), embedding=vector, memory_id=key)
            for key, vector in zip("abc", vectors, strict=True)
        ]
        store.add(new)
        graph.close()
    with MemoryStore(tmp_path / "s") as store:
        assert store.delete(["a"]) == 1
        ends = store.database.table("edges").to_arrow()
        assert set(ends["source"].to_pylist()) == set(ends["target"].to_pylist()) == {"b", "c"}
