"""Categories that are kept for a time: unseen after it, and off the disk with the next run."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memopt.cli import app
from memopt.errors import InputError
from memopt.memory.lifecycle.consolidation import consolidate
from memopt.memory.lifecycle.retention import retain
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, NewMemory
from tests.memory.kit import DIM, Clock, Hashing, files_with

START = datetime(2026, 1, 1, 15, tzinfo=UTC)


@pytest.fixture
def clock() -> Clock:
    return Clock(START)


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> MemoryStore:
    return MemoryStore(tmp_path / "store", embedder=Hashing(), dim=DIM, clock=clock)


def add(store: MemoryStore, text: str, category: str, **fields: object) -> str:
    memory = NewMemory(content=Content(text=text), category=category, **fields)  # type: ignore[arg-type]
    return store.add(memory).ids[0]


def test_old_and_new_memories_of_the_category_go(
    store: MemoryStore, clock: Clock, tmp_path: Path
) -> None:
    """Those there before the policy and those added after it; others stay."""
    before = add(store, "visitor with the blue hat", "visitors")
    kept = add(store, "the door code changed", "house")
    assert retain(store, "visitors", 30) == 1
    after = add(store, "visitor with the green coat", "visitors")
    clock.now += timedelta(days=29)
    assert len(store.get_many([before, kept, after])) == 3
    clock.now += timedelta(days=3)
    assert (
        store.search(Hashing().embed([Content(text="visitor with the blue hat")])[0])[
            0
        ].memory.memory_id
        == kept
    )
    assert consolidate(store).expired == 2
    for needle in (b"blue hat", b"green coat"):
        assert not files_with(tmp_path / "store", needle)
    assert files_with(tmp_path / "store", b"door code")


def test_an_earlier_end_of_one_memory_stays(store: MemoryStore) -> None:
    """A policy never makes anything live longer."""
    soon = START + timedelta(days=2)
    key = add(store, "a", "visitors", expires_at=soon)
    assert retain(store, "visitors", 30) == 0
    assert store.get(key).expires_at == soon
    again = add(store, "b", "visitors", expires_at=soon)
    assert store.get(again).expires_at == soon


def test_a_policy_ends(store: MemoryStore, tmp_path: Path) -> None:
    """None keeps what is to come; every process sees the policy."""
    retain(store, "visitors", 1)
    with MemoryStore(tmp_path / "store", embedder=Hashing()) as other:
        assert other.meta.retention == {"visitors": 1}
    retain(store, "visitors", None)
    assert store.get(add(store, "a", "visitors")).expires_at is None


@pytest.mark.parametrize("days", [0, -1, float("nan"), 1e9])
def test_no_time_is_refused(store: MemoryStore, days: float) -> None:
    """In one line."""
    with pytest.raises(InputError, match="days"):
        retain(store, "visitors", days)


def test_the_command(store: MemoryStore) -> None:
    """``forget --after-days`` sets the policy and deletes nothing now."""
    key = add(store, "a", "visitors")
    place = str(store.place)
    options = ["memory", "forget", place, "--category", "visitors", "--after-days", "7", "--json"]
    done = CliRunner().invoke(app, options)
    assert json.loads(done.stdout) == {"days": 7, "changed": {"visitors": 1}}
    assert store.get(key).text == "a"
    refused = CliRunner().invoke(app, ["memory", "forget", place, "--after-days", "7"])
    assert "category" in str(refused.exception)
