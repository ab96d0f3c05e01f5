"""Every size a peer may claim, and the checks that run before anything is allocated."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from memopt.errors import ConfigurationError
from memopt.federation.failures import SyncFailure
from memopt.jsontext import unique_keys

MIB = 1 << 20
_ADAPTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}\Z")
# A plan of 500 versions has 1,500; a table of tensors asks for more by itself.
_MAX_CONTAINERS = 10_000
_HEX64 = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Upper bounds on what is accepted from a peer; sizes in bytes.

    The defaults hold a rank-64 adapter of a 70B model (about 3.5 GB in fp32) and nothing bigger.
    """

    message_bytes: int = 8 * MIB  # one gRPC message; chunks are at most half of it
    fields_bytes: int = MIB  # the JSON part of a message: a plan of 500 versions has 0.4 MB
    header_bytes: int = 16 * MIB  # decompressed tensor table of a payload
    payload_bytes: int = 4096 * MIB
    total_bytes: int = 8192 * MIB  # all decoded tensors together
    tensors: int = 65_536
    name_bytes: int = 512
    dimensions: int = 8
    uploads_per_node: int = 4  # unfinished uploads kept for resuming
    upload_seconds: float = 24 * 3600.0  # after which an unfinished upload is forgotten
    connections: int = 256
    node_connections: int = 128  # of those, by one node
    connection_seconds: float = 3600.0  # a connection's whole life; what it was doing resumes
    connection_streams: int = 32  # calls open at once on one connection
    streams: int = 128  # exchanges running at once

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ConfigurationError(
                    f"limit {field.name}={getattr(self, field.name)} is not positive"
                )


def check_adapter(name: object) -> str:
    """Return ``name`` when it can safely be a folder's name.

    >>> check_adapter("../etc")
    Traceback (most recent call last):
    ...
    memopt.federation.failures.SyncFailure: adapter id '../etc' is not allowed; use 1 to 100 of ...
    """
    if not isinstance(name, str) or not _ADAPTER.match(name) or ".." in name:
        raise SyncFailure(
            "malformed",
            f"adapter id {short(name)} is not allowed",
            fix="use 1 to 100 of A-Z a-z 0-9 . _ @ -, starting with a letter or digit",
        )
    return name


def check_tensor_name(name: object, limits: Limits) -> str:
    """Return ``name`` when it is a tensor name and nothing that looks like a path."""
    if not isinstance(name, str) or not name:
        raise SyncFailure("malformed", f"tensor name {short(name)} is not a non-empty string")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise SyncFailure("malformed", f"tensor name {short(name)} is not valid text") from None
    if size > limits.name_bytes:
        raise SyncFailure(
            "too-large", f"a tensor name has {size} bytes, the limit is {limits.name_bytes}"
        )
    if "/" in name or "\\" in name or ".." in name or name[0] in ".~" or not name.isprintable():
        raise SyncFailure("malformed", f"tensor name {short(name)} looks like a path")
    return name


def check_shape(name: str, shape: object, itemsize: int, limits: Limits) -> tuple[int, ...]:
    """Return ``shape`` as a tuple when its dimensions and its size in bytes are within bounds."""
    if not isinstance(shape, list | tuple) or len(shape) > limits.dimensions:
        raise SyncFailure("malformed", f"{name}: shape {short(shape)} is not allowed")
    count = 1
    for dimension in shape:
        check_count(f"{name}: dimension", dimension, limits.total_bytes)
        # Checked at each step: a product of many large dimensions never becomes a huge integer.
        count *= dimension
        if count * itemsize > limits.total_bytes:
            raise SyncFailure(
                "too-large", f"{name}: shape {short(shape)} is over {limits.total_bytes} bytes"
            )
    return tuple(shape)


def check_count(what: str, value: object, limit: int) -> int:
    """Return ``value`` when it is an integer in 0..limit (a bool is not an integer here)."""
    if type(value) is not int or value < 0:
        raise SyncFailure("malformed", f"{what} {short(value)} is not a count")
    if value > limit:
        raise SyncFailure("too-large", f"{what} {short(value)} is over the limit {limit}")
    return value


def check_hash(what: str, value: object) -> str:
    """Return ``value`` when it is 64 lower-case hex digits."""
    if not isinstance(value, str) or not _HEX64.match(value):
        raise SyncFailure("malformed", f"{what} {short(value)} is not a SHA-256")
    return value


def strict_json(
    data: bytes | str, *, what: str, containers: int = _MAX_CONTAINERS
) -> dict[str, Any]:
    """Parse a JSON object from a peer: no duplicate keys, no NaN, any damage is a SyncFailure.

    Args:
        data: the text.
        what: what it is, for the message.
        containers: the most objects and lists, which take many times their text in memory.

    >>> strict_json('{"a": 1}', what="manifest")
    {'a': 1}
    """
    text = data.encode() if isinstance(data, str) else data
    # Counted in the text, before anything is built; those inside strings count too.
    if text.count(b"{") + text.count(b"[") > containers:
        raise SyncFailure("too-large", f"{what} has more than {containers} objects and lists")
    try:
        value = json.loads(data, object_pairs_hook=unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise SyncFailure("malformed", f"{what} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise SyncFailure("malformed", f"{what} is not a JSON object")
    return value


def check_keys(what: str, value: object, required: Sequence[str]) -> dict[str, Any]:
    """Return ``value`` when it is an object with exactly the ``required`` keys."""
    if not isinstance(value, dict):
        raise SyncFailure("malformed", f"{what} is not an object")
    if set(value) != set(required):
        odd = sorted(map(str, set(value) ^ set(required)))[:5]
        raise SyncFailure("malformed", f"{what} has missing or unknown keys: {short(odd)}")
    return value


def canonical_json(value: object) -> bytes:
    """Return the one byte form of a JSON value: sorted keys, no spaces, ASCII (cf. RFC 8785).

    >>> canonical_json({"b": 1, "a": [True]})
    b'{"a":[true],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def short(value: object) -> str:
    """Return a value as a message shows it."""
    try:
        text = repr(value)
    except ValueError:  # an integer beyond Python's digit limit
        return "<a huge number>"
    return text if len(text) <= 80 else text[:77] + "..."
