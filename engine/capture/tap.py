"""The tap: records what a step has just computed, and hands the records of a pass to the thread that writes them.

A record is made from a copy taken the moment the value is computed; no pointer into the engine is kept, so buffers that
are reused later cannot change it. The stage decides where that copy lies: in host memory (`HostStage`) or in a ring on the device
(`DeviceStage`). The writer thread formats and writes: the engine goes on, and waits only when too much is still to be
written, which is counted.
"""

import atexit
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Protocol, Self

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.record import Rows, Token
from checkpoints.recording import Positions

from ..backend import Array
from .writer import WriterThread


class RowSink(Protocol):
    """What the writer thread writes to: a `checkpoints.jsonl.Writer`, or in a test a list."""

    def rows(self, rows: Rows) -> None:
        """Take the records of one point and pass."""

    def token(self, token: Token) -> None:
        """Take one generated token."""


class CapturedPass(Struct, frozen=True):
    """The place of a forward pass in its sequence; `causal`: whether no position sees a later one."""

    token_idx: NDArray[np.int64]
    step: int
    decode: bool
    first: int = 0
    causal: bool = True


def stands_once(value: Array, now: CapturedPass) -> bool:
    """Whether a value of this pass has a single row for all positions, like a state or a pooled embedding."""
    return value.ndim == 2 and value.shape[0] == 1 and len(now.token_idx) > 1


def kept_rows(positions: Positions, now: CapturedPass) -> NDArray[np.int64]:
    """Indices of the rows of this pass that are recorded: all, the last one, or those at given positions."""
    if positions == "all":
        return np.arange(len(now.token_idx))
    if positions == "last":
        return np.array([len(now.token_idx) - 1])
    return np.flatnonzero(np.isin(now.token_idx, np.array(positions, dtype=np.int64)))


class Stage(Protocol):
    """Where the records of a pass are made and held until the writer thread takes them."""

    points: frozenset[str]
    sink: RowSink
    writer: WriterThread

    def begin(self, now: CapturedPass, kept: NDArray[np.int64]) -> None:
        """Start a pass of which these rows are recorded; the records of the last one have been handed over."""

    def record(self, name: str, value: Array) -> None:
        """Record a value that a step has just computed.

        Raises:
            TypeError: it is not float32, or lies in the wrong memory.
            ValueError: it does not hold a row for each position of the pass.
            Any exception that the writer's thread ended with.
        """

    def hand_over(self) -> None:
        """Give the writer what was recorded since the last call."""


class Capture:
    """A tap: records the points of its stage, pass by pass.

    A failure in the writer's thread is raised by the engine's next call, and at the latest by `close`.
    `on_value`, if set, is called for every value that is computed.
    """

    def __init__(self, stage: Stage, *, positions: Positions = "all") -> None:
        self.stage = stage
        self.on_value: Callable[[str], None] | None = None
        self._positions = positions
        self._rows_kept = 0
        atexit.register(self._at_exit)

    @property
    def waits(self) -> int:
        """How often the engine had to wait for the writer."""
        return self.stage.writer.waits

    @property
    def keeps_rows(self) -> bool:
        """Whether anything of the pass in progress is recorded."""
        return self._rows_kept > 0

    def begin(self, now: CapturedPass) -> None:
        """Start a pass at its place in the sequence; the records of the last one go to the writer."""
        self.stage.hand_over()
        self.stage.writer.check()
        kept = kept_rows(self._positions, now)
        self._rows_kept = len(kept)
        self.stage.begin(now, kept)

    def __call__(self, name: str, value: Array) -> None:
        """Record a value; the loop calls it right after the step. Raises what the stage's `record` raises."""
        if self.on_value is not None:
            self.on_value(name)
        if name in self.stage.points and self._rows_kept:
            self.stage.record(name, value)

    def token(self, token: Token) -> None:
        """Record one generated token, after the pass that chose it."""
        self.stage.hand_over()
        sink = self.stage.sink
        self.stage.writer.put(lambda: sink.token(token), 0)

    def close(self) -> None:
        """Hand over the last pass and wait until everything is written. Raises what failed in the thread."""
        atexit.unregister(self._at_exit)
        try:
            self.stage.hand_over()
        finally:
            self.stage.writer.finish()
        self.stage.writer.check()

    def _at_exit(self) -> None:
        """Lose nothing if the process forgets to close. A failure that was raised before is not raised again."""
        with suppress(BaseException) if self.stage.writer.failure_raised else nullcontext():
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with nullcontext() if kind is None else suppress(BaseException):  # what failed first is already under way
            self.close()
