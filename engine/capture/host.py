"""The stage in host memory: copies of the values, from which the writer thread makes the records."""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from checkpoints.record import DEFAULT_SLICE
from checkpoints.summary import kept_copy, summarise_pass
from checkpoints.tensors import TensorWriter, key

from ..backend import Array, Backend
from .tap import CapturedPass, RowSink, stands_once
from .writer import WriterThread

_HELD = 1 << 20  # bytes of copies after which they are handed over before their pass ends: a prefill is not held as a whole


class HostStage:
    """Copies each value to host memory at once, waiting for it if it is on a device.

    With `tensors` every value is also written whole; with a `slice_size` of None the records hold whole rows.
    """

    def __init__(
        self,
        sink: RowSink,
        points: Collection[str],
        backend: Backend,
        *,
        slice_size: int | None = DEFAULT_SLICE,
        tensors: TensorWriter | None = None,
    ) -> None:
        self.points = frozenset(points)
        self.sink = sink
        self.writer = WriterThread()
        self._backend = backend
        self._slice = slice_size
        self._tensors = tensors
        self._now = CapturedPass(np.zeros(0, dtype=np.int64), 0, decode=False)
        self._kept = np.zeros(0, dtype=np.int64)
        self._held: list[tuple[str, NDArray[np.float32]]] = []

    def begin(self, now: CapturedPass, kept: NDArray[np.int64]) -> None:
        """Start a pass of which these rows are recorded."""
        self._now, self._kept = now, kept

    def record(self, name: str, value: Array) -> None:
        """Copy a value; raises as `Stage.record`."""
        host = self._backend.to_host(value)
        if stands_once(value, self._now):
            record_once(self.sink, self.writer, name, host, self._now, self._kept, self._slice)
        else:
            self._held.append((name, kept_copy(name, host, len(self._now.token_idx), self._kept)))
        if self._tensors is not None:
            tensors, entry, whole = self._tensors, key(name, self._now.step), np.array(host)
            self.writer.put(lambda: tensors.add(entry, whole), whole.nbytes)
        if sum(held.nbytes for _, held in self._held) >= _HELD:
            self.hand_over()

    def hand_over(self) -> None:
        """Give the writer what was copied since the last call."""
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
                self.sink.rows(rows)

        self.writer.put(write, sum(copy.nbytes for _, copy in held))


def record_once(
    sink: RowSink,
    writer: WriterThread,
    name: str,
    host: NDArray[np.float32],
    now: CapturedPass,
    kept: NDArray[np.int64],
    slice_size: int | None,
) -> None:
    """Record a value that a pass has only once, at the pass's last position; nothing if that position is not recorded."""
    if kept[-1] != len(now.token_idx) - 1:
        return
    copy = kept_copy(name, host, 1, np.zeros(1, np.int64))

    def write() -> None:
        (rows,) = summarise_pass(
            [(name, copy)],
            now.token_idx[-1:],
            np.zeros(1, np.int64),
            step=now.step,
            decode=now.decode,
            slice_size=slice_size,
            first=now.first,
        )
        sink.rows(rows)

    writer.put(write, copy.nbytes)
