"""Retrieval: nearest first, and what the nearest remind of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memopt.errors import InputError
from memopt.memory.graph.association import AssociationGraph
from memopt.memory.graph.retriever import MultimodalRetriever
from memopt.memory.lifecycle.consolidation import consolidate
from memopt.memory.lifecycle.plan import ConsolidationRecipe
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, Filter, NewMemory

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DIM = 16


class Words:
    """An embedder of text: a fixed random direction per first word, turned by the rest."""

    model_id, dim = "words", DIM

    def embed(self, items: Sequence[Content]) -> np.ndarray:
        rows = []
        for item in items:
            first, _, rest = (item.text or "").partition(" ")
            base = np.random.default_rng(list(first.encode())).normal(size=DIM)
            turn = np.random.default_rng([*rest.encode(), 1]).normal(size=DIM)
            rows.append(base + 0.1 * turn)
        vectors = np.array(rows, np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path / "store", embedder=Words(), dim=DIM, clock=lambda: NOW) as opened:
        yield opened


def add(store: MemoryStore, text: str, hours: float, **fields: object) -> str:
    moment = NOW + timedelta(hours=hours)
    memory = NewMemory(content=Content(text=text), timestamp=moment, **fields)  # type: ignore[arg-type]
    return store.add(memory).ids[0]


def test_association_brings_in_what_is_not_near(store: MemoryStore) -> None:
    """The key was put away a minute after the door was painted."""
    graph = AssociationGraph(store)
    retriever = MultimodalRetriever(store, graph)
    door = add(store, "door painted red", 0)
    key = add(store, "locksmith came by", 0.01)
    words = [NewMemory(content=Content(text=f"word{at}"), timestamp=NOW) for at in range(60)]
    store.observers.remove(graph)
    store.add(words)
    plain = retriever.retrieve("door painted", top_k=2, enable_association=False, touch=False)
    assert key not in {result.memory.memory_id for result in plain}
    found = retriever.retrieve("door painted", top_k=2, alpha=0.5, beta=0.5, touch=False)
    assert [result.memory.memory_id for result in found] == [door, key]


@pytest.mark.parametrize(
    ("query", "beta"), [({"text": "word1 number"}, 0.1), ({"vector": np.ones(DIM)}, 0.3)]
)
def test_scores_are_mixed_as_documented(
    store: MemoryStore, query: dict[str, object], beta: float
) -> None:
    """All three in 0..1, sorted, final = (alpha x similarity + beta x association)."""
    retriever = MultimodalRetriever(store, AssociationGraph(store))
    for at in range(20):
        add(store, f"word{at % 4} number {at}", at * 0.02)
    found = retriever.retrieve(**query, top_k=20, touch=False)  # type: ignore[arg-type]
    assert found == sorted(found, key=lambda result: -result.final_score)
    for result in found:
        assert 0 <= result.similarity <= 1
        assert 0 <= result.association_score <= 1
        mixed = 0.7 * result.similarity + beta * result.association_score
        assert result.final_score == pytest.approx(mixed / (0.7 + beta))
    assert max(result.association_score for result in found) == pytest.approx(1)


def test_weights_may_be_given(store: MemoryStore) -> None:
    """0.5 and 0.5 are what they say."""
    retriever = MultimodalRetriever(store, AssociationGraph(store))
    for at in range(4):
        add(store, f"word number {at}", at * 0.02)
    for result in retriever.retrieve("word number", alpha=0.5, beta=0.5, touch=False):
        mixed = (result.similarity + result.association_score) / 2
        assert result.final_score == pytest.approx(mixed)


def test_filters_hold_for_associated_memories_too(store: MemoryStore) -> None:
    """Association does not lead out of the category, nor to the expired."""
    retriever = MultimodalRetriever(store, AssociationGraph(store))
    kept = add(store, "door one", 0, category="home")
    add(store, "key one", 0.01, category="work")
    add(store, "lamp one", 0.02, category="home", expires_at=NOW - timedelta(hours=1))
    found = retriever.retrieve("door one", where=Filter(categories=("home",)), top_k=9)
    assert [result.memory.memory_id for result in found] == [kept]


def test_results_are_counted_as_recalled_together(store: MemoryStore) -> None:
    """A search touches its results and links them, without a commit of its own."""
    graph = AssociationGraph(store)
    retriever = MultimodalRetriever(store, graph)
    ids = [add(store, "door one", 0), add(store, "door two", 500)]
    version = store.database.table("edges").version
    retriever.retrieve("door one", top_k=2)
    assert store.database.table("edges").version == version
    graph.flush()
    assert store.database.table("edges").version > version
    assert [memory.access_count for memory in store.get_many(ids)] == [1, 1]


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ({}, "query"),
        ({"text": ""}, "query"),
        ({"text": "a", "top_k": -1}, "top_k"),
        ({"text": "a", "alpha": -0.5}, "alpha"),
        ({"vector": np.full(DIM, np.nan)}, "vector"),
        ({"vector": np.ones(DIM - 1)}, "vector"),
        ({"vision": b"no image"}, "image"),
    ],
)
def test_bad_queries_are_named(store: MemoryStore, query: dict[str, object], named: str) -> None:
    """One clear error each."""
    add(store, "door", 0)
    with pytest.raises(InputError, match=named):
        MultimodalRetriever(store).retrieve(**query)  # type: ignore[arg-type]


@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=6))
def test_partners_of_another_modality_are_found_from_each_other(
    tmp_path: Path, groups: list[int]
) -> None:
    """Vectors of one thing seen, heard and read are near; each finds a partner of each kind."""
    generator = np.random.default_rng(len(groups))
    centres = generator.normal(size=(6, DIM))
    png, wav = _png(), _wav()
    with MemoryStore(tmp_path / "".join(map(str, groups)), dim=DIM) as store:
        graph = AssociationGraph(store)
        new = []
        for at, group in enumerate(groups):
            for kind in ("text", "vision", "audio"):
                content = Content(
                    text=f"thing {group} {at}" if kind == "text" else None,
                    vision=png if kind == "vision" else None,
                    audio=wav if kind == "audio" else None,
                )
                vector = centres[group] + 0.2 * generator.normal(size=DIM)
                name = f"{group}-{at}-{kind}"
                new.append(NewMemory(content=content, embedding=vector, memory_id=name))
        store.add(new)
        retriever = MultimodalRetriever(store, graph)
        for at, group in enumerate(groups):
            for kind in ("text", "vision", "audio"):
                vector = store.get(f"{group}-{at}-{kind}").joint_embedding
                for other in {"text", "vision", "audio"} - {kind}:
                    best = retriever.retrieve(
                        vector=vector, where=Filter(modality=other), top_k=1, touch=False
                    )
                    assert best[0].memory.memory_id.startswith(f"{group}-")


def _png() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def _wav() -> bytes:
    import io

    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(160), 16_000, format="WAV")
    return buffer.getvalue()


@pytest.mark.parametrize("association", [False, True])
def test_the_only_memory_with_the_word_is_found(store: MemoryStore, association: bool) -> None:
    """A rare word wins over a hundred that are nearer."""
    graph = AssociationGraph(store)
    near = np.eye(DIM)[0]
    generator = np.random.default_rng(0)
    store.add(
        [
            NewMemory(
                content=Content(text=f"chatter {at}"),
                embedding=near + 0.1 * generator.normal(size=DIM),
            )
            for at in range(100)
        ]
    )
    part = "the pump takes ZX-4410B"
    far = NewMemory(content=Content(text=part), embedding=np.eye(DIM)[1] + 0.2 * near)
    store.add(far)
    found = MultimodalRetriever(store, graph).retrieve(
        "ZX-4410B", vector=near, enable_association=association, touch=False
    )
    assert part in {result.memory.text for result in found}


def test_an_answer_is_found_by_its_question(store: MemoryStore) -> None:
    """What was said right after, in none of the words asked for, comes before what is nearer."""
    axes = np.eye(DIM)
    talk = ["Ann: where is the ladder kept?", "Bob: behind the shed", "Ann: thanks a lot"]
    vectors = [axes[1] + axes[0], axes[2], axes[3]]
    for at, (text, vector) in enumerate(zip(talk, vectors, strict=True)):
        add(store, text, at * 0.01, embedding=vector)
    for at in range(20):
        add(store, f"Eve: note {at}", 10 + at, embedding=axes[4] + 0.3 * axes[0])
    found = MultimodalRetriever(store).retrieve("ladder", vector=axes[0], top_k=2, touch=False)
    assert [result.memory.text for result in found] == talk[:2]


@pytest.mark.parametrize("asked", ["in May 2025", "on 3 May, 2025", "on 2025-05-03", "am 3. Mai"])
def test_what_is_of_the_time_asked_for_comes_first(store: MemoryStore, asked: str) -> None:
    """Two that say the same, the nearer of another month."""
    axes = np.eye(DIM)
    for at, name in enumerate(("may", "june")):
        new = NewMemory(
            content=Content(text=f"walked the dog {at}"),
            embedding=axes[0] + 0.2 * (1 - at) * axes[1],
            timestamp=datetime(2025, 5 + at, 3, 12, tzinfo=UTC),
            memory_id=name,
        )
        store.add(new)
    question = f"who walked the dog {asked}?"
    hits = store.search(axes[0], text=question, top_k=2, touch=False)
    found = MultimodalRetriever(store).retrieve(question, vector=axes[0], top_k=2, touch=False)
    assert hits[0].memory.memory_id == "may"
    assert found[0].memory.memory_id == "may"


def test_a_summary_parts_no_conversation(store: MemoryStore) -> None:
    """A question that was condensed with others still leads to what was said right after it."""
    axes = np.eye(DIM)
    talk = ["Ann: where is the ladder kept?", "Ann: where is the ladder kept now?", "Bob: the shed"]
    for at, text in enumerate(talk):
        key = add(store, text, at * 0.01, embedding=axes[2] if at == 2 else axes[1] + axes[0])
        if at < 2:
            store.touch([key] * 10)
    for at in range(20):
        add(store, f"Eve: note {at}", 10 + at, embedding=axes[4] + 0.3 * axes[0])
    assert consolidate(store, ConsolidationRecipe(duty=1)).condensed == 2
    found = MultimodalRetriever(store).retrieve("ladder", vector=axes[0], top_k=4, touch=False)
    assert talk[2] in {result.memory.text for result in found}
