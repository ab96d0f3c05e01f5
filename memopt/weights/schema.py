"""The two weight schemas, how to tell them apart, and how names and dtypes are kept.

V1 (float), one weight per row:

    layer_name string, weight_name string, weight_data list<float16 | float>, shape list<int32>,
    dtype string [, weight_bytes binary]

``weight_data`` has the type that most bytes of the model have, float16 or float32. ``dtype`` names
each weight's own type. A weight of another type (bfloat16, int64 buffers, the odd float32 in a
float16 model) has a null ``weight_data`` and its little-endian bytes in ``weight_bytes``: no column
ever holds numbers that mean something else, and every bit is kept. A file with only the first four
columns is read as well; the list type is then the dtype.

V2 (quantized):

    layer_name, weight_name, weight_data list<int8>, shape list<int32>,
    quant_type string ('int8' | 'int4' | 'int2' | 'fp16' | 'raw'),
    scales list<float>, zero_points list<int8>, quant_axis int32

V2.1 is V2 with one column more, ``minima list<float>``: what is added to ``scale * (integer -
zero_point)``, in the scales' layout, empty for a weight without. GGUF's types that count up from a
minimum need it. A memopt that knows only V2 refuses such a file by its version.

Files of others: V1's ``weight_data`` may be any float; V2 without ``memopt.packing`` may have int4
and int2 one value a byte; 'fp16' rows with one byte a value are refused, as their fractions were
lost in the int8 column.

int4 and int2 are packed two and four per byte over the flattened tensor, lowest bits first (the
layout of ONNX's INT4 tensors). ``zero_points`` is empty for a symmetric weight. ``quant_axis`` is
-1 for one scale per tensor. With group size 0 there is one scale per index of that axis; with group
size g the axis is cut into blocks of g and ``scales`` is the flattened array of the weight's shape
with that axis replaced by ceil(size / g), as in ONNX's blocked DequantizeLinear. 'fp16' rows hold
the bytes of float16 values; 'raw' rows hold the bytes of what is not a float16-safe float (int64
buffers), with the dtype in the file metadata. ``memopt.rows`` in the metadata is a JSON object:
weight name -> {"group_size": g} or {"dtype": d} where they are not 0 and float32.

A weight's full checkpoint name is ``layer_name + "." + weight_name``, or ``weight_name`` alone
where ``layer_name`` is empty.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pyarrow as pa

from memopt.errors import WeightsError
from memopt.registry import nearest

VERSION_KEY = "memopt.schema_version"
ROWS_KEY = "memopt.rows"
SOURCE_KEY = "memopt.source"
PACKING_KEY = "memopt.packing"
PACKING = "flat-little-endian"  # lowest bits first over the flattened tensor

_STRING = pa.string()
_NAMES = [("layer_name", _STRING), ("weight_name", _STRING)]
_SHAPE = ("shape", pa.list_(pa.int32()))

V2 = pa.schema(
    [
        *_NAMES,
        ("weight_data", pa.list_(pa.int8())),
        _SHAPE,
        ("quant_type", _STRING),
        ("scales", pa.list_(pa.float32())),
        ("zero_points", pa.list_(pa.int8())),
        ("quant_axis", pa.int32()),
    ]
)
MINIMA = "minima"
V2_1 = V2.append(pa.field(MINIMA, pa.list_(pa.float32())))
MINIMA_VERSION = "2.1"
QUANT_BITS = {"int8": 8, "int4": 4, "int2": 2}

_DTYPES: dict[str, np.dtype] = {
    str(np.dtype(t)): np.dtype(t)
    for t in (
        *(np.float16, np.float32, np.float64, np.int8, np.int16, np.int32, np.int64),
        *(np.uint8, np.uint16, np.uint32, np.uint64, np.bool_, np.complex64),
        *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
    )
}
_CARRIERS = {"float16": pa.float16(), "float32": pa.float32()}


def v1(carrier: str, *, with_bytes: bool) -> pa.Schema:
    """Return schema V1 with ``weight_data`` of type ``carrier`` ('float16' or 'float32').

    >>> v1("float16", with_bytes=False).names
    ['layer_name', 'weight_name', 'weight_data', 'shape', 'dtype']
    """
    fields = [*_NAMES, ("weight_data", pa.list_(_CARRIERS[carrier])), _SHAPE, ("dtype", _STRING)]
    return pa.schema(fields + ([("weight_bytes", pa.binary())] if with_bytes else []))


def numpy_dtype(name: str) -> np.dtype:
    """Return the numpy dtype called ``name``, bfloat16 and float8 included.

    >>> numpy_dtype("bfloat16").itemsize
    2
    """
    if name not in _DTYPES:
        raise WeightsError(f"dtype {name!r} is not supported", fix=nearest(name, _DTYPES))
    return _DTYPES[name]


def is_float(dtype: np.dtype) -> bool:
    """Whether values of ``dtype`` are real floating-point numbers."""
    return bool(dtype.kind == "f" or dtype.name.startswith(("bfloat", "float")))


def split_name(name: str) -> tuple[str, str]:
    """Split a checkpoint name into (layer_name, weight_name); :func:`join_name` undoes it exactly.

    >>> split_name("encoder.layer.0.output.dense.bias")
    ('encoder.layer.0.output.dense', 'bias')
    >>> split_name("logit_scale")
    ('', 'logit_scale')
    """
    layer, _, weight = name.rpartition(".")
    return (layer, weight) if layer and weight else ("", name)


def join_name(layer: str, weight: str) -> str:
    """Return the checkpoint name of a row, also where one column holds all of it.

    >>> join_name("encoder.dense", "bias"), join_name("dense", "dense.bias"), join_name("scale", "")
    ('encoder.dense.bias', 'dense.bias', 'scale')
    """
    if not layer or weight.startswith(f"{layer}."):
        return weight
    return f"{layer}.{weight}" if weight else layer


def detect_version(schema: pa.Schema, *, origin: str) -> int:
    """Return 1 or 2, read from the columns and their types; the metadata only confirms it.

    Raises:
        WeightsError: a column is missing or has a type of neither schema, or the metadata
            contradicts the columns.

    >>> detect_version(V2, origin="x.parquet")
    2
    """
    names = set(schema.names)
    only_v2 = {"quant_type", "scales", "zero_points", "quant_axis"}
    version = 2 if names & only_v2 else 1
    needed = V2.names if version == 2 else v1("float32", with_bytes=False).names[:4]
    if version == 2 and MINIMA in names:
        needed = V2_1.names
    missing = [name for name in needed if name not in names]
    if missing:
        raise WeightsError(
            f"{origin} has no column {', '.join(map(repr, missing))}, schema V{version} needs it",
            fix="convert the model again",
        )
    for name in needed:
        kind = schema.field(name).type
        if not _type_fits(name, kind, version):
            raise WeightsError(
                f"{origin}: column {name!r} has type {kind}, which is not schema V{version}",
                fix="convert the model again",
            )
    said = (schema.metadata or {}).get(VERSION_KEY.encode())
    shown = MINIMA_VERSION if needed == V2_1.names else str(version)
    if said is not None and said != shown.encode():
        raise WeightsError(
            f"{origin}: the metadata says schema V{said.decode(errors='replace')}, "
            f"the columns are schema V{shown}",
            fix="the file was altered; convert the model again",
        )
    return version


def _type_fits(name: str, kind: pa.DataType, version: int) -> bool:
    types = pa.types
    if name in ("layer_name", "weight_name", "quant_type"):
        return bool(types.is_string(kind) or types.is_large_string(kind))
    if name == "quant_axis":
        return bool(types.is_integer(kind))
    if not (types.is_list(kind) or types.is_large_list(kind)):
        return False
    value = kind.value_type
    if name == "weight_data" and version == 1:
        return bool(types.is_floating(value))
    floats = name in ("scales", MINIMA)
    return bool(types.is_floating(value) if floats else types.is_integer(value))
