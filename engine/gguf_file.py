"""The GGUF container: metadata and tensor places, read from a memory map.

gguf-py's reader makes a NumPy view of every element of every array, seconds for a vocabulary of 150,000 tokens; a run
needs none of them. This parser skips arrays (`read_array` decodes one on demand) and is held to gguf-py's by a test.
Layout: docs/gguf.md of ggml.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4  # GGML_MAX_DIMS
_DEFAULT_ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT


@dataclass(frozen=True)
class ArrayField:
    """An array of the metadata that was not decoded: element type, length, where its data begins."""

    kind: int
    length: int
    offset: int


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `shape` is row-major, (out, in) for a matrix; `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    n_bytes: int
    offset: int


class GgufFile:
    """An opened GGUF.

    Raises:
        ModelError: no such file, not a GGUF, truncated, or contradicting itself; the message says which.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = _map(path)
        self._at = 0
        try:
            self.metadata, self.tensors = self._parse()
        except struct.error as error:
            raise self._broken("it ends inside its header") from error
        except UnicodeDecodeError as error:
            raise self._broken("a name in its header is not UTF-8") from error

    def _broken(self, what: str) -> ModelError:
        return ModelError(f"{self.path} is damaged: {what}.", "Download or convert it again.", code="damaged-model")

    def _take(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _string(self) -> str:
        length = self._take("<Q")
        if length > len(self._data) - self._at:
            raise self._broken("a text in its header is longer than the file")
        raw = self._data[self._at : self._at + length]
        self._at += length
        return bytes(raw).decode("utf-8")

    def _parse(self) -> tuple[Mapping[str, Any], Mapping[str, TensorInfo]]:
        self._at = len(MAGIC)
        version = self._take("<I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "is big-endian" if swapped in VERSIONS else f"is GGUF version {version}"
            raise ModelError(f"{self.path} {what}; versions 2 and 3, little-endian, can be read.", "Convert it again.")
        n_tensors, n_fields = self._take("<Q"), self._take("<Q")
        # A field takes 13 bytes at least and a tensor 33: more of them than the file has room for is damage.
        if n_fields * 13 + n_tensors * 33 > len(self._data):
            raise self._broken(f"it counts {n_fields} fields and {n_tensors} tensors, more than it has room for")
        metadata: dict[str, Any] = {}
        for _ in range(n_fields):
            key = self._string()
            metadata[key] = self._value(self._take("<I"))
        places = [self._tensor_place() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._broken(f"its alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in places:
            if name in tensors:
                raise self._broken(f"it has two tensors {name}")
            tensors[name] = self._tensor(name, shape, kind, start + offset)
        return metadata, tensors

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._take(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._broken(f"its header has a value of unknown type {kind}")
        element, length = self._take("<I"), self._take("<Q")
        found = ArrayField(element, length, self._at)
        self._skip(found)
        return found

    def _skip(self, array: ArrayField) -> None:
        if array.kind in _SCALARS:
            self._at += struct.calcsize(_SCALARS[array.kind]) * array.length
        elif array.kind == _STRING:
            if array.length * 8 > len(self._data):
                raise self._broken("an array of its header is longer than the file")
            unpack, at, data = struct.Struct("<Q").unpack_from, self._at, self._data
            for _ in range(array.length):
                at += 8 + unpack(data, at)[0]
            self._at = at
        else:
            raise self._broken(f"its header has an array of unsupported element type {array.kind}")
        if self._at > len(self._data):
            raise self._broken("it ends inside an array of its header")

    def read_array(self, key: str) -> list[Any]:
        """The elements of an array of the metadata; an empty list if there is no such array."""
        array = self.metadata.get(key)
        if not isinstance(array, ArrayField):
            return []
        self._at = array.offset
        if array.kind == _STRING:
            return [self._string() for _ in range(array.length)]
        return [self._take(_SCALARS[array.kind]) for _ in range(array.length)]

    def _tensor_place(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        n_dims = self._take("<I")
        if not 0 < n_dims <= _MAX_DIMS:
            raise self._broken(f"tensor {name} has {n_dims} dimensions")
        dims = [self._take("<Q") for _ in range(n_dims)]
        return name, tuple(reversed(dims)), self._take("<I"), self._take("<Q")

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        block, size = block_of(kind, name)
        if min(shape) < 1 or shape[-1] % block:
            raise self._broken(f"tensor {name} of shape {list(shape)} does not fit its type's blocks of {block}")
        n_bytes = prod(shape) // block * size
        if offset + n_bytes > len(self._data):
            raise ModelError(
                f"{self.path} is truncated: tensor {name} ends at byte {offset + n_bytes:,}, the file at {len(self._data):,}.",
                "Download it again.",
                code="damaged-model",
            )
        return TensorInfo(name, shape, kind, n_bytes, offset)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes, one row of blocks a line: uint8 [rows, bytes a row], a view of the memory map."""
        info = self.tensors[name]
        rows = prod(info.shape[:-1])
        return np.frombuffer(self._data, np.uint8, info.n_bytes, info.offset).reshape(rows, -1)


def block_of(kind: int, name: str = "") -> tuple[int, int]:
    """Elements and bytes of one block of a ggml type.

    Raises:
        ModelError: gguf-py does not know the type.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        found: tuple[int, int] = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        advice = "A newer gguf package may know it: pip install -U gguf."
        raise ModelError(f"tensor {name} has the unknown type {kind}.", advice, code="type") from None
    return found


def _map(path: Path) -> mmap.mmap:
    try:
        if path.is_dir():
            raise ModelError(f"{path} is a folder.", "Name the .gguf file in it.", code="no-file")
        with path.open("rb") as file:
            head = file.read(len(MAGIC))
            if head != MAGIC:
                what = "is empty" if not head else f"is not a GGUF file: it begins with {head!r}, not {MAGIC!r}"
                raise ModelError(f"{path} {what}.", "Take a .gguf model file.", code="not-gguf")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}.", "Check the path.", code="no-file") from error
