"""An open weight file: its footer, the index of its rows, its memory map."""

from __future__ import annotations

import io
import mmap
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from memopt.errors import WeightsError, first_line
from memopt.jsontext import parse_json
from memopt.parquetfile import one_line, open_parquet
from memopt.weights import schema
from memopt.weights.parquet import PLAIN, find_pages, identity_bytes

_NAME_COLUMNS = ["layer_name", "weight_name"]
# What reading a corrupt Parquet file can raise besides ArrowException.
_DAMAGE = (pa.ArrowException, OSError, ValueError, IndexError, KeyError, OverflowError)


# Arrow's names of floats; its integers are called as numpy's. to_pandas_dtype() wants pandas up
# to pyarrow 20.
_FLOATS = {"halffloat": "float16", "float": "float32", "double": "float64"}


def _numpy_dtype(kind: pa.DataType) -> np.dtype[Any]:
    return np.dtype(_FLOATS.get(str(kind), str(kind)))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a weight is."""

    name: str
    row: int
    group: int
    offset: int  # row within its row group
    alone: bool  # the only row of its group


class _CountingFile(io.FileIO):
    """A file that counts what is read from it."""

    count = 0

    def readinto(self, buffer: Any) -> int:
        got = super().readinto(buffer) or 0
        self.count += got
        return got

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size) or b""
        self.count += len(data)
        return data


class OpenFile:
    """An open file: footer, index, memory map."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        if not path.is_file():
            raise WeightsError(f"no weight file at {str(path)!r}", fix="run: memopt convert")
        self._raw = _CountingFile(path)
        self._mapped = 0
        # The columns last read of a group of several rows: files that hold a whole model in one
        # group would otherwise be decoded once for each weight.
        self._decoded: tuple[int, dict[str, pa.ChunkedArray]] = (-1, {})
        try:
            self._parquet = open_parquet(path, error=WeightsError, source=self._raw)
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._view = memoryview(self._map)
            with one_line(path, WeightsError):
                self._begin()
        except BaseException:
            self._raw.close()
            raise

    def _begin(self) -> None:
        """Read the schema and the index."""
        path, arrow = self.path, self._parquet.schema_arrow
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
        rows = parse_json(text, f"{self.path}: {schema.ROWS_KEY}", error=WeightsError)
        if not isinstance(rows, dict) or not all(isinstance(v, dict) for v in rows.values()):
            raise WeightsError(f"{self.path}: {schema.ROWS_KEY} is not an object of objects")
        return rows

    def _index(self) -> dict[str, Place]:
        """Map names to rows by the row groups' statistics; read names only where they differ."""
        places: dict[str, Place] = {}
        footer = self._parquet.metadata
        row = 0
        for group in range(footer.num_row_groups):
            count = footer.row_group(group).num_rows
            for offset, name in enumerate(self._group_names(group, count)):
                if name in places:
                    raise WeightsError(f"{self.path}, row {row}: weight {name!r} is there twice")
                places[name] = Place(name, row, group, offset, count == 1)
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
                table = self._parquet.read_row_group(group, columns=columns, use_threads=False)
            # Names and types that are no UTF-8 would be believed until they are used.
            table.validate(full=True)
            rows = self._parquet.metadata.row_group(group).num_rows
            if table.num_rows != rows:
                raise pa.ArrowInvalid(f"{table.num_rows} rows are there of {rows} announced")
            return table
        except _DAMAGE as error:
            raise WeightsError(
                f"{self.path}, {what}: cannot be read ({first_line(error)})",
                fix="the file is damaged; convert the model again",
            ) from error

    def damaged(self, place: Place, problem: str) -> WeightsError:
        """Return the error that says what is wrong with a weight."""
        return WeightsError(
            f"{self.path}, row {place.row} ({place.name}): {problem}", fix="convert the model again"
        )

    def expect(
        self, place: Place, shape: tuple[int, ...], got: int, needed: int, what: str = "values"
    ) -> None:
        """Raise unless a weight of this shape has as many values (or bytes) as it needs."""
        if got != needed:
            raise self.damaged(place, f"{got} {what}, shape {list(shape)} needs {needed}")

    def _column(self, place: Place, column: str) -> pa.ChunkedArray:
        what = f"row {place.row} ({place.name})"
        if place.alone:
            return self._read(place.group, [column], what).column(column)
        with self._lock:
            group, columns = self._decoded
            if group == place.group and column in columns:
                return columns[column]
        read = self._read(place.group, [column], what).column(column)
        with self._lock:
            kept = self._decoded[1] if self._decoded[0] == place.group else {}
            self._decoded = (place.group, {**kept, column: read})
        return read

    def small(self, place: Place) -> dict[str, Any]:
        """Read the columns that describe a weight, not its values."""
        wanted = ("shape", "dtype", "quant_type", "quant_axis")
        columns = [c for c in wanted if c in self._leaf]
        if place.alone:
            table = self._read(place.group, columns, f"row {place.row} ({place.name})")
            return {c: table.column(c)[place.offset].as_py() for c in columns}
        return {c: self._column(place, c)[place.offset].as_py() for c in columns}

    def carrier(self) -> str:
        """The dtype of the V1 weight_data column."""
        value = self._arrow.field("weight_data").type.value_type
        return str(_numpy_dtype(value))

    def loaded_dtype(self, row: dict[str, Any], place: Place) -> str:
        if self.version == 1:
            return row.get("dtype") or self.carrier()
        kind = row["quant_type"]
        return {"fp16": "float16", "raw": self.raw_dtype(place.name)}.get(kind, "float32")

    def raw_dtype(self, name: str) -> str:
        return str(self._rows.get(name, {}).get("dtype", "float32"))

    def group_size(self, name: str) -> int:
        size = self._rows.get(name, {}).get("group_size", 0)
        if not isinstance(size, int) or size < 0:
            raise WeightsError(f"{self.path}: {name!r} has group size {size!r}")
        return size

    def float_values(self, place: Place, row: dict[str, Any]) -> np.ndarray:
        carrier = self.carrier()
        kind = row.get("dtype") or carrier
        if kind == carrier:
            return self.values(place, "weight_data")
        dtype = schema.numpy_dtype(kind)
        if "weight_bytes" not in self._leaf:
            raise WeightsError(
                f"{self.path}, row {place.row} ({place.name}): dtype {kind} needs the column "
                "'weight_bytes', which is not there"
            )
        data = self.values(place, "weight_bytes")
        if data.size % dtype.itemsize:
            raise self.damaged(place, f"{data.size} bytes are not whole {kind} values")
        return data.view(dtype)

    def values(self, place: Place, column: str) -> np.ndarray:
        """Return a flat array of a list or binary column: a view of the map, or decoded."""
        if place.alone:
            view = self._mapped_values(place, column)
            if view is not None:
                return view
        scalar = self._column(place, column)[place.offset]
        if not scalar.is_valid:
            raise self.damaged(place, f"{column} is null")
        if pa.types.is_binary(scalar.type) or pa.types.is_large_binary(scalar.type):
            return np.frombuffer(scalar.as_buffer(), np.uint8)
        if scalar.values.null_count:
            raise self.damaged(place, f"{column} holds {scalar.values.null_count} null values")
        out: np.ndarray = scalar.values.to_numpy(zero_copy_only=False)
        return out

    def minima(self, place: Place) -> np.ndarray:
        """Return the minima of a quantized row, none in a file that has no such column."""
        if schema.MINIMA not in self._leaf:
            return np.zeros(0, np.float32)
        return self.values(place, schema.MINIMA).astype(np.float32)

    def _mapped_values(self, place: Place, column: str) -> np.ndarray | None:
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
            dtype = _numpy_dtype(kind.value_type).newbyteorder("<")
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

    def release(self, place: Place) -> None:
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
