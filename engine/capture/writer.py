"""The thread that writes what the engine hands over, while the engine rests.

Python runs one thread at a time: summaries and formatting between the steps of a pass would hold the engine up. So the
thread lets work come together until the engine is quiet, and takes it then in one go.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

_LIMIT = 64 << 20  # bytes that may wait: the logits of a hundred positions of a vocabulary of 150,000
_QUIET = 0.1  # seconds without new work that count as rest: longer than a decode step of a small model on a CPU (20 ms)
_LATEST = 1.0  # seconds after which work is done also beside a busy engine: what a process that is killed can lose


@dataclass(frozen=True)
class _Work:
    write: Callable[[], None]
    discard: Callable[[], None]
    size: int


class WriterThread:
    """Runs pieces of work in order, in a thread of its own.

    It begins when nothing new came for 0.1 s, after 1 s, when half of the limit waits, when it is hurried or has to end.
    Once a piece has failed the others are discarded, and the failure comes out in the next call. `waits` counts how often
    somebody had to wait for room; `limit` is in bytes.
    """

    def __init__(self, limit: int = _LIMIT) -> None:
        self.waits = 0
        self.told = False
        self.limit = limit
        self._size = 0  # of what waits or is being written
        self._waiting: list[_Work] = []
        self._last = 0.0
        self._hurried = False
        self._closing = False
        self._failure: BaseException | None = None
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def put(self, write: Callable[[], None], size: int, discard: Callable[[], None] = lambda: None) -> None:
        """Give the thread something to do that holds `size` bytes; `discard` is called instead once a piece has failed.

        Raises:
            what an earlier piece has raised.
        """
        self.check()
        with self._change:
            if self._full(size):
                self.waits += 1
                self._begin()
                self._change.wait_for(lambda: not self._full(size))
            self._waiting.append(_Work(write, discard, size))
            self._size += size
            self._last = monotonic()
            if 2 * self._size >= self.limit:
                self._begin()
            elif len(self._waiting) == 1:
                self._change.notify_all()

    def _full(self, size: int) -> bool:
        return self._size > 0 and self._size + size > self.limit

    def hurry(self) -> None:
        """Begin at once with what waits, and count that somebody waits for room."""
        with self._change:
            self.waits += 1
            self._begin()

    def _begin(self) -> None:
        self._hurried = bool(self._waiting)
        self._change.notify_all()

    def check(self) -> None:
        """Raise what a piece of work has raised; `told` says that somebody has heard of it."""
        if self._failure is not None:
            self.told = True
            raise self._failure

    def finish(self) -> None:
        """Wait until everything is done; the thread ends."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            for work in batch:
                self._do(work)
                with self._change:
                    self._size -= work.size
                    self._change.notify_all()

    def _next(self) -> list[_Work]:
        """What has come together when the time is right; nothing when all is done and no more will come."""
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._closing)
            latest = monotonic() + _LATEST
            while not self._hurried and not self._closing:
                left = min(self._last + _QUIET, latest) - monotonic()
                if left <= 0:
                    break
                self._change.wait(left)
            self._hurried = False
            batch, self._waiting = self._waiting, []
            return batch

    def _do(self, work: _Work) -> None:
        if self._failure is not None:
            work.discard()
            return
        try:
            work.write()
        except BaseException as error:
            self._failure = error
