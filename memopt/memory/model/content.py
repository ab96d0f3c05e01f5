"""What comes in is checked before anything is stored: sizes, decodability, identity."""

from __future__ import annotations

import hashlib
import io
import math
import re
import struct
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memopt.errors import InputError
from memopt.extras import require
from memopt.memory.model.filters import utc
from memopt.memory.model.schema import MODALITIES, Content, NewMemory
from memopt.memory.model.unicode import stream_safe

# A text longer than a book belongs in a file or in several memories; an encoder reads its start.
MAX_TEXT_BYTES = 8 << 20
# A row is held in memory several times over while it is written.
MAX_MEDIA_BYTES = 64 << 20
MAX_ID_BYTES = 512
_ID_BYTES = 16
_WAV_HEADER = 12
# Streamed WAV files do not know their length when the header is written.
_UNKNOWN_SIZES = (0, 0xFFFFFFFF)


def check(memory: NewMemory, position: int, dim: int) -> None:
    """Refuse a memory that cannot be stored as it is.

    Args:
        position: its place in what was given, for the message.
        dim: length of a vector of this store.

    Raises:
        InputError: empty, too large, not Unicode, an image or sound that does not decode, or an
            embedding of another shape, all zeros, or with NaN.
    """
    name = f"memory {position}"
    if not isinstance(memory, NewMemory):
        raise InputError(f"{name} is {type(memory).__name__}, not a NewMemory")
    name = memory.origin or name
    check_content(memory.content, name)
    if memory.memory_id is not None:
        check_label(memory.memory_id, f"{name}: memory_id")
    check_label(memory.category, f"{name}: category")
    if memory.memory_id == "":
        raise InputError(f"{name}: memory_id is empty", fix="leave it out to get a content hash")
    for label, moment in (("timestamp", memory.timestamp), ("expires_at", memory.expires_at)):
        if moment is not None and not isinstance(moment, datetime):
            raise InputError(f"{name}: {label} is {type(moment).__name__}, not a datetime")
    if memory.embedding is not None:
        _check_embedding(np.asarray(memory.embedding), dim, name)


def check_content(content: Content, name: str = "content") -> None:
    """Refuse content that cannot be stored or embedded; see :func:`check`.

    >>> check_content(Content(text="a red door"))
    """
    if not content.modalities:
        raise InputError(f"{name} is empty", fix="give text, vision or audio")
    if content.text is not None:
        check_text(content.text, f"{name}: text")
        if not content.text.strip() and len(content.modalities) == 1:
            raise InputError(f"{name}: text is empty")
    for modality, decode in (("vision", _decode_image), ("audio", _decode_sound)):
        data = getattr(content, modality)
        if data is None:
            continue
        if not isinstance(data, bytes):
            raise InputError(f"{name}: {modality} is {type(data).__name__}, not bytes of a file")
        if len(data) > MAX_MEDIA_BYTES:
            raise InputError(
                f"{name}: {modality} has {_mebibytes(len(data))}, "
                f"the limit is {_mebibytes(MAX_MEDIA_BYTES)}"
            )
        decode(data, f"{name}: {modality}")


def check_text(text: str, name: str) -> None:
    """Refuse what is no text, or one that is too large.

    Raises:
        InputError: no string, not Unicode, or above MAX_TEXT_BYTES.
    """
    size = len(encoded(text, name))
    if size > MAX_TEXT_BYTES:
        raise InputError(
            f"{name} has {_mebibytes(size)}, the limit is {_mebibytes(MAX_TEXT_BYTES)}",
            fix="split it into several memories",
        )


def check_label(label: str, name: str) -> None:
    """Refuse an id or category that is no string, not Unicode, or above MAX_ID_BYTES."""
    if len(encoded(label, name)) > MAX_ID_BYTES:
        raise InputError(f"{name} is longer than {MAX_ID_BYTES} bytes")


def encoded(text: object, name: str) -> bytes:
    """Return UTF-8 bytes, or say that it is no Unicode text."""
    if not isinstance(text, str):
        raise InputError(f"{name} is {type(text).__name__}, not a string")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is not valid Unicode: {error.reason}") from error


def redacted(
    memory: NewMemory, redact: Callable[[str], str] | None, name: str = "memory"
) -> NewMemory:
    """Return the memory with its text passed through ``redact``, once it is none too large.

    Redaction takes the better part of a second for a MiB.
    """
    text = memory.content.text if isinstance(memory, NewMemory) else None
    if redact is None or not isinstance(text, str):
        return memory
    check_text(text, f"{memory.origin or name}: text")
    return replace(memory, content=replace(memory.content, text=redact(text)))


