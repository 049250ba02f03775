"""Full tensors in a safetensors file beside the JSONL dump, written as a stream.

safetensors' own writer needs every tensor in memory at once; here the data goes to disk as it comes and the header,
which stands first in the file, is written when all shapes are known. The library reads the result.
"""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from .errors import DumpError, InputError

_DTYPES = {"float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32"}


def beside(dump: str | os.PathLike[str]) -> Path:
    """The tensors file of a dump: ours.jsonl -> ours.safetensors."""
    return Path(dump).with_suffix(".safetensors")


def key(point: str, step: int) -> str:
    """The name of a point's tensor of one forward pass."""
    return f"{point}/{step}"


class TensorWriter:
    """Writes tensors one after the other into a safetensors file; nothing stands at `path` until `close`.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._part = self.path.with_name(self.path.name + ".part")
        self._entries: dict[str, dict[str, Any]] = {}
        self._size = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._part.open("wb")
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}.", "Choose another --out.", code="output") from error

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Append one tensor, in host memory; a name that is there already is an error (ValueError)."""
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
            self._file.write(data.data if data.size else b"")
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}.", "Free disk space.", code="output") from error

    def close(self, *, complete: bool = True) -> None:
        """Put header and data together; with `complete` False, drop what was written. A second call does nothing."""
        if self._file.closed:
            return
        self._file.close()
        joined = self.path.with_name(self.path.name + ".whole")
        try:
            if complete:
                header = json.dumps(self._entries).encode()
                header += b" " * (-len(header) % 8)  # the format wants the data aligned to 8 bytes
                with joined.open("wb") as whole, self._part.open("rb") as part:
                    whole.write(struct.pack("<Q", len(header)) + header)
                    shutil.copyfileobj(part, whole, 1 << 24)
                joined.replace(self.path)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}.", "Free disk space.", code="output") from error
        finally:
            self._part.unlink(missing_ok=True)
            joined.unlink(missing_ok=True)

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
            DumpError: it is not there.
        """
        if key(point, step) not in self.names:
            raise DumpError(f"{self.path} has no tensor of {point} in step {step}.", "Dump again with --full.")
        tensor: NDArray[np.float32] = self._file.get_tensor(key(point, step))
        return tensor
