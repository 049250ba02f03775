"""The thread that writes what the engine hands over, while the engine is idle.

Python runs one thread at a time: summaries and formatting between the steps of a pass would hold the engine up. So the
thread lets work pile up until the engine is quiet, and then does it in one go. If memory runs short before that, it sets
work aside unprocessed, which costs a copy and hardly any of Python's time.

With `freeze`, garbage collections meanwhile pass over the objects that the process already has. In a program that has imported CuPy one
full collection holds Python for 23 ms, in which a device runs out of launched steps (measured beside an H100). That changes the whole
process, so only a device asks for it.
"""

import gc
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic

from msgspec import Struct
from msgspec.structs import replace

from checkpoints import collector

_LIMIT = 64 << 20  # bytes that may wait: the logits of a hundred positions of a vocabulary of 150,000
_QUIET = 0.1  # seconds without new work that count as idle: longer than a decode step of a small model on a CPU (20 ms)
_LATEST = 1.0  # seconds after which work is done even while the engine is busy, piece by piece

Write = Callable[[], None]


def _nothing() -> None:
    """The `discard` of work that holds nothing."""


class _Work(Struct, frozen=True):
    write: Write
    discard: Write
    size: int
    put_at: float
    set_aside: Callable[[], Write] | None


class WriterThread:
    """Runs pieces of work in order, in a thread of its own.

    It starts when no new work has come for 0.1 s, or when it has to end. A piece older than a second is done even while the engine
    is busy, followed by a pause as long as the work took, in which the engine has Python to itself. When half of the limit is
    waiting, or the engine waits for room, pieces are set aside, or done if they cannot be set aside. Once a piece has failed the
    others are discarded, and the next call raises the failure. `waits` counts how often the engine had to wait for room; `limit`
    is in bytes. With `freeze`, garbage collections pass over the objects that existed when the thread began, until `finish` has returned.
    """

    def __init__(self, limit: int = _LIMIT, *, freeze: bool = False) -> None:
        self.waits = 0
        self.failure_raised = False
        self.limit = limit
        self._size = 0  # bytes of the work that waits without being set aside, or is being written
        self._aside: deque[_Work] = deque()
        self._waiting: deque[_Work] = deque()
        self._last_put = 0.0
        self._pause_until = 0.0
        self._hurried = False
        self._closing = False
        self._failure: BaseException | None = None
        self._change = threading.Condition()
        # If the program or another writer has frozen objects already, nothing is frozen here, and so nothing is thawed.
        self._froze = freeze and collector.freeze()
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def put(self, write: Write, size: int, discard: Write = _nothing, set_aside: Callable[[], Write] | None = None) -> None:
        """Give the thread a piece of work that holds `size` bytes.

        Args:
            discard: called instead once a piece has failed.
            set_aside: frees the bytes and returns a function that does the work later. If it raises OSError the work is done at once.

        Raises:
            Any exception that an earlier piece raised.
        """
        self.check()
        with self._change:
            if self._full(size):
                self.waits += 1
                self._begin()
                self._change.wait_for(lambda: not self._full(size))
            self._last_put = monotonic()
            self._waiting.append(_Work(write, discard, size, self._last_put, set_aside))
            self._size += size
            if 2 * self._size >= self.limit:
                self._begin()
            elif len(self._waiting) == 1:
                self._change.notify_all()

    def _full(self, size: int) -> bool:
        return self._size > 0 and self._size + size > self.limit

    def hurry(self) -> None:
        """Make room at once, and count that the engine waits for it."""
        with self._change:
            self.waits += 1
            self._begin()

    def _begin(self) -> None:
        self._hurried = bool(self._waiting)
        self._change.notify_all()

    def check(self) -> None:
        """Raise what a piece of work has raised, and note in `failure_raised` that it was reported."""
        if self._failure is not None:
            self.failure_raised = True
            raise self._failure

    def finish(self) -> None:
        """Wait until everything is done; the thread ends."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._thread.join()
        if self._froze:
            self._froze = False
            gc.unfreeze()

    def _run(self) -> None:
        while True:
            with self._change:
                following = self._next()
            if following is None:
                return
            work, aside = following
            began = monotonic()
            later = self._set_aside(work) if aside else None
            if later is None:
                self._do(work)
            with self._change:
                if later is not None:
                    self._aside.append(later)
                else:
                    self._pause_until = 2 * monotonic() - began
                self._size -= work.size
                self._change.notify_all()

    def _next(self) -> tuple[_Work, bool] | None:
        """The next piece when its time has come, and whether to set it aside; None when all is done and no more will come."""
        while True:
            if not self._waiting:
                self._hurried = False
            if self._hurried and self._can_wait(self._waiting[0]):
                return self._waiting.popleft(), True
            queue = self._aside or self._waiting
            if not queue:
                if self._closing:
                    return None
                self._change.wait()
                continue
            now = monotonic()
            due = min(self._last_put + _QUIET, max(queue[0].put_at + _LATEST, self._pause_until))
            if self._hurried or self._closing or now >= due:
                return queue.popleft(), False
            self._change.wait(due - now)

    def _can_wait(self, work: _Work) -> bool:
        """Whether a piece can free its bytes without being done; one that holds nothing only keeps its place in the order."""
        return self._failure is None and not self._closing and (work.set_aside is not None or not work.size)

    def _set_aside(self, work: _Work) -> _Work | None:
        try:
            write = work.write if work.set_aside is None else work.set_aside()
        except OSError:  # the disk is full: the engine waits until the work is done
            return None
        return replace(work, write=write, discard=_nothing, size=0, set_aside=None)

    def _do(self, work: _Work) -> None:
        if self._failure is not None:
            work.discard()
            return
        try:
            work.write()
        except BaseException as error:
            self._failure = error
