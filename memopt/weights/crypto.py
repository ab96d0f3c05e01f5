"""Weights at rest under a key: AES-256 by Parquet modular encryption, or AES-256-GCM for any file.

Parquet modular encryption (Apache Parquet Format, Encryption.md) encrypts column data, statistics
and the footer, and a reader decrypts only the columns it reads. AES-GCM (NIST SP 800-38D) takes a
whole file, in segments that cannot be reordered, dropped or cut. Keys come from the environment
or from a file that only its owner may read. Loading checks a SHA-256 of what was encrypted.
"""

from __future__ import annotations

import base64
import hashlib
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.errors import ConfigurationError, WeightsError
from memopt.extras import require
from memopt.files import atomic_path, sha256_file

if TYPE_CHECKING:
    import pyarrow as pa

KEY_BYTES = 32
KEY_VARIABLE = "MEMOPT_WEIGHTS_KEY"
KEY_FILE_VARIABLE = "MEMOPT_WEIGHTS_KEY_FILE"
MAGIC = b"MEMOPT-GCM1"
_SEGMENT = 4 << 20
_HEAD = struct.Struct("<QQ")  # segment bytes, plain bytes
_NONCE_PREFIX = 8
_TAG = 16
_FOOTER = "memopt"


def load_key(source: str | Path | None = None) -> bytes:
    """Return a 32-byte key from a file, or from the environment.

    Args:
        source: a file with 64 hex digits or base64; None reads ``MEMOPT_WEIGHTS_KEY``, else the
            file that ``MEMOPT_WEIGHTS_KEY_FILE`` names.

    Raises:
        ConfigurationError: there is none, it is not 32 bytes, or others may read the file.
    """
    if source is None and not os.environ.get(KEY_VARIABLE):
        source = os.environ.get(KEY_FILE_VARIABLE) or None
    if source is None:
        text = os.environ.get(KEY_VARIABLE, "")
        origin = f"variable {KEY_VARIABLE}"
        if not text:
            raise ConfigurationError(
                "there is no key for the weights",
                fix=f"set {KEY_VARIABLE} to 64 hex digits, or {KEY_FILE_VARIABLE} to a key file",
            )
    else:
        path, origin = Path(source), f"key file {source}"
        try:
            if path.stat().st_mode & 0o077:
                raise ConfigurationError(
                    f"{origin} can be read by others", fix=f"run: chmod 600 {path}"
                )
            text = path.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{origin} cannot be read ({error})") from error
    return parse_key(text.strip(), origin)


