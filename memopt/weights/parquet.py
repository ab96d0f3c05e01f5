"""Parquet pages written and read in place, so that a tensor never has to be in memory twice.

pyarrow's writer holds about five times a list value (levels, encoder buffer, page buffer) and
places values at any byte, so a view of them is misaligned. This module writes the few page kinds
a weight file needs straight from the tensor's own memory, values at a multiple of 64 bytes, and
finds those values again in a memory map. The files are ordinary Parquet: every reader opens them,
and pyarrow decodes what this module does not (compression, other writers' encodings).

Source: the Apache Parquet format 2.x and its thrift definitions (parquet.thrift).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from memopt.errors import WeightsError
from memopt.thrift import (
    BINARY,
    BYTE,
    I32,
    I64,
    LIST,
    STRUCT,
    TRUE,
    read_struct,
    read_varint,
    varint,
    write_struct,
)

MAGIC = b"PAR1"
# Where values start: the widest vector register (64 bytes) and a cache line.
ALIGNMENT = 64
# Page sizes are int32 in the format; a quarter of the limit leaves room for levels.
PAGE_BYTES = 1 << 29
# A dictionary page costs 1 KiB; below this many int8 values four plain bytes each are smaller.
_DICTIONARY_FROM = 512
CREATED_BY = b"memopt weights writer version 1"

PLAIN, RLE, RLE_DICTIONARY = 0, 3, 8
DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
_INT32, _FLOAT, _DOUBLE, _BYTE_ARRAY, _FIXED = 1, 4, 5, 6, 7
_CODECS = {None: 0, "zstd": 6}
_OPTIONAL, _REPEATED = 1, 2

# ------------------------------------------------------------------------------- columns and pages


@dataclass(frozen=True, slots=True)
class Column:
    """A leaf column: its name, Arrow type and what the footer says about it."""

    name: str
    type: pa.DataType
    physical: int
    width: int  # bytes of one stored value; 0 for strings and binary
    logical: bytes | None = None
    converted: int | None = None
    statistics: bool = False

    @property
    def is_list(self) -> bool:
        """Whether one row holds a list of values."""
        return bool(pa.types.is_list(self.type))

    @property
    def path(self) -> list[bytes]:
        """The leaf's path in the Parquet schema."""
        name = self.name.encode()
        return [name, b"list", b"element"] if self.is_list else [name]

    def elements(self) -> list[bytes]:
        """Return the SchemaElement structs of this column, parents first."""
        leaf = (
            (1, I32, self.physical),
            (2, I32, self.width if self.physical == _FIXED else None),
            (3, I32, _OPTIONAL),
        )
        kind = ((6, I32, self.converted), (10, STRUCT, self.logical))
        if not self.is_list:
            return [write_struct(*leaf, (4, BINARY, self.name.encode()), *kind)]
        group = write_struct(
            (3, I32, _OPTIONAL),
            (4, BINARY, self.name.encode()),
            (5, I32, 1),
            (6, I32, 3),  # converted type LIST
            (10, STRUCT, write_struct((3, STRUCT, write_struct()))),
        )
        repeated = write_struct((3, I32, _REPEATED), (4, BINARY, b"list"), (5, I32, 1))
        return [group, repeated, write_struct(*leaf, (4, BINARY, b"element"), *kind)]


def column(field_: pa.Field) -> Column:
    """Describe an Arrow field of a weight schema as a Parquet column."""
    kind = field_.type.value_type if pa.types.is_list(field_.type) else field_.type
    if pa.types.is_string(kind):
        logical = write_struct((1, STRUCT, write_struct()))
        return Column(field_.name, field_.type, _BYTE_ARRAY, 0, logical, 0, statistics=True)
    if pa.types.is_binary(kind):
        return Column(field_.name, field_.type, _BYTE_ARRAY, 0)
    if pa.types.is_float16(kind):
        return Column(
            field_.name, field_.type, _FIXED, 2, write_struct((15, STRUCT, write_struct())), None
        )
    if pa.types.is_float32(kind):
        return Column(field_.name, field_.type, _FLOAT, 4)
    if pa.types.is_int32(kind):
        return Column(field_.name, field_.type, _INT32, 4)
    if pa.types.is_int8(kind):
        integer = write_struct((1, BYTE, 8), (2, TRUE, True))
        return Column(field_.name, field_.type, _INT32, 4, write_struct((10, STRUCT, integer)), 15)
    raise WeightsError(
        f"column {field_.name!r} has type {field_.type}, which no weight schema uses"
    )


def _run(value: int, count: int) -> bytes:
    return varint(count << 1) + bytes([value]) if count else b""


def _levels(count: int, *, first: bool, definition: int, is_list: bool) -> bytes:
    """Levels of one page of one row: repetition 0 then 1s, one definition level throughout."""
    body = b""
    if is_list:
        repeats = _run(0, 1) + _run(1, count - 1) if first else _run(1, count)
        body = struct.pack("<I", len(repeats)) + repeats
    defined = _run(definition, count)
    return body + struct.pack("<I", len(defined)) + defined


