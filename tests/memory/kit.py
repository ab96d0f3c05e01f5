"""What the tests of the memory share: content, an embedder, a byte search."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import soundfile
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from PIL import Image

from memopt.memory.model.schema import Content, NewMemory

DIM = 16


class Clock:
    """A store's clock that a test sets: ``now``."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


class Hashing:
    """An embedder of anything: a random direction per content, the same for the same."""

    def __init__(self, model_id: str = "hashing", dim: int = DIM) -> None:
        self.model_id, self.dim = model_id, dim

    def embed(self, items: Sequence[Content]) -> np.ndarray:
        rows = [
            np.random.default_rng(list(self._bytes(item))).normal(size=self.dim) for item in items
        ]
        vectors = np.array(rows, np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _bytes(self, item: Content) -> bytes:
        return self.model_id.encode() + repr((item.text, item.vision, item.audio)).encode()


class Key:
    """A caller's own cipher: AES-256-GCM with a random nonce before the text."""

    def __init__(self, key_id: str, byte: int) -> None:
        self.key_id = key_id
        self._aes = AESGCM(bytes([byte]) * 32)

    def encrypt(self, data: bytes) -> bytes:
        nonce = os.urandom(12)
        return nonce + self._aes.encrypt(nonce, data, None)

    def decrypt(self, data: bytes) -> bytes:
        return self._aes.decrypt(data[:12], data[12:], None)


def png(seed: int) -> bytes:
    """A small noisy picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def wav(seed: int) -> bytes:
    """A tenth of a second of noise."""
    samples = np.random.default_rng(seed).normal(0, 0.1, 800)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 8_000, format="WAV")
    return buffer.getvalue()


def note(text: str, **fields: object) -> NewMemory:
    """A memory of a text."""
    return NewMemory(content=Content(text=text), memory_id=text.replace(" ", "-"), **fields)  # type: ignore[arg-type]


def files_with(folder: Path, needle: bytes) -> list[str]:
    """The files below a folder that hold these bytes."""
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and needle in path.read_bytes()
    ]
