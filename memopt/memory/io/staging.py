"""Rows made of what others wrote, kept beside the store until all of them are checked."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from memopt.errors import InputError
from memopt.files import staged_directory
from memopt.memory.io.files import CHUNK, Files, Row, Summary, read_memories, read_summaries
from memopt.memory.model import content as incoming
from memopt.memory.model import rows
from memopt.memory.model.schema import (
    ARCHIVED,
    LONG_TERM,
    SHORT_TERM,
    Content,
    NewMemory,
    memories_schema,
)
from memopt.memory.store.ends import end_of
from memopt.memory.store.writer import Writer


class Parts:
    """Whole rows in a file, a table of some hundred at a time, as often as asked for."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def __iter__(self) -> Iterator[pa.Table]:
        for at in range(self._reader.num_record_batches):
            yield pa.Table.from_batches([self._reader.get_batch(at)])


class Staging:
    """Turns what files hold into rows of a store.

    Args:
        writer: of the store; its ``redact`` is what texts pass through.
        model: what made the vectors of the files, '' for what made the store's.

    Attributes:
        expired: how many were left out since their time has come.
    """

    def __init__(self, writer: Writer, files: Files, model: str) -> None:
        self._reader, self._embedding = writer.reader, writer.embedding
        self._database = database = writer.reader.database
        self._redact, self._files = writer.redact, files
        self._model = model or database.meta.model_id
        self._now = database.now()
        self._retention = database.meta.retention
        self.expired = 0
        self._summaries = read_summaries(files)
        # Of which no memory has the id.
        self._alone = dict(self._summaries)
        self._condensed: dict[str, list[Summary]] = defaultdict(list)
        for summary in self._summaries.values():
            for source in summary.sources:
                self._condensed[source].append(summary)
        # For the place and the end of summaries that stand alone.
        self._sums: dict[str, NDArray[np.float32]] = {}
        self._category: dict[str | None, NDArray[np.float32]] = {}
        self._ends: dict[str, list[datetime]] = defaultdict(list)
        self._seen: set[str] = set()

    @contextmanager
    def rows(self) -> Iterator[Parts]:
        """Yield the rows of an export, checked, redacted and encrypted where the store is.

        Raises:
            InputError: see :class:`memopt.memory.io.imports.Import`.
        """
        local = self._database.place.local
        place = staged_directory(local) if local else tempfile.TemporaryDirectory()
        with place as folder:
            path = str(Path(folder) / "rows.arrow")
            schema = memories_schema(self._database.dim)
            with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for table in self._tables():
                    if table.num_rows:
                        writer.write_table(table.combine_chunks())
            with pa.memory_map(path) as source:
                yield Parts(pa.ipc.open_file(source))

    def _tables(self) -> Iterator[pa.Table]:
        stream = read_memories(self._files)
        while part := list(islice(stream, CHUNK)):
            yield self._memories(part)
        for summaries in rows.chunks(list(self._alone.values()), CHUNK):
            yield self._summaries_alone(summaries)

    def _memories(self, part: list[Row]) -> pa.Table:
        dim = self._database.dim
        if len(part[0].vector) != dim:
            raise InputError(
                f"{part[0].memory.origin} has a vector of {len(part[0].vector)} numbers, "
                f"the store of {dim}",
                fix="import into a new store, or reembed",
            )
        living, extra = [], []
        for row in part:
            key = row.memory.memory_id or ""
            self._place(row)
            summary = self._alone.pop(key, None)
            end = end_of(row.memory, self._now, self._retention)
            if end is not None:
                for other in self._condensed.get(key, ()):
                    self._ends[other.memory_id].append(end)
            if end is not None and end <= self._now:
                self.expired += 1
                continue
            living.append(row)
            extra.append(self._extra(row, summary, end))
        memories = [row.memory for row in living]
        vectors = np.array([row.vector for row in living], np.float32).reshape(-1, dim)
        return self._table(memories, vectors, extra)

    def _place(self, row: Row) -> None:
        key = row.memory.memory_id or ""
        self._seen.add(key)
        unit = row.vector / np.linalg.norm(row.vector)
        for summary in self._condensed.get(key, ()):
            _accumulate(self._sums, summary.memory_id, unit)
        for name in (row.memory.category, None):
            _accumulate(self._category, name, unit)

    def _extra(self, row: Row, summary: Summary | None, end: datetime | None) -> dict[str, Any]:
        if row.tier == LONG_TERM and summary is None:
            raise InputError(
                f"{row.memory.origin} is a long-term memory whose summary is in no file",
                fix="give all files of the export",
            )
        condensed = self._condensed.get(row.memory.memory_id or "", ())
        tier = row.tier or (ARCHIVED if condensed else SHORT_TERM)
        found: dict[str, Any] = {
            "expires_at": end,
            "access_count": row.access_count,
            "last_access": row.last_access,
            "tier": LONG_TERM if summary else tier,
            "consolidated_at": row.consolidated_at,
        }
        if summary:
            return {**found, **self._of(summary)}
        if condensed and row.tier is None:
            found["consolidated_at"] = condensed[0].consolidated_at or self._now
        return found

    def _of(self, summary: Summary) -> dict[str, Any]:
        redact = self._redact or str
        return {
            "tier": LONG_TERM,
            "summary": redact(summary.summary),
            "source_memory_ids": list(summary.sources),
            "source_count": summary.source_count,
            "consolidated_at": summary.consolidated_at,
        }

    def _summaries_alone(self, summaries: list[Summary]) -> pa.Table:
        """Return rows of summaries that come without a vector: at the middle of their sources."""
        self._look_up({key for summary in summaries for key in summary.sources} - self._seen)
        memories, vectors, extra = [], [], []
        for summary in summaries:
            memory = NewMemory(
                content=Content(),
                category=summary.category,
                timestamp=summary.consolidated_at,
                memory_id=summary.memory_id,
                origin=summary.origin,
            )
            own = end_of(memory, self._now, self._retention)
            end = min(filter(None, (own, *self._ends[summary.memory_id])), default=None)
            if end is not None and end <= self._now:
                self.expired += 1
                continue
            memories.append(memory)
            vectors.append(self._middle(summary))
            extra.append({"access_count": 0, "expires_at": end, **self._of(summary)})
        found = np.array(vectors, np.float32).reshape(-1, self._database.dim)
        return self._table(memories, found, extra)

    def _look_up(self, ids: set[str]) -> None:
        """Take sources into account that are in the store already."""
        there = sorted(self._database.existing(sorted(ids))) if ids else []
        if not there:
            return
        for key, vector in zip(*self._reader.vectors(there), strict=True):
            self._seen.add(key)
            for summary in self._condensed[key]:
                _accumulate(self._sums, summary.memory_id, vector)

    def _middle(self, summary: Summary) -> NDArray[np.float32]:
        found = self._sums.get(summary.memory_id)
        if found is None and self._embedding.embedder is not None:
            text = self._redact(summary.summary) if self._redact else summary.summary
            return np.asarray(self._embedding.embed([Content(text=text)])[0], np.float32)
        # Its sources are gone: near what it is about, until the store is reembedded.
        for other in (found, self._category.get(summary.category), self._category.get(None)):
            if other is not None and other.any():
                return other
        raise InputError(
            f"{summary.origin} has no vector, and none of its sources is there",
            fix="open the store with an embedder",
        )

    def _table(
        self, memories: list[NewMemory], vectors: NDArray[np.float32], extra: list[dict[str, Any]]
    ) -> pa.Table:
        dim = self._database.dim
        if not memories:
            return memories_schema(dim).empty_table()
        memories = [incoming.redacted(memory, self._redact) for memory in memories]
        ids = [memory.memory_id or "" for memory in memories]
        columns = incoming.columns(ids, memories, self._now, self._model)
        names = sorted({name for values in extra for name in values})
        columns.update({name: [values.get(name) for values in extra] for name in names})
        columns["source_count"] = [values.get("source_count", 0) for values in extra]
        columns["has_text"] = [
            values.get("summary") is not None or memory.content.text is not None
            for values, memory in zip(extra, memories, strict=True)
        ]
        table = rows.new_rows(rows.unit(vectors, dim), columns)
        archived = pa.array([tier == ARCHIVED for tier in columns["tier"]], pa.bool_())
        packed = self._reader.cells.pack(table.filter(archived))
        # Words are made when the rows are stored: what a table has may change until then.
        rest = table.filter(pc.invert(archived))
        return self._reader.cells.stored(pa.concat_tables([rest, packed])).select(
            table.column_names
        )


def _accumulate(sums: dict[Any, NDArray[np.float32]], key: Any, vector: Any) -> None:
    known = sums.get(key)
    sums[key] = np.array(vector, np.float32) if known is None else known + vector
