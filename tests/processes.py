"""Processes that tests start, seen from outside: whether they have ended, and what a machine's speed has to do with it."""

import time
from collections.abc import Callable
from pathlib import Path

LONG = 300.0  # seconds after which something is taken never to happen: a busy machine may need many for what an idle one does in two


def comes_true(happened: Callable[[], bool], within: float = LONG) -> bool:
    """Wait for something that another process does; whether it has happened within so many seconds."""
    deadline = time.monotonic() + within
    while not (true := happened()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return true


def ended(pid: int) -> bool:
    """Whether a process is gone, or has ended and waits to be reaped, which a container without an init process never does."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def working_in(folder: Path, but: int) -> list[int]:
    """The processes whose working directory this is, but one."""
    pids = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if link.readlink() == folder and int(link.parent.name) != but:
                pids.append(int(link.parent.name))
        except OSError:  # it has just ended, or is another user's
            continue
    return pids
