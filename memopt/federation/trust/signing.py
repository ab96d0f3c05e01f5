"""Signing keys: Ed25519 (RFC 8032) over a manifest, in files that only their owner may read."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from memopt.errors import ConfigurationError
from memopt.federation.trust.manifest import Signed, VersionManifest
from memopt.files import open_plain
from memopt.sealing import check_private, write_private


class SigningKey:
    """An Ed25519 private key; :meth:`public` is what the trust file lists."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private

    @classmethod
    def generate(cls) -> SigningKey:
        """Make a new key from the system's random source."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: str | Path) -> SigningKey:
        """Read a PEM private key.

        Raises:
            ConfigurationError: no such file, not an Ed25519 key, or others may read it.
        """
        path = Path(path)
        check_private(path)
        try:
            private = serialization.load_pem_private_key(path.read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigurationError(
                f"signing key {path} cannot be read ({error})", fix="run: memopt sync keygen"
            ) from error
        if not isinstance(private, Ed25519PrivateKey):
            raise ConfigurationError(f"{path} is not an Ed25519 key", fix="run: memopt sync keygen")
        return cls(private)

    def save(self, path: str | Path, *, new: bool = False) -> None:
        """Write the key as PEM (PKCS 8), readable by its owner only.

        Args:
            new: refuse (ConfigurationError) to take the place of a key that is there.
        """
        write_private(Path(path), pem_of(self._private), new=new)

    def public(self) -> str:
        """Return the public key as 64 hex digits."""
        return self._private.public_key().public_bytes_raw().hex()

    def sign(self, manifest: VersionManifest) -> Signed:
        """Return the manifest with this key's signature."""
        signature = self._private.sign(manifest.text())
        return Signed(manifest=manifest, key=self.public(), signature=signature.hex())


def pem_of(key: Ed25519PrivateKey | EllipticCurvePrivateKey) -> bytes:
    """Return a private key as PEM (PKCS 8), not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep other processes (and threads) from changing a folder of keys meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = open_plain(folder / ".keys.lock")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def signature_holds(signed: Signed) -> bool:
    """Return whether the signature is the key's over exactly this manifest."""
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signed.key))
        public.verify(bytes.fromhex(signed.signature), signed.manifest.text())
    except (InvalidSignature, ValueError):
        return False
    return True
