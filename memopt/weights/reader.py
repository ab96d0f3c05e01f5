"""Read weight files lazily: one weight without the others, a view where the file allows it."""

from __future__ import annotations

import io
import json
import math
import mmap
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from memopt.errors import WeightsError
from memopt.registry import nearest
from memopt.weights import schema
from memopt.weights.packing import packed_length, unpack
from memopt.weights.parquet import PLAIN, find_pages, identity_bytes
from memopt.weights.quantized import QuantizedWeight, scale_shape

_NAME_COLUMNS = ["layer_name", "weight_name"]
# What reading a corrupt Parquet file can raise besides ArrowException.
_DAMAGE = (pa.ArrowException, OSError, ValueError, IndexError, KeyError, OverflowError)


@dataclass(frozen=True, slots=True)
class WeightInfo:
    """What a file says about one weight without its values being read."""

    name: str
    dtype: str  # what load() returns: the stored dtype, float32 for a quantized weight
    shape: tuple[int, ...]
    row: int
    row_group: int
    quant_type: str | None = None  # V2: int8, int4, int2, fp16 or raw

    @property
    def size(self) -> int:
        """How many values the weight has."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class _Place:
    row: int
    group: int
    offset: int  # row within its row group
    alone: bool  # the only row of its group


class _CountingFile(io.RawIOBase):
    """A file that counts what is read from it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self.count = 0

    def readinto(self, buffer: Any) -> int:
        got = self._file.readinto(buffer) or 0
        self.count += got
        return got

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


