"""Reads: ids are looked up alone first, so that media of other rows stay on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memopt.errors import ConsolidationError, InputError
from memopt.memory.model import rows
from memopt.memory.model.filters import (
    DELETED,
    EVERYTHING,
    expression,
    id_list,
    one_of,
    present,
    unexpired,
)
from memopt.memory.model.schema import Filter, Link, Memory, memories_schema
from memopt.memory.store.access_counts import AccessCounts
from memopt.memory.store.cells import Cells
from memopt.memory.store.creation import named_errors
from memopt.memory.store.locking import reading

_IDS_PER_QUERY = 10_000


class Reader:
    """Reads memories and links of one database, through its ``cells``."""

    def __init__(self, cells: Cells, counts: AccessCounts) -> None:
        self.database, self.cells, self._counts = cells.database, cells, counts

    def get_many(self, ids: Sequence[str], *, links: bool = True) -> list[Memory]:
        """Return memories in the order of ``ids``; see :meth:`MemoryStore.get_many`."""
        ids = id_list(ids)
        table = self.rows(ids)
        table = table.filter(unexpired(table["expires_at"], self.database.now()))
        known = {memory.memory_id: memory for memory in self.records(table, links=links)}
        self._all_known(ids, known)
        self.database.observers.accessed("read", ids)
        return [known[memory_id] for memory_id in ids]

    def records(self, table: pa.Table, *, links: bool = False) -> list[Memory]:
        """Turn stored rows into memories, with the accesses that are not written yet."""
        linked = self.links(table["memory_id"].to_pylist()) if links else {}
        opened = self.cells.unpack(table)
        return rows.memories(opened, self.database.dim, linked, self._counts.pending())

    def rows(self, ids: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """Return the raw rows (packed content stays packed) of those ``ids`` that exist.

        Any order; all columns by default. Only the rows asked for are read from disk.
        """
        names = list(columns or memories_schema(self.database.dim).names)
        unique = list(dict.fromkeys(id_list(ids)))
        parts = [self._take(part, names) for part in rows.chunks(unique, _IDS_PER_QUERY)]
        parts = [part for part in parts if part.num_rows]
        return pa.concat_tables(parts) if parts else self.database.schema(names).empty_table()

    def by_row_id(self, row_ids: Mapping[str, int], names: Sequence[str]) -> pa.Table | None:
        """Return columns of the rows (id -> row id) just found, in any order.

        None where the rows moved meanwhile: a row id is good until the next update or compaction.
        """
        try:
            return _unmoved(self.database.fetch(self._rows_query(row_ids, names)), row_ids)
        except ConsolidationError:
            return None

    def light_and_rows(
        self,
        ids: Sequence[str],
        seen: Mapping[str, int],
        columns: Sequence[str],
        row_ids: Mapping[str, int],
        names: Sequence[str],
    ) -> tuple[pa.Table, pa.Table | None, int]:
        """Do :meth:`Database.light` of a few ids and :meth:`by_row_id` at the same time.

        Args:
            ids: with the ``columns`` to read, ``memory_id`` and ``_rowid`` among them.
            seen: id -> row id that some of them had once: where the row is still there, that saves
                the look-up by id, and a row that is not is looked up after all.
            row_ids: id -> row id, with the ``names`` to read.

        Returns:
            Both tables, and how many rows had moved from where they were seen.
        """
        database = self.database
        at = {key: seen[key] for key in ids if key in seen}
        rest = [key for key in ids if key not in seen]
        queries: dict[str, Any] = {}
        if at:
            queries["seen"] = self._rows_query(at, columns)
        if rest:
            where = present(one_of("memory_id", rest))
            queries["rest"] = database.query().where(where).select(list(columns))
        if row_ids:
            queries["rows"] = self._rows_query(row_ids, names)
        try:
            found = dict(zip(queries, database.fetch_all(list(queries.values())), strict=True))
        except ConsolidationError:
            return database.light(ids, columns), None, len(at)
        # A place may be empty by now, never another memory's: Lance gives no row id twice.
        moved = sorted(set(at) - set(found["seen"]["memory_id"].to_pylist())) if at else []
        parts = [found[name].select(columns) for name in ("seen", "rest") if name in found]
        if moved or not parts:
            parts.append(database.light(moved, columns))
        table = pa.concat_tables(parts)
        return table, _unmoved(found["rows"], row_ids) if row_ids else None, len(moved)

    def links(self, ids: Sequence[str]) -> dict[str, list[Link]]:
        """Return the associations of each memory that has any, strongest first."""
        found: dict[str, list[Link]] = {}
        for part in rows.chunks(id_list(ids), _IDS_PER_QUERY):
            query = self.database.query("edges").where(one_of("source", part))
            edges = self.database.fetch(query.select(["source", "target", "weight"]))
            for edge in edges.to_pylist():
                found.setdefault(edge["source"], []).append(Link(edge["target"], edge["weight"]))
        for links in found.values():
            links.sort(key=lambda link: (-link.weight, link.linked_id))
        return found

    def scan(
        self,
        where: Filter = EVERYTHING,
        columns: Sequence[str] | None = None,
        batch_size: int = 4096,
    ) -> Iterator[pa.RecordBatch]:
        """Yield raw rows (packed content stays packed) in batches, from one consistent version.

        Args:
            where: expired rows count too.
            columns: by default all; name few, media are large.
        """
        if columns is None or "access_count" in columns or "last_access" in columns:
            self._counts.flush()
        place = self.database.place
        with reading(place.local) if place.local is not None else nullcontext():
            query = self.database.memories.search().where(present(expression(where)))
            query = query.select(list(columns or memories_schema(self.database.dim).names))
            with named_errors(place, "read"):
                batches = query.limit(None).to_batches(batch_size)
            while True:
                with named_errors(place, "read"):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

    def table(self, where: Filter, columns: Sequence[str], batch_size: int = 65_536) -> pa.Table:
        """Return what :meth:`scan` yields as one table."""
        batches = list(self.scan(where, columns, batch_size))
        return pa.Table.from_batches(
            batches, schema=None if batches else self.database.schema(columns)
        )

    def vectors(
        self, ids: Sequence[str] | None = None, where: Filter = EVERYTHING
    ) -> tuple[list[str], NDArray[np.float32]]:
        """Return ids and vectors, float32 (n, dim), of given ids (in their order) or of a filter.

        Raises:
            InputError: one of ``ids`` is unknown.
        """
        names = ["memory_id", "joint_embedding"]
        table = self.table(where, names, 4096) if ids is None else self.rows(ids, names)
        array = rows.vectors_array(table["joint_embedding"], self.database.dim)
        found: list[str] = table["memory_id"].to_pylist()
        if ids is None:
            return found, array
        at = {memory_id: row for row, memory_id in enumerate(found)}
        self._all_known(ids, at)
        return list(ids), array[[at[memory_id] for memory_id in ids]]

    def count(self, where: Filter = EVERYTHING) -> int:
        """Return how many memories pass the filter."""
        if where == EVERYTHING:
            return int(self.database.memories.count_rows(f"tier != '{DELETED}'"))
        return sum(batch.num_rows for batch in self.scan(where, ["memory_id"], 8192))

    def _take(self, ids: Sequence[str], names: list[str]) -> pa.Table:
        database = self.database
        where = present(one_of("memory_id", ids))
        found = database.fetch(database.query().where(where).select(["memory_id"]).with_row_id())
        if not found.num_rows:
            return database.schema(names).empty_table()
        at = dict(zip(found["memory_id"].to_pylist(), found["_rowid"].to_pylist(), strict=True))
        taken = self.by_row_id(at, names)
        if taken is None:
            # Rows moved (update, compaction) between the two reads; one query sees one version.
            columns = list(dict.fromkeys(["memory_id", *names]))
            taken = database.fetch(database.query().where(where).select(columns))
        return taken.select(names)

    def _rows_query(self, row_ids: Mapping[str, int], names: Sequence[str]) -> Any:
        columns = list(dict.fromkeys(["memory_id", *names]))
        return self.database.take(list(row_ids.values())).select(columns)

    def _all_known(self, ids: Sequence[str], known: Any) -> None:
        missing = [memory_id for memory_id in ids if memory_id not in known]
        if missing:
            raise InputError(
                f"{self.database.place} has no memory {missing[0]!r}",
                fix="search for it, ids are exact",
            )


def _unmoved(taken: pa.Table, row_ids: Mapping[str, int]) -> pa.Table | None:
    return taken if set(taken["memory_id"].to_pylist()) == set(row_ids) else None
