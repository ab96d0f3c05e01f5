"""Rows of text files as Parquet: read once, so that any run of them can be read by itself.

The beginning of row 1,000,000 of a CSV or JSONL file is known only to who has read all before it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.errors import InputError
from memopt.files import atomic_path
from memopt.jobs.places import File, filesystem, is_url
from memopt.records import Record, Records, open_records
from memopt.runtimes.inputs import usual_column

if TYPE_CHECKING:
    import pyarrow as pa

# Beside the file's own columns: where a row stood, and why it is none.
WHERE, PROBLEM = "__where", "__problem"
_KINDS = {bool: "bool", int: "int64", float: "double", str: "string"}
_LIMIT = 1 << 63


class Spool:
    """One text file, opened: its columns, how many rows it has, and its rows as Parquet.

    Args:
        source: the place that the file was found at.
        file: the file.
        column: the column that is read; None takes a usual one.
        keep: the columns that are kept beside it; None keeps all.

    Raises:
        InputError: no such column, or a file whose rows cannot be told apart.
    """

    def __init__(
        self, source: str, file: File, column: str | None, keep: Sequence[str] | None
    ) -> None:
        self._copy: Any = None
        path = Path(file.path)
        if is_url(source):
            self._copy = tempfile.TemporaryDirectory()
            path = Path(self._copy.name) / path.name
            _download(source, file.path, path)
        self._records = open_records(path, column)
        self.count, kinds = _kinds(self._records)
        self.column = column or _usual(self._records, kinds)
        self._records.check(self.column)
        if self.count and self.column not in kinds:
            raise InputError(
                f"{file.path} has no column {self.column!r}", fix=f"it has {', '.join(kinds)}"
            )
        names = list(dict.fromkeys([*(kinds if keep is None else keep), self.column]))
        missing = [name for name in names if name not in kinds and self.count]
        if missing:
            raise InputError(
                f"{file.path} has no column {missing[0]!r}", fix=f"it has {', '.join(kinds)}"
            )
        self._kinds = {name: kinds.get(name, "string") for name in names}
        self._kinds[self.column] = "string"  # of another kind it is no text, but a problem

    @property
    def schema(self) -> pa.Schema:
        """The columns as Arrow; what is of several kinds, or nested, is text (JSON)."""
        import pyarrow as pa

        return pa.schema([(name, _arrow(kind)) for name, kind in self._kinds.items()])

    def write(self, target: Path, rows: int) -> None:
        """Write the rows in groups of ``rows``."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        text = pa.string()
        schema = pa.schema([*self.schema, (WHERE, text), (PROBLEM, text)])
        with atomic_path(target) as path, pq.ParquetWriter(path, schema) as writer:
            for group in _groups(self._records, rows):
                cells = {n: [_cell(r, n, k) for r in group] for n, k in self._kinds.items()}
                cells[self.column] = [_text(record, self.column) for record in group]
                cells[WHERE] = [record.where for record in group]
                cells[PROBLEM] = [_problem(record, self.column) for record in group]
                writer.write_table(pa.table(cells, schema=schema), row_group_size=rows)

    def close(self) -> None:
        """Remove the copy of a file that was not here."""
        if self._copy is not None:
            self._copy.cleanup()


def _download(source: str, path: str, target: Path) -> None:
    import shutil

    system, _ = filesystem(source)
    # As it is: pyarrow would unpack a .gz, whose name says that this is still to be done.
    with system.open_input_stream(path, compression=None) as remote, target.open("wb") as local:
        shutil.copyfileobj(remote, local, 1 << 20)


def _usual(records: Records, kinds: Mapping[str, str]) -> str:
    if not records.header:
        raise InputError(
            f"{records.path} may have a header or none: its first line holds no usual column name",
            fix="choose with --column: a name of that line, or a number (from 0) if it is a row",
        )
    return usual_column(dict.fromkeys(records.names or kinds), records.path)


def _kinds(records: Records) -> tuple[int, dict[str, str]]:
    """Return how many rows there are, and of what kind each column is."""
    count, kinds = 0, dict.fromkeys(records.names or (), "string")
    fixed = records.names is not None
    seen: dict[str, set[str]] = {}
    for record in records:
        count += 1
        if not fixed:
            for name, value in record.values.items():
                of = seen.setdefault(name, set())
                if value is not None:
                    of.add(_kind(value))
    if not fixed:
        kinds = {name: _one(of) for name, of in seen.items()}
    return count, kinds


def _kind(value: Any) -> str:
    if type(value) is int and not -_LIMIT <= value < _LIMIT:
        return "json"
    return _KINDS.get(type(value), "json")


def _one(kinds: set[str]) -> str:
    """Return the kind of a column with cells of these.

    >>> _one({"int64", "double"}), _one({"int64", "string"}), _one(set())
    ('double', 'json', 'string')
    """
    if kinds == {"int64", "double"}:
        return "double"
    return next(iter(kinds)) if len(kinds) == 1 else "json" if kinds else "string"


def _arrow(kind: str) -> pa.DataType:
    import pyarrow as pa

    kinds = {"bool": pa.bool_(), "int64": pa.int64(), "double": pa.float64()}
    return kinds.get(kind, pa.string())


def _cell(record: Record, name: str, kind: str) -> Any:
    value = record.values.get(name)
    if value is None or kind not in ("json", "double"):
        return value
    if kind == "double":
        return float(value)
    return json.dumps(value, ensure_ascii=False)


def _text(record: Record, name: str) -> str | None:
    value = record.values.get(name)
    return value if isinstance(value, str) else None


def _problem(record: Record, name: str) -> str | None:
    value = record.values.get(name)
    if record.problem or value is None or isinstance(value, str):
        return record.problem
    return f"is {type(value).__name__}, not text"


def _groups(records: Records, size: int) -> Iterator[list[Record]]:
    group: list[Record] = []
    for record in records:
        group.append(record)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
