"""Read what is to be embedded as a stream: text lines, JSON lines, CSV, Parquet, folders, stdin."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memopt.errors import InputError
from memopt.records import FILES, Record, Records, ending, open_records, read_lines
from memopt.registry import nearest

SUFFIXES = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    "audio": (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif"),
}
# Column names tried when none is given.
_USUAL = ("text", "sentence", "content", "image", "audio", "wav", "bytes", "path")


@dataclass(frozen=True, slots=True)
class Item:
    """One input and what it is called in the output; ``problem`` says why it has no value."""

    value: Any
    label: str | None
    problem: str | None = None


def read_items(source: str, modality: str, column: str | None = None) -> Iterator[Item]:
    """Yield the inputs of ``source``, in order, without holding them all.

    Args:
        source: a file of rows (see :mod:`memopt.records`; empty lines of a ``.txt`` are inputs),
            a folder of images or sounds (by name), or ``-`` for lines on stdin. For an image or
            audio bundle the cells of a file are paths, or encoded bytes in Parquet.
        modality: text, image or audio.
        column: the field to take. In a CSV file a number is a position, counted from 0, in a file
            without a header; a name needs a header.

    Returns:
        The items; a row or line that holds no input is one with a ``problem`` that names it.

    Raises:
        InputError: no such file or column, or not UTF-8 (with the byte).
    """
    if source == "-":
        return (_item(record, "text") for record in read_lines(sys.stdin.buffer, "stdin"))
    path = Path(source)
    if path.is_dir():
        return _folder(path, modality)
    if not path.is_file():
        raise InputError(f"no input {source!r}")
    suffix = ending(path)
    if suffix in FILES:
        return _rows(open_records(path, column), column)
    if suffix in SUFFIXES.get(modality, ()):
        return iter([Item(path, str(path))])
    raise InputError(
        f"{path} has the ending {suffix!r}", fix=f"known: {', '.join(FILES)}, a folder"
    )


def _folder(path: Path, modality: str) -> Iterator[Item]:
    endings = SUFFIXES.get(modality)
    if endings is None:
        raise InputError(f"{path} is a folder, but the bundle takes text", fix="give a file")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in endings)
    if not found:
        raise InputError(f"{path} holds no {modality} file ({', '.join(endings)})")
    return (Item(p, str(p)) for p in found)


def _rows(records: Records, column: str | None) -> Iterator[Item]:
    if records.names is None:
        for record in records:
            name = column or (usual_column(record.values, record.where) if record.values else "")
            column = column or name or None
            yield _item(record, name)
        return
    if column is None and not records.header:
        raise InputError(
            f"{records.path} may have a header or none: its first line holds no usual column name",
            fix="choose with --column: a name of that line, or a number (from 0) if it is a row",
        )
    name = column or usual_column(dict.fromkeys(records.names), records.path)
    records.check(name)
    for record in records.read([name]):
        yield _item(record, name)


def _item(record: Record, name: str) -> Item:
    if record.problem:
        return Item(None, None, f"({record.where}) {record.problem}")
    if name not in record.values:
        told = f"has no {name!r}, {nearest(name, record.values)}"
        return Item(None, None, f"({record.where}) {told}")
    return as_item(record.values[name], record.where)


def as_item(value: Any, where: str) -> Item:
    """Return a cell as an input: text, encoded bytes, or what Hugging Face keeps media in.

    >>> as_item({"bytes": b"RIFF", "path": None}, "a row 1").value, as_item(None, "a row 2").problem
    (b'RIFF', '(a row 2) is null, not text or bytes')
    """
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        value = value["bytes"]  # how Hugging Face datasets store images and sounds
    if isinstance(value, str):
        return Item(value, value)
    if isinstance(value, bytes):
        return Item(value, None)
    kind = "null" if value is None else type(value).__name__
    return Item(None, None, f"({where}) is {kind}, not text or bytes")


def usual_column(names: Mapping[str, Any], where: str) -> str:
    """Return the column that is read where none is named.

    Raises:
        InputError: there are several, and none has a usual name.
    """
    found = [name for name in _USUAL if name in names]
    if found:
        return found[0]
    if len(names) == 1:
        return next(iter(names))
    raise InputError(
        f"{where} has the columns {', '.join(map(repr, names))}", fix="choose one with --column"
    )
