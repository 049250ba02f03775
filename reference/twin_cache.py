"""The cache of F32 twins: found by the model's hash, verified by their own, bounded in bytes.

A twin's name carries both hashes, so a model that was changed anywhere has another twin, and a twin that was damaged anywhere is
recognised before it is used. A process that uses or makes a twin holds a lock on it, so that it is not evicted meanwhile.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec import Struct

from checkpoints.cache import cache_dir, cache_limit, require_cache
from checkpoints.content import content_hash
from checkpoints.errors import InputError
from checkpoints.gguf_file import Contents
from checkpoints.whole_file import create_locked, lock, remove_unowned

_SUFFIX = "-f32.gguf"
_TEMPORARY = "tmp-"
_USES = "used"  # the folder of empty files, named as the twins, whose times say when a twin was last used
_LONGEST_STEM = 60  # characters of the model's name that a twin's begins with


class CachedTwin(Struct, frozen=True):
    """One file of the cache: its size in bytes, and when it was last used (seconds since 1970)."""

    path: Path
    size: int
    used: float


def cached() -> list[CachedTwin]:
    """The twins in the cache, the least recently used first."""
    twins: list[CachedTwin] = []
    folder = cache_dir()
    for path in folder.glob(f"*{_SUFFIX}") if folder.is_dir() else ():
        with suppress(OSError):  # another process may just have removed it
            status = path.lstat()
            if not path.name.startswith(_TEMPORARY):
                twins.append(CachedTwin(path, status.st_size, max(status.st_mtime, _last_used(path))))
    return sorted(twins, key=lambda twin: twin.used)


def _last_used(twin: Path) -> float:
    """When a twin was taken from the cache, seconds since 1970; 0 if it never was.

    The twin's own times stay as they are: its hash is remembered for as long as they do (`checkpoints.content`).
    """
    with suppress(OSError):
        return (twin.parent / _USES / twin.name).lstat().st_mtime
    return 0.0


def _note_use(twin: Path) -> None:
    with suppress(OSError):
        stamp = twin.parent / _USES / twin.name
        stamp.parent.mkdir(exist_ok=True)
        stamp.touch()


def empty_cache() -> int:
    """Remove every twin that is not in use, and what interrupted runs left; returns the bytes that were freed."""
    return sum(remove_unowned(twin.path) for twin in cached()) + sweep_cache()


def workspace() -> Path:
    """The cache folder, created if necessary, without leftovers of interrupted runs.

    Raises:
        InputError: it cannot be made or written to, or its bound is not a number.
    """
    cache_limit()
    folder = require_cache()
    sweep_cache()
    return folder


def sweep_cache() -> int:
    """Remove temporary files of processes that no longer exist, and the times of use of twins that are gone; returns the bytes freed."""
    if not (folder := cache_dir()).is_dir():
        return 0
    for stamp in (folder / _USES).glob(f"*{_SUFFIX}"):
        if not (folder / stamp.name).exists():
            stamp.unlink(missing_ok=True)
    return sum(remove_unowned(path) for pattern in (f"{_TEMPORARY}*", ".*.part") for path in folder.glob(pattern))


@contextmanager
def temporary(label: str) -> Iterator[Path]:
    """An empty file in the cache for this process only, removed afterwards if it is still there.

    Raises:
        InputError: it cannot be created.
    """
    folder = require_cache()
    try:
        path, descriptor = create_locked(folder, _TEMPORARY, f"-{label}")
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def cannot_write(folder: Path, error: OSError) -> InputError:
    """The error for a cache that cannot be written to."""
    return InputError(
        f"cannot write to the cache {folder}: {error.strerror or error}.", "Set PARITY_CACHE to another disk.", code="cache"
    )


def has_twin(model: Contents) -> bool:
    """Whether there is a twin of that model, damaged or not."""
    return bool(_of_model(model))


def _of_model(model: Contents) -> list[Path]:
    return [
        twin.path for twin in cached() if re.search(rf"-{model.content}-[0-9a-f]{{32}}{re.escape(_SUFFIX)}$", twin.path.name)
    ]


def take(model: Contents) -> tuple[Path, int] | None:
    """An undamaged twin of that model, and a descriptor that keeps it from being evicted; None if there is no twin.

    Raises:
        DamagedTwin: every twin of it was damaged, and has been removed.
    """
    damaged = False
    for path in _of_model(model):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0))
            whole = False
            try:
                lock(descriptor, shared=True, wait=True)
                whole = content_hash(path) == path.name.removesuffix(_SUFFIX)[-32:]
            finally:
                if not whole:
                    os.close(descriptor)
            if whole:
                _note_use(path)
                return path, descriptor
            path.unlink()
            damaged = True
    if damaged:
        raise DamagedTwin
    return None


class DamagedTwin(Exception):
    """A twin in the cache did not match its name's hash; it was removed."""


@contextmanager
def making(model: Contents) -> Iterator[None]:
    """Hold a lock while making a model's twin: another process that wants it waits here and finds it afterwards."""
    folder = require_cache() / "locks"
    descriptor = -1
    try:
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
            path = folder / model.content[:2]  # shared by some models: there are few such files, which are never removed
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o666)
            lock(descriptor, wait=True)
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def name_of(model: Contents, own: str) -> str:
    """The name of a twin whose own hash is `own`."""
    stem = re.sub(r"[^\w.-]", "_", model.path.stem, flags=re.ASCII)[:_LONGEST_STEM].lstrip(".-")
    return f"{stem or 'model'}-{model.content}-{own}{_SUFFIX}"


def make_room(size: int) -> None:
    """Remove twins that are not in use, the least recently used first, until a new one of `size` bytes fits on the disk.

    Raises:
        InputError: it does not fit even then.
    """
    folder = cache_dir()
    for twin in cached():
        if shutil.disk_usage(folder).free > size * 1.05:
            return
        remove_unowned(twin.path)
    if shutil.disk_usage(folder).free < size:
        raise InputError(
            f"an F32 copy needs {size / 1e9:.1f} GB and the cache {folder} has {shutil.disk_usage(folder).free / 1e9:.1f} GB free.",
            "Set PARITY_CACHE to another disk, or use --mode native.",
            code="disk",
        )


def evict() -> None:
    """Remove twins that are not in use, the least recently used first, until the rest is within the cache's limit.

    Raises:
        InputError: the bound is not a number.
    """
    twins = cached()
    total, limit = sum(twin.size for twin in twins), cache_limit()
    for twin in twins:
        if total <= limit:
            return
        total -= remove_unowned(twin.path)
