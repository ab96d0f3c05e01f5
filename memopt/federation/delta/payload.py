"""The payload: a table of tensors and their bodies, checked in full before memory is taken.

    "MEMOPT-DELTA" | version u16 | stored table bytes u32 | table bytes u32 | table (zstd) |
    bodies, in table order, nothing between them | SHA-256 over everything before it

The table is JSON: ``{"kind", "dictionary", "tensors": [row, ...]}``, a row
``[name, operation, dtype, shape, codec, stored bytes, compressed, parameter]``; tensors that the
table does not name stay as they are. Little-endian throughout.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard as zstd

from memopt.errors import SyncError
from memopt.federation.delta.arrays import DTYPES, Array, Weights, dtype_name
from memopt.federation.delta.codecs import CODECS, Bytes, check_param
from memopt.federation.failures import SyncFailure
from memopt.federation.limits import (
    Limits,
    canonical_json,
    check_count,
    check_hash,
    check_keys,
    check_shape,
    check_tensor_name,
    strict_json,
)

MAGIC = b"MEMOPT-DELTA"
VERSION = 1
_HEAD = struct.Struct("<HII")
_DIGEST = 32
_NO_DICTIONARY = ""
KINDS = ("delta", "full")
_NOTHING = np.empty(0, np.uint8)
# zstd refuses windows above this; 128 MiB is what `zstd --long=27` makes.
_MAX_WINDOW = 1 << 27


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRow:
    """One tensor of the table. ``operation``: put (all of it), change (against the base), drop."""

    name: str
    operation: str
    dtype: str = "uint8"
    shape: tuple[int, ...] = ()
    codec: int = 0
    stored: int = 0
    compressed: bool = False
    param: int = 0

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def plain(self) -> int:
        """Bytes of the decompressed body."""
        if self.operation == "drop":
            return 0
        return CODECS[self.codec].length(self.count, self.dtype, self.param)


OPERATIONS = ("put", "change", "drop")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What a payload says it holds."""

    kind: str
    rows: tuple[TensorRow, ...]
    dictionary: str = _NO_DICTIONARY  # SHA-256 of the zstd dictionary, or nothing

    @property
    def declared_bytes(self) -> int:
        """Bytes of all tensors the table puts or changes, once decoded."""
        return sum(r.count * DTYPES[r.dtype].itemsize for r in self.rows if r.operation != "drop")


class Compressor:
    """zstd with a level and an optional dictionary, small bodies left alone when that is smaller.

    Args:
        level: zstd level, -7 to 22.
        dictionary: bytes of a trained or raw-content dictionary; the receiver needs the same.
        off: leave every body as it is; the table of names stays what the format says, zstd.
    """

    def __init__(self, level: int = 3, dictionary: bytes = b"", *, off: bool = False) -> None:
        if not -7 <= level <= 22:
            raise SyncError(f"zstd level {level} is not in -7..22")
        self._off = off
        dictionary = b"" if off else dictionary
        self.dictionary = hashlib.sha256(dictionary).hexdigest() if dictionary else _NO_DICTIONARY
        known = zstd.ZstdCompressionDict(dictionary) if dictionary else None
        self._bodies = zstd.ZstdCompressor(level=level, dict_data=known)
        # Quantized noise has no repeats worth naming: the short matches that zstd finds by chance
        # cost more than the Huffman codes they replace (3.87 bits a value with 15 levels in use,
        # 3.32 without them; the entropy is 3.28). Higher levels only look for more matches.
        plain = zstd.ZstdCompressionParameters.from_level(
            min(level, 1), strategy=zstd.STRATEGY_FAST, min_match=7
        )
        self._noise = zstd.ZstdCompressor(compression_params=plain, dict_data=known)
        self._table = zstd.ZstdCompressor(level=max(level, 3))

    def body(self, data: Bytes, *, noise: bool = False) -> tuple[bytes, bool]:
        """Return the stored form and whether it is compressed.

        Args:
            data: the plain body.
            noise: it is quantized numbers, without structure beyond their frequencies.
        """
        if self._off:
            return data.tobytes(), False
        packed = (self._noise if noise else self._bodies).compress(data.data)
        return (packed, True) if len(packed) < data.nbytes else (data.tobytes(), False)

    def table(self, data: bytes) -> bytes:
        """Compress the table, without the dictionary: it names the dictionary."""
        packed: bytes = self._table.compress(data)
        return packed


def train_dictionary(samples: Sequence[bytes], size: int = 16 * 1024) -> bytes:
    """Return a zstd dictionary for many small tensors alike (see ``zstd --train``).

    Raises:
        SyncError: there is too little material to learn from.
    """
    try:
        trained: bytes = zstd.train_dictionary(size, list(samples)).as_bytes()
    except zstd.ZstdError as error:
        raise SyncError(
            f"a dictionary cannot be trained from {len(samples)} samples ({error})",
            fix="give more payloads, or leave the dictionary out",
        ) from error
    return trained


