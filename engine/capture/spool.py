"""Records that wait on disk, as the device staged them, until there is time to format them."""

import os
import tempfile
import threading
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Spool:
    """An unnamed file: arrays are appended and each is taken out once; when none is left the file is emptied.

    Safe to call from any thread.

    Raises (each method):
        OSError: the disk of temporary files is full.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._end = 0
        self._held = 0

    def put(self, records: NDArray[Any]) -> "Spooled":
        """Copy an array into the file."""
        raw = records.view(np.uint8)
        with self._lock:
            if self._descriptor is None:
                self._descriptor = self._open()
            done = 0
            while done < raw.nbytes:
                done += os.pwrite(self._descriptor, raw[done:].data, self._end + done)
            start, self._end = self._end, self._end + raw.nbytes
            self._held += 1
        return Spooled(self, start, raw.nbytes, records.dtype)

    def _open(self) -> int:
        """A file that nothing else can open, and that disappears with this object or the process."""
        descriptor, name = tempfile.mkstemp(prefix="parity-")
        os.unlink(name)  # noqa: PTH108 - as mkstemp names it
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def take(self, start: int, size: int) -> bytes:
        """The bytes that were put at `start`."""
        with self._lock:
            if self._descriptor is None:
                raise ValueError("nothing was put into this spool")
            raw = os.pread(self._descriptor, size, start)
            self._held -= 1
            if not self._held:
                self._end = 0
                os.ftruncate(self._descriptor, 0)
        return raw


class Spooled:
    """An array in a spool."""

    def __init__(self, spool: Spool, start: int, size: int, dtype: np.dtype[Any]) -> None:
        self._spool, self._start, self._size, self._dtype = spool, start, size, dtype

    def take(self) -> NDArray[Any]:
        """The array; it can be taken only once."""
        return np.frombuffer(self._spool.take(self._start, self._size), self._dtype)
