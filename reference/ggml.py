"""A ctypes view of ggml tensors: just enough to read a value inside llama.cpp's eval callback.

`struct ggml_tensor` is not a stable interface. The view is therefore checked against the library's own accessors before the
first value is used; another layout is an error, never wrong numbers.
"""

import ctypes
import os
import struct
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.dataflow import WITH_FUNCTION
from checkpoints.errors import ReferenceFailed

from .bindings import bindings
from .builds import LIBRARY_VARIABLE
from .jobs import Node, OperandSource, Outline

_MAX_NAME = 64  # GGML_MAX_NAME
_MAX_SRC = 10  # GGML_MAX_SRC
COMPUTED = 16  # GGML_TENSOR_FLAG_COMPUTE: versions that have it set it on every node that is not skipped
_DTYPES: dict[str, Any] = {
    "f32": np.float32,
    "f16": np.float16,
    "bf16": np.uint16,  # the upper half of a float32
    "i32": np.int32,
}
_RAW_DTYPES: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "i32": np.int32, "i64": np.int64}


class GgmlTensor(ctypes.Structure):
    """`struct ggml_tensor` (ggml.h), as llama-cpp-python 0.3.36 ships it."""


GgmlTensor._fields_ = [
    ("type", ctypes.c_int32),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int32),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(GgmlTensor) * _MAX_SRC),
    ("view_src", ctypes.POINTER(GgmlTensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * _MAX_NAME),
]


# The same as one `struct`: a node's fields are read at once, ten times as fast as one by one through ctypes.
_FIELDS = struct.Struct(f"iP4q4Ni16ii{_MAX_SRC}PPNP{_MAX_NAME}s")
_TYPE, _NE, _OP, _OP_PARAMS, _SRC, _NAME = 0, slice(2, 6), 10, slice(11, 27), slice(28, 28 + _MAX_SRC), -1


def _text(name: bytes) -> str:
    """A name in a field of fixed size."""
    return name.partition(b"\0")[0].decode(errors="replace")


