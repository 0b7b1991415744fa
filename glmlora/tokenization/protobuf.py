"""As much of protobuf's form as SentencePiece's files and answers need: fields of whole numbers and
of bytes, one behind the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # how a field is written


def varint(value: int) -> bytes:
    """A whole number from 0."""
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(high) if high else bytes([low])


def key(number: int, wire: int) -> bytes:
    """What a field begins with."""
    return varint(number << 3 | wire)


def sized(number: int, content: bytes) -> bytes:
    """A field of bytes."""
    return key(number, BYTES) + varint(len(content)) + content


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of what the library wrote: whole numbers, else bytes."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        field, wire = divmod(number(), 8)
        if wire == VARINT:
            yield field, number()
            continue
        size = number() if wire == BYTES else 8 if wire == FIXED64 else 4
        yield field, data[at : at + size]
        at += size
