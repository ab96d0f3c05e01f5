"""The messages of the sync protocol: small framed records in the metadata of a Flight exchange.

    "MSY" | version u8 | kind u8 | fields bytes u32 | body bytes u32 | fields (JSON) | body | CRC-32

The metadata field carries them, never a record batch: Arrow's IPC reader, with its own
compression and its own lengths, then never sees a byte of the sender's. CRC-32 finds every
changed byte of a frame (any burst up to 32 bits); the payload as a whole is under SHA-256 and a
signature besides.

    push   HELLO -> STATE, OFFER(signed manifest) -> RESUME(offset) | DONE, CHUNK* <-> ACK*, DONE
    pull   HELLO -> PLAN(signed manifests), GET(item, offset) -> CHUNK* <-> ACK*, ... BYE
    either ERROR(code, problem, fix) at any time, and the exchange ends
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

from memopt.federation.failures import CODES, SyncFailure
from memopt.federation.limits import MIB, Limits, canonical_json, strict_json

COMMAND = b"memopt-sync"
MAGIC = b"MSY"
VERSION = 1
_HEAD = struct.Struct("<3sBBII")
_CRC = struct.Struct("<I")
# 2 MiB keeps a chunk under gRPC's default 4 MiB limit, should a proxy in between have it.
CHUNK_BYTES = 2 * MIB
# Unacknowledged bytes: enough for 100 Mbit/s at one second round trip, far under the 16 MiB where
# a peer that only writes would block for ever.
WINDOW_BYTES = 8 * MIB

KINDS = range(1, 12)
HELLO, STATE, OFFER, RESUME, CHUNK, ACK, DONE, PLAN, GET, BYE, ERROR = KINDS


@dataclass(frozen=True, slots=True)
class Message:
    """One message."""

    kind: int
    fields: dict[str, Any] = field(default_factory=dict)
    body: memoryview = field(default_factory=lambda: memoryview(b""))


def encode(kind: int, fields: dict[str, Any] | None = None, body: Any = b"") -> bytes:
    """Return the bytes of one message.

    >>> decode(encode(ACK, {"offset": 7}), Limits()).fields
    {'offset': 7}
    """
    text = canonical_json(fields or {})
    head = _HEAD.pack(MAGIC, VERSION, kind, len(text), len(body))
    crc = zlib.crc32(body, zlib.crc32(text, zlib.crc32(head)))
    return b"".join((head, text, body, _CRC.pack(crc)))


def decode(data: bytes | memoryview, limits: Limits) -> Message:
    """Return the message in ``data``; the body is a view of it.

    Raises:
        SyncFailure: too long, damaged, of another version or kind, or not JSON.
    """
    view = memoryview(data)
    if len(view) > limits.message_bytes:
        raise SyncFailure(
            "too-large", f"message has {len(view)} bytes, the limit is {limits.message_bytes}"
        )
    if len(view) < _HEAD.size + _CRC.size:
        raise SyncFailure("corrupt", f"message of {len(view)} bytes is cut short")
    if _CRC.unpack_from(view, len(view) - _CRC.size)[0] != zlib.crc32(view[: -_CRC.size]):
        raise SyncFailure("corrupt", "message does not match its checksum")
    magic, version, kind, text, body = _HEAD.unpack_from(view)
    if magic != MAGIC:
        raise SyncFailure("malformed", "message does not start like one")
    if version != VERSION:
        raise SyncFailure(
            "unknown-version", f"protocol version {version} is not {VERSION}", fix="update memopt"
        )
    if kind not in KINDS:
        raise SyncFailure("malformed", f"message kind {kind} is unknown")
    if _HEAD.size + text + body + _CRC.size != len(view):
        raise SyncFailure("malformed", "message lengths do not add up")
    if text > limits.fields_bytes:
        raise SyncFailure("too-large", f"message fields have {text} bytes")
    start = _HEAD.size + text
    fields = strict_json(bytes(view[_HEAD.size : start]), what="message")
    return Message(kind, fields, view[start : start + body])


def encode_error(error: SyncFailure) -> dict[str, str]:
    """Return the fields of an ERROR message."""
    return {"code": error.code, "problem": error.problem[:2000], "fix": (error.fix or "")[:500]}


def decode_error(fields: dict[str, Any]) -> SyncFailure:
    """Return the failure an ERROR message (or an action's error) tells of."""
    code, problem, fix = (fields.get(k) for k in ("code", "problem", "fix"))
    if code not in CODES or not isinstance(problem, str):
        return SyncFailure("malformed", "the peer sent an error that is not one")
    clean = "".join(c if c.isprintable() else " " for c in problem)
    return SyncFailure(code, clean, fix=fix if isinstance(fix, str) and fix else None)
