"""Secrets at rest: key files that only their owner reads, and AES-256-GCM under a key.

Everything that memopt keeps under a key (a bundle's weights, memories, a sync server's versions and
a node's state) is AES-256-GCM (NIST SP 800-38D). What is put where is each format's own business.
"""

from __future__ import annotations

import base64
import os
import secrets
from pathlib import Path

from memopt.errors import ConfigurationError
from memopt.extras import require

KEY_BYTES, NONCE_BYTES, TAG_BYTES = 32, 12, 16
KEY_VARIABLE = "MEMOPT_WEIGHTS_KEY"
KEY_FILE_VARIABLE = "MEMOPT_WEIGHTS_KEY_FILE"


class WrongKey(ValueError):
    """Sealed data that a key does not open: another key's, or changed."""


class Envelope:
    """AES-256-GCM under one key.

    Args:
        key: 32 bytes.
        extra: the pip extra to name when the cipher's package is missing.

    Raises:
        ConfigurationError: the key has another length.

    >>> envelope = Envelope(bytes(32))
    >>> envelope.open(envelope.seal(b"a", b"row 7"), b"row 7")
    b'a'
    """

    def __init__(self, key: bytes, *, extra: str = "federation") -> None:
        if len(key) != KEY_BYTES:
            raise ConfigurationError(f"an AES-256 key has {KEY_BYTES} bytes, not {len(key)}")
        why = "encrypt and decrypt"
        module = require("cryptography.hazmat.primitives.ciphers.aead", extra=extra, why=why)
        self._cipher = module.AESGCM(key)

    def seal(self, data: bytes, bound: bytes | None = None) -> bytes:
        """Return a random nonce, the ciphertext and the tag; ``bound`` must be there to open it."""
        # 96 random bits: one key seals far fewer than 2^32 times.
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self.encrypt(nonce, data, bound)

    def open(self, sealed: bytes, bound: bytes | None = None) -> bytes:
        """Return what :meth:`seal` was given.

        Raises:
            WrongKey: another key or another ``bound``, or it was changed.
        """
        return self.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], bound)

    def encrypt(self, nonce: bytes, data: bytes, bound: bytes | None) -> bytes:
        """Return ciphertext and tag under a nonce that this key never had before."""
        sealed: bytes = self._cipher.encrypt(nonce, data, bound)
        return sealed

    def decrypt(self, nonce: bytes, data: bytes, bound: bytes | None) -> bytes:
        """Return what :meth:`encrypt` was given; WrongKey as in :meth:`open`."""
        from cryptography.exceptions import InvalidTag

        try:
            plain: bytes = self._cipher.decrypt(nonce, data, bound)
        except (InvalidTag, ValueError) as error:
            raise WrongKey("the key does not open this") from error
        return plain


def load_key(source: str | Path | None = None) -> bytes:
    """Return a 32-byte key from a file, or from the environment.

    Args:
        source: a file with 64 hex digits or base64; None reads ``MEMOPT_WEIGHTS_KEY``, else the
            file that ``MEMOPT_WEIGHTS_KEY_FILE`` names.

    Raises:
        ConfigurationError: there is none, it is not 32 bytes, or others may read the file.
    """
    text = os.environ.get(KEY_VARIABLE, "")
    if source is None and not text:
        source = os.environ.get(KEY_FILE_VARIABLE) or None
        if source is None:
            raise ConfigurationError(
                "there is no key for the weights",
                fix=f"set {KEY_VARIABLE} to 64 hex digits, or {KEY_FILE_VARIABLE} to a key file",
            )
    if source is None:
        return parse_key(text.strip(), f"variable {KEY_VARIABLE}")
    return parse_key(read_secret(Path(source)).strip(), f"key file {source}")


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


def write_key(path: str | Path) -> None:
    """Write a new random key, readable by its owner only.

    Raises:
        ConfigurationError: there is a file; a key is never overwritten.
    """
    write_private(Path(path), (secrets.token_hex(KEY_BYTES) + "\n").encode(), new=True)


def read_secret(path: Path) -> str:
    """Return the text of a key file.

    Raises:
        ConfigurationError: it cannot be read, or others may read it.
    """
    try:
        check_private(path, f"key file {path}")
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"key file {path} cannot be read ({error})") from error


def check_private(path: Path, what: str = "") -> None:
    """Raise ConfigurationError when others may read a secret; one that is not there passes."""
    if path.exists() and path.stat().st_mode & 0o077:
        raise ConfigurationError(
            f"{what or f'private key {path}'} can be read by others", fix=f"run: chmod 600 {path}"
        )


def write_private(path: Path, data: bytes, *, new: bool = False) -> None:
    """Write a secret so that at no moment anyone but its owner can read it.

    Args:
        new: a file that is there already is kept.

    Raises:
        ConfigurationError: with ``new``, there is one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        if not new:
            temporary.replace(path)
            return
        try:
            # Unlike a rename, a second name is refused where there is a file.
            os.link(temporary, path)
        except FileExistsError:
            raise ConfigurationError(
                f"{path} exists already", fix="use it, or remove it first if it is to go"
            ) from None
    finally:
        temporary.unlink(missing_ok=True)
