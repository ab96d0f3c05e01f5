"""One reader of rows: .txt, .csv, .tsv, .jsonl and .parquet, alike for every command.

Whatever a file holds, no row is lost without a word: a row that cannot be used is a
:class:`Record` with a ``problem``; a file whose rows cannot be told apart is refused.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from memopt.errors import InputError
from memopt.jsontext import parse_json
from memopt.registry import nearest

FILES = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")
# Column names that tell a header from a first line of text.
_HEADER = frozenset(
    {"text", "sentence", "sentence1", "sentence2", "sentence_1", "sentence_2", "premise"}
    | {"hypothesis", "question", "query", "answer", "content", "document", "title", "body"}
    | {"caption", "label", "score", "similarity_score", "id", "index", "image", "audio", "wav"}
    | {"bytes", "path", "memory_id", "category", "timestamp", "expires_at"}
)
_DELIMITERS = (",", ";", "\t")
# Lines whose delimiters are counted: enough to see one that separates columns in all of them.
_SAMPLE = 20
# The csv module's own limit of 128 KiB is below a long document; a C long holds this everywhere.
_LONGEST_CELL = (1 << 31) - 1
# A cell of so many lines, each of which would be a row of the table, is a quote left open.
_SWALLOWED = 4
_BATCH = 256  # Parquet rows read at a time; pictures and sounds may be in them


@dataclass(frozen=True, slots=True)
class Record:
    """One row.

    Attributes:
        where: file and line or row, both counted from 1.
        values: column -> value; empty where there is a problem.
        problem: why it cannot be used, to be said after ``where``.
    """

    where: str
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Records:
    """An opened file of rows.

    Attributes:
        path: the file.
        names: its columns in order; None where each row has its own (JSON lines).
        header: False when the names are positions, "0", "1" and so on.
        texts: the columns that may hold text; None where that is seen row by row.
    """

    path: str
    names: tuple[str, ...] | None
    read: Callable[[Sequence[str] | None], Iterator[Record]]
    header: bool = True
    texts: tuple[str, ...] | None = None

    def __iter__(self) -> Iterator[Record]:
        return self.read(None)

    def check(self, column: str) -> None:
        """Raise InputError unless there is such a column, where that is known beforehand."""
        if self.names is not None and column not in self.names:
            raise InputError(
                f"{self.path} has no column {column!r}; it has "
                + (", ".join(map(repr, self.names)) or "none"),
                fix=nearest(column, self.names) if self.header and self.names else None,
            )


def open_records(path: str | Path, column: str | None = None) -> Records:
    """Open a file of rows; nothing but a header is read before the rows are asked for.

    A ``.txt`` file has one column, ``text``, and a row for each line. A ``.csv`` may be separated
    by commas, semicolons or tabs; its first line is a header when it holds a usual column name or
    ``column``, or when only later lines hold numbers. A ``.jsonl`` holds objects, or strings, which
    are objects with the one field ``text``; empty lines of it and of a ``.csv`` are no rows.

    Args:
        path: the file.
        column: the column that is wanted, when it is known. A number counts columns of a ``.csv``
            from 0; its first line is then a row, unless the number is a name in it.

    Raises:
        InputError: no such file, another ending, not UTF-8 (with the byte), a damaged Parquet file,
            or, from the rows, a quote that is never closed.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.csv"
    >>> _ = path.write_text("text;score\\na red, old door;1\\n")
    >>> [dict(record.values) for record in open_records(path)]
    [{'text': 'a red, old door', 'score': '1'}]
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in FILES:
        raise InputError(f"{path} has the ending {suffix!r}", fix=f"known: {', '.join(FILES)}")
    if not path.is_file():
        raise InputError(f"no file {str(path)!r}", fix="check the path")
    if suffix == ".parquet":
        return _parquet(path)
    if suffix == ".txt":
        return Records(str(path), ("text",), lambda _: _opened(path, read_lines))
    if suffix == ".jsonl":
        return Records(str(path), None, lambda _: _opened(path, _json_lines))
    return _csv(path, column)


def read_lines(file: BinaryIO, name: str) -> Iterator[Record]:
    """Yield a record with the one field ``text`` for each line of a binary file, empty ones too.

    Raises:
        InputError: not UTF-8.
    """
    for number, line in enumerate(decoded_lines(file, name), 1):
        yield Record(f"{name} line {number}", {"text": line})


def decoded_lines(file: BinaryIO, name: str) -> Iterator[str]:
    """Yield the lines of a binary file as text, without their ends and a leading byte order mark.

    A file without a single line feed may end its lines with carriage returns, as old Macs did.

    Raises:
        InputError: not UTF-8; the message has the offset of the first bad byte in the file.

    >>> import io
    >>> list(decoded_lines(io.BytesIO(b"a\\r\\n\\nb"), "x"))
    ['a', '', 'b']
    >>> list(decoded_lines(io.BytesIO(b"a\\rb\\r"), "x"))
    ['a', 'b']
    """
    first = file.readline()
    if b"\r" in first and not first.endswith(b"\n"):
        lines: Iterable[bytes] = first.removesuffix(b"\r").split(b"\r")
    else:
        lines = chain([first] if first else [], file)
    offset = 0
    for line in lines:
        yield _decoded(line, offset, name).removesuffix("\n").removesuffix("\r")
        offset += len(line) + (lines is not file and not line.endswith(b"\n"))


