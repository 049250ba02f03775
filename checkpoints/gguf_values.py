"""Values of a GGUF file's metadata: numbers, texts and arrays as the bytes that they are in the file. Layout: docs/gguf.md of ggml."""

import struct
from typing import Any

from msgspec import Struct

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # gguf_type -> bytes
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY, UINT32 = 8, 9, 4
_ARRAY_HEAD = 12  # bytes of an array's element type and length


class Value(Struct, frozen=True):
    """A metadata value: its `gguf_type` and its bytes as they are in the file."""

    type: int
    raw: bytes

    def number(self) -> int | float | None:
        """The value of a scalar, None for anything else."""
        return struct.unpack("<" + FORMATS[self.type], self.raw)[0] if self.type in FORMATS else None

    def text(self) -> str | None:
        """The value of a string, None for anything else."""
        return self.raw[8:].decode(errors="replace") if self.type == STRING else None

    def plain(self) -> Any:
        """The value in Python: a number, truth value, text, or the list of an array's elements."""
        if self.type != ARRAY:
            return self.text() if self.type == STRING else self.number()
        kind, count = struct.unpack_from("<IQ", self.raw)
        if kind in FORMATS:
            return list(struct.unpack_from(f"<{count}{FORMATS[kind]}", self.raw, _ARRAY_HEAD))
        texts, at = [], _ARRAY_HEAD
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", self.raw, at)
            at += 8 + length
            texts.append(self.raw[at - length : at].decode(errors="replace"))
        return texts


def string_value(text: str) -> Value:
    """A string as a metadata value."""
    encoded = text.encode()
    return Value(STRING, struct.pack("<Q", len(encoded)) + encoded)


def uint32_value(number: int) -> Value:
    """An unsigned integer as a metadata value."""
    return Value(UINT32, struct.pack("<I", number))
