"""The content of a row in one cell: zstd-compressed when archived, encrypted when a key is set.

Media of an archived row, and all content of an encrypted one; in a plain store the words of the
archive stay in their columns, where they are found. A payload is four fields in the order text,
vision_data, audio_data, summary, each a presence byte and, when present, a little-endian uint64
length and the bytes. ``codec`` of the row says what was done to it, innermost first: 'zstd',
'aesgcm2:KEY_ID', 'zstd+aesgcm2:KEY_ID'. A compressed payload starts with its own length as uint64.

What is encrypted begins with a tie (:func:`tie`) to the store, the memory, the column and the
codec, which is checked on opening: whoever can write the files and has no key cannot put the
content of one memory under another. Cells of before, 'aesgcm:KEY_ID', have no tie; they open until
the store is bound (see :func:`memopt.memory.rotate`), and are tied whenever they are written.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Protocol, cast

import pyarrow as pa

from memopt.errors import ConsolidationError, MemoptError
from memopt.memory.model.rows import with_columns

CONTENT = ("text", "vision_data", "audio_data", "summary")
_MEDIA = ("vision_data", "audio_data")
ZSTD = "zstd"
# Archived rows are written once and rarely read: a level where zstd still unpacks at full speed.
_LEVEL = 12
_LENGTH = struct.Struct("<Q")
_LOOSE, _TIED = "aesgcm:", "aesgcm2:"
# No payload of before begins so: its first byte is a field mark, or its first eight a length.
_TIE = b"memopt\xb2\xff"
_DIGEST_BYTES = 16


class Cipher(Protocol):
    """Authenticated encryption of a cell; memopt.memory.privacy.keys has AES-256-GCM."""

    @property
    def key_id(self) -> str:
        """A public name of the key that encrypts."""

    def encrypt(self, data: bytes) -> bytes:
        """Return ``data`` sealed; two calls give two different results."""

    def decrypt(self, data: bytes) -> bytes:
        """Return what was sealed; any exception when the key or the data is wrong."""


def encode_fields(values: Sequence[bytes | None]) -> bytes:
    r"""Join optional byte strings into one.

    >>> decode_fields(encode_fields([b"a", None, b""]))
    [b'a', None, b'']
    """
    parts: list[bytes] = []
    for value in values:
        if value is None:
            parts.append(b"\0")
        else:
            parts += [b"\1", _LENGTH.pack(len(value)), value]
    return b"".join(parts)


def decode_fields(data: bytes) -> list[bytes | None]:
    """Split what :func:`encode_fields` joined.

    Raises:
        ConsolidationError: the bytes are cut short or are no payload.
    """
    values: list[bytes | None] = []
    at = 0
    while at < len(data):
        if data[at] == 0:
            values.append(None)
            at += 1
            continue
        start = at + 1 + _LENGTH.size
        if data[at] != 1 or start > len(data):
            raise ConsolidationError("a packed memory is damaged: bad field mark")
        (length,) = _LENGTH.unpack_from(data, at + 1)
        at = start + length
        if at > len(data):
            raise ConsolidationError("a packed memory is damaged: it is cut short")
        values.append(data[start:at])
    return values


def tied_under(codec: str, key_id: str) -> bool:
    """Say whether a cell is encrypted under a key and tied to its row.

    >>> tied_under("zstd+aesgcm2:k1", "k1"), tied_under("aesgcm:k1", "k1")
    (True, False)
    """
    return codec.split("+")[-1] == f"{_TIED}{key_id}"


def tie(data: bytes, memory_id: str, column: str, codec: str, store_key: bytes) -> bytes:
    """Return ``data`` after 24 bytes that only this cell of this store begins with.

    In the plain text rather than beside it, since not every :class:`Cipher` takes associated data;
    authenticated encryption protects it there as well.

    Args:
        store_key: a secret of the store, up to 64 bytes.
    """
    return _tie_of(memory_id, column, codec, store_key) + data


def untie(data: bytes, memory_id: str, column: str, codec: str, store_key: bytes) -> bytes | None:
    """Return what :func:`tie` was given; None for a cell of another place.

    >>> cell = tie(b"x", "a", "packed", "aesgcm2:k1", b"store")
    >>> untie(cell, "a", "packed", "aesgcm2:k1", b"store")
    b'x'
    >>> untie(cell, "b", "packed", "aesgcm2:k1", b"store") is None
    True
    """
    head = _tie_of(memory_id, column, codec, store_key)
    return data[len(head) :] if data.startswith(head) else None


def is_tied(data: bytes) -> bool:
    """Say whether decrypted ``data`` begins with any tie."""
    return data.startswith(_TIE)


def seal(
    rows: pa.Table, *, compress: bool, cipher: Cipher | None, store_key: bytes = b""
) -> pa.Table:
    """Move the content of every row into ``packed``.

    Under a cipher all of it. Without one the words stay where they are, text and summary: they are
    found by the word index, and Lance compresses them as well as zstd does one by one. A row
    without media is then left as it is. Packed rows must be opened first (:func:`unseal`).
    """
    codec = "+".join(([ZSTD] if compress else []) + ([f"{_TIED}{cipher.key_id}"] if cipher else []))
    if not codec or not rows.num_rows:
        return rows
    if any(rows["codec"].to_pylist()):
        raise ConsolidationError("rows are packed already", fix="unpack them first")
    fields = CONTENT if cipher else _MEDIA
    columns = [
        rows[name].to_pylist() if name in fields else [None] * rows.num_rows for name in CONTENT
    ]
    packed: list[bytes | None] = []
    for memory_id, *values in zip(rows["memory_id"].to_pylist(), *columns, strict=True):
        data = None
        if cipher or any(value is not None for value in values):
            data = encode_fields([_as_bytes(value) for value in values])
            data = _compressed(data) if compress else data
        if data is not None and cipher:
            data = cipher.encrypt(tie(data, memory_id, "packed", codec, store_key))
        packed.append(data)
    codecs = ["" if data is None else codec for data in packed]
    return with_columns(rows, **dict.fromkeys(fields), codec=codecs, packed=packed)


def unseal(
    rows: pa.Table, cipher: Cipher | None, store_key: bytes = b"", *, only_tied: bool = False
) -> pa.Table:
    """Return ``rows`` with the content back in its columns; plain rows pass as they are.

    Args:
        store_key: what :func:`seal` was given.
        only_tied: refuse what is not encrypted and tied to its row.

    Raises:
        ConsolidationError: a row is encrypted and the key is absent or wrong, it is damaged, or its
            content is that of another row.
    """
    codecs = rows["codec"].to_pylist()
    ids = rows["memory_id"].to_pylist()
    if only_tied:
        for memory_id, codec in zip(ids, codecs, strict=True):
            if not codec.split("+")[-1].startswith(_TIED):
                raise _misplaced(memory_id, "is not encrypted as all of this store is")
    if not any(codecs):
        return rows
    packed = rows["packed"].to_pylist()
    columns = {name: rows[name].to_pylist() for name in CONTENT if name in rows.column_names}
    for at, codec in enumerate(codecs):
        if not codec:
            continue
        values = decode_fields(_unwrap(packed[at], codec, ids[at], cipher, store_key))
        for name, value in zip(CONTENT, values, strict=False):
            if name in columns and value is not None:
                text = name in ("text", "summary") and value is not None
                columns[name][at] = value.decode() if text else value
    return with_columns(rows, **columns, codec="", packed=None)


def open_secret(cipher: Cipher, data: bytes, key_id: str | None) -> bytes:
    """Decrypt ``data``, which was encrypted under ``key_id``.

    Raises:
        ConsolidationError: the key does not open it.
    """
    try:
        return cipher.decrypt(data)
    except Exception as error:
        if isinstance(error, MemoptError):
            raise
        raise ConsolidationError(
            f"the key {cipher.key_id!r} does not open what key {key_id!r} encrypted",
            fix="give the key this store was written with",
        ) from error


def _compressed(data: bytes) -> bytes:
    codec = pa.Codec(ZSTD, compression_level=_LEVEL)
    return _LENGTH.pack(len(data)) + cast("bytes", codec.compress(data, asbytes=True))


def _tie_of(memory_id: str, column: str, codec: str, store_key: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES, key=store_key, person=b"memopt cell")
    for part in (memory_id, column, codec):
        name = part.encode()
        digest.update(_LENGTH.pack(len(name)) + name)
    return _TIE + digest.digest()


def _misplaced(memory_id: str, what: str) -> ConsolidationError:
    return ConsolidationError(
        f"memory {memory_id} was changed from outside: its content {what}",
        fix="restore it from a copy of the store, or delete it",
    )


def _unwrap(
    data: bytes | None, codec: str, memory_id: str, cipher: Cipher | None, store_key: bytes
) -> bytes:
    if data is None:
        raise ConsolidationError(f"memory {memory_id} is damaged: packed content is missing")
    *rest, last = codec.split("+")
    mark = next((mark for mark in (_LOOSE, _TIED) if last.startswith(mark)), None)
    if mark:
        key_id = last.removeprefix(mark)
        if cipher is None:
            raise ConsolidationError(
                f"memory {memory_id} is encrypted with key {key_id!r} and no key was given",
                fix="open the store with its key",
            )
        try:
            data = open_secret(cipher, data, key_id)
        except MemoptError as error:
            raise ConsolidationError(
                f"memory {memory_id} does not open: {error.problem}", fix=error.fix
            ) from error
        # An old mark opens no tied cell, or a cell could be moved by changing its mark.
        own = None if mark == _LOOSE and is_tied(data) else data
        if mark == _TIED:
            own = untie(data, memory_id, "packed", codec, store_key)
        if own is None:
            raise _misplaced(memory_id, "is that of another memory or store")
        data = own
    else:
        rest.append(last)
    if rest not in ([], [ZSTD]):
        raise ConsolidationError(
            f"memory {memory_id} has the unknown codec {codec!r}", fix="upgrade memopt"
        )
    if rest:
        try:
            (length,) = _LENGTH.unpack_from(data)
            return cast("bytes", pa.decompress(data[_LENGTH.size :], length, ZSTD, asbytes=True))
        except (struct.error, pa.ArrowException, OSError, MemoryError) as error:
            raise ConsolidationError(f"memory {memory_id} is damaged: {error}") from error
    return data


def _as_bytes(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value
