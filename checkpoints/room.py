"""How much memory and disk there is, asked before something large is begun."""

import os
import shutil
from pathlib import Path

from .errors import DISK, MEMORY, InputError


def free_memory() -> int:
    """Bytes that can be allocated now: the system's, or what its control group leaves."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # not Linux, or no control group: the first number stands
    return max(free, 0)


def free_disk(path: Path) -> int:
    """Bytes that a file at `path` may take: of the folder that it will stand in, or of the nearest one that is there."""
    folder = path.absolute().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_room(path: Path, size: int, memory: int) -> None:
    """Refuse to begin what cannot end well.

    Args:
        size: bytes that the file at `path` will have.
        memory: bytes that making it takes at once.

    Raises:
        InputError: there is less of either.
    """
    if size > (free := free_disk(path)):
        raise InputError(
            f"{path} would take {_amount(size)}, but its disk has only {_amount(free)} free.",
            "Make it smaller, or write to another disk.",
            code=DISK,
        )
    if memory > (free := free_memory()):
        raise InputError(
            f"making {path} takes {_amount(memory)} of memory, but only {_amount(free)} are free.",
            "Make it smaller.",
            code=MEMORY,
        )


def _amount(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
