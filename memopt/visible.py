"""Text that was written by others, as it may be shown.

A memory, a file's name or a node's holds what somebody put there. A terminal obeys some characters
(another title, a cleared screen, a line written over), and some a reader never sees.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any

# C0 but tab and newline, DEL, C1; zero width but the joiners letters need; line separators; what
# turns the direction of text; half characters, which no stream takes; tags, which nobody sees.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    r"""Return ``text`` with every character a terminal would obey written as its escape.

    >>> visible("a red\x1b[2J door\tand \u202eback")
    'a red\\x1b[2J door\tand \\u202eback'
    """
    return _OBEYED.sub(_escape, text.replace("\r\n", "\n"))


def json_text(document: Any, *, indent: int | None = 1) -> str:
    r"""Return JSON that keeps letters readable and holds no character a terminal would obey.

    >>> json_text({"text": "Tür\x9b2J"}, indent=None)
    '{"text": "Tür\\u009b2J"}'
    """
    text = json.dumps(document, indent=indent, ensure_ascii=False)
    # They stand inside of strings only, where JSON has an escape for each (for a tag, two).
    return _OBEYED.sub(lambda found: json.dumps(found[0])[1:-1], text)


class VisibleLog(logging.Formatter):
    """Warnings of the library, which quote names and texts too, as :func:`visible` shows them."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return visible(super().format(record))


def _escape(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