def text_problem(value: str) -> str | None:
    """Return why a str is no text that can be written, None when it can.

    >>> text_problem("cut \\ud83d")
    'holds half of a surrogate pair at position 4, which no text file can hold'
    """
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return (
            f"holds half of a surrogate pair at position {error.start}, which no text file can hold"
        )
    return None


def _decoded(line: bytes, offset: int, name: str) -> str:
    if offset == 0 and line.startswith(codecs.BOM_UTF8):
        line, offset = line[3:], 3
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8 text: byte {error.object[error.start]:#04x} "
            f"at offset {offset + error.start}",
            fix="convert it, for example with iconv -t UTF-8",
        ) from None


def _opened(path: Path, read: Callable[[BinaryIO, str], Iterator[Record]]) -> Iterator[Record]:
    with path.open("rb") as file:
        yield from read(file, str(path))


# ------------------------------------------------------------------------------------ JSON lines


def _json_lines(file: BinaryIO, name: str) -> Iterator[Record]:
    for number, line in enumerate(decoded_lines(file, name), 1):
        if line.strip():
            yield _json_line(line, f"{name} line {number}")


def _json_line(line: str, where: str) -> Record:
    try:
        value = parse_json(line, where)
    except InputError as error:
        return Record(where, problem=error.problem.removeprefix(where).strip())
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        kind = "null" if value is None else type(value).__name__
        return Record(where, problem=f"is {kind}, not text or an object")
    return _checked(where, value)


def _checked(where: str, values: dict[str, Any]) -> Record:
    for name, value in values.items():
        for text in (name, value):
            if isinstance(text, str) and (why := text_problem(text)):
                return Record(where, problem=why)
    return Record(where, values)


# ------------------------------------------------------------------------------------------- CSV


def _csv(path: Path, column: str | None) -> Records:
    first, second, delimiter = _head(path)
    position = column is not None and column.isdecimal() and column not in first
    header = not position and _is_header(first, second, column)
    names = _distinct(first) if header else tuple(map(str, range(len(first))))

    def read(columns: Sequence[str] | None) -> Iterator[Record]:
        for number, (start, row) in enumerate(_rows(path, delimiter, len(names))):
            if number == 0 and header:
                continue
            where = f"{path} line {start}"
            if isinstance(row, str):
                yield Record(where, problem=row)
                continue
            missing = [name for name in columns or () if names.index(name) >= len(row)]
            if missing:
                told = f"has {len(row)} cells, column {missing[0]} is not there"
                yield Record(where, problem=told)
            elif any(row[len(names) :]):
                told = f"has {len(row)} cells, the first line has {len(names)}"
                hint = f"a {delimiter!r} inside a text needs quotes around it"
                yield Record(where, problem=f"{told}: {hint}")
            else:
                yield Record(where, dict(zip(names, row, strict=False)))

    return Records(str(path), names, read, header)


def _head(path: Path) -> tuple[list[str], list[str], str]:
    """Return the first two rows of a table and what separates its cells."""
    with path.open("rb") as file:
        sample = list(islice(_table_lines(file, str(path)), _SAMPLE))
    told = re.fullmatch(r"sep=(.)[\r\n]*", sample[0], re.IGNORECASE) if sample else None
    if told:
        delimiter = told[1]
    elif path.suffix.lower() == ".tsv":
        delimiter = "\t"
    else:
        delimiter = _delimiter(sample)
    rows = [row for _, row in islice(_rows(path, delimiter, None), 2) if not isinstance(row, str)]
    first, second = [*rows, [], []][:2]
    return first, second, delimiter


def _delimiter(sample: Sequence[str]) -> str:
    """Return what separates the cells of a table: in every line, equally often.

    >>> _delimiter(["id;text", "1;a, b, c"]), _delimiter(["a line; with both", "and, none"])
    (';', ',')
    """
    for delimiter in _DELIMITERS:
        widths = _widths(sample, delimiter)
        if len(widths) == 1 and widths != {1}:
            return delimiter
    first = sample[0] if sample else ""
    # Rows of different lengths: what the header has, if it has only one of them.
    there = [delimiter for delimiter in _DELIMITERS if delimiter in first]
    named = [d for d in there if any(c.strip(' "\r\n').lower() in _HEADER for c in first.split(d))]
    return named[0] if len(named) == 1 else ","


def _widths(sample: Sequence[str], delimiter: str) -> set[int]:
    try:
        return {len(row) for row in csv.reader(sample, delimiter=delimiter) if row}
    except csv.Error:
        return set()


