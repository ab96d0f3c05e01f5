"""Parquet files of others: the footer is checked before pyarrow believes it.

pyarrow reads some of a footer's fields through C++ that throws where nothing catches it, so that a
single changed byte can end the process (SIGABRT). Sizes, offsets, types and codecs are therefore
compared here first, and what is left is raised by pyarrow as an exception that can be caught.

Source: the Apache Parquet format 2.x (parquet.thrift).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from memopt.errors import InputError, MemoptError, first_line
from memopt.extras import require
from memopt.thrift import read_struct

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_MAGIC, _ENCRYPTED = b"PAR1", b"PARE"
_TAIL = 8  # the footer's length (uint32) and the magic
_TYPES, _FIXED = range(8), 7
_REPETITIONS = range(3)
_CONVERTED = range(22)
_CODECS = range(8)
_ENCODINGS = {0, *range(2, 10)}
_DEEPEST = 64  # levels of nested columns; pyarrow's own readers recurse over them
_WIDEST = 1 << 30  # bytes of one fixed-length value
_NO_THREAD = "Resource temporarily unavailable"  # Arrow found no memory for a thread of its own
# What reading a damaged file raises besides Arrow's own exceptions.
_DAMAGE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    MemoryError,
    RecursionError,
)


def check_footer(path: Path) -> None:
    """Compare what a Parquet file's footer says with the file.

    Raises:
        ValueError, IndexError: it cannot be believed; the message says what is wrong.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        check_opened(file, path.stat().st_size)


def check_opened(file: BinaryIO, size: int) -> None:
    """Compare what the footer of an open Parquet file of ``size`` bytes says with the file.

    Raises:
        ValueError, IndexError, OSError: as :func:`check_footer`.
    """
    file.seek(0)
    head = file.read(4)
    file.seek(max(size - _TAIL, 0))
    tail = file.read(_TAIL)
    if size < 12 or tail[4:] not in (_MAGIC, _ENCRYPTED) or head not in (_MAGIC, _ENCRYPTED):
        raise ValueError(f"{size} bytes that do not begin and end with {_MAGIC.decode()}")
    if _ENCRYPTED in (head, tail[4:]):
        raise ValueError("it is encrypted")
    length = int.from_bytes(tail[:4], "little")
    if length + 12 > size:
        raise ValueError(f"a footer of {length} bytes is announced in a file of {size}")
    file.seek(size - _TAIL - length)
    footer = file.read(length)
    meta, _ = read_struct(memoryview(footer), 0)
    if type(meta.get(1)) is not int:
        raise ValueError("the footer has no version")
    leaves = _leaves(_list(meta, 2, "schema"))
    groups = _list(meta, 4, "row groups")
    end = size - _TAIL - length
    rows = [_check_group(group, leaves, end) for group in groups]
    if sum(rows) != meta.get(3):
        raise ValueError(f"{meta.get(3)} rows are announced, the row groups have {sum(rows)}")
    for pair in meta.get(5) or []:
        _text(_struct(pair), 1, "metadata key")


def open_parquet(
    path: str | Path, *, error: type[MemoptError] = InputError, source: Any = None
) -> pq.ParquetFile:
    """Open a Parquet file whose footer was checked.

    Args:
        path: the file.
        error: the class to raise.
        source: an open file object of the same file, to read through; by default it is opened.

    Raises:
        MemoptError: of the class ``error``: it is missing, no Parquet file, or damaged.

    >>> open_parquet("/nowhere.parquet")
    Traceback (most recent call last):
    ...
    memopt.errors.InputError: no file '/nowhere.parquet'; check the path
    """
    path = Path(path)
    pq = require("pyarrow.parquet", extra="arrow", why=f"read {path}")
    if not path.is_file():
        raise error(f"no file {str(path)!r}", fix="check the path")
    with one_line(path, error):
        check_footer(path)
        opened = pq.ParquetFile(source or path, pre_buffer=False)
        # Only this decodes the names.
        _ = opened.schema_arrow.names
    return opened


