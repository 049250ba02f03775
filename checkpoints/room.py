"""How many cores and how much memory and disk there are, asked before anything large is begun."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from .errors import DISK, MEMORY, InputError

_MOUNT = Path("/sys/fs/cgroup")
_NONE = 1 << 60  # a limit beyond it is none: v1 writes the largest number of pages


class FreeMemory(Struct, frozen=True):
    """Bytes that can be allocated now, and the source of that number: the system, or a control group of this process."""

    free: int
    source: str


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int:
    """Bytes that can be allocated now."""
    return memory().free


def memory(system: Path = Path("/proc"), mount: Path = _MOUNT) -> FreeMemory:
    """What the system has available, or the least that a control group of this process leaves.

    A group's usage counts the pages of files that were read; those that are not in use (`inactive_file`) are given back when memory is
    short, and count as free here, as `docker stats` and Kubernetes count them.
    """
    free, source = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "in the machine"
    try:
        for line in (system / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free, source = int(line.split()[1]) * 1024, "available (/proc/meminfo)"
    except (OSError, ValueError):
        pass  # not Linux: the first number stands
    for left, limit_source in _groups(system, mount):
        if left < free:
            free, source = left, limit_source
    return FreeMemory(max(free, 0), source)


def _groups(system: Path, mount: Path) -> Iterator[tuple[int, str]]:
    """(bytes left, source) of each control group with a limit that this process is in: its own and all above."""
    try:
        lines = (system / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2) if line.count(":") > 1 else ("", "-", "")
        if controllers == "":
            kinds = [
                (mount, "memory.max", "memory.current", "inactive_file"),
                (mount / "unified", "memory.max", "memory.current", "inactive_file"),
            ]
        elif "memory" in controllers.split(","):
            kinds = [(mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")]
        else:
            continue
        for root, limit, usage, idle in kinds:
            # Within a container the group's own path may not exist: its files are the mount's.
            for group in {root, *(root.joinpath(*Path(name).parts[1:count]) for count in range(2, len(Path(name).parts) + 1))}:
                try:
                    most, used = int((group / limit).read_text()), int((group / usage).read_text())
                    entries = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
                    if most < _NONE:
                        yield most - max(used - int(entries.get(idle, 0)), 0), f"left in the control group {group} ({limit})"
                except (OSError, ValueError):
                    continue  # no limit ("max"), or no such group


def free_disk(path: Path) -> int:
    """Bytes that a file at `path` may take, in its folder or in the nearest existing one above."""
    folder = path.absolute().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_room(path: Path, size: int, needed: int) -> None:
    """Refuse to begin something for which there is no room.

    Args:
        size: bytes that the file at `path` will have.
        needed: bytes of memory that making it takes at once.

    Raises:
        InputError: there is less disk or memory than that.
    """
    if size > (free := free_disk(path)):
        raise InputError(
            f"{path} would take {_amount(size)}, but its disk has only {_amount(free)} free.",
            "Make it smaller, or write to another disk.",
            code=DISK,
        )
    if needed > (now := memory()).free:
        raise InputError(
            f"making {path} takes {_amount(needed)} of memory, but only {_amount(now.free)} are {now.source}.",
            "Make it smaller.",
            code=MEMORY,
        )


def _amount(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
