"""CUDA sources of `engine/kernels`, compiled for the current device when they are first used.

CuPy keeps compiled binaries in ~/.cupy/kernel_cache, so that only the first process on a machine waits for the compiler.
"""

import ctypes
import re
from collections.abc import Sequence
from functools import lru_cache
from threading import Thread
from typing import Any

import numpy as np

_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)  # of ours; those in <> are the compiler's


def wake(number: int) -> None:
    """Start to create the device's context in a thread: it takes as long as importing CuPy, and needs nothing of Python.

    Nothing happens if the driver or the device is missing; CuPy's own error is clearer.
    """

    def create() -> None:
        try:
            driver = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), number) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)

    Thread(target=create, name="cuda-context", daemon=True).start()


@lru_cache(maxsize=64)
def module(name: str, device: int, defines: tuple[str, ...] = ()) -> Any:
    """The compiled `kernels/<name>.cu` as a cupy.RawModule; `defines` are "NAME=value"."""
    import cupy

    with cupy.cuda.Device(device):
        return cupy.RawModule(code=source(f"{name}.cu"), options=("-std=c++17", *(f"-D{define}" for define in defines)))


def source(file: str) -> str:
    """A file of `kernels` with its headers inlined where they are first included: the cache of binaries is keyed by the text."""
    from importlib.resources import files

    there: set[str] = set()

    def read(name: str) -> str:
        if name in there:
            return ""
        there.add(name)
        text = files("engine").joinpath("kernels", name).read_text(encoding="utf-8")
        return _INCLUDE.sub(lambda match: read(match[1]), text)

    return read(file)


class _Attribute(ctypes.Structure):
    """The driver's CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("value", ctypes.c_int * 17))  # the value stands at byte 8 of 72


class _Configuration(ctypes.Structure):
    """The driver's CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


_PROGRAMMATIC = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


def launch_behind(kernel: Any, blocks: int, threads: int, arguments: Sequence[Any], shared: int) -> None:
    """Launch a kernel that may start before the one ahead of it in the current stream has ended; CuPy has no call for that.

    Both must be written for it: the one ahead says when (`griddepcontrol.launch_dependents`), this one waits for its results
    (`griddepcontrol.wait`). Arguments are CuPy's arrays, and float32, int32 and uint64 of NumPy.
    """
    import cupy

    values = [_argument(argument) for argument in arguments]
    places = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    attribute = _Attribute(_PROGRAMMATIC, (0, 1))
    stream = cupy.cuda.get_current_stream().ptr
    where = _Configuration((blocks, 1, 1), (threads, 1, 1), shared, stream, ctypes.pointer(attribute), 1)
    error = _driver().cuLaunchKernelEx(ctypes.byref(where), ctypes.c_void_p(kernel.kernel.ptr), places, None)
    if error:
        raise cupy.cuda.driver.CUDADriverError(error)


def _argument(value: Any) -> Any:
    if isinstance(value, np.float32):
        return ctypes.c_float(float(value))
    if isinstance(value, np.int32):
        return ctypes.c_int(int(value))
    return ctypes.c_uint64(int(value) if isinstance(value, np.uint64) else value.data.ptr)


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def kernel(file: str, name: str, defines: tuple[str, ...] = ()) -> Any:
    """One kernel of a source file, for the current device."""
    import cupy

    return module(file, cupy.cuda.Device().id, defines).get_function(name)
