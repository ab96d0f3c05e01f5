"""The values of a GGUF header, read within bounds: nothing is believed before it is measured.

A count or a length is compared with the bytes that are left before anything of that size is made,
which the ``gguf`` package's reader does not do: hence a reader of our own.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memopt.errors import WeightsError

DAMAGED = "the file is truncated or damaged; download it again"
# Type number -> numpy's name of the value.
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_LENGTH = struct.Struct("<Q")
_TYPE = struct.Struct("<I")


@dataclass(slots=True)
class Cursor:
    """A place in the bytes of a file, which moves as values are read."""

    path: Path
    data: memoryview
    at: int = 0

    @property
    def left(self) -> int:
        """Bytes behind the place."""
        return len(self.data) - self.at

    def damaged(self, problem: str) -> WeightsError:
        """Return the error that says what is wrong here."""
        return WeightsError(f"{self.path}, byte {self.at:,}: {problem}", fix=DAMAGED)

    def take(self, size: int, what: str) -> memoryview:
        """Return the next ``size`` bytes.

        Raises:
            WeightsError: the file ends before.
        """
        if size > self.left:
            raise self.damaged(f"{what} needs {size:,} bytes, the file has {self.left:,} more")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, what: str, kind: struct.Struct = _LENGTH) -> int:
        """Return an unsigned integer, of 64 bits where ``kind`` does not say otherwise."""
        return int(kind.unpack(self.take(kind.size, what))[0])

    def type(self, what: str) -> int:
        """Return an unsigned integer of 32 bits."""
        return self.number(what, _TYPE)

    def string(self, what: str) -> str:
        """Return a string."""
        raw = self.take(self.number(f"the length of {what}"), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8 text") from None

    def value(self, kind: int, key: str) -> Any:
        """Return a metadata value: bool, int, float, str, list of str, or an array of numbers."""
        if kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[kind])
            return np.frombuffer(self.take(dtype.itemsize, key), dtype)[0].item()
        if kind == _BOOL:
            return bool(self.take(1, key)[0])
        if kind == _STRING:
            return self.string(f"the value of {key!r}")
        if kind != _ARRAY:
            raise self.damaged(f"{key!r} has values of type {kind}, which GGUF does not have")
        kind, count = self.type(key), self.number(f"the length of {key!r}")
        if kind in _NUMBERS or kind == _BOOL:
            dtype = np.dtype(_NUMBERS.get(kind, "?"))
            if count > self.left // dtype.itemsize:
                raise self.damaged(f"{key!r} announces {count:,} values, the file ends before")
            raw = self.take(count * dtype.itemsize, key)
            return np.frombuffer(raw, np.uint8).copy().view(dtype)
        if kind != _STRING:
            raise self.damaged(f"{key!r} is an array of type {kind}, which memopt does not read")
        if count > self.left // _LENGTH.size:
            raise self.damaged(f"{key!r} announces {count:,} strings, the file ends before")
        return [self.string(f"string {index} of {key!r}") for index in range(count)]
