"""F32 twins: copies of a model with every weight dequantised by llama.cpp, kept in a bounded cache.

A twin is bit-equal to gguf-py's dequantisation. It is found again by the original's fingerprint.
"""

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from checkpoints.errors import InputError, ModelError, ReferenceFailed
from checkpoints.gguf_file import Contents, contents

from .library import Library, default_threads

_DEFAULT_GB = 20.0  # of twins in the cache: one of a 4 B model, or all those of a test model; PARITY_CACHE_GB says another
_F32 = 0  # ggml_type
_MARK = "-f32.gguf"


@dataclass(frozen=True)
class Cached:
    """One file of the cache: its bytes, and when it was last used (seconds since 1970)."""

    path: Path
    size: int
    used: float


def cache_dir() -> Path:
    """$PARITY_CACHE, else $XDG_CACHE_HOME/parity, else ~/.cache/parity; it need not exist."""
    if given := os.environ.get("PARITY_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "parity"


def cache_limit() -> int:
    """The cache's bound in bytes: $PARITY_CACHE_GB, else 20 GB.

    Raises:
        InputError: the variable is no number.
    """
    text = os.environ.get("PARITY_CACHE_GB", "")
    try:
        return int(float(text or _DEFAULT_GB) * 1e9)
    except (ValueError, OverflowError):
        raise InputError(f"PARITY_CACHE_GB is {text!r}.", "Set it to a number of gigabytes.", code="environment") from None


def cached() -> list[Cached]:
    """The twins in the cache, the longest unused first."""
    found: list[Cached] = []
    folder = cache_dir()
    for path in folder.glob(f"*{_MARK}") if folder.is_dir() else ():
        with suppress(OSError):  # another process may just have removed it
            status = path.stat()
            found.append(Cached(path, status.st_size, status.st_mtime))
    return sorted(found, key=lambda item: item.used)


def empty_cache() -> int:
    """Remove every twin and what an interrupted run left; returns the bytes that were freed."""
    freed = 0
    for item in cached():
        item.path.unlink(missing_ok=True)
        freed += item.size
    return freed + _sweep(cache_dir())


def _sweep(folder: Path) -> int:
    """Remove temporary files and folders of processes that are gone."""
    freed = 0
    for path in folder.glob("tmp-*") if folder.is_dir() else ():
        owner = path.name.split("-")[1]
        if owner.isdigit() and not _alive(int(owner)):
            freed += sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*")))
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    return freed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def workspace() -> Path:
    """The cache folder, made if need be and swept.

    Raises:
        InputError: it cannot be made or written to.
    """
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "no permission")
    except OSError as error:
        raise InputError(
            f"cannot write to the cache {folder}: {error.strerror}.",
            "Set PARITY_CACHE to a folder that can be written.",
            code="cache",
        ) from error
    _sweep(folder)
    return folder


def is_f32(found: Contents) -> bool:
    """Whether every tensor is F32 already: such a model is its own twin."""
    return all(tensor.type == _F32 for tensor in found.tensors)


def twin_bytes(found: Contents) -> int:
    """What a twin takes, in memory as on disk."""
    return 4 * sum(tensor.elements for tensor in found.tensors)


def checked(library: Library, path: Path) -> Contents:
    """The contents of a model that can be computed.

    Raises:
        ModelError: not a GGUF, no tensors in it, or cut short.
    """
    found = contents(path)
    if not found.tensors:
        raise ModelError(
            f"{path} has a tokenizer but no tensors: it can tokenize, not compute.", "Take a model file with weights."
        )
    for tensor in found.tensors:
        end = found.data + tensor.offset + library.ggml.row_size(tensor.type, tensor.elements)
        if end > found.size:
            raise ModelError(
                f"{path} is cut short: tensor {tensor.name} ends at byte {end:,}, the file at {found.size:,}.",
                "Download it again.",
            )
    return found


def twin(library: Library, found: Contents, out: Path | None = None, *, threads: int | None = None) -> Path:
    """The F32 twin of a model that was `checked`: from the cache, or made now; `out` makes one there instead.

    Raises:
        ReferenceFailed: llama.cpp cannot convert it; InputError: cannot be written.
    """
    path = found.path
    if out is not None:
        return quantize(library, path, "F32", out, threads=threads)
    if is_f32(found):
        return path
    workspace()
    target = place(found)
    with suppress(OSError):
        if target.stat().st_size >= twin_bytes(found):
            os.utime(target)
            return target
    _make_room(twin_bytes(found), target.parent)
    made = quantize(library, path, "F32", target, threads=threads)
    _evict(made)
    return made


def place(found: Contents) -> Path:
    """Where the twin of a model stands in the cache, once it is made."""
    return cache_dir() / f"{found.path.stem[:80]}-{found.fingerprint}{_MARK}"


def _make_room(size: int, folder: Path) -> None:
    """Twins that would go anyway go first, where the disk needs it."""
    for item in cached():
        if shutil.disk_usage(folder).free > size * 1.05:
            return
        item.path.unlink(missing_ok=True)
    if shutil.disk_usage(folder).free < size:
        raise InputError(
            f"an F32 copy needs {size / 1e9:.1f} GB and {folder} has {shutil.disk_usage(folder).free / 1e9:.1f} GB free.",
            "Set PARITY_CACHE to another disk, or take --mode native.",
            code="disk",
        )


def _evict(keep: Path) -> None:
    files = cached()
    total = sum(item.size for item in files)
    for item in files:
        if total <= cache_limit():
            return
        if item.path != keep:
            item.path.unlink(missing_ok=True)
            total -= item.size


@contextmanager
def temporary(folder: Path, label: str) -> Iterator[Path]:
    """A path in `folder` for this process's own file, removed afterwards if it is still there."""
    path = folder / f"tmp-{os.getpid()}-{label}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def file_types(library: Library) -> dict[str, int]:
    """The names of llama.cpp's file types: "Q4_K_M" -> 15 (`enum llama_ftype`)."""
    prefixes = ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_")
    found: dict[str, int] = {}
    for name in dir(library.api):
        for prefix in prefixes:
            if name.startswith(prefix):
                found[name.removeprefix(prefix)] = int(getattr(library.api, name))
    return found


def quantize(library: Library, path: Path, ftype: str, out: Path, *, threads: int | None = None) -> Path:
    """Write a model with another file type (`llama_model_quantize`), whole or not at all.

    Raises:
        InputError: no such type, or `out` cannot be written; ReferenceFailed: llama.cpp refused.
    """
    types = file_types(library)
    if ftype.upper() not in types:
        raise InputError(f"no file type is called {ftype!r}.", f"There are {', '.join(sorted(types))}.", code="ftype")
    checked(library, path)
    _writable(out)
    api = library.api
    params = api.llama_model_quantize_default_params()
    params.ftype = types[ftype.upper()]
    params.allow_requantize = True
    params.nthread = threads or default_threads()
    with temporary(out.parent, out.name) as part:
        library.lines.clear()
        status = api.llama_model_quantize(os.fsencode(path), os.fsencode(part), ctypes.byref(params))
        if status != 0 or not part.exists():
            free = shutil.disk_usage(out.parent).free / 1e6  # llama.cpp says "iostream error" where the disk is full
            raise ReferenceFailed(
                f"llama.cpp cannot write {path.name} as {ftype.upper()}: {library.reason()}.",
                f"{out.parent} has {free:,.0f} MB free; --verbose shows llama.cpp's log.",
            )
        part.replace(out)
    return out


def _writable(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError(21, "it is a folder")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}.", "Choose another --out.", code="output") from error
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"cannot write {out}: no permission.", "Choose another --out.", code="output")
