"""One operation of ggml, computed by libggml itself from arrays: the reference for operations that no model has."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reference.bindings import bindings
from reference.ggml import GgmlTensor
from reference.library import Library

_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.int32): 26, np.dtype(np.int64): 27}  # ggml_type
_DTYPES = {number: dtype for dtype, number in _TYPES.items()}
_ROOM = 64 << 20
_LAST = "GLU"  # the last ggml_op


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class LibGgml:
    """libggml and its CPU code, through ctypes."""

    def __init__(self) -> None:
        self.library = Library()  # loads the CPU backend
        folder = Path(bindings().__file__).parent / "lib"
        self._base = ctypes.CDLL(str(folder / "libggml-base.so"))
        self._cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        self._cpu.ggml_cpu_init()
        self._base.ggml_init.restype = ctypes.c_void_p
        self._base.ggml_init.argtypes = [_InitParams]
        self._base.ggml_new_tensor.restype = ctypes.POINTER(GgmlTensor)
        self._base.ggml_new_tensor.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_int64)]
        self._base.ggml_new_graph.restype = ctypes.c_void_p
        self._base.ggml_new_graph.argtypes = [ctypes.c_void_p]
        self._base.ggml_build_forward_expand.argtypes = [ctypes.c_void_p, ctypes.POINTER(GgmlTensor)]
        self._base.ggml_free.argtypes = [ctypes.c_void_p]
        self._cpu.ggml_graph_compute_with_ctx.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
        self._numbers: dict[str, int] = {}
        while _LAST not in self._numbers:
            self._numbers[self.library.ggml.op_name(len(self._numbers))] = len(self._numbers)

    def compute(
        self,
        name: str,
        operands: Sequence[Any],
        shape: Sequence[int],
        params: Sequence[int] = (),
        dtype: Any = np.float32,
    ) -> Any:
        """The result of one node, of the given shape (NumPy's order, four dimensions); operands may be None."""
        context = self._base.ggml_init(_InitParams(_ROOM, None, False))
        try:
            result = self._tensor(context, shape, np.dtype(dtype))
            result.contents.op = self._numbers[name]
            result.contents.op_params = (ctypes.c_int32 * 16)(*params)
            for place, operand in enumerate(operands):
                if operand is not None:
                    result.contents.src[place] = self._filled(context, np.asarray(operand))
            if name == "SET_ROWS":  # the result is a view of the target
                target = result.contents.src[2]
                ctypes.memmove(result.contents.data, target.contents.data, np.asarray(operands[2]).nbytes)
            graph = self._base.ggml_new_graph(context)
            self._base.ggml_build_forward_expand(graph, result)
            self._cpu.ggml_graph_compute_with_ctx(context, graph, 1)
            size = int(np.prod(shape))
            raw = (ctypes.c_char * (size * np.dtype(dtype).itemsize)).from_address(result.contents.data)
            return np.frombuffer(raw, dtype, size).reshape(tuple(shape)).copy()
        finally:
            self._base.ggml_free(context)

    def _tensor(self, context: int, shape: Sequence[int], dtype: Any) -> Any:
        ne = (ctypes.c_int64 * 4)(*reversed(shape))
        return self._base.ggml_new_tensor(context, _TYPES[dtype], 4, ne)

    def _filled(self, context: int, array: Any) -> Any:
        tensor = self._tensor(context, array.shape, array.dtype)
        whole = np.ascontiguousarray(array)
        ctypes.memmove(tensor.contents.data, whole.ctypes.data, whole.nbytes)
        return tensor

    def table(self, name: str) -> Any:
        """A table of 65,536 float16 of the CPU code: float16 of every float16."""
        return np.frombuffer((ctypes.c_uint16 * 65536).in_dll(self._cpu, name), np.float16).copy()
