"""Parts of a file copied into device memory by several threads, through pinned memory.

A copy from pageable memory runs at a few GB/s and holds everything up; here each thread reads the file (from the page cache or the
disk) into a pinned buffer of its own, while other threads' buffers are being copied.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import local
from types import TracebackType
from typing import Any, Self

import numpy as np

from ..backend import Array, Backend

# Measured on an H200's host: one thread reads the page cache at 5 GB/s, eight at 32 to 48, and the link carries 52, so that a second
# buffer for each thread gains little; pinning 32 MB takes 12 to 30 ms, and Python takes 0.1 ms a piece, one thread at a time.
_THREADS = 8
_PIECE = 4 << 20  # bytes of a pinned buffer


class Upload:
    """A context manager: `into` starts a copy, `wait` (and leaving the context) waits for all that were started.

    Raises (in `wait`):
        OSError: the file cannot be read, or ended early.
    """

    def __init__(self, path: Path, backend: Backend) -> None:
        self._backend, self._xp = backend, backend.xp
        self._file = os.open(path, os.O_RDONLY)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="upload")
        self._own = local()
        self._running: list[Future[Any]] = []

    def into(self, array: Array, offset: int) -> None:
        """Start to fill the contiguous array with the file's bytes from this offset on."""
        self._xp.cuda.get_current_stream().synchronize()  # the pool may hand out memory that kernels still read
        for start in range(0, array.nbytes, _PIECE):
            size = min(_PIECE, array.nbytes - start)
            self._running.append(self._pool.submit(self._bring, array.data.ptr + start, offset + start, size))

    def wait(self) -> None:
        """Wait until everything that was started is in device memory."""
        running, self._running = self._running, []
        for piece in running:
            piece.result().synchronize()

    def _bring(self, there: int, offset: int, size: int) -> Any:
        with self._backend.current():
            buffer, copied, stream = self._own_buffer()
            copied.synchronize()
            piece = memoryview(buffer)[:size]
            while len(piece):
                read = os.preadv(self._file, [piece], offset)
                if not read:
                    raise OSError(f"the file ended {len(piece):,} bytes early")
                piece, offset = piece[read:], offset + read
            runtime = self._xp.cuda.runtime
            runtime.memcpyAsync(there, buffer.ctypes.data, size, runtime.memcpyHostToDevice, stream.ptr)
            copied.record(stream)
            return copied

    def _own_buffer(self) -> tuple[Any, Any, Any]:
        """This thread's buffer, the event of its last copy, and the stream."""
        own = self._own
        if not hasattr(own, "buffer"):
            own.buffer = np.frombuffer(self._xp.cuda.alloc_pinned_memory(_PIECE), np.uint8)
            own.copied = self._xp.cuda.Event(block=True, disable_timing=True)
            own.stream = self._xp.cuda.Stream(non_blocking=True)
        return own.buffer, own.copied, own.stream

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown()
            with self._backend.current():
                self._xp.cuda.Device().synchronize()
            os.close(self._file)
