"""Give the room of what was condensed back to the disk."""

from __future__ import annotations

import warnings
from datetime import timedelta
from typing import TYPE_CHECKING

from memopt.memory.store.meta import TABLES
from memopt.memory.store.reembed import unfinished

if TYPE_CHECKING:
    from memopt.memory.memory_store import MemoryStore


def reclaim(store: MemoryStore) -> None:
    """Compact every table and delete the files of all versions but the newest.

    A scan that was begun before, in another process too, may miss files and must be repeated.

    Raises:
        ConsolidationError: the disk takes no more; the store is as it was.

    >>> import tempfile
    >>> from memopt.memory.memory_store import MemoryStore
    >>> reclaim(MemoryStore(tempfile.mkdtemp(), dim=2))
    """
    store.flush()
    with store.changing(), warnings.catch_warnings():
        # Lance warns that old versions go: that is what this is for.
        warnings.filterwarnings("ignore", message="optimize\\(cleanup_older_than=0\\)")
        moving = unfinished(store)
        for table in [*map(store.table, TABLES), *([] if moving is None else [moving])]:
            # Under the writer lock no commit is under way, so unverified files are leftovers.
            table.optimize(
                cleanup_older_than=timedelta(0), delete_unverified=store.place.local is not None
            )
