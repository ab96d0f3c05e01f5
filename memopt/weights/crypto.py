"""Files under a key: AES-256-GCM in segments that cannot be reordered, dropped or cut.

A file is ``MAGIC``, segment and plain bytes (uint64, little endian), eight random bytes that each
nonce begins with, and the segments. Loading checks a SHA-256 of what was encrypted.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

from memopt.errors import WeightsError
from memopt.files import atomic_path
from memopt.moved import old_names
from memopt.sealing import KEY_VARIABLE, TAG_BYTES, Envelope, WrongKey

__getattr__ = old_names(__name__)

MAGIC = b"MEMOPT-GCM1"
_SEGMENT = 4 << 20
_HEAD = struct.Struct("<QQ")  # segment bytes, plain bytes
_NONCE_PREFIX = 8
_HEAD_BYTES = len(MAGIC) + _HEAD.size + _NONCE_PREFIX


def encrypt_file(source: str | Path, target: str | Path, key: bytes) -> str:
    """Encrypt any file with AES-256-GCM; return the SHA-256 of the plain file.

    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "w").write_bytes(b"weights")
    >>> digest = encrypt_file(folder / "w", folder / "w.enc", bytes(32))
    >>> decrypt_file(folder / "w.enc", folder / "back", bytes(32), sha256=digest)
    >>> (folder / "back").read_bytes()
    b'weights'
    """
    source, envelope = Path(source), Envelope(key)
    size = source.stat().st_size
    prefix = os.urandom(_NONCE_PREFIX)
    head = MAGIC + _HEAD.pack(_SEGMENT, size) + prefix
    digest = hashlib.sha256()
    with source.open("rb") as plain, atomic_path(Path(target)) as path, path.open("wb") as out:
        out.write(head)
        for number in range(_segments(size)):
            data = plain.read(_SEGMENT)
            digest.update(data)
            # The whole head is authenticated with each segment, its place by the nonce.
            out.write(envelope.encrypt(_nonce(prefix, number), data, head))
        if plain.read(1):
            raise WeightsError(f"{source} grew while it was encrypted", fix="try again")
    return digest.hexdigest()


def decrypt_file(
    source: str | Path, target: str | Path, key: bytes, *, sha256: str | None = None
) -> None:
    """Decrypt what :func:`encrypt_file` wrote; ``target`` appears only when all of it is right.

    Raises:
        WeightsError: not such a file, a wrong key, a changed or missing byte, another SHA-256.
    """
    source, envelope = Path(source), Envelope(key)
    digest = hashlib.sha256()
    with source.open("rb") as file, atomic_path(Path(target)) as path:
        head = file.read(_HEAD_BYTES)
        if not head.startswith(MAGIC) or len(head) < _HEAD_BYTES:
            raise WeightsError(f"{source} is not a file that memopt encrypted")
        segment, size = _HEAD.unpack_from(head, len(MAGIC))
        expected = len(head) + size + TAG_BYTES * _segments(size)
        if segment != _SEGMENT or source.stat().st_size != expected:
            raise WeightsError(f"{source} is cut short or damaged: {expected} bytes announced")
        with path.open("wb") as out:
            for number in range(_segments(size)):
                data = file.read(_SEGMENT + TAG_BYTES)
                try:
                    plain = envelope.decrypt(_nonce(head[-_NONCE_PREFIX:], number), data, head)
                except WrongKey as error:
                    raise WeightsError(
                        f"{source} cannot be decrypted: a wrong key, or the file was changed",
                        fix=f"check {KEY_VARIABLE} or the key file",
                    ) from error
                digest.update(plain)
                out.write(plain)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise WeightsError(
                f"{source} holds other weights: SHA-256 {digest.hexdigest()[:16]}, "
                f"expected {sha256[:16]}"
            )


def _nonce(prefix: bytes, number: int) -> bytes:
    return prefix + struct.pack(">I", number)


def _segments(size: int) -> int:
    # An empty file still has one segment, so that its head is authenticated.
    return max(1, -(-size // _SEGMENT))