@dataclass(slots=True)
class _Chunk:
    """What the footer records about one column chunk."""

    meta: bytes
    offset: int
    size: int
    raw_size: int


@dataclass(slots=True)
class RowWriter:
    """Write a Parquet file in which every row is its own row group, one row at a time.

    ``file`` is written front to back and never read. Memory: nothing beyond the row's own arrays
    (with ``compression`` one page more).
    """

    file: BinaryIO
    schema: pa.Schema
    compression: str | None = None
    _columns: list[Column] = field(init=False)
    _groups: list[bytes] = field(init=False, default_factory=list)
    _at: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.compression not in _CODECS:
            raise WeightsError(
                f"compression {self.compression!r} is not supported", fix="use 'zstd' or none"
            )
        self._columns = [column(f) for f in self.schema]
        self._write(MAGIC)

    def write_row(self, row: Mapping[str, Any]) -> None:
        """Write one row: strings, bytes-like values, ints and 1-d contiguous arrays, or None."""
        start = self._at
        chunks = [self._chunk(c, row[c.name]) for c in self._columns]
        columns = [
            write_struct((2, I64, chunk.offset), (3, STRUCT, chunk.meta)) for chunk in chunks
        ]
        self._groups.append(
            write_struct(
                (1, LIST, (STRUCT, columns)),
                (2, I64, sum(c.raw_size for c in chunks)),
                (3, I64, 1),
                (5, I64, start),
                (6, I64, sum(c.size for c in chunks)),
            )
        )

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the footer with these key-value pairs; the file is complete afterwards."""
        root = write_struct((4, BINARY, b"schema"), (5, I32, len(self._columns)))
        elements = [root] + [e for c in self._columns for e in c.elements()]
        pairs = [
            write_struct((1, BINARY, key.encode()), (2, BINARY, value.encode()))
            for key, value in sorted(metadata.items())
        ]
        order = write_struct((1, STRUCT, write_struct()))
        footer = write_struct(
            (1, I32, 2),
            (2, LIST, (STRUCT, elements)),
            (3, I64, len(self._groups)),
            (4, LIST, (STRUCT, self._groups)),
            (5, LIST, (STRUCT, pairs)),
            (6, BINARY, CREATED_BY),
            (7, LIST, (STRUCT, [order] * len(self._columns))),
        )
        self._write(footer + struct.pack("<I", len(footer)) + MAGIC)

    def _write(self, *parts: Any) -> None:
        for part in parts:
            self.file.write(part)
            self._at += memoryview(part).nbytes

    def _chunk(self, c: Column, value: Any) -> _Chunk:
        listed = c.is_list and value is not None and len(value) > 0
        dictionary = listed and c.width == 4 and value.dtype == np.int8
        if dictionary and len(value) < _DICTIONARY_FROM:
            dictionary, value = False, value.astype("<i4")
        if listed:
            definition, pages = 3, list(_list_pages(value, dictionary=dictionary))
        elif c.is_list or value is None:
            definition, pages = (0 if value is None else 1), [_Body(b"", b"", 1)]
        else:
            definition, pages = 1, [_plain(c, value)]
        out = _Pages(self, aligned=listed or (c.physical == _BYTE_ARRAY and not c.statistics))
        if dictionary:
            out.dictionary(np.arange(256, dtype=np.uint8).view(np.int8).astype("<i4"))
        for index, page in enumerate(pages):
            levels = _levels(
                page.levels, first=index == 0, definition=definition, is_list=c.is_list
            )
            out.data(levels + page.head, page, RLE_DICTIONARY if dictionary else PLAIN)
        statistics = None
        if c.statistics and value is not None:
            text = value.encode()
            statistics = write_struct((3, I64, 0), (5, BINARY, text), (6, BINARY, text))
        meta = write_struct(
            (1, I32, c.physical),
            (2, LIST, (I32, [PLAIN, RLE, RLE_DICTIONARY] if dictionary else [PLAIN, RLE])),
            (3, LIST, (BINARY, c.path)),
            (4, I32, _CODECS[self.compression]),
            (5, I64, sum(page.levels for page in pages)),
            (6, I64, out.raw_size),
            (7, I64, out.size),
            (9, I64, out.first_data),
            (11, I64, out.dictionary_at),
            (12, STRUCT, statistics),
        )
        return _Chunk(meta, out.start, out.size, out.raw_size)


@dataclass(frozen=True, slots=True)
class _Body:
    """What a data page holds after its levels: a few leading bytes, then the values' own memory."""

    head: bytes
    values: Any  # bytes-like
    levels: int


def _plain(c: Column, value: Any) -> _Body:
    if c.physical == _INT32:
        return _Body(struct.pack("<i", value), b"", 1)
    data = value.encode() if isinstance(value, str) else value
    size = memoryview(data).nbytes
    if size >= 1 << 31:
        raise WeightsError(
            f"a value of {size:,} bytes does not fit in column {c.name!r} (limit 2 GiB)",
            fix="store it as float16 or float32",
        )
    return _Body(struct.pack("<I", size), data, 1)