def content_id(content: Content, category: str, key: bytes = b"", turn: int = 0) -> str:
    """Return the 32 hex digits that name this content in this category (BLAKE2b, RFC 7693).

    Args:
        key: keyed in an encrypted store, so that the id does not betray a guessed text.
        turn: the next id of the same content, where another took the one before.

    >>> content_id(Content(text="a"), "") == content_id(Content(text="a"), "")
    True
    >>> content_id(Content(text="a"), "") == content_id(Content(audio=b"a"), "")
    False
    """
    digest = hashlib.blake2b(digest_size=_ID_BYTES, key=key)
    for name in ("category", *MODALITIES):
        value = category if name == "category" else getattr(content, name)
        if value is None:
            continue
        data = value.encode() if isinstance(value, str) else value
        digest.update(f"{name}:{len(data)}:".encode())
        digest.update(data)
    if turn:
        digest.update(f"turn:{turn}".encode())
    return digest.hexdigest()


def composed(text: str) -> str:
    r"""Return a text in the normalisation (NFC) in which two that look alike are the same.

    >>> composed("cafe\u0301") == "caf\xe9"
    True
    """
    return text if text.isascii() else unicodedata.normalize("NFC", stream_safe(text))


def spellings(content: Content) -> list[Content]:
    """Return content with its text composed, and as it or another may have been added before.

    What is typed on a Mac or comes from its file names is decomposed (NFD), the same text from
    elsewhere is not: it is one memory, whose id is that of the composed text.

    >>> [each.text for each in spellings(Content(text="door"))]
    ['door']
    """
    text = content.text
    if text is None or text.isascii():
        return [content]
    forms = (composed(text), text, unicodedata.normalize("NFD", stream_safe(text)))
    return [replace(content, text=form) for form in dict.fromkeys(forms)]


def content_ids(content: Content, category: str, key: bytes = b"", turn: int = 0) -> list[str]:
    """Return the id of content whose text is composed, and others under which it may lie.

    Before, a text had another id in each Unicode normalisation.

    >>> len(content_ids(Content(text="door"), "")), len(content_ids(Content(text="caf\xe9"), ""))
    (1, 2)
    """
    return [content_id(spelling, category, key, turn) for spelling in spellings(content)]


def columns(
    ids: Sequence[str], memories: Sequence[NewMemory], now: datetime, model_id: str
) -> dict[str, Any]:
    """Return the columns of new rows, for :func:`memopt.memory.model.rows.new_rows`."""
    contents = [memory.content for memory in memories]
    times = [utc(memory.timestamp) if memory.timestamp else now for memory in memories]
    return {
        "memory_id": list(ids),
        "text": [content.text for content in contents],
        "vision_data": [content.vision for content in contents],
        "audio_data": [content.audio for content in contents],
        "timestamp": times,
        "category": [memory.category for memory in memories],
        "model_id": model_id,
        "has_text": [content.text is not None for content in contents],
        "has_vision": [content.vision is not None for content in contents],
        "has_audio": [content.audio is not None for content in contents],
    }


def _check_embedding(vector: NDArray[Any], dim: int, name: str) -> None:
    if vector.shape != (dim,):
        raise InputError(
            f"{name}: embedding has shape {vector.shape}, this store has ({dim},)",
            fix="use the model the store was made with, or reembed the store",
        )
    if vector.dtype.kind not in "fiu":
        raise InputError(f"{name}: embedding has dtype {vector.dtype}, not a float")
    # Half precision would overflow in the square.
    vector = vector.astype(np.float32, copy=False)
    square = float(np.dot(vector, vector))
    if not math.isfinite(square) or square == 0:
        kind = "is all zeros" if square == 0 else "holds NaN or infinity"
        raise InputError(f"{name}: embedding {kind}", fix="check the model that made it")


def _decode_image(data: bytes, name: str) -> None:
    image_module = require("PIL.Image", extra="media", why="check images before they are stored")
    try:
        with warnings.catch_warnings():
            # A picture of more than 89 Mpx is refused, not only warned of.
            warnings.simplefilter("error", image_module.DecompressionBombWarning)
            image_module.open(io.BytesIO(data)).load()
    except Exception as error:
        raise InputError(
            f"{name} is no image that can be decoded ({_reason(error)})",
            fix="give a whole .png or .jpg",
        ) from error


def _decode_sound(data: bytes, name: str) -> None:
    soundfile = require("soundfile", extra="media", why="check sounds before they are stored")
    try:
        samples, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    except Exception as error:
        raise InputError(
            f"{name} is no sound that can be decoded ({_reason(error)})", fix="give a whole .wav"
        ) from error
    if not len(samples):
        raise InputError(f"{name} holds no sample")
    # libsndfile reads what is there of a cut file and does not complain.
    if data[:4] == b"RIFF" and len(data) >= _WAV_HEADER:
        (declared,) = struct.unpack_from("<I", data, 4)
        if declared not in _UNKNOWN_SIZES and declared + 8 > len(data):
            raise InputError(
                f"{name} is cut short: {len(data)} of {declared + 8} bytes", fix="give a whole .wav"
            )


def _reason(error: Exception) -> str:
    # Where the buffer lies in memory tells nobody anything.
    return re.sub(r"\s*<_io\.BytesIO[^>]*>", "", str(error))


def _mebibytes(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
