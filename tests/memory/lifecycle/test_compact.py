"""A compact store: vectors in a quarter of the room, and the same memories found."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from memopt.bundle import Bundle
from memopt.memory.graph.retriever import MultimodalRetriever
from memopt.memory.lifecycle import compact
from memopt.memory.lifecycle.consolidation import consolidate
from memopt.memory.lifecycle.plan import ConsolidationRecipe
from memopt.memory.lifecycle.verify import verify
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, Filter, NewMemory
from memopt.memory.privacy.erase import forget, reclaim
from memopt.runtimes.engine import ArrowEngine
from tests.memory.kit import Hashing, note
from tests.memory.paraphrases import facts

DIM = 160
OLD = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    store = MemoryStore(tmp_path / "s", embedder=Hashing(dim=DIM), background=False)
    store.add([note(f"note number {at}", timestamp=OLD + timedelta(hours=at)) for at in range(400)])
    return store


def test_the_default_consolidation_saves_half_and_finds_the_same(store: MemoryStore) -> None:
    """By vectors, words, filters, candidates and retrieval, with no index."""
    queries = store.embed([Content(text=f"note number {at}") for at in range(0, 400, 40)])
    wide = Filter(since=OLD + timedelta(hours=100))

    def found() -> list[list[str]]:
        retriever = MultimodalRetriever(store)
        answers = []
        for query in queries:
            answers.append([hit.memory.memory_id for hit in store.search(query, touch=False)])
            answers.append([hit.memory.memory_id for hit in store.search(query, where=wide)])
            answers.append([key for key, _ in store.candidates(query)])
            answers.append([hit.memory.memory_id for hit in retriever.retrieve(vector=query)])
        answers.append([hit.memory.memory_id for hit in store.search(text="number 77", top_k=1)])
        answers.append(
            [hit.memory.memory_id for hit in store.search(queries[0], text="number 5", top_k=1)]
        )
        return answers

    reclaim(store)
    before, size = found(), store.stats().bytes_on_disk or 0
    report = consolidate(store, ConsolidationRecipe(duty=1))
    reclaim(store)
    after = found()
    shares = [len(set(a) & set(b)) / len(a) for a, b in zip(before, after, strict=True)]
    assert report.archived == 400
    assert np.mean(shares) > 0.95
    assert [answer[0] for answer in before] == [answer[0] for answer in after]
    assert (store.stats().bytes_on_disk or 0) < 0.65 * size
    assert verify(store).problems == {}
    assert store.index.ensure() is None


def test_a_compact_store_goes_on(store: MemoryStore) -> None:
    """Added, changed, merged, deleted, erased, condensed again, and moved to another model."""
    exact = store.get("note-number-7").joint_embedding
    assert compact.compact(store) is not None
    assert compact.compact(store) is None
    again = store.get("note-number-7").joint_embedding
    assert exact is not None
    assert again is not None
    assert again.dtype == np.float32
    assert float(exact @ again) > 0.9999
    assert np.linalg.norm(again) == pytest.approx(1, abs=1e-5)
    store.add(note("a new one"))
    assert store.find(Content(text="a new one"), top_k=1)[0].memory.text == "a new one"
    store.update("a-new-one", text="another one")
    assert store.find(Content(text="another one"), top_k=1)[0].score == pytest.approx(1, abs=1e-3)
    consolidate(store, ConsolidationRecipe(duty=1))
    store.optimize()
    forget(store, ["note-number-7"])
    assert store.vectors()[1].shape == (400, DIM)
    assert verify(store).problems == {}
    store.embedding.use(Hashing("next", 24))
    assert store.reembed(store.embedder) == 400
    assert not store.database.compact
    assert store.find(Content(text="another one"), top_k=1)[0].memory.text == "another one"


def test_others_that_have_the_store_open_notice(store: MemoryStore) -> None:
    """A reader and a writer that opened it before, in their next search and their next commit."""
    path = str(store.place)
    other = MemoryStore(path, embedder=Hashing(dim=DIM), background=False)
    assert len(other.find(Content(text="note number 3"))) == 10
    compact.compact(store)
    assert other.find(Content(text="note number 3"), top_k=1)[0].memory.text == "note number 3"
    late = MemoryStore(path, embedder=Hashing(dim=DIM), background=False)
    assert not other.add(note("note number 3")).added
    assert other.add(note("late")).added
    assert late.find(Content(text="late"), top_k=1)[0].memory.text == "late"
    assert verify(late).problems == {}


def test_what_signs_cannot_tell_apart_stays_as_it_is(tmp_path: Path) -> None:
    """Vectors of one direction with a little in the last digits: exact search is kept."""
    store = MemoryStore(tmp_path / "s", dim=DIM, background=False)
    random = np.random.default_rng(0)
    base = 1 + 1e-4 * random.normal(size=(600, DIM))
    store.add([NewMemory(content=Content(text=str(n)), embedding=v) for n, v in enumerate(base)])
    assert compact.compact(store) is None
    assert not store.database.compact
    small = MemoryStore(tmp_path / "small", dim=compact.LEAST_DIM - 1, background=False)
    small.add(NewMemory(content=Content(text="a"), embedding=np.ones(compact.LEAST_DIM - 1)))
    assert compact.compact(small) is None


def test_stats_name_the_near_duplicates_and_every_fact_stays_findable(tmp_path: Path) -> None:
    """50 facts said 10 times each in other words: nearly all have a duplicate, none gets lost."""
    random = np.random.default_rng(0)
    ways = [*"abcdefghij"]
    facts = random.normal(size=(50, DIM))
    store = MemoryStore(tmp_path / "s", dim=DIM, background=False)
    assert store.stats().duplicate_rate is None
    noise = random.normal(size=(50, len(ways), DIM))
    store.add(
        [
            NewMemory(
                content=Content(text=f"{way} fact {at}"), embedding=fact + 0.25 * noise[at, n]
            )
            for at, fact in enumerate(facts)
            for n, way in enumerate(ways)
        ]
    )
    rate = store.stats().duplicate_rate
    assert rate is not None
    assert rate > 0.9
    ids, _ = store.vectors()
    store.touch(ids * 10)
    consolidate(store, ConsolidationRecipe(duty=1, originals="drop"))
    for at, fact in enumerate(facts):
        best = store.search(fact, top_k=1)[0].memory
        assert f"fact {at}" in (best.summary or best.text or "")
    after = store.stats()
    assert after.memories < 250
    assert after.duplicate_rate is not None
    assert after.duplicate_rate < rate


@pytest.mark.slow
def test_a_thousand_ways_to_say_fifty_facts_leave_each_findable(
    tmp_path: Path, minilm: Bundle
) -> None:
    """Told over and over by a real model's measure: each fact is among ten, before and after."""
    known = facts()
    told = [(fact, text) for fact in known for text in fact.told]
    assert len({text for _, text in told}) == 1000
    with ArrowEngine(minilm) as engine:
        vectors = engine.encode([text for _, text in told])
        asked = engine.encode([fact.question for fact in known])
    store = MemoryStore(tmp_path / "s", dim=vectors.shape[1], background=False)
    new = [
        NewMemory(
            content=Content(text=text),
            embedding=vector,
            memory_id=f"{fact.name} {at}",
            # Round after round, so that nothing is beside what says the same.
            timestamp=OLD + timedelta(hours=at % 20, minutes=at // 20),
        )
        for at, ((fact, text), vector) in enumerate(zip(told, vectors, strict=True))
    ]
    store.add(new)

    def missed() -> list[str]:
        retriever = MultimodalRetriever(store)
        lost = []
        for fact, query in zip(known, asked, strict=True):
            found = retriever.retrieve(fact.question, vector=query, touch=False)
            said = " ".join(f"{one.memory.text or ''} {one.memory.summary or ''}" for one in found)
            if not any(text in said for text in fact.told):
                lost.append(fact.name)
        return lost

    rate = store.stats().duplicate_rate
    assert rate is not None
    assert rate > 0.5
    assert missed() == []
    consolidate(store, ConsolidationRecipe(duty=1))
    assert missed() == []
    store.close()
