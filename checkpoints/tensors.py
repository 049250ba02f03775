"""Full tensors in a safetensors file beside the JSONL dump, written as a stream.

safetensors' own writer needs every tensor in memory at once; here the data goes to disk as it comes and the header,
which comes first in the file, is written when all shapes are known. The library reads the result.
"""

import contextlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from .errors import DumpError
from .whole_file import Replacement, unwritable

_DTYPES = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64", "int32": "I32"}


def beside(dump: str | os.PathLike[str]) -> Path:
    """The tensors file of a dump: ours.jsonl -> ours.safetensors."""
    return Path(dump).with_suffix(".safetensors")


def key(point: str, step: int) -> str:
    """The name of a point's tensor of one forward pass."""
    return f"{point}/{step}"


class TensorWriter:
    """Writes tensors one after the other into a safetensors file; nothing exists at `path` until `close`.

    `metadata` are texts that the file also carries.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        self._metadata = dict(metadata or {})
        self._entries: dict[str, dict[str, Any]] = {}
        self._size = 0
        try:
            self._replacement = Replacement(self.path)
            try:
                self._data = tempfile.TemporaryFile(dir=self._replacement.path.parent)  # noqa: SIM115 - closed by close
            except OSError:
                self._replacement.discard()
                raise
        except OSError as error:
            raise unwritable(self.path, error, "Choose another --out.") from error

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Append one tensor, in host memory; a name that was used before is an error (ValueError)."""
        if name in self._entries:
            raise ValueError(f"tensor {name!r} was written before")
        data = np.ascontiguousarray(array)
        start, self._size = self._size, self._size + data.nbytes
        self._entries[name] = {
            "dtype": _DTYPES[str(data.dtype)],
            "shape": list(array.shape),
            "data_offsets": [start, self._size],
        }
        try:
            self._data.write(data.data if data.size else b"")
        except OSError as error:
            raise unwritable(self.path, error, "Free disk space.") from error

    def close(self, *, complete: bool = True) -> None:
        """Put header and data together; with `complete` False, drop what was written. A second call does nothing."""
        if self._data.closed:
            return
        try:
            if complete:
                described = {"__metadata__": self._metadata, **self._entries} if self._metadata else self._entries
                header = json.dumps(described).encode()
                header += b" " * (-len(header) % 8)  # the format wants the data aligned to 8 bytes
                self._data.seek(0)
                with self._replacement.temporary.open("wb") as file:
                    file.write(struct.pack("<Q", len(header)) + header)
                    shutil.copyfileobj(self._data, file, 1 << 24)
                self._replacement.commit()
        except OSError as error:
            raise unwritable(self.path, error, "Free disk space.") from error
        finally:
            with contextlib.suppress(OSError):  # closing tries to write what is left
                self._data.close()
            self._replacement.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(complete=kind is None)


class TensorReader:
    """Reads single tensors of a file of `TensorWriter`, memory-mapped.

    Raises:
        DumpError: no such file, or not a safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        try:
            self._file = cast(Any, safe_open(self.path, framework="numpy"))
        except (OSError, SafetensorError) as error:
            raise DumpError(f"cannot read the tensors of {path}: {error}.", "Dump again with --full.") from error
        self.names = tuple(self._file.keys())

    def get(self, point: str, step: int = 0) -> NDArray[np.float32]:
        """The full tensor of a point in one forward pass.

        Raises:
            DumpError: it is missing, or of a type that NumPy lacks (BF16).
        """
        if key(point, step) not in self.names:
            raise DumpError(f"{self.path} has no tensor of {point} in step {step}.", "Dump again with --full.")
        try:
            tensor: NDArray[np.float32] = self._file.get_tensor(key(point, step))
        except TypeError as error:
            kind = self._file.get_slice(key(point, step)).get_dtype()
            raise DumpError(
                f"{self.path}: {point} is of type {kind}, which is not read here.", "Save it as float32."
            ) from error
        return tensor
