"""What a job reads, cut into fragments: runs of rows that can be read by themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from memopt.errors import ConfigurationError, InputError
from memopt.extras import require
from memopt.jobs.places import File, filesystem, list_files, local_path, open_table
from memopt.jobs.spool import Spool
from memopt.records import ending
from memopt.registry import nearest
from memopt.runtimes.inputs import SUFFIXES, usual_column

if TYPE_CHECKING:
    import pyarrow as pa

TEXTS = (".csv", ".tsv", ".jsonl", ".txt")
# What a job adds to the columns it keeps: the row in the source, and its vector.
INDEX, VECTOR = "index", "vector"
# Rows of a fragment: a few seconds of work on a small CPU is what a kill may cost.
ROWS = {"text": 8192, "image": 256, "audio": 64}


@dataclass(frozen=True, slots=True)
class Fragment:
    """Rows ``first`` to ``first + rows`` of a source.

    They are in ``paths``: one a row of a folder of media, else one file, from its row ``start`` on.
    """

    number: int
    first: int
    rows: int
    paths: tuple[str, ...]
    start: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSource:
    """A planned source.

    Attributes:
        place: where it is, as it was given.
        kind: parquet (text files become that), lance or media.
        column: what is encoded.
        keep: the columns that go along.
        schema: of the kept columns, as Arrow writes it.
        version: of a Lance data set, so that later writes to it change nothing.
        fingerprint: of the names, sizes and times of its files.
        ignored: files of a folder that are of no kind that is read.
    """

    place: str
    kind: str
    column: str
    keep: tuple[str, ...]
    schema: bytes
    version: int | None
    fingerprint: str
    rows: int
    ignored: int
    fragments: tuple[Fragment, ...]


def plan(
    place: str,
    modality: str,
    *,
    column: str | None = None,
    keep: Sequence[str] | None = None,
    rows: int | None = None,
    spool: Path | None = None,
) -> JobSource:
    """Find the rows of a source and cut them into fragments.

    Args:
        place: a file, a folder or an URL: Parquet, CSV, JSON lines, text, a Lance data set, or
            images or sounds.
        modality: what the bundle takes.
        column: the column that is encoded; None takes a usual one.
        keep: the columns that go along; None takes all.
        rows: of a fragment.
        spool: where rows of text files are written as Parquet; None only counts them.

    Raises:
        InputError: nothing there, no such column, or files that do not go together.
    """
    size = rows or ROWS[modality]
    if size < 1:
        raise ConfigurationError(f"a fragment of {size} rows", fix="give 1 or more")
    if _is_lance(place):
        return _lance(place, column, keep, size)
    files = list_files(place)
    media = [f for f in files if _suffix(f) in SUFFIXES.get(modality, ())]
    tables = [f for f in files if _suffix(f) in (".parquet", *TEXTS)]
    if media and tables:
        raise InputError(
            f"{place} has files of {modality}s and tables too", fix="give one kind: a folder each"
        )
    if media:
        return _media(place, media, size, len(files) - len(media))
    if not tables:
        known = (".parquet", *TEXTS, *SUFFIXES.get(modality, ()))
        raise InputError(f"{place} holds no file of a kind that is read", fix=", ".join(known))
    return _tables(place, tables, column, keep, size, spool, len(files) - len(tables))


def _suffix(file: File) -> str:
    return ending(PurePosixPath(file.path))


def _is_lance(place: str) -> bool:
    return place.rstrip("/").endswith(".lance") or (local_path(place) / "_versions").is_dir()


def _fingerprint(files: Sequence[File]) -> str:
    rows = [[file.path, file.size, file.stamp] for file in files]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _media(place: str, files: list[File], size: int, ignored: int) -> JobSource:
    import pyarrow as pa

    paths = [file.path for file in files]
    runs = range(0, len(paths), size)
    fragments = [
        Fragment(number, first, len(part), part)
        for number, first in enumerate(runs)
        for part in [tuple(paths[first : first + size])]
    ]
    return JobSource(
        place=place,
        kind="media",
        column="path",
        keep=("path",),
        schema=pa.schema([("path", pa.string())]).serialize().to_pybytes(),
        version=None,
        fingerprint=_fingerprint(files),
        rows=len(paths),
        ignored=ignored,
        fragments=tuple(fragments),
    )


def _lance(place: str, column: str | None, keep: Sequence[str] | None, size: int) -> JobSource:
    lance = require("lance", extra="jobs", why=f"read {place}")
    try:
        dataset = lance.dataset(place)
    except (ValueError, OSError) as error:
        raise InputError(f"{place} is no Lance data set", fix="check the path") from error
    column, schema = _columns(place, dataset.schema, column, keep)
    rows = dataset.count_rows()
    return JobSource(
        place=place,
        kind="lance",
        column=column,
        keep=tuple(schema.names),
        schema=schema.serialize().to_pybytes(),
        version=dataset.version,
        fingerprint=hashlib.sha256(f"{place} {dataset.version} {rows}".encode()).hexdigest(),
        rows=rows,
        ignored=0,
        fragments=tuple(_cut([(place, rows)], size)),
    )


def _tables(
    place: str,
    files: list[File],
    column: str | None,
    keep: Sequence[str] | None,
    size: int,
    spool: Path | None,
    ignored: int,
) -> JobSource:
    fingerprint = _fingerprint(files)
    parts: list[tuple[str, int]] = []
    agreed: tuple[str, pa.Schema] | None = None
    for number, file in enumerate(files):
        if _suffix(file) == ".parquet":
            table = open_table(filesystem(place)[0], file.path, file.size)
            own = _columns(file.path, table.schema_arrow, column, keep)
            parts.append((file.path, table.metadata.num_rows))
        else:
            # Named by what it was made of: rows of a file that changed are never taken for it.
            home = spool / f"{fingerprint[:16]}-{size}" if spool else None
            target = home / f"{number:08d}.parquet" if home else None
            path, count, own = _spooled(place, file, column, keep, size, target)
            parts.append((path, count))
        agreed = agreed or own
        if own[0] != agreed[0] or not own[1].equals(agreed[1]):
            raise InputError(
                f"{file.path} has {_columns_told(own)}, and "
                f"{files[0].path} {_columns_told(agreed)}",
                fix="choose with --column and --keep what all files have alike",
            )
    assert agreed is not None
    fragments = tuple(_cut(parts, size))
    return JobSource(
        place=place,
        kind="parquet",
        column=agreed[0],
        keep=tuple(agreed[1].names),
        schema=agreed[1].serialize().to_pybytes(),
        version=None,
        fingerprint=fingerprint,
        rows=sum(rows for _, rows in parts),
        ignored=ignored,
        fragments=fragments,
    )


def _spooled(
    place: str,
    file: File,
    column: str | None,
    keep: Sequence[str] | None,
    size: int,
    target: Path | None,
) -> tuple[str, int, tuple[str, pa.Schema]]:
    rows = Spool(place, file, column, keep)
    try:
        if target is not None and not target.is_file():
            rows.write(target, size)
        schema = rows.schema
        names = schema.names if keep is None else keep
        kept = _kept(file.path, schema, names)
        # The scheme tells the reader that this one is here, wherever the source is.
        return f"file://{target}" if target else file.path, rows.count, (rows.column, kept)
    finally:
        rows.close()


def _columns(
    where: str, schema: pa.Schema, column: str | None, keep: Sequence[str] | None
) -> tuple[str, pa.Schema]:
    """Return the column that is encoded, and the kept ones as a schema."""
    names = schema.names
    if len(set(names)) < len(names):
        raise InputError(f"{where} has a column twice", fix="rename one")
    column = column or usual_column(dict.fromkeys(names), where)
    return column, _kept(where, schema, names if keep is None else keep, column)


def _kept(
    where: str, schema: pa.Schema, keep: Sequence[str], column: str | None = None
) -> pa.Schema:
    import pyarrow as pa

    for name in [*([column] if column else []), *keep]:
        if name not in schema.names:
            raise InputError(f"{where} has no column {name!r}", fix=nearest(name, schema.names))
    for name in (INDEX, VECTOR):
        if name in keep:
            raise InputError(
                f"{where} has a column {name!r}, which the job writes itself",
                fix="name the columns to keep with --keep",
            )
    return pa.schema([schema.field(name) for name in dict.fromkeys(keep)])


def _columns_told(columns: tuple[str, pa.Schema]) -> str:
    """Return the column that is encoded and the kept ones with their types, in words."""
    kept = ", ".join(f"{field.name} ({field.type})" for field in columns[1])
    return f"column {columns[0]}, kept {kept or 'nothing'}"


def _cut(parts: Sequence[tuple[str, int]], size: int) -> Iterator[Fragment]:
    number = first = 0
    for path, rows in parts:
        for start in range(0, rows, size):
            count = min(size, rows - start)
            yield Fragment(number, first, count, (path,), start)
            number, first = number + 1, first + count


def kept_schema(source: JobSource) -> Any:
    """Return the Arrow schema of the kept columns."""
    import pyarrow as pa

    return pa.ipc.read_schema(pa.py_buffer(source.schema))
