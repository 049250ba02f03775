"""The table of contents of a GGUF file: metadata and tensors by place, without loading either.

Used to refuse a file that llama.cpp would refuse in its own words, and to copy parts of one. Values are kept as raw
bytes, so that what is copied is copied to the bit.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from checkpoints.errors import ModelError

_ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # gguf_type -> bytes
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY, UINT32 = 8, 9, 4


@dataclass(frozen=True)
class Value:
    """A metadata value: its `gguf_type` and its bytes as they stand in the file."""

    type: int
    raw: bytes

    def number(self) -> int | float | None:
        """The value of a scalar, None for anything else."""
        return struct.unpack("<" + _FORMATS[self.type], self.raw)[0] if self.type in _FORMATS else None

    def text(self) -> str | None:
        """The value of a string, None for anything else."""
        return self.raw[8:].decode(errors="replace") if self.type == STRING else None


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's place: `ne` in ggml's order, `type` a `ggml_type`, `offset` from the start of the data section."""

    name: str
    ne: tuple[int, ...]
    type: int
    offset: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        count = 1
        for n in self.ne:
            count *= n
        return count


@dataclass(frozen=True)
class Contents:
    """What a GGUF file holds, and where: `data` is the file offset of the data section, `size` of the file's end."""

    path: Path
    metadata: dict[str, Value]
    tensors: tuple[TensorInfo, ...]
    data: int
    size: int

    def text(self, key: str) -> str:
        """A string of the metadata, "" if it is not there."""
        found = self.metadata.get(key)
        return (found.text() or "") if found else ""

    def integer(self, key: str) -> int | None:
        """An integer of the metadata, None if it is not there."""
        found = self.metadata.get(key)
        number = found.number() if found else None
        return int(number) if number is not None else None

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return self.text("general.architecture")

    @property
    def layers(self) -> int:
        """`<architecture>.block_count`, 0 if it is not there."""
        return self.integer(f"{self.architecture}.block_count") or 0


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, n: int) -> bytes:
        if n < 0 or self.at + n > len(self.data):
            raise EOFError
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, code: str) -> int:
        return int(struct.unpack("<" + code, self.take(struct.calcsize(code)))[0])

    def string(self) -> str:
        return self.take(self.number("Q")).decode(errors="replace")

    def skip_value(self, kind: int) -> None:
        if kind in SIZES:
            self.take(SIZES[kind])
        elif kind == STRING:
            length = self.number("Q")
            self.at += length
        elif kind == ARRAY:
            item, count = self.number("I"), self.number("Q")
            if item in SIZES:
                self.at += SIZES[item] * count
            else:
                for _ in range(count):
                    self.skip_value(item)
        else:
            raise ValueError(f"metadata of type {kind}")
        if self.at > len(self.data):
            raise EOFError


def contents(path: Path) -> Contents:
    """Read the table of contents.

    Raises:
        ModelError: no such file, a folder, not a GGUF, or cut short within the table.
    """
    try:
        if path.is_dir():
            raise ModelError(f"{path} is a folder.", "Give the model file (.gguf) itself.")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file.", "Give a model in llama.cpp's format (.gguf).")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data)
    except FileNotFoundError:
        raise ModelError(f"no such file: {path}.", "Check the path of the model.") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}.", "Check the file's permissions.") from error
    except EOFError:
        raise ModelError(f"{path} is cut short: it ends within its table of contents.", "Download it again.") from None
    except (ValueError, MemoryError) as error:
        raise ModelError(f"{path} is damaged: {error}.", "Download it again.") from error


def _parse(path: Path, data: mmap.mmap) -> Contents:
    cursor = _Cursor(data)
    cursor.take(4)
    version = cursor.number("I")
    if not 2 <= version <= 3:
        raise ModelError(f"{path} is GGUF version {version}.", "Convert it again (version 3, little-endian).")
    n_tensors, n_values = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Value] = {}
    for _ in range(n_values):
        key, kind = cursor.string(), cursor.number("I")
        start = cursor.at
        cursor.skip_value(kind)
        metadata[key] = Value(kind, data[start : cursor.at])
    tensors: list[TensorInfo] = []
    for _ in range(n_tensors):
        name, n_dims = cursor.string(), cursor.number("I")
        if n_dims > 4:
            raise ValueError(f"tensor {name!r} has {n_dims} dimensions")
        ne = tuple(cursor.number("Q") for _ in range(n_dims))
        tensors.append(TensorInfo(name, ne, cursor.number("I"), cursor.number("Q")))
    alignment = metadata["general.alignment"].number() if "general.alignment" in metadata else _ALIGNMENT
    step = int(alignment or _ALIGNMENT)
    return Contents(path, metadata, tuple(tensors), -(-cursor.at // step) * step, len(data))


def string_value(text: str) -> Value:
    """A string as a metadata value."""
    encoded = text.encode()
    return Value(STRING, struct.pack("<Q", len(encoded)) + encoded)


def uint32_value(number: int) -> Value:
    """An unsigned integer as a metadata value."""
    return Value(UINT32, struct.pack("<I", number))


def header_bytes(metadata: dict[str, Value], tensors: list[TensorInfo]) -> bytes:
    """The table of contents of a new file (GGUF 3), padded so that the data section may follow at once."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [string_value(key).raw, struct.pack("<I", value.type), value.raw]
    for tensor in tensors:
        parts += [string_value(tensor.name).raw, struct.pack(f"<I{len(tensor.ne)}Q", len(tensor.ne), *tensor.ne)]
        parts.append(struct.pack("<IQ", tensor.type, tensor.offset))
    joined = b"".join(parts)
    return joined + b"\0" * (-len(joined) % _ALIGNMENT)
