"""Only regular files are read: a pipe could make a command wait for ever, and a device might never end."""

import stat
from pathlib import Path

from .errors import InputError

STDIN = "-"
LFS_POINTER = b"version https://git-lfs"  # what a clone without Git LFS has in place of a large file (docs/spec.md of git-lfs)


def require_regular(path: Path, error: type[InputError] = InputError, advice: str = "") -> None:
    """Refuse whatever is neither file nor folder. A missing path is left to the code that opens it.

    Raises:
        InputError (or the `error` given): it is a pipe, a device or a socket.
        OSError: it cannot be looked at.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise error(f"{path} is {kind}.", advice or "Name a regular file.", code="no-file")


def read_text(path: Path, largest: int = 1 << 26) -> str:
    """A small text file, UTF-8.

    Raises:
        InputError: it is no regular file, or has more than `largest` bytes.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    require_regular(path)
    if (size := path.stat().st_size) > largest:
        raise InputError(f"{path} has {size:,} bytes, more than the limit of {largest:,}.", "Is it the right file?")
    return path.read_text(encoding="utf-8")
