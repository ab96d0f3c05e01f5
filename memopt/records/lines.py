"""Rows that are lines: plain text, and JSON lines."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, BinaryIO

from memopt.errors import InputError
from memopt.jsontext import parse_json
from memopt.records.record import Record


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
        yield decoded(line, offset, name).removesuffix("\n").removesuffix("\r")
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


def decoded(line: bytes, offset: int, name: str) -> str:
    """Return one line of a file as text; ``offset`` is where it begins there."""
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


def json_lines(file: BinaryIO, name: str) -> Iterator[Record]:
    """Yield a record for each line of JSON that is not empty."""
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
