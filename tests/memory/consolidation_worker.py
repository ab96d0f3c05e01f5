"""A process that consolidates a store, to be killed: STORE ORIGINALS."""

from __future__ import annotations

import sys
from datetime import UTC, datetime

from memopt.memory.lifecycle.condense import ConsolidationRecipe, consolidate
from memopt.memory.memory_store import MemoryStore

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)

if __name__ == "__main__":
    with MemoryStore(sys.argv[1], clock=lambda: NOW) as store:
        consolidate(
            store,
            ConsolidationRecipe(originals=sys.argv[2], duty=1),  # type: ignore[arg-type]
        )
