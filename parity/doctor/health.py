"""What is installed and what is missing: the facts behind `parity doctor`."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .. import requirements
from .. import version as parity_version


def check(*, empty_cache: bool = False) -> dict[str, Any]:
    """Versions, llama.cpp's backends, CUDA and the twin cache, as plain data. Problems are sentences, not exceptions."""
    facts: dict[str, Any] = {
        "parity": parity_version(),
        "python": f"{sys.version.split()[0]} ({sys.executable})",
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "memory": _memory(),
        "packages": {name: _version(name) for name in requirements()},
        "llama.cpp": _llama(),
        "cuda": _cuda(),
    }
    facts["twin cache"] = _cache(empty_cache)
    return facts


def _memory() -> str:
    from checkpoints.room import memory

    now = memory()
    return f"{now.free / 2**30:.1f} GiB {now.source}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing: pip install parity again"


def _llama() -> dict[str, Any]:
    from checkpoints.errors import ParityError
    from reference.client import Reference

    try:
        with Reference() as reference:
            return dict(reference.versions())
    except ParityError as error:
        return {"problem": str(error)}


def _cuda() -> dict[str, Any]:
    package = next((f"{name} {version(name)}" for name in ("cupy-cuda12x", "cupy-cuda13x", "cupy") if _installed(name)), None)
    if package is None:
        advice = "without it our engine computes with NumPy. With a CUDA device: pip install cupy-cuda12x, or cupy-cuda13x"
        return {"cupy": f"not installed; {advice}"}
    import cupy

    if not cupy.cuda.is_available():
        return {"cupy": package, "device": "none: no driver, or no usable device (see nvidia-smi)"}
    runtime = cupy.cuda.runtime
    devices = {}
    for number in range(runtime.getDeviceCount()):
        with cupy.cuda.Device(number):
            free, total = runtime.memGetInfo()
        name = runtime.getDeviceProperties(number)["name"].decode()
        devices[f"device {number}"] = f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return {"cupy": package, "runtime": runtime.runtimeGetVersion(), "driver": runtime.driverGetVersion(), **devices}


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _cache(empty: bool) -> dict[str, Any]:
    from checkpoints.cache import cache_dir, cache_limit
    from reference import twin_cache

    freed = twin_cache.empty_cache() if empty else 0
    entries = twin_cache.cached()
    facts: dict[str, Any] = {"folder": str(cache_dir()), "files": len(entries)}
    facts["size"] = f"{sum(entry.size for entry in entries) / 2**20:,.0f} MiB of at most {cache_limit() / 2**30:,.0f} GiB"
    if empty:
        facts["freed"] = f"{freed / 2**20:,.0f} MiB"
    return facts
