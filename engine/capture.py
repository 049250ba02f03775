"""The tap: copies what a step has just computed, and a thread that writes it.

A record is made of a copy taken in the moment the value is computed; no pointer into the engine is kept, so buffers that
are reused later cannot change it. Formatting and disk are the writer thread's: the engine hands over finished rows and
goes on, and waits only when more than `_QUEUE` batches wait, which is counted.
"""

import queue
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from checkpoints.record import DEFAULT_SLICE, Rows, Token
from checkpoints.summary import summarise
from checkpoints.tensors import TensorWriter, key

from .backend import Array, Backend

Positions = Literal["all", "last"] | tuple[int, ...]
_QUEUE = 256  # batches that may wait for the disk: some tens of MB at the default slice, whatever the model's size


class RowSink(Protocol):
    """What the writer thread writes to: a `checkpoints.jsonl.Writer`, or a list in a test."""

    def rows(self, rows: Rows) -> None:
        """Take the records of one point and pass."""

    def token(self, token: Token) -> None:
        """Take one generated token."""


@dataclass(frozen=True)
class Pass:
    """Where in the sequence a forward pass stands."""

    token_idx: NDArray[np.int64]
    step: int
    decode: bool
    first: int = 0


def kept_rows(positions: Positions, now: Pass) -> NDArray[np.int64]:
    """Indices of the rows of this pass that are recorded: all, the last one, or those at given positions."""
    if positions == "all":
        return np.arange(len(now.token_idx))
    if positions == "last":
        return np.array([len(now.token_idx) - 1])
    return np.flatnonzero(np.isin(now.token_idx, np.array(positions, dtype=np.int64)))


class Capture:
    """Records the points asked for and writes them in a thread of its own.

    What fails in the thread comes out in the engine's next call, and at the latest in `close`.
    `waits` counts how often the engine had to wait for the writer; `on_value`, if set, hears of every value computed.
    """

    def __init__(
        self,
        sink: RowSink,
        points: Collection[str],
        backend: Backend,
        *,
        positions: Positions = "all",
        slice_size: int | None = DEFAULT_SLICE,
        tensors: TensorWriter | None = None,
    ) -> None:
        self.points = frozenset(points)
        self.waits = 0
        self.on_value: Callable[[str], None] | None = None
        self._sink = sink
        self._backend = backend
        self._positions = positions
        self._slice = slice_size
        self._tensors = tensors
        self._now = Pass(np.zeros(0, dtype=np.int64), 0, decode=False)
        self._failure: BaseException | None = None
        self._queue: queue.Queue[tuple[Callable[[], None], Callable[[], None]] | None] = queue.Queue(_QUEUE)
        self._thread = threading.Thread(target=self._write, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def begin(self, now: Pass) -> None:
        """Say where the pass that starts now stands."""
        self._raise_failure()
        self._now = now

    def __call__(self, name: str, value: Array) -> None:
        """Record a value; called by the loop right after the step."""
        if self.on_value is not None:
            self.on_value(name)
        if name not in self.points:
            return
        keep = kept_rows(self._positions, self._now)
        if not len(keep):
            return
        host = np.ascontiguousarray(self._backend.to_host(value))
        now = self._now
        rows = summarise(
            name,
            host,
            now.token_idx,
            step=now.step,
            decode=now.decode,
            slice_size=self._slice,
            keep=keep,
            first=now.first,
        )
        self._put(lambda: self._sink.rows(rows))
        if self._tensors is not None:
            tensors, copy = self._tensors, host.copy()
            self._put(lambda: tensors.add(key(name, now.step), copy))

    def token(self, token: Token) -> None:
        """Record one generated token."""
        self._put(lambda: self._sink.token(token))

    def _put(self, work: Callable[[], None], discard: Callable[[], None] = lambda: None) -> None:
        """Give the writer's thread something to do; `discard` is called instead once the writer has failed."""
        self._raise_failure()
        try:
            self._queue.put_nowait((work, discard))
        except queue.Full:
            self.waits += 1
            self._queue.put((work, discard))

    def _write(self) -> None:
        while (item := self._queue.get()) is not None:
            work, discard = item
            if self._failure is not None:
                discard()
                continue
            try:
                work()
            except BaseException as error:
                self._failure = error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Wait until everything is written. Raises what failed in the thread."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self._raise_failure()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._queue.put(None)
            self._thread.join()
