"""Summaries follow their sources, archived words are found, and a wrong clock delays nothing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from memopt.memory.graph.association import AssociationGraph
from memopt.memory.lifecycle.consolidation import consolidate, plan
from memopt.memory.lifecycle.plan import FAILED, ConsolidationRecipe
from memopt.memory.lifecycle.retention import retain
from memopt.memory.lifecycle.schedule import RUN, Triggers, due
from memopt.memory.lifecycle.tiering import HotColdTiering
from memopt.memory.lifecycle.verify import verify
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, NewMemory
from memopt.memory.privacy.erase import expire, forget
from memopt.memory.privacy.keys import AesGcm
from tests.memory.kit import Clock

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
WRONG = datetime(2099, 1, 1, tzinfo=UTC)
FAST = ConsolidationRecipe(duty=1)
TEXTS = ("The guest code is tulip.", "Tulip is the code of the guest.", "The guest code: tulip!")


@pytest.fixture(params=["plain", "encrypted"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> MemoryStore:
    cipher = AesGcm((bytes(32),)) if request.param == "encrypted" else None
    return MemoryStore(tmp_path / "s", dim=8, clock=Clock(NOW), cipher=cipher, background=False)


def put(store: MemoryStore, *texts: str, axis: int = 0, **fields: object) -> list[str]:
    vector = np.eye(8)[axis]
    new = [NewMemory(content=Content(text=text), embedding=vector, **fields) for text in texts]  # type: ignore[arg-type]
    return list(store.add(new).ids)


CHANGES: dict[str, Callable[[MemoryStore, str], object]] = {
    "text": lambda store, key: store.update(key, text="Changed.", joint_embedding=np.eye(8)[0]),
    "category": lambda store, key: store.update(key, category="private"),
    "expiry": lambda store, key: store.update(key, expires_at=NOW + timedelta(days=1)),
    "deleted": lambda store, key: store.delete([key]),
    "forgotten": lambda store, key: forget(store, [key]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_summary_goes_with_what_it_was_made_of(store: MemoryStore, change: str) -> None:
    """Whatever happens to one source; the others are condensed anew without it."""
    AssociationGraph(store)
    ids = put(store, *TEXTS)
    store.touch(ids * 10)
    (made,) = consolidate(store, FAST).summaries
    CHANGES[change](store, ids[0])
    left = [
        memory for batch in store.scan(columns=["memory_id"]) for memory in batch[0].to_pylist()
    ]
    assert made not in left
    assert [store.get(key).tier for key in ids[1:]] == ["short_term"] * 2
    assert verify(store).problems == {}
    again = consolidate(store, FAST)
    sources = [store.get(key).source_memory_ids for key in again.summaries]
    # Only a text that was changed is still of the same category and expiry.
    assert all((ids[0] in found) == (change == "text") for found in sources)
    assert set(ids[1:]) <= set(sources[0])


def test_forgetting_a_dropped_original_takes_what_repeats_it(store: MemoryStore) -> None:
    """Only its id is left, in the summary."""
    ids = put(store, *TEXTS)
    store.touch(ids * 10)
    consolidate(store, ConsolidationRecipe(duty=1, originals="drop"))
    assert forget(store, ids[:1]).memories == 1
    assert store.count() == 0


def test_a_summary_lives_no_longer_than_its_shortest_lived_source(tmp_path: Path) -> None:
    """Retention is set after condensing memories of different days."""
    clock = Clock(NOW)
    store = MemoryStore(tmp_path / "s", dim=8, clock=clock, background=False)
    old = put(store, TEXTS[0], timestamp=NOW - timedelta(days=9))
    young = put(store, TEXTS[1], timestamp=NOW)
    store.touch([*old, *young] * 10)
    (made,) = consolidate(store, FAST).summaries
    retain(store, "", 10)
    assert store.get(made).expires_at == store.get(old[0]).expires_at
    clock.now += timedelta(days=3)
    expire(store)
    assert [store.count(), store.get(young[0]).tier] == [1, "short_term"]


def test_archived_words_are_found(tmp_path: Path) -> None:
    """By consolidation, by tiering, and those that an older memopt packed away."""
    store = MemoryStore(tmp_path / "s", dim=8, clock=Clock(NOW), background=False)
    put(store, "The boiler takes part QX7731", timestamp=NOW - timedelta(days=40))
    kept = put(store, "The kettle takes part ZV4410", axis=1)
    consolidate(store, FAST)
    HotColdTiering(store).archive(kept)
    for word in ("QX7731", "ZV4410"):
        (hit,) = store.search(text=word)
        assert (hit.memory.tier, word in (hit.memory.text or "")) == ("archived", True)


@pytest.mark.parametrize("triggers", [Triggers(), Triggers(cron=None, pressure_mb=1e-3)])
def test_a_clock_once_wrong_stops_no_schedule(tmp_path: Path, triggers: Triggers) -> None:
    """Neither a store made in 2099 nor a run recorded then keeps the next one away."""
    clock = Clock(WRONG)
    store = MemoryStore(tmp_path / "s", dim=8, clock=clock, background=False)
    consolidate(store, FAST)
    clock.now = NOW
    assert due(store, triggers)
    consolidate(store, FAST)
    assert due(store, triggers) is None
    clock.now += timedelta(days=2)
    assert due(store, triggers)
    assert [event.at for event in store.events(RUN)] == [WRONG, NOW]


def test_a_clock_once_wrong_keeps_nothing_for_ever(tmp_path: Path) -> None:
    """Retries, ages, expiries, accesses and links dated by it are those of now."""
    clock = Clock(WRONG)
    store = MemoryStore(tmp_path / "s", dim=8, clock=clock, background=False)
    graph = AssociationGraph(store)
    retain(store, "visit", 30)
    ids = put(store, "one", "two", category="visit")
    graph.retrieved(ids)
    graph.flush()
    store.touch(ids[:1])
    store.flush()
    store.event(FAILED, "no room", ids, WRONG + timedelta(hours=1))
    clock.now = NOW
    assert plan(store, FAST).plan.postponed == 0
    assert consolidate(store, FAST).archived == 2
    first = store.get(ids[0])
    assert first.last_access == NOW
    assert first.expires_at is not None
    assert first.expires_at <= NOW + timedelta(days=32)
    clock.now += timedelta(days=10_000)
    assert all(weight < 1e-3 for weight in graph.around(ids)[2])
    put(store, "three", category="visit", timestamp=clock.now)
    assert expire(store) == 2
