"""JSON of others: whatever is wrong with it is one clear line, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from memopt.errors import InputError, MemoptError


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of its pairs; ValueError where a key is there twice."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name occurs twice")
    return value


def parse_json(
    text: str | bytes,
    what: str,
    *,
    error: type[MemoptError] = InputError,
    fix: str | None = None,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """Return the value of a JSON text.

    Args:
        text: the text, or its UTF-8 bytes.
        what: what it is, to begin the message with.
        error: the class to raise.
        fix: what to do about it.
        pairs: makes an object of its (key, value) pairs; it may raise ValueError.

    Raises:
        MemoptError: of the class ``error``: it is not JSON, not UTF-8, nested deeper than Python
            reads, or holds a number of more digits than Python reads.

    >>> parse_json("[" * 100_000, "a.json")
    Traceback (most recent call last):
    ...
    memopt.errors.InputError: a.json is nested too deep to be read
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise error(f"{what} is nested too deep to be read", fix=fix) from None
    except UnicodeDecodeError as cause:
        raise error(f"{what} is not UTF-8 text (byte {cause.start})", fix=fix) from None
    except json.JSONDecodeError as cause:
        raise error(f"{what} is not JSON: {cause}", fix=fix) from None
    except ValueError as cause:
        # Python's own limit on the digits of a number says how to lift it, which is no way here.
        raise error(f"{what} is not usable JSON: {str(cause).partition(';')[0]}", fix=fix) from None
