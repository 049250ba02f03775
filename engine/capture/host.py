"""The tap: copies what a step has just computed, and hands the copies of a pass to the thread that writes them.

A record is made of a copy taken in the moment the value is computed; no pointer into the engine is kept, so buffers that
are reused later cannot change it. Statistics, sketches, formatting and disk are the writer thread's: the engine copies
and goes on, and waits only where the copies that wait are too many, which is counted.
"""

import atexit
from collections.abc import Callable, Collection
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from checkpoints.record import DEFAULT_SLICE, Rows, Token
from checkpoints.recording import Positions
from checkpoints.summary import kept_copy, summarise_pass
from checkpoints.tensors import TensorWriter, key

from ..backend import Array, Backend
from .writer import WriterThread

_HELD = 1 << 20  # bytes of copies that are handed over before their pass ends: a prefill need not be held as a whole


class RowSink(Protocol):
    """What the writer thread writes to: a `checkpoints.jsonl.Writer`, or a list in a test."""

    def rows(self, rows: Rows) -> None:
        """Take the records of one point and pass."""

    def token(self, token: Token) -> None:
        """Take one generated token."""


@dataclass(frozen=True)
class Pass:
    """Where in the sequence a forward pass stands; `causal`: whether no position sees a later one."""

    token_idx: NDArray[np.int64]
    step: int
    decode: bool
    first: int = 0
    causal: bool = True


def stands_once(value: Array, now: Pass) -> bool:
    """Whether a value of this pass has one row for all of its positions, as a state after it or a pooled embedding."""
    return value.ndim == 2 and value.shape[0] == 1 and len(now.token_idx) > 1


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
    `on_value`, if set, hears of every value computed.
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
        self.on_value: Callable[[str], None] | None = None
        self._sink = sink
        self._backend = backend
        self._positions = positions
        self._slice = slice_size
        self._tensors = tensors
        self._now = Pass(np.zeros(0, dtype=np.int64), 0, decode=False)
        self._kept = np.zeros(0, dtype=np.int64)
        self._held: list[tuple[str, NDArray[np.float32]]] = []
        self._writer = WriterThread()
        atexit.register(self._at_exit)

    @property
    def waits(self) -> int:
        """How often the engine had to wait for the writer."""
        return self._writer.waits

    def begin(self, now: Pass) -> None:
        """Say where the pass that starts now stands; what the last one made goes to the writer."""
        self._hand_over()
        self._writer.check()
        self._now = now
        self._kept = kept_rows(self._positions, now)

    def __call__(self, name: str, value: Array) -> None:
        """Record a value; called by the loop right after the step.

        Raises:
            TypeError: it is not float32.
            ValueError: it does not hold a row for each position of the pass.
            what failed in the writer's thread.
        """
        if self.on_value is not None:
            self.on_value(name)
        if name not in self.points or not len(self._kept):
            return
        host = self._backend.to_host(value)
        if stands_once(value, self._now):
            self._record_once(name, host)
        else:
            self._held.append((name, kept_copy(name, host, len(self._now.token_idx), self._kept)))
        if self._tensors is not None:
            tensors, entry, whole = self._tensors, key(name, self._now.step), np.array(host)
            self._writer.put(lambda: tensors.add(entry, whole), whole.nbytes)
        if sum(held.nbytes for _, held in self._held) >= _HELD:
            self._hand_over()

    def _record_once(self, name: str, host: NDArray[np.float32]) -> None:
        """Record what stands once a pass, with its last position; not where that is left out."""
        now = self._now
        if self._kept[-1] != len(now.token_idx) - 1:
            return
        copy = kept_copy(name, host, 1, np.zeros(1, np.int64))

        def write() -> None:
            (rows,) = summarise_pass(
                [(name, copy)],
                now.token_idx[-1:],
                np.zeros(1, np.int64),
                step=now.step,
                decode=now.decode,
                slice_size=self._slice,
                first=now.first,
            )
            self._sink.rows(rows)

        self._writer.put(write, copy.nbytes)

    def _hand_over(self) -> None:
        """Give the writer what was copied since the last time."""
        if not self._held:
            return
        held, self._held = self._held, []
        now, kept = self._now, self._kept

        def write() -> None:
            for rows in summarise_pass(
                held,
                now.token_idx,
                kept,
                step=now.step,
                decode=now.decode,
                slice_size=self._slice,
                first=now.first,
                causal=now.causal,
            ):
                self._sink.rows(rows)

        self._writer.put(write, sum(copy.nbytes for _, copy in held))

    def token(self, token: Token) -> None:
        """Record one generated token, after the pass that chose it."""
        self._hand_over()
        self._writer.put(lambda: self._sink.token(token), 0)

    def close(self) -> None:
        """Hand over the last pass and wait until everything is written. Raises what failed in the thread."""
        atexit.unregister(self._at_exit)
        try:
            self._hand_over()
        finally:
            self._writer.finish()
        self._writer.check()

    def _at_exit(self) -> None:
        """A process that forgets to close loses nothing. A failure that came out before is not raised again."""
        with suppress(BaseException) if self._writer.failure_raised else nullcontext():
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with nullcontext() if kind is None else suppress(BaseException):  # what failed first is already under way
            self.close()
