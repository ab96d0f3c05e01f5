"""A text as a search reads it, with the way back to the text as it was written."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# What is put over a part already found: no letter, no digit, no space.
FILLER = "\ue000"
# Ordering combining marks is quadratic in their number: no letter of any language has so many.
_LONGEST_CLUSTER = 16
_PLAIN = re.compile(r"[\t\n\r\x20-\x7e]*")
# Unicode Standard Annex 15, section 13: in stream-safe text a grapheme joiner ends 30 marks.
_MARKS, _JOINER = 30, "\u034f"
_MARK_RUN = re.compile(rf"[^\w\s\x00-\x7f]{{{_MARKS + 1},}}")


@dataclass(frozen=True, slots=True)
class Normalised:
    """A copy to search in, and where each of its characters begins and ends in the original."""

    text: str
    starts: Sequence[int]
    ends: Sequence[int]


def normalised(text: str) -> Normalised:
    """Return the text in NFKC, digits, dashes and spaces in ASCII, without invisible characters.

    >>> copy = normalised("n\\u200bo\\u00a0１")
    >>> copy.text, copy.starts[1], copy.ends[3]
    ('no 1', 2, 5)
    """
    if _PLAIN.fullmatch(text):
        return Normalised(text, range(len(text)), range(1, len(text) + 1))
    characters: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    begin = 0
    while begin < len(text):
        end = begin + 1
        while (
            end < len(text) and end - begin < _LONGEST_CLUSTER and unicodedata.combining(text[end])
        ):
            end += 1
        for character in unicodedata.normalize("NFKC", text[begin:end]):
            if plain := _plain(character):
                characters.append(plain)
                starts.append(begin)
                ends.append(end)
        begin = end
    return Normalised("".join(characters), starts, ends)


def stream_safe(text: str) -> str:
    """Return the text as it can be normalised in linear time: long runs of combining marks broken.

    >>> stream_safe("e\u0301t\u0301") == "e\u0301t\u0301"
    True
    >>> len(stream_safe("e" + "\u0301" * 61))
    64
    """
    return _MARK_RUN.sub(lambda run: "".join(_broken(run[0])), text)


def _broken(run: str) -> Iterator[str]:
    marks = 0
    for character in run:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks > _MARKS:
            yield _JOINER
            marks = 1
        yield character


def _plain(character: str) -> str:
    if _PLAIN.fullmatch(character):
        return character
    category = unicodedata.category(character)
    if category in ("Cf", "Cc") or "\ufe00" <= character <= "\ufe0f":
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(character))
    return {"Zs": " ", "Zl": "\n", "Zp": "\n", "Pd": "-"}.get(
        category, "-" if character == "\u2212" else character
    )