def pack(table: Table, bodies: Sequence[bytes], compressor: Compressor) -> bytes:
    """Return the payload of ``table``, whose rows' bodies are ``bodies`` in the same order."""
    rows = [
        [r.name, OPERATIONS.index(r.operation)]
        if r.operation == "drop"
        else [
            *(r.name, OPERATIONS.index(r.operation), r.dtype, list(r.shape)),
            *(r.codec, r.stored, int(r.compressed), r.param),
        ]
        for r in table.rows
    ]
    text = canonical_json({"kind": table.kind, "dictionary": table.dictionary, "tensors": rows})
    stored = compressor.table(text)
    parts = [MAGIC, _HEAD.pack(VERSION, len(stored), len(text)), stored, *bodies]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return b"".join((*parts, digest.digest()))


def read_table(payload: bytes | memoryview, limits: Limits) -> tuple[Table, int]:
    """Check a payload's hash and table; return the table and the offset of the first body.

    Allocates at most the declared, limited size of the table.

    Raises:
        SyncFailure: anything is not as it must be.
    """
    view = memoryview(payload)
    start = len(MAGIC) + _HEAD.size
    if len(view) > limits.payload_bytes:
        raise SyncFailure(
            "too-large", f"payload has {len(view)} bytes, the limit is {limits.payload_bytes}"
        )
    if len(view) < start + _DIGEST or bytes(view[: len(MAGIC)]) != MAGIC:
        raise SyncFailure("malformed", "payload does not start like one, or is cut short")
    if hashlib.sha256(view[:-_DIGEST]).digest() != bytes(view[-_DIGEST:]):
        raise SyncFailure("corrupt", "payload does not match its SHA-256")
    version, stored, plain = _HEAD.unpack_from(view, len(MAGIC))
    if version != VERSION:
        raise SyncFailure("unknown-version", f"payload version {version} is not {VERSION}")
    check_count("table size", plain, limits.header_bytes)
    if start + stored + _DIGEST > len(view):
        raise SyncFailure("malformed", "payload's table is longer than the payload")
    text = _inflate(view[start : start + stored], plain, b"", what="table")
    # A row and its shape for each tensor; some more, so that too many tensors are called that.
    fields = strict_json(text, what="payload table", containers=3 * limits.tensors + 100)
    table = _parse_table(fields, limits)
    bodies = len(view) - start - stored - _DIGEST
    if sum(r.stored for r in table.rows) != bodies:
        raise SyncFailure("malformed", "payload's bodies do not add up to its length")
    return table, start + stored


def _parse_table(raw: dict[str, Any], limits: Limits) -> Table:
    check_keys("payload table", raw, ("kind", "dictionary", "tensors"))
    if raw["kind"] not in KINDS:
        raise SyncFailure("malformed", "payload kind is neither delta nor full")
    if raw["dictionary"] != _NO_DICTIONARY:
        check_hash("dictionary", raw["dictionary"])
    if not isinstance(raw["tensors"], list):
        raise SyncFailure("malformed", "tensors is not a list")
    check_count("number of tensors", len(raw["tensors"]), limits.tensors)
    rows = tuple(_parse_row(row, limits) for row in raw["tensors"])
    if len({r.name for r in rows}) != len(rows):
        raise SyncFailure("malformed", "a tensor is named twice")
    if raw["kind"] == "full" and any(r.operation != "put" for r in rows):
        raise SyncFailure("malformed", "a full payload can only put tensors")
    table = Table(kind=raw["kind"], rows=rows, dictionary=raw["dictionary"])
    if table.declared_bytes > limits.total_bytes:
        raise SyncFailure(
            "too-large",
            f"tensors have {table.declared_bytes} bytes, the limit is {limits.total_bytes}",
        )
    return table


