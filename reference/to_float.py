"""libggml's own dequantisation, through ctypes: the third opinion on a block's values."""

import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from checkpoints.errors import ReferenceFailed

_USED = ("ggml_get_type_traits", "ggml_quantize_chunk", "ggml_quantize_requires_imatrix", "ggml_row_size")
_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _Traits(ctypes.Structure):
    """`struct ggml_type_traits` (ggml.h), its first six fields."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _ToFloat),
    )


def base_library() -> ctypes.CDLL:
    """libggml-base of the installed llama-cpp-python; loading it does not start llama.cpp.

    Raises:
        ReferenceFailed: the library is missing, or lacks functions that are used through this.
    """
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ReferenceFailed("llama-cpp-python is not installed.", "pip install llama-cpp-python", code="abi")
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    try:
        library = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / f"libggml-base{suffix}"))
        for name in _USED:
            getattr(library, name)
    except (OSError, AttributeError) as error:
        raise ReferenceFailed(
            f"libggml of llama-cpp-python cannot be used: {error}.", "Install llama-cpp-python 0.3.36.", code="abi"
        ) from error
    return library


class ToFloat:
    """`ggml_get_type_traits(type)->to_float` of the installed llama-cpp-python; this loads the library but does not start llama.cpp.

    Raises:
        ReferenceFailed: the library is missing, or has another layout.
    """

    def __init__(self) -> None:
        self._traits = base_library().ggml_get_type_traits
        self._traits.argtypes = [ctypes.c_int]
        self._traits.restype = ctypes.POINTER(_Traits)
        q8_0 = self._traits(8).contents
        if q8_0.type_name != b"q8_0" or (q8_0.blck_size, q8_0.type_size) != (32, 34):
            raise ReferenceFailed(
                "this libggml lays out its types differently.", "Install llama-cpp-python 0.3.36.", code="abi"
            )

    def __call__(self, raw: NDArray[np.uint8], kind: int, elements: int) -> NDArray[np.float32] | None:
        """Blocks of a type, in an array of any shape, as float32 [elements]; None if libggml has no function for the type.

        Raises:
            ReferenceFailed: the number of bytes does not match the elements.
        """
        if kind == 0:  # F32 has no function: the bytes are the values
            return np.ascontiguousarray(raw).reshape(-1).view(np.float32)
        traits = self._traits(kind).contents
        if not traits.to_float or not traits.blck_size:
            return None
        if elements % traits.blck_size or raw.size != elements // traits.blck_size * traits.type_size:
            raise ReferenceFailed(f"libggml has a different block size for type {kind}.", "Install llama-cpp-python 0.3.36.")
        out = np.empty(elements, dtype=np.float32)
        data = np.ascontiguousarray(raw)
        traits.to_float(data.ctypes.data, out.ctypes.data, elements)
        return out

    def padded(self, data: bytes, kind: int, elements: int) -> NDArray[np.float32] | None:
        """As the call, of bytes that may have padding after them."""
        traits = self._traits(kind).contents
        if not traits.to_float or not traits.blck_size:
            return None
        return self(np.frombuffer(data, np.uint8, elements // traits.blck_size * traits.type_size), kind, elements)