def batches(
    file: pq.ParquetFile,
    path: str | Path,
    rows: int,
    columns: Sequence[str] | None = None,
    *,
    error: type[MemoptError] = InputError,
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of an opened file, ``rows`` at a time; damaged pages are one line.

    Raises:
        MemoptError: of the class ``error``: pages that cannot be read.
    """
    wanted = None if columns is None else list(columns)
    with one_line(Path(path), error):
        stream = file.iter_batches(rows, columns=wanted)
    while True:
        with one_line(Path(path), error):
            batch = next(stream, None)
        if batch is None:
            return
        with one_line(Path(path), error):
            # Offsets and text are believed by every reader of a batch from here on.
            batch.validate(full=True)
        yield batch


class one_line:  # noqa: N801 - used as a function
    """Turn all that reading a damaged Parquet file can raise into one error of one line."""

    def __init__(self, path: Path, error: type[MemoptError]) -> None:
        self._path, self._error = path, error

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, value: BaseException | None, trace: Any) -> None:
        import pyarrow as pa

        known = (*_DAMAGE, pa.ArrowException)
        if isinstance(value, known) and not isinstance(value, MemoptError):
            fix = "it was cut short or changed; make it again"
            if isinstance(value, MemoryError) or _NO_THREAD in str(value):
                fix = f"free memory; where there is enough, {fix}"
            raise self._error(
                f"{self._path} is not a readable Parquet file: {first_line(value)}", fix=fix
            ) from value


def _struct(value: object) -> dict[int, Any]:
    if not isinstance(value, dict):
        raise ValueError("a number stands where the footer has a structure")
    return value


def _list(fields: dict[int, Any], number: int, what: str) -> list[Any]:
    value = fields.get(number)
    if not isinstance(value, list):
        raise ValueError(f"the footer has no {what}")
    return value


def _whole(fields: dict[int, Any], number: int, what: str) -> int:
    value = fields.get(number)
    if type(value) is not int or value < 0:
        raise ValueError(f"{what} is {value!r:.40}")
    return value


def _text(fields: dict[int, Any], number: int, what: str) -> str:
    value = fields.get(number)
    if not isinstance(value, bytes):
        raise ValueError(f"there is no {what}")
    return value.decode("utf-8")


def _leaves(elements: list[Any]) -> list[dict[int, Any]]:
    """Return the leaf columns of a schema, whose tree must use every element once."""
    leaves: list[dict[int, Any]] = []
    # How many children are still to come at each level above the next element.
    open_groups: list[int] = []
    for place, raw in enumerate(elements):
        element = _struct(raw)
        name = _text(element, 4, "column name")
        if place and not open_groups:
            raise ValueError("the schema has elements outside of its tree")
        children = element.get(5)
        if children is not None and (type(children) is not int or children < 0):
            raise ValueError(f"column {name!r} has {children!r:.40} children")
        if place:
            if element.get(3) not in _REPETITIONS:
                raise ValueError(f"column {name!r} has repetition {element.get(3)!r:.40}")
            open_groups[-1] -= 1
        if element.get(6) is not None and element[6] not in _CONVERTED:
            raise ValueError(f"column {name!r} has converted type {element[6]!r:.40}")
        if children or not place:
            if len(open_groups) == _DEEPEST:
                raise ValueError(f"columns are nested deeper than {_DEEPEST} levels")
            open_groups.append(children or 0)
        elif element.get(1) not in _TYPES:
            raise ValueError(f"column {name!r} has type {element.get(1)!r:.40}")
        else:
            if element[1] == _FIXED and not 0 < _whole(element, 2, "a width") <= _WIDEST:
                raise ValueError(f"column {name!r} has values of {element[2]} bytes")
            leaves.append(element)
        while open_groups and not open_groups[-1]:
            open_groups.pop()
    if open_groups or not elements:
        raise ValueError("the schema lacks columns that it announces")
    return leaves


def _check_group(raw: object, leaves: list[dict[int, Any]], end: int) -> int:
    group = _struct(raw)
    columns = _list(group, 1, "columns")
    if len(columns) != len(leaves):
        raise ValueError(f"a row group has {len(columns)} of {len(leaves)} columns")
    for column, leaf in zip(columns, leaves, strict=True):
        _check_chunk(_struct(column), leaf, end)
    return _whole(group, 3, "a number of rows")


def _check_chunk(chunk: dict[int, Any], leaf: dict[int, Any], end: int) -> None:
    name = leaf[4].decode("utf-8", "replace")
    if chunk.get(1) is not None:
        raise ValueError(f"column {name!r} is in another file")
    if chunk.get(8) is not None:
        raise ValueError(f"column {name!r} is encrypted")
    meta = _struct(chunk.get(3))
    if meta.get(1) != leaf[1]:
        raise ValueError(f"column {name!r} has type {meta.get(1)!r:.40} here, {leaf[1]} above")
    if meta.get(4) not in _CODECS:
        raise ValueError(f"column {name!r} has compression {meta.get(4)!r:.40}")
    if not set(_list(meta, 2, "encodings")) <= _ENCODINGS:
        raise ValueError(f"column {name!r} has the encodings {meta[2]!r:.80}")
    for part in _list(meta, 3, "path"):
        _text({0: part}, 0, "path")
    _whole(meta, 5, f"the number of values of {name!r}")
    _whole(meta, 6, f"the size of {name!r}")
    start = _whole(meta, 9, f"the place of {name!r}")
    if meta.get(11) is not None:
        start = min(start, _whole(meta, 11, f"the dictionary of {name!r}") or start)
    if start + _whole(meta, 7, f"the stored size of {name!r}") > end:
        raise ValueError(f"column {name!r} reaches past the end of the file")
