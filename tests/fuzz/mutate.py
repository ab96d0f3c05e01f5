"""Changed copies of good files: the kinds of damage that readers fall over."""

from __future__ import annotations

import random
from collections.abc import Sequence

# Numbers at the edges of what fields hold, and text that parsers have limits for.
_EDGES = (
    b"\0",
    b"\x7f",
    b"\x80",
    b"\xff",
    b"\xff" * 4,
    b"\xff" * 8,
    b"\0" * 8,
    b"\x7f" + b"\xff" * 7,
)
_TEXTS = (
    *(b"null", b"true", b"-1", b"1e999", b"NaN", b"[]", b"{}", b'""', b"9" * 30, b"9" * 5000),
    *(b'"\\ud83d"', b"\xed\xa0\xbd", b"[" * 2000, b'{"a":' * 2000, b"&a [*a, *a]", b"../../x"),
    *(b"\r", b"\n", b'"', b";", b"\t", b",", b"0", b"1", b"\xef\xbb\xbf"),
)


def mutate(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Return ``data`` with one to six changes; parts of ``others`` may come into it."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(len(out) + 1)
        size = min(rng.choice((1, 2, 4, 8, 32, 200)), len(out) - at)
        kind = rng.randrange(8)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = rng.randrange(256)
        elif kind == 2:
            edge = rng.choice(_EDGES)
            out[at : at + len(edge)] = edge
        elif kind == 3:
            out[at:at] = rng.choice(_TEXTS)
        elif kind == 4:
            del out[at : at + size]
        elif kind == 5:
            out[at:at] = out[at : at + size] * rng.choice((1, 2, 50))
        elif kind == 6:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            out[at : at + size] = other[start : start + rng.choice((4, 32, 300))]
        else:
            _replace_token(out, rng)
    return bytes(out)


def _replace_token(out: bytearray, rng: random.Random) -> None:
    """Put another value where a JSON or YAML one stands."""
    edges = [n for n, byte in enumerate(out) if byte in b':,[]{}"\n']
    if len(edges) < 2:
        return
    which = rng.randrange(len(edges) - 1)
    out[edges[which] + 1 : edges[which + 1]] = rng.choice(_TEXTS)
