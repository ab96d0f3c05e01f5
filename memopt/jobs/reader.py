"""Reading any fragment of a source, in a worker."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.errors import InputError, first_line
from memopt.jobs.places import filesystem, is_url, open_table
from memopt.jobs.spool import PROBLEM, WHERE
from memopt.parquetfile import one_line
from memopt.runtimes.inputs import Item, as_item

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from memopt.jobs.source import Fragment, JobSource


class FragmentReader:
    """Reads the fragments of a source; may be called from several threads.

    A Parquet file is read on from where the fragment before ended: a row group holds many
    fragments and can only be decoded from its beginning.
    """

    def __init__(self, source: JobSource) -> None:
        self._source = source
        self._guard = threading.Lock()
        self._dataset: Any = None
        self._cursor: tuple[str, RowCursor] | None = None

    def read(self, fragment: Fragment) -> tuple[pa.Table, list[Item], list[str]]:
        """Return the kept columns, what is to be encoded, and where each row stood.

        Raises:
            InputError: a file that is gone or damaged.
        """
        if self._source.kind == "media":
            return self._media(fragment)
        with self._guard:
            table = self._lance(fragment) if self._source.kind == "lance" else self._rows(fragment)
        if table.num_rows != fragment.rows:
            raise InputError(
                f"{fragment.paths[0]} has fewer rows than it had", fix="run the job anew"
            )
        if WHERE in table.schema.names:
            where = table[WHERE].to_pylist()
        else:
            first = fragment.start + 1
            where = [f"{fragment.paths[0]} row {first + i}" for i in range(fragment.rows)]
        items = list(_items(table[self._source.column], where))
        if PROBLEM in table.schema.names:
            for at, why in enumerate(table[PROBLEM].to_pylist()):
                if why:
                    items[at] = Item(None, None, why)
        return table.select(list(self._source.keep)), items, where

    def _media(self, fragment: Fragment) -> tuple[pa.Table, list[Item], list[str]]:
        import pyarrow as pa

        paths = list(fragment.paths)
        items = [Item(Path(p), p) for p in paths]
        if is_url(self._source.place):
            system, _ = filesystem(self._source.place)
            items = [_bytes(system, path) for path in paths]
        return pa.table({"path": paths}), items, paths

    def _lance(self, fragment: Fragment) -> pa.Table:
        import lance

        if self._dataset is None:
            self._dataset = lance.dataset(self._source.place, version=self._source.version)
        names = list(dict.fromkeys([*self._source.keep, self._source.column]))
        rows: pa.Table = self._dataset.to_table(
            columns=names, offset=fragment.start, limit=fragment.rows
        )
        return rows

    def _rows(self, fragment: Fragment) -> pa.Table:
        path = fragment.paths[0]
        if self._cursor is None or self._cursor[0] != path:
            spooled = path.startswith("file://")
            system, inside = filesystem(path if spooled else self._source.place)
            table = open_table(system, inside if spooled else path)
            names = [*self._source.keep, self._source.column, *((WHERE, PROBLEM) * spooled)]
            self._cursor = (path, RowCursor(table, list(dict.fromkeys(names))))
        with one_line(Path(path), InputError):
            return self._cursor[1].read(fragment.start, fragment.rows)


class RowCursor:
    """Reads runs of rows of a Parquet file, decoding each row group once as long as they ascend."""

    def __init__(self, file: pq.ParquetFile, columns: Sequence[str]) -> None:
        self._file, self._columns = file, columns
        groups = file.metadata
        self._starts = [0]
        for group in range(groups.num_row_groups):
            self._starts.append(self._starts[-1] + groups.row_group(group).num_rows)
        self._batches: Iterator[Any] = iter(())
        self._rest: list[Any] = []
        # Nothing is at hand: the next read begins a row group.
        self._at = self._starts[-1] + 1

    def read(self, start: int, rows: int) -> pa.Table:
        """Return rows ``start`` to ``start + rows``."""
        import pyarrow as pa

        group = max(i for i, first in enumerate(self._starts[:-1] or [0]) if first <= start)
        if start < self._at or self._starts[group] > self._at:
            self._at = self._starts[group]
            groups = list(range(group, len(self._starts) - 1))
            self._batches = self._file.iter_batches(rows, row_groups=groups, columns=self._columns)
            self._rest = []
        found: list[Any] = []
        while self._at < start + rows:
            batch = self._rest.pop() if self._rest else next(self._batches, None)
            if batch is None:
                break
            # Offsets and text are believed by every reader of a batch from here on.
            batch.validate(full=True)
            skipped = min(max(0, start - self._at), batch.num_rows)
            taken = min(batch.num_rows - skipped, start + rows - self._at - skipped)
            if taken > 0:
                found.append(batch.slice(skipped, taken))
            self._at += skipped + max(taken, 0)
            if skipped + taken < batch.num_rows:
                self._rest.append(batch.slice(skipped + taken))
        schema = pa.schema([self._file.schema_arrow.field(name) for name in self._columns])
        return pa.Table.from_batches(found, schema) if found else schema.empty_table()


def _bytes(system: Any, path: str) -> Item:
    try:
        with system.open_input_stream(path) as file:
            return Item(file.read(), path)
    except OSError as error:
        return Item(None, path, f"cannot be read: {first_line(error)}")


def _items(column: Any, where: list[str]) -> Iterator[Item]:
    for value, at in zip(column.to_pylist(), where, strict=True):
        item = as_item(value, at)
        yield Item(None, None, item.problem.removeprefix(f"({at}) ")) if item.problem else item
