"""NumPy or CuPy: which of them computes, and on which device.

The plain operations of `engine.ops` call NumPy functions, which pass CuPy arrays on to CuPy (NEP 13 and NEP 18). Only code that creates
arrays needs to know the module.
"""

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, cast

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.errors import InputError

from .device import wake

Array = Any  # numpy.ndarray or cupy.ndarray


class Backend(Struct, frozen=True):
    """Where arrays live: `xp` is the numpy or cupy module, `device` names the device in words for the dump's header.

    `number` is the device's CUDA number, 0 on the host; `spread` says that an engine's values are not all on the current device.
    """

    name: str
    xp: Any
    device: str
    number: int = 0
    spread: bool = False

    def current(self) -> AbstractContextManager[Any]:
        """Make this the device that computes and allocates."""
        return nullcontext() if self.xp is np else cast(AbstractContextManager[Any], self.xp.cuda.Device(self.number))

    def array(self, host: NDArray[Any]) -> Array:
        """The array on this backend's device; on NumPy the array itself."""
        if self.xp is np:
            return host
        with self.current():
            return self.xp.asarray(host)

    def take(self, array: Array) -> Array:
        """An array of any device on this one: the array itself if it is already here, else a copy, made once its device is done."""
        if self.xp is np or array.device.id == self.number:
            return array
        with array.device:
            self.xp.cuda.get_current_stream().synchronize()
        with self.current():
            return array.copy()

    def free_bytes(self) -> int | None:
        """Free memory on the device, in bytes (what CuPy holds unused counts as free); None on the host."""
        if self.xp is np:
            return None
        with self.current():
            free: int = self.xp.cuda.runtime.memGetInfo()[0] + self.xp.get_default_memory_pool().free_bytes()
        return free

    def require(self, needed: int, purpose: str) -> None:
        """Check that the device has room before anything is put there.

        Raises:
            InputError: it has too little; the message gives the needed and the free size.
        """
        free = self.free_bytes()
        if free is not None and needed > free:
            raise InputError(
                f"{purpose} needs {needed / 2**30:.2f} GiB of device memory, {free / 2**30:.2f} GiB are free.",
                "Use --backend numpy, a smaller model, or stop other programs on the device (nvidia-smi lists them).",
                code="device-memory",
            )

    def to_host(self, array: Array) -> NDArray[Any]:
        """A NumPy array of the same values. On a device it waits for the stream that computes them."""
        return np.asarray(array) if self.xp is np else self.xp.asnumpy(array)


def module_of(*arrays: Array) -> Any:
    """The module (numpy or cupy) that the first array belongs to, without importing cupy.

    Raises:
        TypeError: arrays of both kinds are mixed.
    """
    if all(type(array) is np.ndarray for array in arrays):
        return np
    kinds = {type(array).__module__.split(".")[0] for array in arrays}
    if "cupy" in kinds:
        if len(kinds) > 1:
            raise TypeError("arrays in host and device memory are mixed; bring them to one side first")
        return sys.modules["cupy"]
    return np


def all_equal(a: Array, b: Array) -> bool:
    """Whether two arrays of one shape hold the same numbers; NaN is the same as nothing. Waits for the device."""
    return bool((a == b).all()) if module_of(a, b) is np else bool(_all_equal()(a, b))


@lru_cache(maxsize=1)
def _all_equal() -> Any:
    """The comparison as one kernel instead of two: for small values, launches take most of the time."""
    return sys.modules["cupy"].ReductionKernel("T a, U b", "bool same", "a == b", "a && b", "same = a", "true", "all_equal")


def choose(name: str = "auto", number: int | None = None) -> Backend:
    """The backend of that name; "auto" is CuPy if there is a device, otherwise NumPy. `number` is the device's CUDA number.

    Raises:
        InputError: CuPy was asked for but the device or the package is missing, or the name is unknown.
    """
    if number is not None:
        if name == "numpy":
            raise InputError("--devices are GPUs; --backend numpy has none.", "Use --backend cupy.", code="devices")
        name = "cupy"
    if name not in ("auto", "cupy", "numpy"):
        raise InputError(f"there is no backend {name!r}.", "Use auto, cupy or numpy.", code="backend")
    if name == "numpy":
        return _numpy()
    wake(number or 0)
    try:
        import cupy
    except ImportError as error:
        if name == "auto":
            return _numpy()
        advice = "Install CuPy for your CUDA: pip install cupy-cuda12x, or cupy-cuda13x."
        raise InputError(f"CuPy cannot be imported ({error}).", advice, code="backend") from error
    if not cupy.cuda.is_available():
        if name == "auto":
            return _numpy()
        raise InputError("CuPy finds no CUDA device.", "`parity doctor` shows what is missing.", code="backend")
    if os.environ.get("CUPY_TF32", "0") not in ("", "0"):
        raise InputError(
            "CUPY_TF32 is set: CuPy would round the factors of float32 products to TF32.",
            "Unset it; `--compute tf32` is for engines that do that.",
            code="tf32",
        )
    there = cupy.cuda.runtime.getDeviceCount()
    if number is None:
        number = cupy.cuda.Device().id
    if not 0 <= number < there:
        raise InputError(f"there is no device {number}.", f"CUDA counts {there}, from 0.", code="devices")
    properties = cupy.cuda.runtime.getDeviceProperties(number)
    return Backend("cupy", cupy, f"CuPy {cupy.__version__}, {properties['name'].decode()}", number)


def _numpy() -> Backend:
    cores = os.cpu_count() or 1
    wanted = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or ""
    # OpenBLAS ignores what is no number, and starts no more threads than there are cores.
    threads = min(int(wanted[:9]) if wanted[:9].isdecimal() else cores, cores) or cores
    return Backend("numpy", np, f"NumPy {np.__version__}, {threads} threads")
