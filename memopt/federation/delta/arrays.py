"""Named arrays: the dtypes that travel, their bits, and the hash both ends compare."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from memopt.errors import SyncError
from memopt.federation.failures import SyncFailure

Array: TypeAlias = NDArray[np.generic]
Weights: TypeAlias = Mapping[str, Array]

FLOATS: dict[str, np.dtype[np.generic]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
# Integers travel losslessly only: quantized weights, counters, an adapter's config file.
INTEGERS: dict[str, np.dtype[np.generic]] = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool")
}
DTYPES = {**FLOATS, **INTEGERS}
_DOMAIN = b"memopt weights 1\0"


def dtype_name(array: Array) -> str:
    """Return the wire name of an array's dtype.

    >>> dtype_name(np.zeros(1, "float32"))
    'float32'
    """
    name = array.dtype.name
    if name not in DTYPES:
        raise SyncError(f"dtype {name} cannot be synchronised", fix="known: " + ", ".join(DTYPES))
    return name


def normal(array: Array) -> Array:
    """Return ``array`` little-endian and C-contiguous; a view where it is so already."""
    array = np.asarray(array)
    return np.ascontiguousarray(array, dtype=DTYPES[dtype_name(array)]).reshape(array.shape)


def raw(array: Array) -> NDArray[np.uint8]:
    """Return the bytes of a normal array as a flat uint8 view."""
    return array.reshape(-1).view(np.uint8)


def total_bytes(weights: Weights) -> int:
    """Return the size of all tensors together, in bytes."""
    return sum(array.nbytes for array in weights.values())


def fp32_bytes(weights: Weights) -> int:
    """Return what the tensors weigh with floats in float32: what savings are given against."""
    return sum(
        array.size * 4 if array.dtype.name in FLOATS else array.nbytes for array in weights.values()
    )


def weights_hash(weights: Weights) -> str:
    """Return the SHA-256 of the canonical form: names in order, dtype, shape, little-endian bytes.

    Two mappings have the same hash exactly when they hold the same names, dtypes, shapes and bits.

    >>> weights_hash({"a": np.zeros(2, "float32")})[:12]
    '22f4c7d7448f'
    """
    digest = hashlib.sha256(_DOMAIN)
    for name in sorted(weights):
        array = normal(weights[name])
        label = f"{name}\0{dtype_name(array)}".encode()
        digest.update(struct.pack("<II", len(label), array.ndim))
        digest.update(label)
        digest.update(struct.pack(f"<{array.ndim}Q", *array.shape))
        digest.update(raw(array).data)
    return digest.hexdigest()


def check_weights(weights: Weights) -> dict[str, Array]:
    """Return a normalised copy of the mapping (arrays are views where they can be).

    Raises:
        SyncError: no tensors, or a dtype that does not travel.
    """
    if not weights:
        raise SyncError("there are no tensors to synchronise")
    return {name: normal(array) for name, array in weights.items()}


def work_dtype(name: str) -> np.dtype[np.generic]:
    """Return the dtype a lossy codec computes in: float64 for float64, float32 for the rest."""
    return np.dtype("<f8") if name == "float64" else np.dtype("<f4")


def require_same(expected: str, weights: Weights, *, what: str) -> None:
    """Raise ``wrong-result`` unless the weights hash to ``expected``."""
    actual = weights_hash(weights)
    if actual != expected:
        raise SyncFailure(
            "wrong-result", f"{what} hash to {actual[:16]}, the signed hash is {expected[:16]}"
        )
