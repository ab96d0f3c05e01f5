"""Tiers: ranked by use and words, moved without losing anything."""

from __future__ import annotations

import dataclasses
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.errors import ConfigurationError, ConsolidationError
from memopt.memory.graph.association import AssociationGraph
from memopt.memory.lifecycle.consolidation import consolidate, plan
from memopt.memory.lifecycle.plan import ConsolidationRecipe
from memopt.memory.lifecycle.tiering import HotColdTiering
from memopt.memory.lifecycle.verify import verify
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, NewMemory
from memopt.memory.privacy.keys import AesGcm
from tests.memory.kit import Hashing, png, wav

NOW = datetime(2026, 5, 1, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    store = MemoryStore(tmp_path / "s", dim=2, clock=lambda: NOW)
    words = ("red door", "blue lake", "lake shore", "green hill")
    store.add(
        [
            NewMemory(
                content=Content(text=text),
                embedding=np.ones(2, np.float32),
                memory_id=text,
                timestamp=NOW - timedelta(days=at),
            )
            for at, text in enumerate(words)
        ]
    )
    return store


def test_rank_mixes_use_and_words(store: MemoryStore) -> None:
    """0.6 of the rank by last use and 0.4 of the likeness to the query."""
    ranked = HotColdTiering(store).rank(query="lake")
    for found in ranked:
        mixed = 0.6 * found.recency + 0.4 * found.relevance
        assert found.score == pytest.approx(mixed)
    assert ranked[0].memory_id == "blue lake"
    assert {found.memory_id: found.recency for found in ranked}["red door"] == 1


def test_rebalance_archives_the_rest_and_recalls_what_is_wanted(store: MemoryStore) -> None:
    """What moves out stays readable, is found by its words, and comes back whole."""
    tiers = HotColdTiering(store)
    assert tiers.rebalance(1).recalled == ()
    assert store.stats().tiers == {"short_term": 1, "long_term": 0, "archived": 3}
    assert store.get("green hill").text == "green hill"
    assert store.search(text="hill", touch=False)[0].memory.memory_id == "green hill"
    store.touch(["green hill"] * 3)
    assert "green hill" in tiers.rebalance(2, "green hill").recalled
    assert (store.get("green hill").tier, store.count()) == ("short_term", 4)
    assert store.rows(["green hill"])["text"].to_pylist() == ["green hill"]


def test_consolidation_keeps_at_hand_what_is_worth_most(store: MemoryStore) -> None:
    """What was used last and what is like it stays; what is hot is no surplus."""
    store.touch(["green hill"] * 10)
    store.touch(["blue lake"])
    recipe = ConsolidationRecipe(at_hand=3, duty=1)
    assert plan(store, recipe).archived == 1
    assert consolidate(store, recipe).plan.archive == ("lake shore",)
    assert consolidate(store, recipe).archived == 0
    assert store.get("lake shore").text == "lake shore"
    with pytest.raises(ConfigurationError, match="at_hand -1 is below 0"):
        ConsolidationRecipe(at_hand=-1)


def test_bad_requests_are_refused(store: MemoryStore) -> None:
    """Weights that do not sum to 1, a negative size, an unknown id."""
    with pytest.raises(ConfigurationError, match="sum to 1"):
        HotColdTiering(store, recency=0.9)
    with pytest.raises(ConfigurationError, match="keep -1"):
        HotColdTiering(store).rebalance(-1)
    with pytest.raises(ConsolidationError, match="no memory 'x'"):
        HotColdTiering(store).archive(["x"])


MOVES = st.tuples(
    st.sampled_from(["archive", "recall", "rebalance"]), st.sets(st.integers(0, 5), min_size=1)
)


@settings(max_examples=8, deadline=None)
@given(st.lists(MOVES, min_size=1, max_size=5), st.booleans())
def test_moves_lose_nothing(moves: list[tuple[str, set[int]]], encrypted: bool) -> None:
    """Content, vector, times, counts and links are the same wherever a memory went."""
    cipher = AesGcm((bytes(32),)) if encrypted else None
    with (
        tempfile.TemporaryDirectory() as folder,
        MemoryStore(folder, embedder=Hashing(), cipher=cipher, clock=lambda: NOW) as store,
    ):
        AssociationGraph(store)
        contents = [
            Content(
                text=f"note {at}" if at % 2 == 0 else None,
                vision=png(at) if at % 3 == 1 else None,
                audio=wav(at) if at % 3 == 2 or at == 3 else None,
            )
            for at in range(6)
        ]
        ids = list(store.add([NewMemory(content=content) for content in contents]).ids)
        store.touch(ids[:3])
        before = store.get_many(ids)
        tiers = HotColdTiering(store)
        for kind, places in moves:
            if kind == "rebalance":
                tiers.rebalance(len(places))
            else:
                getattr(tiers, kind)([ids[place] for place in places])
        after = store.get_many(ids)
        for one, two in zip(before, after, strict=True):
            for field in dataclasses.fields(one):
                if field.name not in ("tier", "joint_embedding"):
                    assert getattr(one, field.name) == getattr(two, field.name)
            np.testing.assert_array_equal(one.joint_embedding, two.joint_embedding)
        assert store.count() == 6
        assert verify(store).problems == {}
