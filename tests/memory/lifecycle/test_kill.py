"""kill -9 at every step of a consolidation: every original or its summary, never both."""

from __future__ import annotations

import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from memopt.memory.lifecycle.consolidation import consolidate
from memopt.memory.lifecycle.plan import ConsolidationRecipe
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, NewMemory
from tests.memory.consolidation_worker import NOW, STEPS

DIM = 8


def filled(folder: Path) -> dict[str, str]:
    """Two hot groups of three and three cold memories; returns id -> text."""
    store = MemoryStore(folder, dim=DIM, clock=lambda: NOW)
    texts = {}
    for at in range(9):
        kind, which = divmod(at, 3)
        vector = np.eye(DIM, dtype=np.float32)[kind] + 0.01 * np.eye(DIM, dtype=np.float32)[5]
        text = f"Thing {kind} was seen by the lake{'!' * which}"
        old = NOW - timedelta(days=60 if kind == 2 else 1)
        new = NewMemory(content=Content(text=text), embedding=vector, timestamp=old)
        (memory_id,) = store.add(new).ids
        texts[memory_id] = text
        if kind < 2:
            store.touch([memory_id] * 10)
    store.close()
    return texts


def covered(folder: Path, texts: dict[str, str]) -> None:
    """Every original stands for itself or is stood for, exactly once."""
    with MemoryStore(folder, clock=lambda: NOW) as store:
        rows = [row for batch in store.scan() for row in batch.to_pylist()]
        ids = [row["memory_id"] for row in rows]
        assert len(ids) == len(set(ids))
        sources = [source for row in rows for source in row["source_memory_ids"] or ()]
        assert len(sources) == len(set(sources))
        # Archived originals of a summary are marked; all others count for themselves.
        standing = [
            row["memory_id"]
            for row in rows
            if not row["source_memory_ids"] and row["consolidated_at"] is None
        ]
        assert sorted(standing + sources) == sorted(texts)
        marked = {row["memory_id"] for row in rows if row["consolidated_at"]} & set(texts)
        assert marked <= set(sources)
        for memory_id in set(ids) & set(texts):
            assert store.get(memory_id).text == texts[memory_id]


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_step_loses_and_repeats_nothing(tmp_path: Path, step: str) -> None:
    """After the kill all is covered once; the next run finishes the work."""
    originals = "drop" if STEPS.index(step) % 2 else "archive"
    texts = filled(tmp_path / "store")
    run = [sys.executable, str(Path(__file__).parents[1] / "consolidation_worker.py")]
    command = [*run, str(tmp_path / "store"), originals, step]
    killed = subprocess.run(command, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    covered(tmp_path / "store", texts)
    with MemoryStore(tmp_path / "store", clock=lambda: NOW) as store:
        recipe = ConsolidationRecipe(originals=originals, duty=1)  # type: ignore[arg-type]
        consolidate(store, recipe)
        tiers = store.stats().tiers
        assert (tiers["short_term"], tiers["long_term"]) == (0, 2)
    covered(tmp_path / "store", texts)
