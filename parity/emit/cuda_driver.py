"""The CUDA driver's functions for graphs, called through ctypes: what a captured stream is, and the nodes that copy values.

They are the same whatever framework captures, and their binary interface does not change.
"""

import ctypes
import functools
import sys
from typing import Any

RELAXED, SET_DEPENDENCIES, _LEGACY_STREAM, HOST, DEVICE = 2, 1, 1, 1, 2  # of cuda.h
_ACTIVE, _INVALIDATED, _IMPLICIT = 1, 2, 906
HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _side(name: str) -> "list[tuple[str, Any]]":
    """The fields of one side of a copy, "src" or "dst"."""
    return [
        *((name + field, ctypes.c_size_t) for field in ("XInBytes", "Y", "Z", "LOD")),
        (name + "MemoryType", ctypes.c_int),
        *((name + field, ctypes.c_void_p) for field in ("Host", "Device", "Array", "Reserved")),
        *((name + field, ctypes.c_size_t) for field in ("Pitch", "Height")),
    ]


class CopyOfBytes(ctypes.Structure):
    """CUDA_MEMCPY3D."""

    _fields_ = [*_side("src"), *_side("dst"), *((name, ctypes.c_size_t) for name in ("WidthInBytes", "Height", "Depth"))]


class HostCall(ctypes.Structure):
    """CUDA_HOST_NODE_PARAMS."""

    _fields_ = [("function", HOST_FUNCTION), ("argument", ctypes.c_void_p)]


@functools.lru_cache(maxsize=1)
def cuda_driver() -> "Any":
    """The CUDA driver's library; None if there is none."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def call_driver(name: str, *arguments: Any) -> None:
    """Call a function of the driver.

    Raises:
        RuntimeError: it returns an error; the message is the driver's.
    """
    status = getattr(cuda_driver(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        cuda_driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()}")


def stream_of(value: Any) -> "int | None":
    """The handle of the stream that a device array of PyTorch or CuPy is computed in; None for arrays in host memory and others."""
    if getattr(value, "is_cuda", False):
        return int(sys.modules["torch"].cuda.current_stream(value.device).cuda_stream)
    if hasattr(value, "__cuda_array_interface__") and "cupy" in sys.modules:
        return int(sys.modules["cupy"].cuda.get_current_stream().ptr)
    return None


def is_captured(value: Any) -> bool:
    """Whether a value is computed in a stream that is being captured.

    Raises:
        RuntimeError: another stream is being captured, or this capture has failed.
    """
    stream = stream_of(value)
    if stream is None or cuda_driver() is None:
        return False
    state = ctypes.c_int()
    status = cuda_driver().cuStreamIsCapturing(ctypes.c_void_p(stream), ctypes.byref(state))
    if not status and not state.value and stream > _LEGACY_STREAM:
        status = cuda_driver().cuStreamIsCapturing(ctypes.c_void_p(_LEGACY_STREAM), ctypes.byref(ctypes.c_int()))
    if status == _IMPLICIT:
        raise RuntimeError("another stream is being captured into a CUDA graph: record in the captured stream")
    if state.value == _INVALIDATED:
        raise RuntimeError("the capture of this stream has already failed")
    return not status and state.value == _ACTIVE


def on_device(source: int, target: int, size: int) -> CopyOfBytes:
    """A copy of `size` bytes from one device address to another."""
    return CopyOfBytes(
        srcMemoryType=DEVICE, srcDevice=source, dstMemoryType=DEVICE, dstDevice=target, WidthInBytes=size, Height=1, Depth=1,
    )  # fmt: skip


def copy_node(graph: Any, copy: CopyOfBytes, after: "list[Any]") -> Any:
    """Add a node that makes this copy after those nodes to the graph."""
    node, nodes, context = ctypes.c_void_p(), (ctypes.c_void_p * len(after))(*after), ctypes.c_void_p()
    call_driver("cuCtxGetCurrent", ctypes.byref(context))
    call_driver(
        "cuGraphAddMemcpyNode", ctypes.byref(node), graph, nodes, ctypes.c_size_t(len(after)), ctypes.byref(copy), context
    )
    return node.value


def add_dependency(graph: Any, before: Any, node: Any) -> None:
    """Let `node` of a graph wait for `before`."""
    sources, targets = (ctypes.c_void_p * 1)(before), (ctypes.c_void_p * 1)(node)
    call_driver("cuGraphAddDependencies", graph, sources, targets, ctypes.c_size_t(1))
