"""The protobuf wire format (https://protobuf.dev/programming-guides/encoding), read into plain lists: enough for ONNX.

A message is a sequence of (field number, wire type, payload). ``Message`` keeps the payloads by field number:
integers for
varints, bytes for everything else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from exactprune.checker.network import CheckError


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, next position) of a varint of at most ten bytes."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise CheckError("a protobuf message is cut off")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value & (1 << 64) - 1, at
    raise CheckError("a protobuf integer is too long")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise CheckError(f"a protobuf field of wire type {kind}")
        if at + size > len(data):
            raise CheckError("a protobuf message is cut off")
        yield key >> 3, data[at : at + size]
        at += size


class Message:
    """One message: payloads by field number."""

    def __init__(self, data: bytes) -> None:
        self._fields: dict[int, list[int | bytes]] = {}
        for number, value in _fields(data):
            self._fields.setdefault(number, []).append(value)

    def all(self, number: int) -> list[int | bytes]:
        """Every payload of a field."""
        return self._fields.get(number, [])

    def has(self, number: int) -> bool:
        """Whether the field is there."""
        return number in self._fields

    def data(self, number: int) -> bytes | None:
        """A single field of bytes, or None.

        Raises:
            CheckError: it is there twice, or no bytes.
        """
        values = self.all(number)
        if len(values) > 1 or any(not isinstance(v, bytes) for v in values):
            raise CheckError(f"protobuf field {number} is doubled or of another type")
        return values[0] if values else None  # type: ignore[return-value]

    def text(self, number: int) -> str:
        """A single string, "" by default."""
        return _text(self.data(number) or b"")

    def texts(self, number: int) -> list[str]:
        """Repeated strings."""
        return [_text(v) for v in self.all(number)]

    def messages(self, number: int) -> list[Message]:
        """Repeated messages."""
        if any(not isinstance(v, bytes) for v in self.all(number)):
            raise CheckError(f"protobuf field {number} is of another type")
        return [Message(v) for v in self.all(number)]  # type: ignore[arg-type]

    def message(self, number: int) -> Message | None:
        """A single message, or None."""
        data = self.data(number)
        return None if data is None else Message(data)

    def ints(self, number: int) -> list[int]:
        """Repeated signed 64-bit integers, packed or not."""
        found: list[int] = []
        for value in self.all(number):
            if isinstance(value, int):
                found.append(value)
                continue
            at = 0
            while at < len(value):
                item, at = _varint(value, at)
                found.append(item)
        return [v - (1 << 64) if v >= 1 << 63 else v for v in found]

    def int(self, number: int, default: int = 0) -> int:
        """A single integer."""
        values = self.ints(number)
        if len(values) > 1:
            raise CheckError(f"protobuf field {number} is doubled")
        return values[0] if values else default

    def packed(self, number: int) -> bytes:
        """Repeated fixed-size numbers as their bytes, packed or not."""
        if any(not isinstance(v, bytes) for v in self.all(number)):
            raise CheckError(f"protobuf field {number} is of another type")
        return b"".join(self.all(number))  # type: ignore[arg-type]

    def float(self, number: int, default: float) -> float:
        """A single float32."""
        data = self.data(number)
        if data is not None and len(data) != 4:
            raise CheckError(f"protobuf field {number} is no float")
        return default if data is None else struct.unpack("<f", data)[0]


def _text(value: int | bytes) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else ""
    except UnicodeDecodeError:
        raise CheckError("a protobuf string is not UTF-8") from None
