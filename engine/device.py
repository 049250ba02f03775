"""CUDA sources of `engine/kernels`, compiled for the current device when they are first used.

CuPy keeps compiled binaries in ~/.cupy/kernel_cache, so that only the first process on a machine waits for the compiler.
"""

from functools import lru_cache
from importlib.resources import files
from typing import Any


@lru_cache(maxsize=64)
def module(name: str, device: int, defines: tuple[str, ...] = ()) -> Any:
    """The compiled `kernels/<name>.cu` as a cupy.RawModule; `defines` are "NAME=value"."""
    import cupy

    folder = files("engine").joinpath("kernels")
    source = folder.joinpath(f"{name}.cu").read_text(encoding="utf-8")
    for header in ("weights.cuh",):  # put in here: the compiler's cache keys on the text
        source = source.replace(f'#include "{header}"', folder.joinpath(header).read_text(encoding="utf-8"))
    with cupy.cuda.Device(device):
        return cupy.RawModule(code=source, options=("-std=c++17", *(f"-D{define}" for define in defines)))


def kernel(file: str, name: str, defines: tuple[str, ...] = ()) -> Any:
    """One kernel of a source file, for the current device."""
    import cupy

    return module(file, cupy.cuda.Device().id, defines).get_function(name)
