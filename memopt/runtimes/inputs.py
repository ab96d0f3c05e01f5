"""Read what is to be embedded as a stream: text lines, JSON lines, CSV, Parquet, folders, stdin."""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from memopt.errors import InputError
from memopt.extras import require
from memopt.registry import nearest

SUFFIXES = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    "audio": (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif"),
}
_FILES = (".txt", ".jsonl", ".csv", ".parquet")
# Column names tried when none is given.
_USUAL = ("text", "sentence", "content", "image", "audio", "wav", "bytes", "path")
_ROWS = 1024  # Parquet rows read at a time
# The csv module's own limit of 128 KiB is below a long document; a C long holds this everywhere.
_LONGEST_CELL = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Item:
    """One input and what it is called in the output; ``problem`` says why it has no value."""

    value: Any
    label: str | None
    problem: str | None = None


def read_items(source: str, modality: str, column: str | None = None) -> Iterator[Item]:
    """Yield the inputs of ``source``, in order, without holding them all.

    Args:
        source: a ``.txt`` (one input per line, empty lines included), ``.jsonl`` (strings or
            objects), ``.csv`` or ``.parquet`` file, a folder of images or sounds (by name), or
            ``-`` for lines on stdin. For an image or audio bundle the cells of a file are paths,
            or encoded bytes in Parquet.
        modality: text, image or audio.
        column: the field to take. In a CSV file a number is a position, counted from 0, in a file
            without a header; a name needs a header.

    Returns:
        The items; a row or line that holds no input is one with a ``problem`` that names it.

    Raises:
        InputError: no such file or column, or not UTF-8 (with the byte).
    """
    if source == "-":
        return _lines(sys.stdin.buffer, "stdin")
    path = Path(source)
    if path.is_dir():
        return _folder(path, modality)
    if not path.is_file():
        raise InputError(f"no input {source!r}")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path, column)
    if suffix == ".csv":
        return _csv(path, column)
    if suffix == ".jsonl":
        return _jsonl(path, column)
    if suffix == ".txt":
        return _text(path)
    if suffix in SUFFIXES.get(modality, ()):
        return iter([Item(path, str(path))])
    raise InputError(
        f"{path} has the ending {suffix!r}", fix=f"known: {', '.join(_FILES)}, a folder"
    )


def _folder(path: Path, modality: str) -> Iterator[Item]:
    endings = SUFFIXES.get(modality)
    if endings is None:
        raise InputError(f"{path} is a folder, but the bundle takes text", fix="give a file")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in endings)
    if not found:
        raise InputError(f"{path} holds no {modality} file ({', '.join(endings)})")
    return (Item(p, str(p)) for p in found)


def _text(path: Path) -> Iterator[Item]:
    with path.open("rb") as file:
        yield from _lines(file, str(path))


def _lines(file: BinaryIO, name: str) -> Iterator[Item]:
    for line in decoded_lines(file, name):
        yield Item(line, line)


def decoded_lines(file: BinaryIO, name: str) -> Iterator[str]:
    """Yield the lines of a binary file as text, without their ends and a leading byte order mark.

    Raises:
        InputError: not UTF-8; the message has the offset of the first bad byte in the file.

    >>> import io
    >>> list(decoded_lines(io.BytesIO(b"a\\r\\n\\nb"), "x"))
    ['a', '', 'b']
    """
    offset = 0
    for line in file:
        start, offset = offset, offset + len(line)
        if start == 0 and line.startswith(codecs.BOM_UTF8):
            line, start = line[3:], 3
        try:
            yield line.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name} is not UTF-8 text: byte {error.object[error.start]:#04x} "
                f"at offset {start + error.start}",
                fix="convert it, for example with iconv -t UTF-8",
            ) from None


def _jsonl(path: Path, column: str | None) -> Iterator[Item]:
    with path.open("rb") as file:
        for number, line in enumerate(decoded_lines(file, str(path)), 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                yield Item(None, None, f"({where}) is not JSON: {error}")
                continue
            if isinstance(value, dict):
                column = column or _usual(value, where)
                if column not in value:
                    yield Item(None, None, f"({where}) has no {column!r}, {nearest(column, value)}")
                    continue
                value = value[column]
            yield _cell(value, where)


def _csv(path: Path, column: str | None) -> Iterator[Item]:
    with path.open("rb") as file:
        # Lines keep their ends for the csv module: a quoted cell may hold one.
        rows = csv.reader(f"{line}\n" for line in decoded_lines(file, str(path)))
        position = int(column) if column is not None and column.isdecimal() else None
        csv.field_size_limit(_LONGEST_CELL)
        for row in rows:
            where = f"{path} line {rows.line_num}"
            if not row:
                continue
            if position is None:
                header = {name: index for index, name in enumerate(row)}
                name = column or _usual(header, f"{path} (first line)")
                if name not in header:
                    raise InputError(f"{path} has no column {name!r}", fix=nearest(name, header))
                position = header[name]
                continue
            if position < len(row):
                yield Item(row[position], row[position])
            else:
                told = f"({where}) has {len(row)} cells, column {position} is not there"
                yield Item(None, None, told)


def _parquet(path: Path, column: str | None) -> Iterator[Item]:
    pa = require("pyarrow", extra="arrow", why=f"read {path}")
    pq = require("pyarrow.parquet", extra="arrow", why=f"read {path}")

    try:
        with pq.ParquetFile(path) as file:
            names = dict.fromkeys(file.schema_arrow.names)
            name = column or _usual(names, str(path))
            if name not in names:
                raise InputError(f"{path} has no column {name!r}", fix=nearest(name, names))
            row = 0
            for batch in file.iter_batches(_ROWS, columns=[name]):
                for value in batch.column(0):
                    yield _cell(value.as_py(), f"{path} row {row}")
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}") from error


def _cell(value: Any, where: str) -> Item:
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        value = value["bytes"]  # how Hugging Face datasets store images and sounds
    if isinstance(value, str):
        return Item(value, value)
    if isinstance(value, bytes):
        return Item(value, None)
    kind = "null" if value is None else type(value).__name__
    return Item(None, None, f"({where}) is {kind}, not text or bytes")


def _usual(names: Mapping[str, Any], where: str) -> str:
    found = [name for name in _USUAL if name in names]
    if found:
        return found[0]
    if len(names) == 1:
        return next(iter(names))
    raise InputError(
        f"{where} has the columns {', '.join(map(repr, names))}", fix="choose one with --column"
    )
