"""Rows of a table of text: commas, semicolons or tabs between the cells."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

from memopt.errors import InputError
from memopt.records.lines import decoded
from memopt.records.opened import ending, opened
from memopt.records.record import Record, Records

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


def table_records(path: Path, column: str | None) -> Records:
    """Open a table; see :func:`memopt.records.open_records`."""
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
    with opened(path) as file:
        sample = list(islice(_table_lines(file, str(path)), _SAMPLE))
    told = re.fullmatch(r"sep=(.)[\r\n]*", sample[0], re.IGNORECASE) if sample else None
    if told:
        delimiter = told[1]
    elif ending(path) == ".tsv":
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
    with opened(path) as file:
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
        yield decoded(line, offset, name)
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
