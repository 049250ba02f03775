"""Files that are cut short while they are mapped into memory: reading a lost page raises SIGBUS, which ends the process silently."""

import ctypes
import mmap
import os
import signal
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


def on_lost_pages(end: Callable[[str], int]) -> Any:
    """When this process reads a page that its file no longer has, call `end` with a sentence and leave with the code that it returns.

    Python's own handlers run only after the instruction that raised the signal, which never succeeds here; this one runs in its place.

    Returns:
        What must be kept as long as the process reads files; None where there is no such signal (Windows), or where the system does
        not allow programs to make code while they run, as `ctypes` does.
    """
    if not hasattr(signal, "SIGBUS"):
        return None

    leaving = threading.Lock()

    def leave(_: int) -> None:
        leaving.acquire()  # for good: other threads that read such a page meanwhile wait until the process is gone
        try:
            code = end(_sentence())
        except BaseException:
            code = 2
        os._exit(code)  # to return would be to read the page again

    try:
        handler, set_handler = _HANDLER(leave), ctypes.CDLL(None).signal
    except (MemoryError, OSError):
        return None
    set_handler.argtypes, set_handler.restype = [ctypes.c_int, _HANDLER], ctypes.c_void_p
    set_handler(signal.SIGBUS, handler)
    return handler


def _sentence() -> str:
    """What happened, with the file's name where the system lists what is mapped (Linux)."""
    try:
        mapped = Path("/proc/self/maps").read_bytes().splitlines()
    except OSError:
        mapped = []
    regions = [fields for line in mapped if len(fields := line.split(maxsplit=5)) == 6 and fields[5].startswith(b"/")]
    # Libraries, which are mapped beyond their ends.
    programs = {name for _, rights, _, _, _, name in regions if b"x" in rights}
    for places, _, offset, _, _, name in regions:
        if name in programs:
            continue
        begin, end = (int(place, 16) for place in places.split(b"-"))
        try:
            status = Path(os.fsdecode(name)).stat()
        except OSError:
            continue
        if not stat.S_ISREG(status.st_mode):  # a device, which a driver has mapped: it has no size
            continue
        if -(-status.st_size // mmap.PAGESIZE) * mmap.PAGESIZE < int(offset, 16) + end - begin:
            return f"{os.fsdecode(name)} was cut short while it was being read."
    return "a file was cut short while it was being read, or its disk failed."