def _parse_row(row: object, limits: Limits) -> TensorRow:
    if not isinstance(row, list) or len(row) not in (2, 8):
        raise SyncFailure("malformed", "a tensor's row has not 2 or 8 fields")
    name = check_tensor_name(row[0], limits)
    operation = OPERATIONS[check_count(f"{name}: operation", row[1], len(OPERATIONS) - 1)]
    if (operation == "drop") != (len(row) == 2):
        raise SyncFailure("malformed", f"{name}: fields do not suit operation {operation}")
    if operation == "drop":
        return TensorRow(name=name, operation=operation)
    dtype = row[2]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise SyncFailure("malformed", f"{name}: unknown dtype")
    shape = check_shape(name, row[3], DTYPES[dtype].itemsize, limits)
    if type(row[4]) is not int or not 0 <= row[4] < len(CODECS):
        raise SyncFailure("unknown-codec", f"{name}: unknown codec", fix="update the receiver")
    codec = CODECS[row[4]]
    if codec.needs_base != (operation == "change"):
        raise SyncFailure("malformed", f"{name}: codec {codec.name} does not suit {operation}")
    whole = TensorRow(
        name=name,
        operation=operation,
        dtype=dtype,
        shape=shape,
        codec=row[4],
        stored=check_count(f"{name}: stored bytes", row[5], limits.payload_bytes),
        compressed=bool(check_count("flag", row[6], 1)),
        param=check_param(codec, dtype, math.prod(shape), row[7]),
    )
    check_count(f"{name}: body", whole.plain, 2 * limits.total_bytes)
    if not whole.compressed and whole.stored != whole.plain:
        raise SyncFailure("malformed", f"{name}: body has not the length its shape asks for")
    return whole


def _inflate(data: memoryview, expected: int, dictionary: bytes, *, what: str) -> bytes:
    try:
        # Decompression trusts the frame's own size field for its buffer: compare it first.
        frame = zstd.get_frame_parameters(data)
        if frame.content_size != expected:
            raise SyncFailure("malformed", f"{what}: zstd frame does not declare {expected} bytes")
        if frame.window_size > _MAX_WINDOW:
            raise SyncFailure("too-large", f"{what}: zstd window is over {_MAX_WINDOW} bytes")
        decompressor = zstd.ZstdDecompressor(
            dict_data=zstd.ZstdCompressionDict(dictionary) if dictionary else None
        )
        plain: bytes = decompressor.decompress(
            data, max_output_size=expected, allow_extra_data=False
        )
    except zstd.ZstdError as error:
        raise SyncFailure("corrupt", f"{what}: not a zstd frame ({error})") from None
    if len(plain) != expected:
        raise SyncFailure("malformed", f"{what}: decompresses to another length")
    return plain


def unpack(
    payload: bytes | memoryview,
    base: Weights,
    limits: Limits,
    dictionaries: Mapping[str, bytes] | None = None,
    *,
    kind: str | None = None,
) -> dict[str, Array]:
    """Return the weights that ``payload`` makes of ``base``; ``base`` is left as it is.

    Args:
        kind: what its manifest says it is, ``delta`` or ``full``; None takes either.

    Raises:
        SyncFailure: the payload is damaged, over a limit, or does not suit ``base``.
    """
    table, offset = read_table(payload, limits)
    if kind not in (None, table.kind):
        raise SyncFailure("malformed", f"a {table.kind} payload with a manifest of kind {kind}")
    dictionary = b""
    if table.dictionary != _NO_DICTIONARY:
        dictionary = (dictionaries or {}).get(table.dictionary, b"")
        if not dictionary:
            raise SyncFailure(
                "unknown-dictionary",
                f"payload needs zstd dictionary {table.dictionary[:16]}",
                fix="give both ends the same --dictionary",
            )
    result: dict[str, Array] = {} if table.kind == "full" else dict(base)
    _check_against(table, base, limits)
    view = memoryview(payload)
    for row in table.rows:
        if row.operation == "drop":
            del result[row.name]
            continue
        stored = view[offset : offset + row.stored]
        offset += row.stored
        if row.compressed:
            stored = memoryview(_inflate(stored, row.plain, dictionary, what=row.name))
        result[row.name] = decode_row(row, np.frombuffer(stored, np.uint8), base.get(row.name))
    return result


def decode_row(row: TensorRow, body: Bytes, base: Array | None) -> Array:
    """Return the tensor of one row; the array owns its memory."""
    known = _NOTHING if base is None else base
    decoded = CODECS[row.codec].decode(known, body, row.dtype, row.param).reshape(row.shape)
    return decoded if decoded.flags.writeable else decoded.copy()


def _check_against(table: Table, base: Weights, limits: Limits) -> None:
    sizes = {} if table.kind == "full" else {name: a.nbytes for name, a in base.items()}
    for row in table.rows:
        known = base.get(row.name) if table.kind == "delta" else None
        if row.operation == "drop":
            if known is None:
                raise SyncFailure("need-full", f"{row.name}: cannot drop what is not there")
            del sizes[row.name]
            continue
        if row.operation == "change" and (
            known is None or known.shape != row.shape or dtype_name(known) != row.dtype
        ):
            raise SyncFailure("need-full", f"{row.name}: the base has another shape or dtype")
        sizes[row.name] = row.count * DTYPES[row.dtype].itemsize
    if sum(sizes.values()) > limits.total_bytes or len(sizes) > limits.tensors:
        raise SyncFailure("too-large", "the weights would grow over the limit")
