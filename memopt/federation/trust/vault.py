"""Weights at rest: files as they are, or sealed under a key; whole, appended to, or read in part.

A sealed file is ``MAGIC`` and records: plain length (uint32, big endian), a random 96-bit nonce,
AES-256-GCM ciphertext and tag (NIST SP 800-38D). Each record's number and length are authenticated
with it, so that none can be moved or changed; a file cut at a record's end is found by the hash
that a signed manifest holds of everything that is kept here. Appending seals as it goes: a payload
that is still arriving is never on disk in the clear.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memopt.errors import ConfigurationError
from memopt.federation.failures import SyncFailure
from memopt.files import atomic_path, open_plain
from memopt.sealing import KEY_VARIABLE, NONCE_BYTES, TAG_BYTES, Envelope, WrongKey

MAGIC = b"MEMOPT-SEAL1"
MARK = "sealed"
_LENGTH = struct.Struct(">I")
# Bytes of a record that are not its content.
_AROUND = _LENGTH.size + NONCE_BYTES + TAG_BYTES
# Also the most that is handed out at once: half of a chunk on the wire.
PART_BYTES = 1 << 20
_FIX = f"give the key with --key-file or {KEY_VARIABLE}"


@dataclass(frozen=True, slots=True)
class Vault:
    """How the files of a store or of a node's state are kept.

    Args:
        key: 32 bytes; None keeps files as they are.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "w"
    >>> Vault(bytes(32)).write(path, [b"weights"])
    >>> b"weights" in path.read_bytes(), Vault(bytes(32)).read(path)
    (False, b'weights')
    """

    key: bytes | None = field(default=None, repr=False)

    def admit(self, folder: Path, files: Iterable[Path] = ()) -> None:
        """Check that the key is the folder's; seal those of ``files`` that are still plain.

        Raises:
            ConfigurationError: the folder is sealed, and the key is absent or another one.
        """
        mark = folder / MARK
        if self.key is None:
            if mark.exists():
                raise ConfigurationError(f"{folder} is encrypted and no key was given", fix=_FIX)
            return
        try:
            if not mark.exists():
                # The mark first: nobody opens a half-sealed folder without the key.
                self.write(mark, [MARK.encode()])
            elif self.read(mark) != MARK.encode():
                raise ConfigurationError(f"{mark} is damaged", fix="take it from a backup")
        except SyncFailure as error:
            raise ConfigurationError(f"the key does not open {folder}", fix=_FIX) from error
        for path in files:
            if not self.sealed(path):
                self.write(path, Vault().parts(path))

    def sealed(self, path: Path) -> bool:
        """Whether the file is sealed; without a key it is what it is, whatever its first bytes."""
        if self.key is None:
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC

    def size(self, path: Path) -> int:
        """Return how many bytes :meth:`read` gives."""
        if not self.sealed(path):
            return path.stat().st_size
        return sum(length for _, length in _records(path))

    def read(self, path: Path) -> bytes:
        """Return the whole content."""
        return b"".join(self.parts(path)) if self.sealed(path) else path.read_bytes()

    def parts(self, path: Path, offset: int = 0) -> Iterator[bytes]:
        """Yield the content from ``offset`` on, at most :data:`PART_BYTES` at a time.

        Raises:
            SyncFailure: ``storage`` when the key does not open the file, or it was changed.
        """
        if not self.sealed(path):
            with path.open("rb") as file:
                file.seek(offset)
                while data := file.read(PART_BYTES):
                    yield data
            return
        start = 0
        with path.open("rb") as file:
            for number, (at, length) in enumerate(_records(path)):
                if start + length > offset:
                    file.seek(at)
                    data = self._open(file.read(_AROUND + length), number, path)
                    for begin in range(max(0, offset - start), length, PART_BYTES):
                        yield data[begin : begin + PART_BYTES]
                start += length

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 of the content as 64 hex digits."""
        digest = hashlib.sha256()
        for part in self.parts(path):
            digest.update(part)
        return digest.hexdigest()

    def write(self, path: Path, parts: Iterable[bytes | memoryview]) -> None:
        """Write a file that is whole or not there."""
        with atomic_path(path) as temporary, Appending(temporary, self) as file:
            for part in parts:
                view = memoryview(part).cast("B")
                for start in range(0, len(view), PART_BYTES):
                    file.append(view[start : start + PART_BYTES])

    def seal(self, data: bytes | memoryview, number: int) -> bytes:
        """Return ``data`` as record ``number`` of a file, or as it is without a key."""
        if self.key is None:
            return bytes(data)
        length = _LENGTH.pack(len(data))
        return length + Envelope(self.key).seal(bytes(data), _bound(number, length))

    def _open(self, record: bytes, number: int, path: Path) -> bytes:
        assert self.key is not None
        length, sealed = record[: _LENGTH.size], record[_LENGTH.size :]
        try:
            return Envelope(self.key).open(sealed, _bound(number, length))
        except WrongKey as error:
            raise SyncFailure(
                "storage", f"{path} cannot be decrypted: a wrong key, or it was changed", fix=_FIX
            ) from error


class Appending:
    """A file that grows by pieces, each written wholly or not at all; closes as a context.

    What a crash left of a last piece is cut off when the file is opened again.

    Attributes:
        size: bytes of content so far.
    """

    def __init__(self, path: Path, vault: Vault) -> None:
        self._vault = vault
        # Unbuffered: what a full disk refused must not be written later by a flush.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._file: Any = os.fdopen(open_plain(path, flags), "ab", buffering=0)
        self.size = self._end = self._file.tell()
        self._number = 0
        if vault.key is not None:
            records = list(_records(path)) if vault.sealed(path) else []
            self.size = sum(length for _, length in records)
            self._number = len(records)
            self._end = sum(records[-1]) + _AROUND if records else 0
            self._file.truncate(self._end)

    def append(self, data: bytes | memoryview) -> None:
        """Write one piece.

        Raises:
            OSError: it could not be written; the file is as it was before.
        """
        record = memoryview(self._vault.seal(data, self._number))
        if self._vault.key is not None and not self._end:
            record = memoryview(MAGIC + record)
        try:
            written = 0
            while written < len(record):
                written += self._file.write(record[written:])
        except OSError:
            self._file.truncate(self._end)
            raise
        self._end += len(record)
        self._number += 1
        self.size += len(data)

    def clear(self) -> None:
        """Make the file empty."""
        self._file.truncate(0)
        self.size = self._end = self._number = 0

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Appending:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _records(path: Path) -> Iterator[tuple[int, int]]:
    """Yield where each whole record starts and how many plain bytes it has."""
    end, at = path.stat().st_size, len(MAGIC)
    with path.open("rb") as file:
        while at + _AROUND <= end:
            file.seek(at)
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            if at + _AROUND + length > end:
                return
            yield at, length
            at += _AROUND + length


def _bound(number: int, length: bytes) -> bytes:
    return MAGIC + struct.pack(">Q", number) + length
