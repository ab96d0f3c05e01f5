"""Which columns are read of rows that are found: those always used, and those met before."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from memopt.memory.model.schema import SHORT_TERM, memories_schema

_MEDIA = ("vision_data", "audio_data")
_OF_SUMMARIES = ("summary", "source_memory_ids", "source_count", "consolidated_at")
_SELDOM = frozenset({*_MEDIA, "packed", *_OF_SUMMARIES})
_ALWAYS = [name for name in memories_schema(1).names if name not in _SELDOM]


class UsedColumns:
    """The columns that hold something in the rows of one store, as far as rows were met.

    Every column read costs a search about 0.3 ms, and most stores use only some of them.
    """

    def __init__(self) -> None:
        self._seldom: frozenset[str] = frozenset()

    def names(self) -> list[str]:
        """Return the columns to read."""
        return [*_ALWAYS, *sorted(self._seldom)]

    def lacks(self, found: pa.Table) -> bool:
        """Say whether rows hold something in columns not read; the next search reads them."""
        needed: set[str] = set()
        if pc.any(found["has_vision"]).as_py():
            needed.add("vision_data")
        if pc.any(found["has_audio"]).as_py():
            needed.add("audio_data")
        if any(found["codec"].to_pylist()):
            needed |= {"packed", *_MEDIA, "summary"}
        if any(tier != SHORT_TERM for tier in found["tier"].to_pylist()):
            needed.update(_OF_SUMMARIES)
        self._seldom |= needed
        return not needed <= set(found.column_names)
