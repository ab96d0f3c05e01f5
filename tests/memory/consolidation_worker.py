"""A process that consolidates a store and kills itself at a step: STORE ORIGINALS STEP."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from memopt.memory.lifecycle import consolidation
from memopt.memory.lifecycle.plan import ConsolidationRecipe
from memopt.memory.lifecycle.summary_writer import SummaryWriter
from memopt.memory.memory_store import MemoryStore

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
STEPS = ("planned", "summarised", "ready", "committed", "archive-ready", "archived", "finished")


def kill_after(owner: Any, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
    """Kill this process when a function has returned, for arguments that ``when`` is true of."""
    function = getattr(owner, name)

    def killing(*args: Any) -> Any:
        due = when(*args)
        found = function(*args)
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(owner, name, killing)


def kill_at(step: str) -> None:
    """Kill this process at one of STEPS of a consolidation."""
    run = consolidation._ConsolidationRun

    def summaries(_: object, batches: list[Any]) -> bool:
        return any(batch.summaries is not None for batch in batches)

    def archived(_: object, batches: list[Any]) -> bool:
        return any(batch.summaries is None for batch in batches)

    kill_after(
        *{
            "planned": (consolidation, "make_plan"),
            "summarised": (SummaryWriter, "write"),
            "ready": (run, "condense"),
            "committed": (run, "_write", summaries),
            "archive-ready": (run, "archive"),
            "archived": (run, "_write", archived),
            "finished": (run, "_tell"),
        }[step]
    )


if __name__ == "__main__":
    kill_at(sys.argv[3])
    with MemoryStore(sys.argv[1], clock=lambda: NOW) as store:
        consolidation.consolidate(
            store,
            ConsolidationRecipe(originals=sys.argv[2], duty=1),  # type: ignore[arg-type]
        )
