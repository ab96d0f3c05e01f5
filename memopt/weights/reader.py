"""Read weight files lazily: one weight without the others, a view where the file allows it."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memopt.errors import WeightsError
from memopt.registry import nearest
from memopt.weights import schema
from memopt.weights.openfile import OpenFile, Place
from memopt.weights.packing import one_a_byte, packed_length, unpack
from memopt.weights.quantized import QuantizedWeight, scale_shape


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
        self._opened: OpenFile | None = None
        self._counted = 0

    def __enter__(self) -> WeightLoader:
        return self

    def __exit__(self, *_: object) -> None:
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
        row = opened.small(place)
        shape, dtype = _shape(row, place, opened), opened.loaded_dtype(row, place)
        return WeightInfo(name, dtype, shape, place.row, place.group, row.get("quant_type"))

    def load(self, name: str) -> np.ndarray:
        """Return a weight in its shape: V1 in its stored dtype, V2 dequantized to float32.

        A V1 weight in an uncompressed file is a read-only view of the memory map: no copy, and the
        values come from disk as they are touched.

        Raises:
            WeightsError: no such weight, or a damaged row; the message names row and values.
        """
        opened = self._file()
        place = self._place(name)
        row = opened.small(place)
        shape = _shape(row, place, opened)
        kind = row.get("quant_type")
        if opened.version == 1:
            flat = opened.float_values(place, row)
        elif kind in schema.QUANT_BITS:
            return self.load_quantized(name).dequantize()
        elif kind in ("fp16", "raw"):
            stored = "float16" if kind == "fp16" else opened.raw_dtype(name)
            data = opened.values(place, "weight_data")
            dtype = schema.numpy_dtype(stored)
            if kind == "fp16" and data.size == math.prod(shape) > 0:
                raise WeightsError(
                    f"{self.path}, row {place.row} ({name}): quant_type fp16, but one whole number "
                    "a value: float16 values were cut to integers when they were put into the int8 "
                    "column, and what they were is lost",
                    fix="make it again from the float weights (memopt quantize keeps float16)",
                )
            opened.expect(place, shape, data.size, math.prod(shape) * dtype.itemsize, "bytes")
            flat = data.view(np.int8).view(dtype)
        else:
            raise opened.damaged(place, f"quant_type {kind!r} is not known")
        opened.expect(place, shape, flat.size, math.prod(shape))
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
        row = opened.small(place)
        bits = schema.QUANT_BITS.get(row["quant_type"])
        if bits is None:
            raise WeightsError(
                f"weight {name!r} is kept as {row['quant_type']}, not quantized", fix="use load()"
            )
        shape = _shape(row, place, opened)
        count = math.prod(shape)
        data = opened.values(place, "weight_data")
        whole = data.size == count and schema.PACKING_KEY not in opened.metadata
        if not whole:
            opened.expect(place, shape, data.size, packed_length(count, bits), "bytes")
        axis, group = row["quant_axis"], opened.group_size(name)
        scales = opened.values(place, "scales").astype(np.float32)
        points = opened.values(place, "zero_points").astype(np.int8)
        minima = opened.minima(place)
        try:
            if axis is None or not -1 <= axis < max(len(shape), 1) or (axis >= 0 and not shape):
                raise WeightsError(f"quant_axis {axis} does not exist in shape {list(shape)}")
            expected = scale_shape(shape, axis, group)
            # Too many or too few stay as they are, for QuantizedWeight to say so.
            fits = math.prod(expected)
            return QuantizedWeight(
                (one_a_byte if whole else unpack)(data, count, bits).reshape(shape),
                scales.reshape(expected) if scales.size == fits else scales,
                points.reshape(expected) if points.size == fits else points,
                axis,
                group,
                bits,
                minima.reshape(expected) if minima.size == fits else minima,
            )
        except WeightsError as error:
            raise opened.damaged(place, error.problem) from None

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

    def _file(self) -> OpenFile:
        with self._lock:
            if self._opened is None:
                self._opened = OpenFile(self.path)
            return self._opened

    def _place(self, name: str) -> Place:
        places = self._file().places
        if name not in places:
            raise WeightsError(f"{self.path} has no weight {name!r}", fix=nearest(name, places))
        return places[name]


def _shape(row: dict[str, Any], place: Place, opened: OpenFile) -> tuple[int, ...]:
    shape = row["shape"]
    if shape is None or any(size is None or size < 0 for size in shape):
        raise opened.damaged(place, f"shape {shape} is not a shape")
    return tuple(shape)
