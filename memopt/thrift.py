"""The thrift compact protocol, as far as Parquet's footer and page headers use it.

Source: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

import struct
from typing import Any

# type codes
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST = 1, 2, 3, 4, 5, 6, 7, 8, 9
SET, STRUCT = 10, 12
# A footer's deepest structs (a logical type's unit, a statistic) are at 6.
_DEEPEST = 32


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _zigzag(value: int) -> bytes:
    return varint(value << 1 if value >= 0 else (-value << 1) - 1)


def _value(kind: int, value: Any) -> bytes:
    if kind in (I16, I32, I64):
        return _zigzag(value)
    if kind == BYTE:
        return struct.pack("b", value)
    if kind == BINARY:
        return varint(len(value)) + bytes(value)
    if kind == LIST:
        element, items = value
        head = (
            bytes([len(items) << 4 | element])
            if len(items) < 15
            else bytes([0xF0 | element]) + varint(len(items))
        )
        return head + b"".join(_value(element, item) for item in items)
    return bytes(value)  # a struct, already encoded


def write_struct(*entries: tuple[int, int, Any]) -> bytes:
    """Encode (field id, type, value) triples in rising id order; a None value is left out."""
    out, last = bytearray(), 0
    for number, kind, value in entries:
        if value is None:
            continue
        code = (TRUE if value else FALSE) if kind == TRUE else kind
        out.append((number - last) << 4 | code)
        if kind != TRUE:
            out += _value(kind, value)
        last = number
    out.append(0)
    return bytes(out)


def read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """Decode the variable-length number at ``at``; return it and the end offset.

    Raises:
        ValueError, IndexError: it is over 64 bits long, or the data ends inside.
    """
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("varint longer than 64 bits")


def _read_signed(data: memoryview, at: int) -> tuple[int, int]:
    raw, at = read_varint(data, at)
    return (raw >> 1) ^ -(raw & 1), at


def _read_bytes(data: memoryview, at: int, length: int) -> tuple[bytes, int]:
    if at + length > len(data):
        raise ValueError(f"{length} bytes are announced, {len(data) - at} are there")
    return bytes(data[at : at + length]), at + length


def _read_value(data: memoryview, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if depth > _DEEPEST:
        raise ValueError("nested too deep")
    if kind in (I16, I32, I64):
        return _read_signed(data, at)
    if kind in (BYTE, TRUE, FALSE):
        return data[at], at + 1
    if kind == DOUBLE:
        return _read_bytes(data, at, 8)
    if kind == BINARY:
        length, at = read_varint(data, at)
        return _read_bytes(data, at, length)
    if kind in (LIST, SET):
        head, at = data[at], at + 1
        size, element = head >> 4, head & 0x0F
        if size == 15:
            size, at = read_varint(data, at)
        # Every element takes a byte at least: no claim makes this run longer than the data.
        if at + size > len(data):
            raise ValueError(f"a list of {size} elements is announced, which are not there")
        items = []
        for _ in range(size):
            item, at = _read_value(data, at, element, depth + 1)
            items.append(item)
        return items, at
    if kind == STRUCT:
        return read_struct(data, at, depth + 1)
    raise ValueError(f"thrift type {kind} does not occur in Parquet")


def read_struct(data: memoryview, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Decode one compact-protocol struct at ``at``; return its fields by id and the end offset.

    Raises:
        ValueError, IndexError: it is damaged, cut short or nested deeper than Parquet's are.
    """
    out: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        at += 1
        kind = head & 0x0F
        if head >> 4:
            number += head >> 4
        else:
            number, at = _read_signed(data, at)
        if kind in (TRUE, FALSE):
            out[number] = kind == TRUE
        else:
            out[number], at = _read_value(data, at, kind, depth)
    return out, at + 1
