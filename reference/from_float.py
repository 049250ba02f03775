"""libggml's own quantisation of a few rows, through ctypes: what `llama_model_quantize` calls for each piece of a tensor."""

import ctypes

import numpy as np
from numpy.typing import NDArray

from .to_float import base_library

_F32 = 0  # ggml_type


class FromFloat:
    """`ggml_quantize_chunk` without an importance matrix, of the installed llama-cpp-python; several threads may call it.

    Raises:
        ReferenceFailed: the library is missing.
    """

    def __init__(self) -> None:
        library = base_library()
        self._quantise, self._row_size = library.ggml_quantize_chunk, library.ggml_row_size
        self._quantise.restype = self._row_size.restype = ctypes.c_size_t
        self._quantise.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
        self._row_size.argtypes = [ctypes.c_int, ctypes.c_int64]

    def __call__(self, rows: NDArray[np.float32], kind: int) -> NDArray[np.uint8]:
        """Float32 [n, columns] as blocks of a ggml type: uint8 [n, bytes of a row]."""
        values = np.ascontiguousarray(rows, dtype=np.float32).reshape(-1, rows.shape[-1])
        if kind == _F32:  # F32 stays as it is
            return values.view(np.uint8)
        count, columns = values.shape
        out = np.empty((count, self._row_size(kind, columns)), np.uint8)
        self._quantise(kind, values.ctypes.data, out.ctypes.data, 0, count, columns, None)
        return out