class WeightLoader:
    """The weights of a Parquet file (schema V1 or V2), each read when asked for.

    Nothing is read before the first question, and then the footer only. A loader may be used from
    several threads. As a context manager it unloads at the end; arrays it gave out stay valid.

    Attributes:
        path: the file.

    >>> import tempfile
    >>> from memopt.weights.writer import write_weights
    >>> path = Path(tempfile.mkdtemp()) / "w.parquet"
    >>> write_weights(path, {"a.weight": np.ones((2, 2), np.float16)})
    >>> with WeightLoader(path) as weights:
    ...     weights.names(), weights.info("a.weight").dtype, weights.load("a.weight").sum()
    (['a.weight'], 'float16', np.float16(4.0))
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        self._opened: _Opened | None = None
        self._counted = 0

    def __enter__(self) -> WeightLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unload()

    def __len__(self) -> int:
        return len(self._file().places)

    def __contains__(self, name: object) -> bool:
        return name in self._file().places

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    @property
    def version(self) -> int:
        """The schema version, 1 or 2, detected from the columns."""
        return self._file().version

    @property
    def metadata(self) -> dict[str, str]:
        """The footer's key-value pairs that are text, the Arrow schema left out."""
        return dict(self._file().metadata)

    @property
    def bytes_read(self) -> int:
        """Bytes read so far: system reads plus the mapped pages whose values were handed out."""
        opened = self._opened
        return self._counted + (opened.bytes_read if opened else 0)

    def names(self) -> list[str]:
        """Return the checkpoint names, in file order."""
        return list(self._file().places)

    def info(self, name: str) -> WeightInfo:
        """Return dtype, shape and place of a weight without reading its values.

        Raises:
            WeightsError: there is no such weight, or its row is damaged.
        """
        opened = self._file()
        place = self._place(name)
        row = opened.small(place, name)
        return WeightInfo(
            name,
            opened.loaded_dtype(row, name),
            _shape(row, name, place, self.path),
            place.row,
            place.group,
            row.get("quant_type"),
        )

    def load(self, name: str) -> np.ndarray:
        """Return a weight in its shape: V1 in its stored dtype, V2 dequantized to float32.

        A V1 weight in an uncompressed file is a read-only view of the memory map: no copy, and the
        values come from disk as they are touched.

        Raises:
            WeightsError: no such weight, or a damaged row; the message names row and values.
        """
        opened = self._file()
        place = self._place(name)
        row = opened.small(place, name)
        shape = _shape(row, name, place, self.path)
        kind = row.get("quant_type")
        if opened.version == 1:
            flat = opened.float_values(place, row, name)
        elif kind in schema.QUANT_BITS:
            return self.load_quantized(name).dequantize()
        elif kind in ("fp16", "raw"):
            stored = "float16" if kind == "fp16" else opened.raw_dtype(name)
            data = opened.values(place, "weight_data", name)
            dtype = schema.numpy_dtype(stored)
            self._expect(data.size, math.prod(shape) * dtype.itemsize, "bytes", place, name, shape)
            flat = data.view(np.int8).view(dtype)
        else:
            raise self._damaged(place, name, f"quant_type {kind!r} is not known")
        self._expect(flat.size, math.prod(shape), "values", place, name, shape)
        out = flat.reshape(shape)
        out.flags.writeable = False
        return out

    def load_quantized(self, name: str) -> QuantizedWeight:
        """Return the stored integers of a quantized weight with their scales.

        Raises:
            WeightsError: the weight is not quantized, or its row is damaged (a truncated list, a
                NaN scale); the message names row and values.
        """
        opened = self._file()
        place = self._place(name)
        if opened.version == 1:
            raise WeightsError(
                f"{self.path} is schema V1 (float): {name!r} is not quantized",
                fix="quantize it first, or use load()",
            )
        row = opened.small(place, name)
        bits = schema.QUANT_BITS.get(row["quant_type"])
        if bits is None:
            raise WeightsError(
                f"weight {name!r} is kept as {row['quant_type']}, not quantized", fix="use load()"
            )
        shape = _shape(row, name, place, self.path)
        count = math.prod(shape)
        data = opened.values(place, "weight_data", name)
        self._expect(data.size, packed_length(count, bits), "bytes", place, name, shape)
        axis, group = row["quant_axis"], opened.group_size(name)
        scales = opened.values(place, "scales", name).astype(np.float32)
        points = opened.values(place, "zero_points", name).astype(np.int8)
        try:
            if axis is None or not -1 <= axis < max(len(shape), 1) or (axis >= 0 and not shape):
                raise WeightsError(f"quant_axis {axis} does not exist in shape {list(shape)}")
            expected = scale_shape(shape, axis, group)
            if scales.size != math.prod(expected):
                raise WeightsError(
                    f"{scales.size} scales, shape {list(shape)} with axis {axis} and group size "
                    f"{group} needs {math.prod(expected)}"
                )
            if points.size not in (0, scales.size):
                raise WeightsError(f"{points.size} zero points for {scales.size} scales")
            return QuantizedWeight(
                unpack(data, count, bits).reshape(shape),
                scales.reshape(expected),
                points.reshape(expected) if points.size else points,
                axis,
                group,
                bits,
            )
        except WeightsError as error:
            raise self._damaged(place, name, error.problem) from None

    def items(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (name, array) in file order; pages of a passed weight are given back to the system.

        An array kept past its turn stays valid: its values are read again when touched.
        """
        opened = self._file()
        for name in self.names():
            yield name, self.load(name)
            opened.release(self._place(name))

    def unload(self) -> None:
        """Close the file and forget the index; the next question opens it again.

        The memory map goes when the last array viewing it goes.
        """
        with self._lock:
            if self._opened is not None:
                self._counted += self._opened.bytes_read
                self._opened.close()
                self._opened = None

    def _file(self) -> _Opened:
        with self._lock:
            if self._opened is None:
                self._opened = _Opened(self.path)
            return self._opened

    def _place(self, name: str) -> _Place:
        places = self._file().places
        if name not in places:
            raise WeightsError(f"{self.path} has no weight {name!r}", fix=nearest(name, places))
        return places[name]

    def _expect(
        self, got: int, needed: int, what: str, place: _Place, name: str, shape: tuple[int, ...]
    ) -> None:
        if got != needed:
            raise self._damaged(place, name, f"{got} {what}, shape {list(shape)} needs {needed}")

    def _damaged(self, place: _Place, name: str, problem: str) -> WeightsError:
        return WeightsError(
            f"{self.path}, row {place.row} ({name}): {problem}", fix="convert the model again"
        )


class _Opened:
    """An open file: footer, index, memory map."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        if not path.is_file():
            raise WeightsError(f"no weight file at {str(path)!r}", fix="run: memopt convert")
        self._raw = _CountingFile(path)
        self._mapped = 0
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._view = memoryview(self._map)
            self._parquet = pq.ParquetFile(self._raw, pre_buffer=False)
            arrow = self._parquet.schema_arrow
        except _DAMAGE as error:
            self._raw.close()
            raise WeightsError(
                f"{path} is not a complete Parquet file ({_first_line(error)})",
                fix="it was truncated or altered; convert the model again",
            ) from error
        self.version = schema.detect_version(arrow, origin=str(path))
        self._arrow = arrow
        self.metadata = {
            k.decode(): v.decode("utf-8", "replace")
            for k, v in (arrow.metadata or {}).items()
            if k != b"ARROW:schema"
        }
        footer = self._parquet.metadata
        leaves = [footer.schema.column(i).path for i in range(footer.num_columns)]
        self._leaf = {path.partition(".")[0]: i for i, path in enumerate(leaves)}
        self._rows = self._extra()
        self.places = self._index()

    @property
    def bytes_read(self) -> int:
        return self._raw.count + self._mapped

    def close(self) -> None:
        self._parquet.close()
        self._raw.close()
        self._view = memoryview(b"")
        # Views given out hold the map; it is unmapped when the last of them is gone.
        del self._map

    def _extra(self) -> dict[str, dict[str, Any]]:
        text = self.metadata.get(schema.ROWS_KEY, "{}")
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise WeightsError(f"{self.path}: {schema.ROWS_KEY} is not JSON ({error})") from error
        if not isinstance(rows, dict) or not all(isinstance(v, dict) for v in rows.values()):
            raise WeightsError(f"{self.path}: {schema.ROWS_KEY} is not an object of objects")
        return rows

    def _index(self) -> dict[str, _Place]:
        """Map names to rows by the row groups' statistics; read names only where they differ."""
        places: dict[str, _Place] = {}
        footer = self._parquet.metadata
        row = 0
        for group in range(footer.num_row_groups):
            count = footer.row_group(group).num_rows
            for offset, name in enumerate(self._group_names(group, count)):
                if name in places:
                    raise WeightsError(f"{self.path}, row {row}: weight {name!r} is there twice")
                places[name] = _Place(row, group, offset, count == 1)
                row += 1
        return places

    def _group_names(self, group: int, count: int) -> list[str]:
        if count == 1:
            exact = []
            for column in _NAME_COLUMNS:
                stats = (
                    self._parquet.metadata.row_group(group).column(self._leaf[column]).statistics
                )
                # A writer that cuts long statistics cuts the minimum down and the maximum up, so
                # equal ones are the value itself.
                if stats is None or not stats.has_min_max or stats.min != stats.max:
                    break
                exact.append(stats.min)
            else:
                return [schema.join_name(*exact)]
        table = self._read(group, _NAME_COLUMNS, f"row group {group}")
        pairs = zip(*(table.column(c).to_pylist() for c in _NAME_COLUMNS), strict=True)
        return [schema.join_name(layer or "", weight or "") for layer, weight in pairs]

    def _read(self, group: int, columns: list[str], what: str) -> pa.Table:
        try:
            with self._lock:
                return self._parquet.read_row_group(group, columns=columns, use_threads=False)
        except _DAMAGE as error:
            raise WeightsError(
                f"{self.path}, {what}: cannot be read ({_first_line(error)})",
                fix="the file is damaged; convert the model again",
            ) from error

    def small(self, place: _Place, name: str) -> dict[str, Any]:
        """Read the columns that describe a weight, not its values."""
        wanted = ("shape", "dtype", "quant_type", "quant_axis")
        columns = [c for c in wanted if c in self._leaf]
        table = self._read(place.group, columns, f"row {place.row} ({name})")
        return {c: table.column(c)[place.offset].as_py() for c in columns}

    def carrier(self) -> str:
        """The dtype of the V1 weight_data column."""
        value = self._arrow.field("weight_data").type.value_type
        return "float16" if pa.types.is_float16(value) else "float32"

    def loaded_dtype(self, row: dict[str, Any], name: str) -> str:
        if self.version == 1:
            return row.get("dtype") or self.carrier()
        kind = row["quant_type"]
        return {"fp16": "float16", "raw": self.raw_dtype(name)}.get(kind, "float32")

    def raw_dtype(self, name: str) -> str:
        return str(self._rows.get(name, {}).get("dtype", "float32"))

    def group_size(self, name: str) -> int:
        size = self._rows.get(name, {}).get("group_size", 0)
        if not isinstance(size, int) or size < 0:
            raise WeightsError(f"{self.path}: {name!r} has group size {size!r}")
        return size

    def float_values(self, place: _Place, row: dict[str, Any], name: str) -> np.ndarray:
        carrier = self.carrier()
        kind = row.get("dtype") or carrier
        if kind == carrier:
            return self.values(place, "weight_data", name)
        dtype = schema.numpy_dtype(kind)
        if "weight_bytes" not in self._leaf:
            raise WeightsError(
                f"{self.path}, row {place.row} ({name}): dtype {kind} needs the column "
                "'weight_bytes', which is not there"
            )
        data = self.values(place, "weight_bytes", name)
        if data.size % dtype.itemsize:
            raise WeightsError(
                f"{self.path}, row {place.row} ({name}): {data.size} bytes are not whole {kind} "
                "values",
                fix="convert the model again",
            )
        return data.view(dtype)

    def values(self, place: _Place, column: str, name: str) -> np.ndarray:
        """Return a flat array of a list or binary column: a view of the map, or decoded."""
        if place.alone:
            view = self._mapped_values(place, column)
            if view is not None:
                return view
        table = self._read(place.group, [column], f"row {place.row} ({name})")
        scalar = table.column(column)[place.offset]
        if not scalar.is_valid:
            raise WeightsError(
                f"{self.path}, row {place.row} ({name}): {column} is null",
                fix="convert the model again",
            )
        if pa.types.is_binary(scalar.type) or pa.types.is_large_binary(scalar.type):
            return np.frombuffer(scalar.as_buffer(), np.uint8)
        if scalar.values.null_count:
            raise WeightsError(
                f"{self.path}, row {place.row} ({name}): {column} holds "
                f"{scalar.values.null_count} null values",
                fix="convert the model again",
            )
        out: np.ndarray = scalar.values.to_numpy(zero_copy_only=False)
        return out

    def _mapped_values(self, place: _Place, column: str) -> np.ndarray | None:
        chunk = self._parquet.metadata.row_group(place.group).column(self._leaf[column])
        if chunk.compression != "UNCOMPRESSED":
            return None
        kind = self._arrow.field(column).type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        try:
            dictionary, pages = find_pages(self._view, chunk, is_list=is_list)
            if len(pages) != 1:
                return None
            page = pages[0]
            if not is_list:
                start = page.start + 4
                size = int.from_bytes(self._view[page.start : start], "little")
                if page.encoding != PLAIN or start + size != page.end:
                    return None
                return self._array(np.dtype(np.uint8), size, start)
            if pa.types.is_int8(kind.value_type):
                where = identity_bytes(self._view, dictionary, page)
                if where is None:
                    return None
                return self._array(np.dtype(np.int8), where.stop - where.start, where.start)
            dtype = np.dtype(kind.value_type.to_pandas_dtype()).newbyteorder("<")
            # Fewer bytes than levels: an empty list, nulls or damage; pyarrow tells which.
            if page.encoding != PLAIN or page.end - page.start != page.levels * dtype.itemsize:
                return None
            return self._array(dtype, page.levels, page.start)
        except (ValueError, IndexError, KeyError, TypeError):
            return None  # not a layout this module reads; pyarrow decodes it or says what is wrong

    def _array(self, dtype: np.dtype, count: int, offset: int) -> np.ndarray:
        with self._lock:
            self._mapped += count * dtype.itemsize
        return np.frombuffer(self._map, dtype, count, offset)

    def release(self, place: _Place) -> None:
        """Tell the system that the pages of a row's values are not needed in memory now."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for column in ("weight_data", "weight_bytes"):
            if column not in self._leaf:
                continue
            chunk = self._parquet.metadata.row_group(place.group).column(self._leaf[column])
            start = -(-chunk.data_page_offset // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (chunk.data_page_offset + chunk.total_compressed_size) // mmap.PAGESIZE
            length = end * mmap.PAGESIZE - start
            if length > 0:
                self._map.madvise(mmap.MADV_DONTNEED, start, length)


def _shape(row: dict[str, Any], name: str, place: _Place, path: Path) -> tuple[int, ...]:
    shape = row["shape"]
    if shape is None or any(size is None or size < 0 for size in shape):
        raise WeightsError(
            f"{path}, row {place.row} ({name}): shape {shape} is not a shape",
            fix="convert the model again",
        )
    return tuple(shape)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