def _rows(path: Path, delimiter: str, width: int | None) -> Iterator[tuple[int, list[str] | str]]:
    """Yield the line where each row begins, and its cells or what is wrong with it."""
    csv.field_size_limit(_LONGEST_CELL)
    with path.open("rb") as file:
        lines = _table_lines(file, str(path))
        first = next(lines, "")
        skipped = bool(re.fullmatch(r"sep=(.)[\r\n]*", first, re.IGNORECASE))
        reader = csv.reader(
            lines if skipped else chain([first], lines), delimiter=delimiter, strict=True
        )
        while True:
            start = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                if reader.line_num > start:
                    raise InputError(
                        f"{path} line {start + skipped} has a quote that is not closed as CSV "
                        f"asks for: {reader.line_num - start} more lines would be one cell of it",
                        fix='close it, or write a quote inside a quoted cell twice ("")',
                    ) from error
                yield start + skipped, f"is not CSV: {_explained(str(error))}"
                continue
            if row is None:
                return
            if row:
                swallowed = width is not None and _swallowed(row, delimiter, width)
                yield start + skipped, _SWALLOWS if swallowed else row


_SWALLOWS = "has a quoted cell of many lines that are rows by themselves: is its quote closed?"


def _swallowed(row: list[str], delimiter: str, width: int) -> bool:
    if width < 2:
        return False
    for cell in row:
        inner = cell.splitlines()[1:-1]
        if len(inner) >= _SWALLOWED and all(line.count(delimiter) == width - 1 for line in inner):
            return True
    return False


def _explained(error: str) -> str:
    if error.startswith("new-line character"):
        return "a carriage return stands in a cell without quotes"
    return error


def _table_lines(file: BinaryIO, name: str) -> Iterator[str]:
    """Yield lines with their ends: a quoted cell may hold one.

    A table whose first line ends with a bare carriage return has them throughout.
    """
    first = file.readline()
    offset = 0
    if re.match(rb"[^\r\n\"]*\r[^\n]", first):
        lines: Iterable[bytes] = re.findall(rb"[^\r]*\r\n?|[^\r]+\Z", first + file.read())
    else:
        lines = chain([first], file)
    for line in lines:
        yield _decoded(line, offset, name)
        offset += len(line)


def _is_header(first: list[str], second: list[str], column: str | None) -> bool:
    if column is not None and column in first:
        return True
    if any(cell.strip().lower() in _HEADER for cell in first):
        return True
    return not any(map(_number, first)) and any(map(_number, second))


def _number(cell: str) -> bool:
    try:
        return bool(float(cell) == float(cell))
    except ValueError:
        return False


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Return names of which none is there twice: no column may hide another.

    >>> _distinct(["", "text", "text"])
    ('', 'text', 'text.1')
    """
    seen: dict[str, None] = {}
    for name in names:
        number, own = 0, name
        while own in seen:
            number += 1
            own = f"{name}.{number}"
        seen[own] = None
    return tuple(seen)


# --------------------------------------------------------------------------------------- Parquet


def _parquet(path: Path) -> Records:
    from memopt.extras import require
    from memopt.parquetfile import open_parquet

    pa = require("pyarrow", extra="arrow", why=f"read {path}")
    with open_parquet(path) as file:
        schema = file.schema_arrow
    names = tuple(dict.fromkeys(schema.names))
    if len(names) < len(schema.names):
        twice = next(name for name in names if schema.names.count(name) > 1)
        raise InputError(f"{path} has the column {twice!r} twice", fix="rename one")
    texts = tuple(f.name for f in schema if _maybe_text(pa, f.type))

    def read(columns: Sequence[str] | None) -> Iterator[Record]:
        from memopt.parquetfile import batches

        row = 0
        with open_parquet(path) as opened:
            for batch in batches(opened, path, _BATCH, columns):
                for values in _row_values(pa, batch):
                    row += 1
                    where = f"{path} row {row}"
                    if isinstance(values, str):
                        yield Record(where, problem=values)
                    else:
                        yield Record(where, values)

    return Records(str(path), names, read, texts=texts)


def _maybe_text(pa: Any, kind: Any) -> bool:
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return bool(text or types.is_floating(kind) or types.is_integer(kind))


def _row_values(pa: Any, batch: Any) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of a batch; nanoseconds, which Python's times lack, are cut off."""
    columns = [_without_nanoseconds(pa, column) for column in batch.columns]
    names = batch.schema.names
    for row in range(batch.num_rows):
        try:
            yield {n: column[row].as_py() for n, column in zip(names, columns, strict=True)}
        except (ValueError, OverflowError, ArithmeticError) as error:
            # A date before the year 1, or text that is no UTF-8.
            yield f"cannot be read: {(str(error).splitlines() or [''])[0]}"


def _without_nanoseconds(pa: Any, column: Any) -> Any:
    kind = column.type
    if getattr(kind, "unit", None) != "ns":
        return column
    if pa.types.is_timestamp(kind):
        return column.cast(pa.timestamp("us", kind.tz), safe=False)
    if pa.types.is_time64(kind):
        return column.cast(pa.time64("us"), safe=False)
    if pa.types.is_duration(kind):
        return column.cast(pa.duration("us"), safe=False)
    return column
