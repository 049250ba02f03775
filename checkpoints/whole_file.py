"""Files that are written completely or not at all: an earlier file is replaced only by a complete one.

A file is written beside its final place, under a random name that nobody else can have made, and renamed when it is complete. Its
writer holds a lock on it (`flock`, which ends with the process), so whoever writes the same file next can tell what a killed run
left behind from what another run is writing now, and removes the former.
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and nothing is swept
    fcntl = None  # type: ignore[assignment]

from .errors import OUTPUT, InputError

_LONGEST = 180  # bytes of a name that are kept in a temporary one, which may have 255
_RANDOM = 8  # bytes: 16 hex digits
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.part")
_ATTEMPTS = 100  # another name each: in vain only where the folder itself is the reason


class Replacement:
    """A file being written: `commit` turns what was written to `temporary` into `path`; otherwise it vanishes.

    A link is followed, and its target replaced. Pipes and devices cannot be replaced, so for them `temporary` is the path itself.
    A context manager that commits unless an exception was raised.

    Attributes:
        temporary: where to write; it exists already, is empty, and may be opened by other programs.

    Raises:
        OSError: the file cannot be created.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = destination(path)
        self._descriptor = -1
        if is_special(self.path):
            self.temporary = self.path
            return
        if self.path.is_dir():
            raise IsADirectoryError(21, "Is a directory")
        self._folders = make_folders(self.path.parent)
        sweep(self.path)
        try:
            self.temporary, self._descriptor = create_locked(self.path.parent, f".{_short(self.path.name)}.", ".part")
        except OSError:
            remove_empty(self._folders)
            raise
        with contextlib.suppress(OSError):
            os.fchmod(self._descriptor, stat.S_IMODE(self.path.stat().st_mode))  # of the file that it replaces

    def commit(self) -> None:
        """Put the file in its place. If it replaces another, it is on the disk before that one goes.

        Raises:
            OSError: the disk refuses it; an earlier file is unchanged.
        """
        if (descriptor := self.commit_locked()) >= 0:
            os.close(descriptor)

    def commit_locked(self, path: Path | None = None, *, durable: bool = False) -> int:
        """As `commit`, at `path` if it is given; returns a descriptor that holds a shared lock, -1 if there is none.

        With `durable` the file is on the disk before it appears, even if it replaces none.
        """
        if self._descriptor < 0:
            return -1
        target = path or self.path
        try:
            if durable or target.exists():
                os.fsync(self._descriptor)
            self.temporary.replace(target)
        except BaseException:
            self.discard()
            raise
        descriptor, self._descriptor = self._descriptor, -1
        lock(descriptor, shared=True)  # others may use it at the same time
        return descriptor

    def discard(self) -> None:
        """Remove what was written, and the folders made for it. A second call, or one after `commit`, does nothing."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                self.temporary.unlink()
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
            remove_empty(self._folders)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()


def put(path: Path, content: bytes) -> None:
    """Write a complete file. A pipe or a device is written to directly.

    Raises:
        InputError: it cannot be written; an earlier file is unchanged.
    """
    try:
        with Replacement(path) as replacement, replacement.temporary.open("wb") as file:
            file.write(content)
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: str | os.PathLike[str], error: OSError, advice: str = "Choose another path.") -> InputError:
    """The error that says why an output cannot be written."""
    reason = error.strerror or str(error)
    if " requested and " in reason:  # NumPy's, which does not say why
        reason = "the disk took only part of it"
    return InputError(f"cannot write {os.fspath(path)}: {reason}.", advice, code=OUTPUT)


def make_folders(folder: Path) -> tuple[Path, ...]:
    """Make a folder and those above it; returns those that were made, the innermost first.

    Raises:
        OSError: it cannot be made; none of the folders above it is left behind.
    """
    missing = tuple(above for above in (folder, *folder.parents) if not above.exists())
    try:
        for above in reversed(missing):  # mkdir(parents=True) goes up by recursion
            above.mkdir(exist_ok=True)
        folder.mkdir(exist_ok=True)
    except OSError:
        remove_empty(missing)
        raise
    return missing


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of some folders that are empty, each before the folder that contains it."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def destination(path: str | os.PathLike[str]) -> Path:
    """Where a path leads, links followed; a pipe or a device is opened by the path given: `/dev/stdout` is a link to no name."""
    return Path(path) if is_special(Path(path)) else Path(os.path.realpath(path))


def is_special(path: Path) -> bool:
    """Whether `path` is neither file nor folder but a pipe, a device or a socket."""
    return path.exists() and not path.is_file() and not path.is_dir()


def sweep(path: Path) -> int:
    """Remove what killed runs left of this file in its folder; returns the bytes freed."""
    freed, own = 0, _short(path.name)
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if not entry.name.startswith("."):  # a folder of thousands of files is passed through quickly
                continue
            match = _TEMPORARY.fullmatch(entry.name)
            if match and match["name"] == own:
                freed += remove_unowned(path.parent / entry.name)
    return freed


def create_locked(folder: Path, prefix: str, suffix: str) -> tuple[Path, int]:
    """A new file under a random name, and a descriptor that holds the lock on it until it is closed.

    Raises:
        OSError: none can be made in that folder.
    """
    for _ in range(_ATTEMPTS):
        path = folder / f"{prefix}{os.urandom(_RANDOM).hex()}{suffix}"
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | _NO_FOLLOW, 0o666)
        if lock(descriptor) and not _still_there(path, descriptor):  # another run swept it before it was locked
            os.close(descriptor)
            continue
        return path, descriptor
    raise FileExistsError(17, "temporary files disappear as soon as they are created")


def lock(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Take the lock on an open file (`flock`); False if another process holds it.
    On file systems without locks every file counts as unlocked when it is to be used, and as locked when it is to be removed.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def remove_unowned(path: Path) -> int:
    """Remove a file or folder that no process has locked; returns the bytes freed, 0 if it stays."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | _NO_FOLLOW)
    except OSError:
        return 0
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not lock(descriptor):
            return 0
        path.unlink()
    except OSError:
        return 0
    finally:
        os.close(descriptor)
    return status.st_size


def _still_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except OSError:
        return False


def _short(name: str) -> str:
    """As much of a file's name as fits into a temporary one."""
    return os.fsdecode(os.fsencode(name)[:_LONGEST])


_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


def open_new(path: Path) -> IO[bytes]:
    """A new file, opened for writing; never an existing one, not even through a link.

    Raises:
        FileExistsError: the path exists; OSError: the file cannot be made.
    """
    return os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | _NO_FOLLOW, 0o666), "wb")
