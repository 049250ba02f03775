"""GGUF files with a fault: run by llama.cpp they are engines with that fault, which know nothing of parity."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.gguf_file import contents, header_bytes
from checkpoints.gguf_values import Value

Floats = NDArray[np.float32]
_F32 = 0  # GGML_TYPE_F32
_FORMATS = {4: "<I", 5: "<i", 6: "<f", 7: "<?"}  # GGUF's types of values: uint32, int32, float32, bool


class File:
    """A GGUF file whose tensors are all F32, in memory: change metadata and tensors, then write it elsewhere."""

    def __init__(self, path: Path) -> None:
        file = contents(path)
        self._metadata, self._infos = dict(file.metadata), list(file.tensors)
        assert all(info.type == _F32 for info in self._infos)
        self._data = np.fromfile(path, dtype=np.uint8)[file.data :]
        self.architecture = self._metadata["general.architecture"].raw[8:].decode()
        self.tensors: dict[str, Floats] = {}
        for info in self._infos:
            shape = tuple(reversed(info.ne))
            end = info.offset + 4 * int(np.prod(shape))
            self.tensors[info.name] = self._data[info.offset : end].view(np.float32).reshape(shape)

    def named(self, ending: str) -> list[str]:
        """The tensors of all layers with this ending, in the layers' order: "attn_norm.weight"."""
        names = [name for name in self.tensors if name.endswith("." + ending) or name == ending]
        assert names, ending
        return names

    def each(self, ending: str, change: Callable[[Floats], Any]) -> None:
        """Change these tensors in all layers."""
        for name in self.named(ending):
            self.tensors[name][...] = change(self.tensors[name].copy())

    def number(self, key: str) -> Any:
        """A number of the architecture's metadata."""
        value = self._metadata[f"{self.architecture}.{key}"]
        return struct.unpack(_FORMATS[value.type], value.raw)[0]

    def set(self, key: str, number: float) -> None:
        """Change a number of the architecture's metadata."""
        whole = f"{self.architecture}.{key}"
        kind = self._metadata[whole].type
        self._metadata[whole] = Value(kind, struct.pack(_FORMATS[kind], number))

    def add(self, key: str, number: int) -> None:
        """Add a count to the architecture's metadata."""
        self._metadata[f"{self.architecture}.{key}"] = Value(4, struct.pack(_FORMATS[4], number))

    def exchange(self, first: str, second: str) -> None:
        """Exchange two tensors of the same shape."""
        left, other = self.tensors[first], self.tensors[second]
        left[...], other[...] = other.copy(), left.copy()

    def write(self, path: Path) -> Path:
        """The changed file."""
        path.write_bytes(header_bytes(self._metadata, self._infos) + self._data.tobytes())
        return path


def permuted(rows: Floats, heads: int) -> Floats:
    """Halves to adjacent pairs in each head, as converters of Llama do."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def transposed(matrix: Floats) -> Floats:
    """A square matrix, or each of many, transposed."""
    return matrix.swapaxes(-1, -2)
