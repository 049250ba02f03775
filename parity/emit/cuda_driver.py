"""The CUDA driver's functions for graphs, called through ctypes: what a captured stream is, and how kernels become nodes of it.

They are the same whatever framework captures, and their binary interface does not change.
"""

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator
from typing import Any

RELAXED, NON_BLOCKING, _LEGACY_STREAM, HOST, DEVICE = 2, 1, 1, 1, 2  # of cuda.h
_ACTIVE, _INVALIDATED, _IMPLICIT = 1, 2, 906
KERNEL_NODE, PROGRAMMATIC_STREAM_SERIALIZATION, _COMPUTE_CAPABILITY_MAJOR = 0, 6, 75


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


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_int), ("unused", ctypes.c_int), ("value", ctypes.c_int * 16)]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("n_attributes", ctypes.c_uint),
    ]


class KernelNodeParams(ctypes.Structure):
    """The first CUDA_KERNEL_NODE_PARAMS."""

    _fields_ = [
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("extra", ctypes.c_void_p),
    ]


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


@contextlib.contextmanager
def in_context(context: Any) -> "Iterator[None]":
    """Call the driver for a device's context: that of another device, or none, may be the caller's, and is again afterwards."""
    call_driver("cuCtxPushCurrent_v2", context)
    try:
        yield
    finally:
        call_driver("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


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


def captured_nodes(stream: Any) -> "tuple[int, Any, list[int]]":
    """The number of a stream's capture, its graph, and the nodes that the next one will follow."""
    state, number, graph, count = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p(), ctypes.c_size_t()
    before = ctypes.POINTER(ctypes.c_void_p)()
    call_driver(
        "cuStreamGetCaptureInfo_v2", stream, ctypes.byref(state), ctypes.byref(number), ctypes.byref(graph),
        ctypes.byref(before), ctypes.byref(count),
    )  # fmt: skip
    return number.value, graph, [before[i] or 0 for i in range(count.value)]


@functools.lru_cache(maxsize=64)
def overlaps(_context: int) -> bool:
    """Whether kernels of the current device can start before the one that they follow has ended."""
    device, major = ctypes.c_int(), ctypes.c_int()
    call_driver("cuCtxGetDevice", ctypes.byref(device))
    call_driver("cuDeviceGetAttribute", ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
    return major.value >= 9 and hasattr(cuda_driver(), "cuLaunchKernelEx")


def add_dependency(graph: Any, before: Any, node: Any) -> None:
    """Let `node` of a graph wait for `before`."""
    sources, targets = (ctypes.c_void_p * 1)(before), (ctypes.c_void_p * 1)(node)
    call_driver("cuGraphAddDependencies", graph, sources, targets, ctypes.c_size_t(1))
