"""Opening a file of rows, as it is or compressed with gzip."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import BinaryIO, cast

from memopt.errors import InputError

# Parquet has compression of its own.
_COMPRESSED = (".txt", ".csv", ".tsv", ".jsonl")


def ending(path: PurePath) -> str:
    """Return what kind of file a name says it is, in small letters; gzip is none.

    >>> ending(PurePath("a.CSV")), ending(PurePath("a.jsonl.gz")), ending(PurePath("a.tar.gz"))
    ('.csv', '.jsonl', '.gz')
    """
    last = path.suffix.lower()
    inner = PurePath(path.stem).suffix.lower() if last == ".gz" else ""
    return inner if inner in _COMPRESSED else last


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read its bytes, without gzip where its name ends with ``.gz``.

    Raises:
        InputError: no gzip, or damaged, also where that is seen only later.
    """
    if path.suffix.lower() != ".gz":
        with path.open("rb") as file:
            yield file
        return
    try:
        if not path.stat().st_size:  # gzip's own tool refuses it, Python's reads no rows
            raise EOFError("it is empty")
        with gzip.open(path, "rb") as unpacked:
            yield cast(BinaryIO, unpacked)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is no whole gzip file: {error}", fix="get it again") from error
