"""Keys of a store: AES-256-GCM cells, a key from the environment or a file, rotation."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from memopt.errors import ConfigurationError, ConsolidationError
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model import payload
from memopt.memory.model.rows import chunks
from memopt.memory.model.schema import ARCHIVED, FORMAT_VERSION
from memopt.memory.store import creation
from memopt.sealing import KEY_BYTES, Envelope, WrongKey, parse_key, read_secret

KEY_VARIABLE = "MEMOPT_MEMORY_KEY"
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class AesGcm:
    """AES-256-GCM (NIST SP 800-38D) under the newest key; older ones still open what they sealed.

    Args:
        keys: 32 bytes each, the newest first.

    Raises:
        ConfigurationError: no key, or one of another length.

    >>> cipher = AesGcm((bytes(32),))
    >>> cipher.decrypt(cipher.encrypt(b"a"))
    b'a'
    """

    keys: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if not self.keys:
            raise ConfigurationError("no key was given", fix=f"set {KEY_VARIABLE}")
        for key in self.keys:
            if len(key) != KEY_BYTES:
                raise ConfigurationError(
                    f"a key has {len(key)} bytes, not {KEY_BYTES}",
                    fix="make one with: openssl rand -hex 32",
                )

    @property
    def key_id(self) -> str:
        """A public name of the newest key: 12 hexadecimal digits of its hash."""
        return hashlib.sha256(b"memopt memory key\0" + self.keys[0]).hexdigest()[:12]

    def encrypt(self, data: bytes) -> bytes:
        """Return nonce and sealed data."""
        return Envelope(self.keys[0], extra="memory").seal(data)

    def decrypt(self, data: bytes) -> bytes:
        """Return what was sealed under any of the keys.

        Raises:
            ConsolidationError: none of them opens it, or it was changed.
        """
        for key in self.keys:
            try:
                return Envelope(key, extra="memory").open(data)
            except WrongKey:
                continue
        raise ConsolidationError(
            f"key {self.key_id} does not open this store, or its data were changed",
            fix="give the key the store was written with",
        )


def read_cipher(file: str | Path | None = None) -> AesGcm | None:
    """Return the cipher of a key file, else of ``MEMOPT_MEMORY_KEY``, else None.

    A key is 64 hexadecimal digits or base64; several, one a line or separated by commas, the newest
    first.

    Raises:
        ConfigurationError: the file cannot be read, others may read it, or a key has another form.

    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "key")
    >>> with open(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
    ...     _ = file.write("00" * 32)
    >>> read_cipher(path).keys == (bytes(32),)
    True
    """
    text, origin = os.environ.get(KEY_VARIABLE, ""), f"variable {KEY_VARIABLE}"
    if file is not None:
        text, origin = read_secret(Path(file)), f"key file {file}"
    words = text.replace(",", " ").split()
    if not words:
        if file is not None:
            raise ConfigurationError(f"{origin} is empty", fix="openssl rand -hex 32 > FILE")
        return None
    return AesGcm(tuple(parse_key(word, origin) for word in words))


def rotate(store: MemoryStore, new: AesGcm, *, on_step: Callable[[int], None] | None = None) -> int:
    """Seal every memory of an encrypted store under a new key, tied to its row.

    Resumable: rows under the new key are passed over, and until the end the store opens with the
    present key beside the new one; from then on it takes no cell that is not tied. Dropped versions
    hold the old ciphertexts until ``erase``.

    Args:
        store: opened with its present key, or with the new and the present one.
        new: the new key first, the present one after it.

    Returns:
        How many memories were sealed anew.

    Raises:
        ConsolidationError: the store is not encrypted, or the present key is not among ``new``'s.
    """
    database = store.database
    if database.cipher is None:
        raise ConsolidationError(
            f"{store.place} is not encrypted", fix="import its export into a new encrypted store"
        )
    id_key = creation.id_key(store.place, store.meta, new).value
    database.use_key(new)
    done = 0
    while True:
        with database.changing():
            ids = _left(store, new)
            if not ids:
                # Under the lock: what others added under the old key until now is among the done.
                database.write_meta(
                    format=FORMAT_VERSION,
                    key_id=new.key_id,
                    id_key=creation.seal_id_key(id_key, new),
                )
                return done
        for part in chunks(ids, _CHUNK):
            with database.changing():
                opened = store.cells.unpack(store.rows(part))
                archived = pc.equal(opened["tier"], ARCHIVED)
                packed = store.cells.pack(opened.filter(archived))
                plain = opened.filter(pc.invert(archived))
                store.commit(updates=pa.concat_tables([plain, packed]))
            done += len(part)
            if on_step:
                on_step(done)


def _left(store: MemoryStore, new: AesGcm) -> list[str]:
    """Return the memories that are not sealed under the new key and tied to their rows."""
    return [
        row["memory_id"]
        for batch in store.scan(columns=["memory_id", "codec"], batch_size=8192)
        for row in batch.to_pylist()
        if not payload.tied_under(row["codec"], new.key_id)
    ]