def _list_pages(values: np.ndarray, *, dictionary: bool) -> Iterator[_Body]:
    per_page = PAGE_BYTES // values.itemsize
    for start in range(0, len(values), per_page):
        part = values[start : start + per_page]
        body = part.view(np.uint8)
        if not dictionary:
            yield _Body(b"", body.data, len(part))
            continue
        # The dictionary holds all 256 int8 values in order of their unsigned byte, so the 8-bit
        # index of a value is its own byte: the index page *is* the data.
        groups = -(-len(part) // 8)
        if len(part) % 8:
            body = np.concatenate([body, np.zeros(groups * 8 - len(part), np.uint8)])
        yield _Body(b"\x08" + varint(groups << 1 | 1), body.data, len(part))


class _Pages:
    """The pages of one column chunk, written as they come."""

    def __init__(self, writer: RowWriter, *, aligned: bool) -> None:
        self.writer = writer
        self.aligned = aligned and writer.compression is None
        self.start = -1
        self.size = self.raw_size = 0
        self.first_data = -1
        self.dictionary_at: int | None = None

    def dictionary(self, values: np.ndarray) -> None:
        entries = write_struct((1, I32, len(values)), (2, I32, PLAIN))
        self.dictionary_at = self.writer._at
        self._page(DICTIONARY_PAGE, (7, STRUCT, entries), b"", values.view(np.uint8).data)

    def data(self, head: bytes, page: _Body, encoding: int) -> None:
        entries = write_struct(
            (1, I32, page.levels), (2, I32, encoding), (3, I32, RLE), (4, I32, RLE)
        )
        at = self._page(DATA_PAGE, (5, STRUCT, entries), head, page.values)
        if self.first_data < 0:
            self.first_data = at

    def _page(self, kind: int, entry: tuple[int, int, bytes], head: bytes, body: Any) -> int:
        raw = len(head) + memoryview(body).nbytes
        parts: tuple[Any, ...] = (head, body)
        if self.writer.compression:
            parts = (pa.Codec(self.writer.compression).compress(head + bytes(body), asbytes=True),)
        stored = sum(memoryview(p).nbytes for p in parts)
        header = write_struct((1, I32, kind), (2, I32, raw), (3, I32, stored), entry)
        if self.aligned and self.start < 0 and kind == DATA_PAGE:
            # Only a chunk's first byte may move: the pages inside a chunk follow each other.
            self.writer._write(bytes(-(self.writer._at + len(header) + len(head)) % ALIGNMENT))
        at = self.writer._at
        if self.start < 0:
            self.start = at
        self.writer._write(header, *parts)
        self.size += len(header) + stored
        self.raw_size += len(header) + raw
        return at


# ------------------------------------------------------------------------------------ pages, read


@dataclass(frozen=True, slots=True)
class Page:
    """One uncompressed data page found in a file: where its values are and how they are coded."""

    levels: int
    encoding: int
    start: int  # offset of the first byte after the levels
    end: int


def find_pages(
    data: memoryview, chunk: Any, *, is_list: bool
) -> tuple[memoryview | None, list[Page]]:
    """Return the dictionary's bytes (or None) and the data pages of an uncompressed column chunk.

    Args:
        data: the whole file.
        chunk: pyarrow's ColumnChunkMetaData.
        is_list: whether repetition levels are there.

    Raises:
        ValueError, IndexError: the pages are damaged or of a kind this module does not read.
    """
    at = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
        at = min(at, chunk.dictionary_page_offset)
    end = at + chunk.total_compressed_size
    if end > len(data):
        raise ValueError("column chunk reaches past the end of the file")
    dictionary: memoryview | None = None
    pages: list[Page] = []
    while at < end:
        header, body = read_struct(data, at)
        at = body + header[3]
        if at > end:
            raise ValueError("page reaches past its column chunk")
        if header[1] == DICTIONARY_PAGE:
            dictionary = data[body:at]
        elif header[1] == DATA_PAGE:
            for _ in range(2 if is_list else 1):
                body += 4 + int.from_bytes(data[body : body + 4], "little")
            pages.append(Page(header[5][1], header[5][2], body, at))
        elif header[1] == DATA_PAGE_V2:
            two = header[8]
            pages.append(Page(two[1], two[4], body + two[5] + two[6], at))
        else:
            raise ValueError(f"page type {header[1]}")
    return dictionary, pages


def identity_bytes(data: memoryview, dictionary: memoryview | None, page: Page) -> slice | None:
    """Return where a page's values are their own bytes (see ``_list_pages``), or None."""
    if dictionary is None or data[page.start] != 8:
        return None
    entries = np.frombuffer(dictionary, "<i4")
    if len(entries) != 256 or not np.array_equal(
        entries, np.arange(256, dtype=np.uint8).view(np.int8)
    ):
        return None
    run, at = read_varint(data, page.start + 1)
    if not run & 1 or (run >> 1) * 8 < page.levels or at + page.levels > page.end:
        return None
    return slice(at, at + page.levels)
