"""Consolidation: what is hot is condensed, what is cold is archived, and no fact gets lost."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from memopt.errors import ConfigurationError
from memopt.memory.lifecycle.backends import CallLimits
from memopt.memory.lifecycle.consolidation import consolidate, plan
from memopt.memory.lifecycle.llm import language_model
from memopt.memory.lifecycle.plan import FAILED, ConsolidationRecipe
from memopt.memory.lifecycle.schedule import due
from memopt.memory.lifecycle.summary_writer import FALLBACK
from memopt.memory.lifecycle.worker import ConsolidationWorker, Triggers
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, NewMemory
from memopt.memory.privacy.erase import reclaim
from tests.memory.kit import Clock
from tests.memory.llm_server import serve

DIM = 16
NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
FAST = ConsolidationRecipe(duty=1)


@pytest.fixture
def clock() -> Clock:
    return Clock(NOW)


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> MemoryStore:
    return MemoryStore(tmp_path / "store", dim=DIM, clock=clock)


def put(store: MemoryStore, axis: int, *texts: str, reads: int = 10, **fields: object) -> list[str]:
    fields = {"timestamp": NOW - timedelta(days=1), **fields}
    vector = np.eye(DIM, dtype=np.float32)[axis]
    new = [NewMemory(content=Content(text=t), embedding=vector, **fields) for t in texts]  # type: ignore[arg-type]
    ids = list(store.add(new).ids)
    store.touch(ids * reads)
    return ids


def test_hot_memories_of_one_kind_become_one_summary(store: MemoryStore) -> None:
    """Same meaning and category: one row at the centroid; a different category is another."""
    ids = put(store, 0, "The door is red.", "The door is red!", category="house")
    put(store, 0, "The door is red?", category="car")
    cold = put(store, 1, "Old news.", reads=0, timestamp=NOW - timedelta(days=31))
    young = put(store, 2, "Fresh news.", reads=0, timestamp=NOW - timedelta(days=29))
    foreseen = plan(store, FAST)
    assert (foreseen.plan.hot, foreseen.plan.cold, foreseen.plan.alone) == (3, 1, 1)
    assert store.count() == 5
    report = consolidate(store, FAST)
    assert (report.condensed, report.archived, report.failed) == (2, 1, 0)
    summary = store.get(report.summaries[0])
    assert (summary.tier, summary.source_count, summary.category) == ("long_term", 2, "house")
    assert summary.summary == "The door is red."
    assert set(summary.source_memory_ids) == set(ids)
    assert store.get(cold[0]).tier == "archived"
    assert store.get(cold[0]).text == "Old news."
    assert store.get(young[0]).tier == "short_term"
    assert store.get(ids[0]).access_count == 10
    assert consolidate(store, FAST).summaries == ()


def test_dropped_originals_leave_their_count_with_the_summary(store: MemoryStore) -> None:
    """Originals are gone, their accesses are counted once."""
    put(store, 0, "The door is red.", "The door is red!", reads=12)
    report = consolidate(store, ConsolidationRecipe(duty=1, originals="drop"))
    assert (store.count(), store.get(report.summaries[0]).access_count) == (1, 24)


def test_memories_that_expire_at_different_times_do_not_mix(store: MemoryStore) -> None:
    """A summary expires with its sources."""
    soon = NOW + timedelta(days=1)
    put(store, 0, "a b c.", "a b c!", expires_at=soon)
    put(store, 0, "a b c?")
    report = consolidate(store, FAST)
    assert [store.get(i).expires_at for i in report.summaries] == [soon]


@pytest.mark.parametrize("step", ["500", "timeout", "empty", "garbage"])
def test_an_unreachable_model_is_replaced_by_extraction(store: MemoryStore, step: str) -> None:
    """The summary is extracted and an event says why."""
    put(store, 0, "The door is red.", "The door is red!")
    with serve(step) as server:
        llm = language_model(
            f"openai:m@{server.url('openai')}", limits=CallLimits(retries=0, timeout_s=0.3)
        )
        report = consolidate(store, FAST, llm=llm)
    assert (len(report.summaries), report.fallbacks, report.failed) == (1, 1, 0)
    assert "openai:m gave no summary" in store.events(FALLBACK)[0].detail


@pytest.mark.parametrize("answer", ["Bananas are yellow fruit.", "The door is red since 1999."])
def test_a_summary_that_lost_or_made_up_facts_is_rejected(store: MemoryStore, answer: str) -> None:
    """Far from the sources, or with a number none of them has: extraction takes over."""
    put(store, 0, "The door is red.", "The door is red!")
    with serve("ok", text=answer) as server:
        llm = language_model(f"openai:m@{server.url('openai')}")
        report = consolidate(store, FAST, llm=llm)
    assert store.get(report.summaries[0]).summary == "The door is red."
    assert "rejected" in store.events(FALLBACK)[0].detail


def test_a_failed_batch_waits_longer_each_time(store: MemoryStore, clock: Clock) -> None:
    """Nothing is lost; retried after 3600 s, then 7200 s."""
    put(store, 0, *(f"{word} alone" for word in ["alpha", "beta", "gamma", "delta", "epsilon"]))
    strict = ConsolidationRecipe(duty=1, fidelity=1.0, summary_length=3)
    for wait in (3600, 7200):
        assert consolidate(store, strict).failed == 1
        assert store.count() == 5
        assert store.events(FAILED)[-1].retry_at == clock.now + timedelta(seconds=wait)
        assert consolidate(store, strict).plan.postponed == 5
        clock.now += timedelta(seconds=wait)
    assert len(consolidate(store, FAST).summaries) == 1


def test_a_memory_changed_meanwhile_is_left_for_the_next_run(store: MemoryStore) -> None:
    """A write that comes between reading a batch and committing it wins."""
    ids = put(store, 0, "The door is red.", "The door is red!")

    class Slow:
        name = "slow"

        def complete(self, system: str, prompt: str) -> str:
            store.update(ids[0], category="other")
            return "The door is red."

    report = consolidate(store, FAST, llm=Slow())
    assert (report.stale, report.summaries, store.count()) == (1, (), 2)


def test_waiting_for_a_language_model_is_no_work(store: MemoryStore) -> None:
    """A second of the model's is not followed by half a minute of rest."""
    # The first run of a process imports what it needs, which would count as work.
    put(store, 5, "A first door is red.", "A first door is red, said Ann.")
    consolidate(store, FAST)
    for axis in range(2):
        put(store, axis, f"Door {axis} is red.", f"Door {axis} is red, said Ann.")
    rests: list[float] = []

    class Recorder(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            rests.append(timeout or 0.0)
            return False

    class Slow:
        name = "slow"

        def complete(self, system: str, prompt: str) -> str:
            time.sleep(1)
            return prompt[prompt.index("Door") :][:14]

    report = consolidate(store, llm=Slow(), stop=Recorder())
    assert len(report.summaries) == 2
    asked = 1.0 / ConsolidationRecipe().duty
    assert len(rests) >= 2
    # The first is that of planning; a rest of the model's second would be as long as this.
    assert all(rest < asked / 2 for rest in rests)


def test_a_missed_run_is_caught_up_once(store: MemoryStore, clock: Clock) -> None:
    """Three missed nights are one run; pressure waits its pause."""
    nightly = Triggers(cron="0 3 * * *")
    assert due(store, nightly) is None
    clock.now += timedelta(days=3)
    assert due(store, nightly) == "schedule"
    consolidate(store, FAST)
    assert due(store, nightly) is None
    pressed = Triggers(cron=None, pressure_mb=0.0001)
    assert due(store, pressed) is None
    clock.now += timedelta(hours=2)
    assert due(store, pressed) == "pressure"


def test_the_worker_runs_by_itself_and_stops(store: MemoryStore, clock: Clock) -> None:
    """A due run is done in the background while the loop stays free."""
    put(store, 0, "The door is red.", "The door is red!")
    clock.now += timedelta(days=1)

    async def live() -> int:
        worker = ConsolidationWorker(store, FAST, triggers=Triggers(), poll_s=0.05)
        await worker.start()
        while worker.last is None:
            await asyncio.sleep(0.01)
        await worker.stop()
        assert worker.last is not None
        return len(worker.last.summaries)

    assert asyncio.run(live()) == 1


@pytest.mark.performance
@pytest.mark.slow
def test_readers_do_not_wait_for_the_worker(tmp_path: Path) -> None:
    """Searches during a run are about as fast as before and after it."""
    random = np.random.default_rng(0)
    store = MemoryStore(tmp_path / "s", dim=64)
    vectors = np.repeat(random.normal(size=(10, 64)), 10, 0) + 0.02 * random.normal(size=(100, 64))
    new = [
        NewMemory(content=Content(text=f"Fact {n // 10} is known{'!' * (n % 10)}"), embedding=v)
        for n, v in enumerate(vectors)
    ]
    store.touch(list(store.add(new).ids) * 10)
    store.flush()
    thread = threading.Thread(target=consolidate, args=(store, ConsolidationRecipe()))

    def p95(*, running: bool) -> float:
        took = []
        while len(took) < 60 or (running and thread.is_alive()):
            begun = time.perf_counter()
            store.search(vectors[len(took) % 100], touch=False)
            took.append(time.perf_counter() - begun)
        return float(np.percentile(took, 95))

    idle = p95(running=False)
    thread.start()
    busy = p95(running=True)
    thread.join()
    after = p95(running=False)
    print(f"p95 in ms: before {idle * 1e3:.1f}, during {busy * 1e3:.1f}, after {after * 1e3:.1f}")
    assert busy < 3 * max(idle, after)


def test_half_the_room_is_saved(tmp_path: Path) -> None:
    """Near-duplicate texts and pictures: at least half of the disk comes back."""
    import io

    from PIL import Image

    random = np.random.default_rng(0)
    store = MemoryStore(tmp_path / "s", dim=256)
    new = []
    for n in range(400):
        vision = None
        if n % 4 == 0:
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 255, (32, 32), np.uint8)).save(buffer, "png")
            vision = buffer.getvalue()
        vector = np.eye(256)[n // 10] + 0.01 * random.normal(size=256)
        text = f"Meeting {n // 10} was moved to noon{'!' * (n % 10)}"
        new.append(NewMemory(content=Content(text=text, vision=vision), embedding=vector))
    store.touch(list(store.add(new).ids) * 10)
    reclaim(store)
    before = store.stats().bytes_on_disk or 0
    report = consolidate(store, ConsolidationRecipe(duty=1, originals="drop"))
    reclaim(store)
    after = store.stats().bytes_on_disk or 0
    print(f"{before} -> {after}")
    assert len(report.summaries) == 40
    assert after < before / 2
    for n in range(40):
        (hit,) = store.search(np.eye(256)[n], top_k=1)
        assert f"Meeting {n} " in (hit.memory.summary or "")


def _saved(store: MemoryStore) -> int:
    (event,) = store.events("consolidation-saved")
    sizes = json.loads(event.detail)
    return int(sizes["before"] - sizes["after"])


def test_the_command_says_what_would_happen(store: MemoryStore) -> None:
    """--dry-run changes nothing; --json is one document; an unknown LLM is refused."""
    from typer.testing import CliRunner

    from memopt.cli import app

    put(store, 0, "The door is red.", "The door is red!")
    store.close()
    place = str(store.place)
    dry = CliRunner().invoke(app, ["memory", "consolidate", place, "--dry-run", "--json"])
    assert json.loads(dry.stdout)["condensed"] == 2
    refused = CliRunner().invoke(app, ["memory", "consolidate", place, "--llm", "oracle"])
    assert isinstance(refused.exception, ConfigurationError)
    real = CliRunner().invoke(app, ["memory", "consolidate", place])
    assert "2 condensed to 1 summaries" in real.stdout
    shown = CliRunner().invoke(app, ["memory", "stats", place, "--json"])
    assert json.loads(shown.stdout)["saved_bytes"] == _saved(store)
    assert store.count() == 3
