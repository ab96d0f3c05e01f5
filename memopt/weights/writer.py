"""Write weight files row by row: whole or absent, the same bytes every time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from memopt.errors import WeightsError
from memopt.files import atomic_path
from memopt.weights import schema
from memopt.weights.packing import pack
from memopt.weights.parquet import RowWriter
from memopt.weights.quantized import QuantizedWeight

# Gathers the many small page headers into one system call; large values bypass it.
_BUFFER = 1 << 16


def write_weights(
    path: str | Path,
    weights: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]],
    *,
    dtypes: Mapping[str, tuple[str, int]] | None = None,
    metadata: Mapping[str, str] | None = None,
    compression: str | None = None,
) -> None:
    """Write a schema V1 file, streaming: one tensor is in memory at a time.

    Args:
        path: the Parquet file; it is replaced only when everything was written.
        weights: a mapping, or (name, array) pairs in the order to store them.
        dtypes: name -> (dtype name, bytes), needed to choose the column type before the first
            tensor is seen when ``weights`` is an iterator.
        metadata: extra key-value pairs for the footer (source, hashes).
        compression: None (values can be memory-mapped) or "zstd".

    Raises:
        WeightsError: an unsupported dtype, a dimension past int32, a name given twice.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "w.parquet"
    >>> write_weights(path, {"layer.weight": np.zeros((2, 3), np.float32)})
    >>> from memopt.weights.reader import WeightLoader
    >>> with WeightLoader(path) as loader:
    ...     loader.load("layer.weight").shape
    (2, 3)
    """
    if isinstance(weights, Mapping):
        dtypes = {name: (a.dtype.name, a.nbytes) for name, a in weights.items()}
        weights = weights.items()
    elif dtypes is None:
        raise TypeError("dtypes is needed when weights is not a mapping")
    carrier, with_bytes = _carrier(dtypes)
    seen: set[str] = set()
    with _row_writer(Path(path), schema.v1(carrier, with_bytes=with_bytes), compression) as rows:
        for name, array in weights:
            _check(name, array.shape, seen)
            kind = schema.numpy_dtype(array.dtype.name).name
            flat = np.ascontiguousarray(array).reshape(-1)
            if flat.dtype.byteorder == ">":
                flat = flat.astype(flat.dtype.newbyteorder("<"))
            if kind != carrier and not with_bytes:
                raise WeightsError(f"weight {name!r} is {kind}, announced as {dtypes.get(name)}")
            layer, weight = schema.split_name(name)
            rows.write_row(
                {
                    "layer_name": layer,
                    "weight_name": weight,
                    "weight_data": flat if kind == carrier else None,
                    "shape": np.asarray(array.shape, "<i4"),
                    "dtype": kind,
                    "weight_bytes": None if kind == carrier else flat.view(np.uint8).data,
                }
            )
            del array, flat  # or this tensor would still be there while the next one is read
        rows.finish({schema.VERSION_KEY: "1", **(metadata or {})})


def write_quantized(
    path: str | Path,
    weights: Iterable[tuple[str, QuantizedWeight | np.ndarray]],
    *,
    metadata: Mapping[str, str] | None = None,
    compression: str | None = None,
    minima: bool = False,
    exact: bool = False,
) -> None:
    """Write a schema V2 file, streaming; a plain array is kept as float16, or raw where it must be.

    A float array goes to float16 when every finite value stays finite there; an integer or boolean
    array, and a float too large for float16, is kept bit for bit (quant_type 'raw').

    Args:
        path: the Parquet file; it is replaced only when everything was written.
        weights: (name, weight) pairs in the order to store them.
        metadata: extra key-value pairs for the footer.
        compression: None or "zstd".
        minima: make room for weights with minima (schema V2.1).
        exact: keep every array bit for bit.

    Raises:
        WeightsError: a name given twice, or a weight with minima that no room was made for.
    """
    seen: set[str] = set()
    extra: dict[str, dict[str, Any]] = {}
    version, arrow = (schema.MINIMA_VERSION, schema.V2_1) if minima else ("2", schema.V2)
    with _row_writer(Path(path), arrow, compression) as rows:
        for name, weight in weights:
            _check(name, weight.shape, seen)
            layer, last = schema.split_name(name)
            row: dict[str, Any] = {"layer_name": layer, "weight_name": last}
            row[schema.MINIMA] = np.zeros(0, "<f4")
            if isinstance(weight, QuantizedWeight):
                if weight.has_minima and not minima:
                    raise WeightsError(f"weight {name!r} has minima, which schema V2 does not keep")
                row |= {
                    "weight_data": pack(weight.integers, weight.bits),
                    "quant_type": f"int{weight.bits}",
                    "scales": weight.scales.reshape(-1).astype("<f4"),
                    "zero_points": weight.zero_points.reshape(-1).astype(np.int8),
                    "quant_axis": weight.axis,
                    schema.MINIMA: weight.minima.reshape(-1).astype("<f4"),
                }
                if weight.group_size:
                    extra[name] = {"group_size": weight.group_size}
            else:
                kind, data = _kept(weight, exact)
                row |= {
                    "weight_data": data,
                    "quant_type": kind,
                    "scales": np.zeros(0, "<f4"),
                    "zero_points": np.zeros(0, np.int8),
                    "quant_axis": -1,
                }
                if kind == "raw":
                    extra[name] = {"dtype": schema.numpy_dtype(weight.dtype.name).name}
            row["shape"] = np.asarray(weight.shape, "<i4")
            rows.write_row(row)
        rows.finish(
            {
                schema.VERSION_KEY: version,
                schema.PACKING_KEY: schema.PACKING,
                schema.ROWS_KEY: json.dumps(extra, sort_keys=True),
                **(metadata or {}),
            }
        )


def _kept(array: np.ndarray, exact: bool) -> tuple[str, np.ndarray]:
    if schema.is_float(array.dtype) and (not exact or array.dtype == np.float16):
        with np.errstate(over="ignore"):
            half = array.astype("<f2")
        if np.array_equal(np.isfinite(half), np.isfinite(array.astype(np.float32))):
            return "fp16", np.ascontiguousarray(half).reshape(-1).view(np.int8)
    return "raw", np.ascontiguousarray(array).reshape(-1).view(np.int8)


def _carrier(dtypes: Mapping[str, tuple[str, int]]) -> tuple[str, bool]:
    total = {"float16": 0, "float32": 0}
    for kind, size in dtypes.values():
        if kind in total:
            total[kind] += max(size, 1)
    carrier = "float16" if total["float16"] > total["float32"] else "float32"
    return carrier, any(kind != carrier for kind, _ in dtypes.values())


def _check(name: str, shape: tuple[int, ...], seen: set[str]) -> None:
    if name in seen:
        raise WeightsError(f"weight {name!r} was given twice")
    seen.add(name)
    if any(size >= 1 << 31 for size in shape):
        raise WeightsError(f"weight {name!r} has shape {list(shape)}, past int32")


@contextmanager
def _row_writer(path: Path, arrow: Any, compression: str | None) -> Iterator[RowWriter]:
    with atomic_path(path) as part, part.open("wb", buffering=_BUFFER) as file:
        yield RowWriter(file, arrow, compression)
