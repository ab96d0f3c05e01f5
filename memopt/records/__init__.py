"""One reader of rows: .txt, .csv, .tsv, .jsonl (also with .gz) and .parquet, for every command.

Whatever a file holds, no row is lost without a word: a row that cannot be used is a
:class:`Record` with a ``problem``; a file whose rows cannot be told apart is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from memopt.errors import InputError
from memopt.records.lines import decoded_lines, json_lines, read_lines
from memopt.records.opened import ending, opened
from memopt.records.parquet import parquet_records
from memopt.records.record import Record, Records
from memopt.records.table import table_records

__all__ = ["FILES", "Record", "Records", "decoded_lines", "ending", "open_records", "read_lines"]

FILES = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")


def open_records(path: str | Path, column: str | None = None) -> Records:
    """Open a file of rows; nothing but a header is read before the rows are asked for.

    A ``.txt`` file has one column, ``text``, and a row for each line. A ``.csv`` may be separated
    by commas, semicolons or tabs; its first line is a header when it holds a usual column name or
    ``column``, or when only later lines hold numbers. A ``.jsonl`` holds objects, or strings, which
    are objects with the one field ``text``; empty lines of it and of a ``.csv`` are no rows. Any of
    these may be compressed with gzip, ``.jsonl.gz`` say.

    Args:
        path: the file.
        column: the column that is wanted, when it is known. A number counts columns of a ``.csv``
            from 0; its first line is then a row, unless the number is a name in it.

    Raises:
        InputError: no such file, another ending, not UTF-8 (with the byte), a damaged Parquet or
            gzip file, or, from the rows, a quote that is never closed.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.csv"
    >>> _ = path.write_text("text;score\\na red, old door;1\\n")
    >>> [dict(record.values) for record in open_records(path)]
    [{'text': 'a red, old door', 'score': '1'}]
    """
    path = Path(path)
    suffix = ending(path)
    if suffix not in FILES:
        raise InputError(f"{path} has the ending {suffix!r}", fix=f"known: {', '.join(FILES)}")
    if not path.is_file():
        raise InputError(f"no file {str(path)!r}", fix="check the path")
    if suffix == ".parquet":
        return parquet_records(path)
    if suffix == ".txt":
        return Records(str(path), ("text",), lambda _: _opened(path, read_lines))
    if suffix == ".jsonl":
        return Records(str(path), None, lambda _: _opened(path, json_lines))
    return table_records(path, column)


def _opened(path: Path, read: Callable[[BinaryIO, str], Iterator[Record]]) -> Iterator[Record]:
    with opened(path) as file:
        yield from read(file, str(path))
