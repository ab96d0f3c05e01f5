"""Pictures and sounds as they come over HTTP."""

from __future__ import annotations

import base64
import binascii
from urllib.parse import unquote_to_bytes

from memopt.serve.failures import Refusal


def decoded(url: str, number: int) -> bytes:
    """Return the bytes of a data URL; nothing is fetched from anywhere.

    Raises:
        Refusal: it is none, or its base64 is damaged.

    >>> decoded("data:text/plain;base64,aGk=", 0)
    b'hi'
    """
    head, comma, body = url.partition(",")
    if not head.startswith("data:") or not comma:
        raise Refusal(400, f"input {number} is no data URL", fix="send data:image/png;base64,...")
    if not head.endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, f"input {number} has damaged base64: {error}") from error
