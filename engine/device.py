"""CUDA sources of `engine/kernels`, compiled for the current device when they are first used.

CuPy keeps compiled binaries in ~/.cupy/kernel_cache, so that only the first process on a machine waits for the compiler.
"""

import ctypes
import re
from functools import lru_cache
from threading import Thread
from typing import Any

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


def kernel(file: str, name: str, defines: tuple[str, ...] = ()) -> Any:
    """One kernel of a source file, for the current device."""
    import cupy

    return module(file, cupy.cuda.Device().id, defines).get_function(name)