class Ggml:
    """libggml-base of the installed llama-cpp-python.

    Raises:
        ReferenceFailed: the library is missing, or lacks a function that is needed.
    """

    def __init__(self) -> None:
        folder = Path(os.environ.get(LIBRARY_VARIABLE) or Path(bindings().__file__).parent / "lib")
        suffix = ".dylib" if sys.platform == "darwin" else ".so"
        try:
            library = ctypes.CDLL(str(folder / f"libggml-base{suffix}"))
            self._get_name = library.ggml_get_name
            self._nbytes = library.ggml_nbytes
            self._op_name = library.ggml_op_name
            self._op_desc = library.ggml_op_desc
            self._type_name = library.ggml_type_name
            self._row_size = library.ggml_row_size
            self._read = library.ggml_backend_tensor_get
        except (OSError, AttributeError) as error:
            raise ReferenceFailed(
                f"libggml of llama-cpp-python cannot be used: {error}.", "Install llama-cpp-python 0.3.36.", code="abi"
            ) from error
        for function in (self._get_name, self._op_desc, self._nbytes):
            function.argtypes = [ctypes.c_void_p]
        for function in (self._op_name, self._type_name):
            function.argtypes = [ctypes.c_int32]
        for function in (self._get_name, self._op_name, self._op_desc, self._type_name):
            function.restype = ctypes.c_char_p
        self._nbytes.restype = ctypes.c_size_t
        self._row_size.argtypes = [ctypes.c_int32, ctypes.c_int64]
        self._row_size.restype = ctypes.c_size_t
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        self._read.restype = None
        self._checked = False

    @lru_cache(maxsize=512)  # noqa: B019 - one library a process, and its numbers never change
    def op_name(self, op: int) -> str:
        """`ggml_op_name`: 28 -> "MUL_MAT"."""
        return str(self._op_name(op).decode())

    @lru_cache(maxsize=128)  # noqa: B019
    def type_name(self, number: int) -> str:
        """`ggml_type_name`: 0 -> "f32", 8 -> "q8_0"."""
        name = self._type_name(number)
        return name.decode() if name else f"type{number}"

    def row_size(self, number: int, n: int) -> int:
        """`ggml_row_size`: bytes of `n` elements of a type."""
        return int(self._row_size(number, n))

    def tensor(self, address: int) -> GgmlTensor:
        """The tensor at an address; the first one is checked against the library.

        Raises:
            ReferenceFailed: the library has another layout.
        """
        tensor = ctypes.cast(address, ctypes.POINTER(GgmlTensor)).contents
        if not self._checked:
            self._check(address, tensor)
            self._checked = True
        return tensor

    def _check(self, address: int, tensor: GgmlTensor) -> None:
        name: bytes = self._get_name(address) or b""
        ours = tensor.name
        plausible = name == ours and all(0 < n < 1 << 40 for n in tensor.ne) and 0 <= tensor.op < 512
        if not plausible or int(self._nbytes(address)) != _extent(tensor, _item(self.type_name(tensor.type))):
            raise ReferenceFailed(
                f"this version of llama.cpp lays out its tensors differently (read {ours!r}, the library says {name!r}).",
                "Install llama-cpp-python 0.3.36.",
                code="abi",
            )

    def node(self, address: int) -> Node:
        """Everything about the tensor at an address except its value; `tensor` has checked that there is one."""
        fields = _FIELDS.unpack(ctypes.string_at(address, _FIELDS.size))
        op = self.op_name(fields[_OP])
        return Node(
            name=_text(fields[_NAME]),
            op=op,
            type=self.type_name(fields[_TYPE]),
            ne=fields[_NE],
            op_params=fields[_OP_PARAMS],
            sources=tuple(self._source(source) for source in fields[_SRC] if source),
            address=address,
            function=self._op_desc(address).decode() if op in WITH_FUNCTION else "",
        )

    def outline(self, tensor: GgmlTensor) -> Outline:
        """A node's name, operation, first operand and shape."""
        return Outline(_text(tensor.name), self.op_name(tensor.op), first_operand(tensor), tuple(tensor.ne))

    def _source(self, address: int) -> OperandSource:
        fields = _FIELDS.unpack(ctypes.string_at(address, _FIELDS.size))
        return OperandSource(
            _text(fields[_NAME]), self.op_name(fields[_OP]), self.type_name(fields[_TYPE]), fields[_NE], address
        )

    def bytes_of(self, address: int, count: int) -> bytes:
        """The memory at an address; `tensor` has checked that a tensor lies there."""
        return ctypes.string_at(address, count)

    def read_raw(self, address: int) -> NDArray[Any]:
        """The elements of a contiguous tensor, unconverted: flat, float32, float16, int32 or int64.

        Raises:
            ReferenceFailed: the tensor has another type.
        """
        tensor = self.tensor(address)
        kind = self.type_name(tensor.type)
        if kind not in _RAW_DTYPES:
            raise ReferenceFailed(
                f"input {tensor.name.decode()!r} has type {kind}, which cannot be recorded.",
                "Use `parity dump ref`.",
                code="graph",
            )
        raw = np.empty(int(np.prod(list(tensor.ne))), dtype=_RAW_DTYPES[kind])
        if raw.size:
            self._read(ctypes.byref(tensor), raw.ctypes.data, 0, raw.nbytes)
        return raw

    def readable(self, type_name: str) -> bool:
        """Whether values of this type can be converted to float32 here."""
        return type_name in _DTYPES

    def read(self, tensor: GgmlTensor) -> NDArray[np.float32]:
        """Copy a tensor's value: float32, a new contiguous array in NumPy's order (ggml's `ne` reversed, 4 dimensions).

        To be called inside the eval callback, while the value exists. Views and permuted tensors are gathered by their
        strides. Mirrors `ggml_backend_tensor_get`, which also reads from a device.

        Raises:
            ReferenceFailed: the type cannot be read.
        """
        kind = self.type_name(tensor.type)
        if kind not in _DTYPES:
            raise ReferenceFailed(
                f"node {tensor.name.decode()!r} has type {kind}, which cannot be recorded.", "Leave it out of --points."
            )
        dtype = np.dtype(_DTYPES[kind])
        raw = np.empty(_extent(tensor, dtype.itemsize), dtype=np.uint8)
        self._read(ctypes.byref(tensor), raw.ctypes.data, 0, raw.nbytes)
        strided: NDArray[Any] = np.ndarray(tuple(tensor.ne)[::-1], dtype, raw, 0, tuple(tensor.nb)[::-1])
        if kind == "f32":
            return np.array(strided, dtype=np.float32, order="C")
        if kind == "bf16":
            return (strided.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return np.ascontiguousarray(strided, dtype=np.float32)


def first_operand(tensor: GgmlTensor) -> str:
    """The name of a node's first operand, "" if it has none."""
    return tensor.src[0].contents.name.decode(errors="replace") if tensor.src[0] else ""


def _item(type_name: str) -> int:
    return np.dtype(_DTYPES[type_name]).itemsize if type_name in _DTYPES else 0


def _extent(tensor: GgmlTensor, item: int) -> int:
    """Bytes from a tensor's first element to its last (`ggml_nbytes`, for types without blocks)."""
    return item + sum((int(n) - 1) * int(stride) for n, stride in zip(tensor.ne, tensor.nb, strict=True))