def write_key(path: str | Path) -> None:
    """Write a new random key, readable by its owner only.

    Raises:
        ConfigurationError: there is a file; a key is never overwritten.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigurationError(f"{path} exists already", fix="use it, or give another") from None
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(os.urandom(KEY_BYTES).hex() + "\n")
        file.flush()
        os.fsync(descriptor)


def parse_key(text: str, origin: str) -> bytes:
    """Return the 32 bytes that 64 hex digits or base64 spell.

    Args:
        origin: where the text is from, for the message.

    Raises:
        ConfigurationError: it is no such key; the message does not repeat it.

    >>> parse_key("00" * 32, "example") == bytes(32)
    True
    """
    try:
        key = bytes.fromhex(text) if len(text) == 64 else base64.b64decode(text, validate=True)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        # The value is a secret: say what is wrong with it, never what it is.
        raise ConfigurationError(
            f"{origin} does not hold a 256-bit key",
            fix="write 64 hex digits: python -c 'import secrets; print(secrets.token_hex(32))'",
        )
    return key


# -------------------------------------------------------------------------------------- AES-GCM


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
    source, cipher = Path(source), aes_gcm(key)
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
            out.write(cipher.encrypt(prefix + struct.pack(">I", number), data, head))
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
    source, cipher = Path(source), aes_gcm(key)
    digest = hashlib.sha256()
    with source.open("rb") as file, atomic_path(Path(target)) as path:
        head = file.read(len(MAGIC) + _HEAD.size + _NONCE_PREFIX)
        if not head.startswith(MAGIC) or len(head) < len(MAGIC) + _HEAD.size + _NONCE_PREFIX:
            raise WeightsError(f"{source} is not a file that memopt encrypted")
        segment, size = _HEAD.unpack_from(head, len(MAGIC))
        expected = len(head) + size + _TAG * _segments(size)
        if segment != _SEGMENT or source.stat().st_size != expected:
            raise WeightsError(f"{source} is cut short or damaged: {expected} bytes announced")
        prefix = head[-_NONCE_PREFIX:]
        with path.open("wb") as out:
            for number in range(_segments(size)):
                data = file.read(_SEGMENT + _TAG)
                plain = _open(cipher, prefix + struct.pack(">I", number), data, head, source)
                digest.update(plain)
                out.write(plain)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise WeightsError(
                f"{source} holds other weights: SHA-256 {digest.hexdigest()[:16]}, "
                f"expected {sha256[:16]}"
            )


def _open(cipher: Any, nonce: bytes, data: bytes, head: bytes, source: Path) -> bytes:
    invalid = require(
        "cryptography.exceptions", extra="federation", why="decrypt weights"
    ).InvalidTag
    try:
        plain: bytes = cipher.decrypt(nonce, data, head)
    except invalid as error:
        raise WeightsError(
            f"{source} cannot be decrypted: a wrong key, or the file was changed",
            fix=f"check {KEY_VARIABLE} or the key file",
        ) from error
    return plain


def _segments(size: int) -> int:
    # An empty file still has one segment, so that its head is authenticated.
    return max(1, -(-size // _SEGMENT))


def aes_gcm(key: bytes) -> Any:
    """Return the cipher of a 32-byte key (cryptography's AESGCM).

    Raises:
        ConfigurationError: the key has another length.
    """
    if len(key) != KEY_BYTES:
        raise ConfigurationError(f"an AES-256 key has 32 bytes, not {len(key)}")
    module = require(
        "cryptography.hazmat.primitives.ciphers.aead", extra="federation", why="encrypt weights"
    )
    return module.AESGCM(key)


# ------------------------------------------------------------------------------ Parquet modular


def encrypt_parquet(source: str | Path, target: str | Path, key: bytes) -> str:
    """Write a Parquet file anew with every column and the footer under AES-256.

    Row groups stay as they are. Returns the SHA-256 of the encrypted file.
    """
    pq = require("pyarrow.parquet", extra="arrow", why="encrypt Parquet files")
    source = Path(source)
    properties = _factory(key).file_encryption_properties(_connection(), _configuration())
    with (
        pq.ParquetFile(source) as plain,
        atomic_path(Path(target)) as path,
        pq.ParquetWriter(
            path, plain.schema_arrow, encryption_properties=properties, compression="none"
        ) as writer,
    ):
        for number in range(plain.num_row_groups):
            writer.write_table(plain.read_row_group(number))
    return sha256_file(Path(target))


def read_encrypted_parquet(
    path: str | Path, key: bytes, *, sha256: str | None = None, columns: list[str] | None = None
) -> pa.Table:
    """Read a file of :func:`encrypt_parquet`, decrypting only the columns asked for.

    Raises:
        WeightsError: another SHA-256 than expected, a wrong key, or a damaged file.
    """
    pa = require("pyarrow", extra="arrow", why="decrypt Parquet files")
    pq = require("pyarrow.parquet", extra="arrow", why="decrypt Parquet files")
    path = Path(path)
    if sha256 is not None and sha256_file(path) != sha256:
        raise WeightsError(f"{path} does not match its SHA-256 {sha256[:16]}")
    try:
        properties = _factory(key).file_decryption_properties(_connection())
        with pq.ParquetFile(path, decryption_properties=properties) as file:
            return file.read(columns=columns)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise WeightsError(
            f"{path} cannot be decrypted: a wrong key, or the file was changed",
            fix=f"check {KEY_VARIABLE} or the key file",
        ) from error


def _configuration() -> Any:
    encryption = require("pyarrow.parquet.encryption", extra="federation", why="encrypt weights")
    # Both settings are needed for 256 bits: the default is 128, and double wrapping knows only it.
    return encryption.EncryptionConfiguration(
        footer_key=_FOOTER,
        uniform_encryption=True,
        encryption_algorithm="AES_GCM_V1",
        double_wrapping=False,
        data_key_length_bits=256,
    )


def _connection() -> Any:
    encryption = require("pyarrow.parquet.encryption", extra="federation", why="encrypt weights")
    return encryption.KmsConnectionConfig()


def _factory(key: bytes) -> Any:
    encryption = require("pyarrow.parquet.encryption", extra="federation", why="encrypt weights")
    cipher = aes_gcm(key)

    class Local(encryption.KmsClient):  # type: ignore[misc,name-defined]
        """Wraps each file's data key with ours, here and now: no key server."""

        def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> str:
            nonce = os.urandom(12)
            wrapped = cipher.encrypt(nonce, key_bytes, master_key_identifier.encode())
            return base64.b64encode(nonce + wrapped).decode()

        def unwrap_key(self, wrapped_key: str, master_key_identifier: str) -> bytes:
            data = base64.b64decode(wrapped_key)
            invalid = require(
                "cryptography.exceptions", extra="federation", why="decrypt weights"
            ).InvalidTag
            try:
                opened: bytes = cipher.decrypt(data[:12], data[12:], master_key_identifier.encode())
            except invalid as error:
                raise ValueError("the key does not open this file") from error
            return opened

    return encryption.CryptoFactory(lambda configuration: Local())
