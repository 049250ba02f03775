"""A file's identity, computed from all of its bytes.

SHA-256 over a tree of chunks: with the processor's SHA instructions a core hashes 1.4 GB/s, and all cores hash chunks at
the same time. Hashes that are several times as fast (XXH3) would let somebody construct two files with one hash. A large file's
hash is remembered in the cache, together with everything that shows whether the file was modified since; small files are hashed
every time.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .cache import cache_dir
from .room import cores
from .whole_file import lock

_CHUNK = 1 << 20  # bytes of a leaf of the tree: stays in a core's cache between reading and hashing
_REMEMBERED = 1 << 22  # the hashes of files from this size on are remembered; smaller files take less than 3 ms of a core
_FOLDER = "hashes"
_MOST = 500  # hashes that are remembered
# A file may be written again within one tick of its file system's clock: one that was modified less than this before it was
# hashed is hashed again. FAT's clock ticks every 2 s.
_TICK_NS = 3_000_000_000
_VERSION = 1


def content_hash(path: str | os.PathLike[str]) -> str:
    """32 hex digits that change with any byte of the file.

    The leaves of the tree are SHA-256 of chunks of 1 MiB, the root is SHA-256 of the size and the leaves. From 4 MiB on the
    result is taken from the cache if size, inode and the times of the last change (mtime, and ctime, which no program can
    set) are the same as when it was computed, and older than the time of computing.

    Raises:
        OSError: the file cannot be read, or changed while it was read.
    """
    with Path(path).open("rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if status.st_size < _REMEMBERED:
            return _hash(file.fileno(), status.st_size)
        with _record(status) as record:
            if record >= 0 and (known := _remembered(record, status)):
                return known
            began = time.time_ns()
            digest = _hash(file.fileno(), status.st_size)
            if touched(status, os.fstat(file.fileno())):
                raise OSError(5, f"{path} changed while it was being read")
            if record >= 0:
                _remember(record, status, began, digest)
            return digest


def touched(before: os.stat_result, after: os.stat_result) -> bool:
    """Whether a file was replaced or written to between two calls of `stat`."""
    return _signature(before) != _signature(after)


def _signature(status: os.stat_result) -> dict[str, int]:
    return {name: getattr(status, f"st_{name}") for name in ("dev", "ino", "size", "mtime_ns", "ctime_ns")}


def _hash(descriptor: int, size: int) -> str:
    import hashlib  # loads OpenSSL, which is not needed where a hash is remembered

    offsets = range(0, size, _CHUNK)
    buffers = threading.local()

    def leaf(offset: int) -> bytes:
        if not hasattr(buffers, "chunk"):
            buffers.chunk = memoryview(bytearray(_CHUNK))
        count = os.preadv(descriptor, [buffers.chunk], offset)
        return hashlib.sha256(buffers.chunk[:count]).digest()

    root = hashlib.sha256(str(size).encode())
    threads = cores()
    if threads > 1 and len(offsets) > 1:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(min(threads, 16)) as pool:
            for digest in pool.map(leaf, offsets):
                root.update(digest)
    else:
        for offset in offsets:
            root.update(leaf(offset))
    return root.hexdigest()[:32]


@contextmanager
def _record(status: os.stat_result) -> Iterator[int]:
    """A locked descriptor of what is remembered of a file, so that two processes don't hash it at once; -1 if there is none."""
    folder = cache_dir() / _FOLDER
    descriptor = -1
    try:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{status.st_dev:x}-{status.st_ino:x}.json"
            flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
            descriptor = os.open(folder / name, flags, 0o666)
            lock(descriptor, wait=True)
        yield descriptor
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _remembered(record: int, status: os.stat_result) -> str:
    """The hash of a file that has not been modified since; empty if it is unknown or uncertain."""
    try:
        noted = json.loads(os.pread(record, 4096, 0))
        same = noted["version"] == _VERSION and noted["file"] == _signature(status)
        settled = max(status.st_mtime_ns, status.st_ctime_ns) + _TICK_NS < noted["began_ns"]
        return str(noted["hash"]) if same and settled else ""
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def _remember(record: int, status: os.stat_result, began_ns: int, digest: str) -> None:
    line = {"version": _VERSION, "file": _signature(status), "began_ns": began_ns, "hash": digest}
    with contextlib.suppress(OSError):
        os.ftruncate(record, 0)
        os.pwrite(record, json.dumps(line).encode(), 0)
        known = sorted((cache_dir() / _FOLDER).iterdir(), key=lambda path: path.stat().st_mtime)
        for path in known[:-_MOST]:
            path.unlink()
