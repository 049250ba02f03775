"""The stage on a device: records are made where the value was computed, and reach the host in one copy per pass.

A kernel in the stream that computed the value writes slice, statistics and sketch of its rows into a staging buffer; when
the pass is over, one asynchronous copy brings the staged rows to a slab of pinned memory. Both have the same size, are allocated
once and used as one ring: a pass takes the same place in both. The writer thread waits for that copy's event, hands the rows on
and gives their place back; while the engine is busy it only moves them to a file, which takes hardly any of Python's time, and
formats them later. The engine waits only when the ring is full, and counts how often it did.
"""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.record import DEFAULT_SLICE

from ..backend import Array, Backend
from ..device import kernel
from .host import record_once
from .ring import Ring
from .spool import Spool
from .staged import CAUSAL, PART_DOUBLES, PLAIN, Batch, StagedRows, layout, record_type
from .tap import CapturedPass, RowSink, stands_once
from .writer import WriterThread

_CHUNK = 1024  # elements per block: the logits of one row are 149 blocks, one for each multiprocessor of an H200
_LARGE_CHUNK = 8192  # … and where many rows fill the device anyway, larger chunks cost less overhead
_MANY_BLOCKS = 8192
_LARGEST = 3  # how many of the largest passes the slab holds: one must be less than half of it, or the writer is hurried
_RING = 256  # decode passes that the slab holds: as many batches as may wait in the host's stage
_RING_BYTES = 1 << 28  # … and fewer of long slices: every point of 24 layers takes a ninth of this with slices of 16


class DeviceStage:
    """Makes records on the device; they equal the host's up to float64's rounding."""

    def __init__(
        self,
        sink: RowSink,
        points: Collection[str],
        backend: Backend,
        *,
        slice_size: int = DEFAULT_SLICE,
        ring: int = _RING,
    ) -> None:
        self.points = frozenset(points)
        self.sink = sink
        self.writer = WriterThread(freeze=True)
        self._backend = backend
        self._now = CapturedPass(np.zeros(0, dtype=np.int64), 0, decode=False)
        self._kept = np.zeros(0, dtype=np.int64)
        self._xp = backend.xp
        self._record = record_type(slice_size)
        self._passes = ring
        self.slice_size = slice_size
        self._step_places = len(self.points)  # places of the slab that a decode step takes
        self._beside = 0  # places of the pass in progress that hold no records
        self._ring = Ring(0, self.writer.hurry)
        self._staging: Array = None  # as large as the slab: no pass waits until another's records are copied out
        self._start: int | None = None  # the place where the records of the pass in progress begin
        self._copies = self._xp.cuda.Stream(non_blocking=True)
        self._slab: NDArray[Any] = np.zeros(0, self._record)
        self._spool = Spool()
        self._parts: list[StagedRows] = []
        self._seen = np.zeros(0, dtype=np.int64)
        self._kept_there: Array = None
        self._scratch: Array = None
        self._counters: Array = None
        self._kernel = kernel("summary", "summarise_value")

    def begin(self, now: CapturedPass, kept: NDArray[np.int64]) -> None:
        """Start a pass of which these rows are recorded."""
        self._now, self._kept = now, kept
        self._seen = now.token_idx[self._kept] - now.first + 1 if now.causal else np.full(len(self._kept), len(now.token_idx))
        self._allocate(len(self.points) * len(self._kept))
        self._kept_there = None

    def _allocate(self, records: int) -> None:
        """Allocate slab and staging buffer for passes of that many records; again only if a later pass is larger."""
        waiting = min(self._passes * self._step_places, _RING_BYTES // self._record.itemsize)
        capacity = max(_LARGEST * max(records, self._step_places), waiting, 1)
        if self._staging is not None and len(self._slab) >= capacity:
            return
        self._ring.drain()
        self._ring = Ring(capacity, self.writer.hurry)
        self.writer.limit = capacity * self._record.itemsize
        size = capacity * self._record.itemsize
        self._backend.require(
            size, f"recording {max(records, self._step_places):,} rows a pass, {self.slice_size:,} values of each,"
        )
        # Without cupyx, whose import takes as long as loading a model.
        self._slab = np.frombuffer(self._xp.cuda.alloc_pinned_memory(size), self._record, capacity)
        self._xp.cuda.get_current_stream().synchronize()
        self._staging = self._xp.empty(size, dtype=np.uint8)

    def _place(self, count: int) -> Array:
        """Where this pass's records are staged, from its next free place on; its first record takes `count` places of the ring."""
        if self._start is None:
            self._start = self._ring.take(count)
        return self._staging[(self._start + len(self._parts) * len(self._kept)) * self._record.itemsize :]

    def record(self, name: str, value: Array) -> None:
        """Launch the kernel that makes the records of a value; raises as `Stage.record`."""
        self._check(name, value)
        value = self._xp.ascontiguousarray(value)  # a step may read a view, and so may make one
        if stands_once(value, self._now):
            host = self._backend.to_host(value)
            record_once(self.sink, self.writer, name, host, self._now, self._kept, self.slice_size)
            return
        kind, s, heads, width = layout(name, value.shape, len(self._now.token_idx))
        if kind != PLAIN and s < int(self._seen.max()):
            raise ValueError(f"{name}: {value.shape} holds fewer than the {int(self._seen.max())} positions that were read")
        if self._kept_there is None:
            self._kept_there = self._xp.asarray(np.stack([self._kept, self._seen]).astype(np.int32))
        rows = len(self._kept)
        longest = width if kind == PLAIN else int(self._seen.max()) * (heads if kind == CAUSAL else width)
        size = _LARGE_CHUNK if rows * longest > _MANY_BLOCKS * _CHUNK else _CHUNK
        chunks = -(-longest // size)
        self._room(rows, chunks)
        there = self._place(len(self.points) * rows)
        arguments = (
            *(value, np.int32(kind), np.int32(len(self._now.token_idx)), np.int32(s), np.int32(heads), np.int32(width)),
            *(
                self._kept_there[0],
                self._kept_there[1],
                np.int32(size),
                np.int32(self.slice_size),
                np.int32(self._record.itemsize),
            ),
            *(self._scratch, self._counters, there),
        )
        self._kernel((chunks, rows), (256,), arguments)
        self._parts.append(StagedRows(name, kind, len(self._parts) * rows, width, heads))

    @property
    def record_bytes(self) -> int:
        """The size of one record in staging buffer and slab."""
        return self._record.itemsize

    def staging(self, places: int) -> Array:
        """Where this step's records are staged, with room for `places` of them."""
        self._step_places = places
        self._allocate(places)
        return self._place(places)

    def staged(self, parts: Collection[StagedRows]) -> None:
        """Note that a step fills the places that `staging` gave it: one row for each of these points, with its partial sums."""
        self._parts.extend(parts)
        self._beside = self._step_places - len(parts)

    def _check(self, name: str, value: Array) -> None:
        if not isinstance(value, self._xp.ndarray):
            raise TypeError(
                f"{name}: the stage of a device takes device memory, got {type(value).__name__} in host memory; "
                "use engine.capture.host.HostStage for a host engine"
            )
        if value.dtype != np.float32:
            raise TypeError(f"{name}: expected float32, got {value.dtype}")

    def _room(self, rows: int, chunks: int) -> None:
        """Make scratch memory for the chunks of so many rows; the counters start at zero, and each kernel leaves them at zero."""
        if self._scratch is None or self._scratch.size < rows * chunks * PART_DOUBLES:
            self._scratch = self._xp.empty(rows * chunks * PART_DOUBLES, dtype=np.float64)
        if self._counters is None or self._counters.size < rows:
            self._counters = self._xp.zeros(rows, dtype=np.uint32)

    def hand_over(self) -> None:
        """Copy what this pass staged into the slab, without waiting for it, and tell the writer."""
        start = self._start
        if start is None or not self._parts:
            return
        self.writer.check()
        batch = Batch(self._now, self._kept, self._seen, tuple(self._parts))
        count = len(self._parts) * len(self._kept) + self._beside
        here, runtime = self._slab[start : start + count], self._xp.cuda.runtime
        computed, copied = self._xp.cuda.Event(disable_timing=True), self._xp.cuda.Event(block=True, disable_timing=True)
        computed.record(self._xp.cuda.get_current_stream())
        self._copies.wait_event(computed)
        source = self._staging.data.ptr + start * self._record.itemsize
        runtime.memcpyAsync(here.ctypes.data, source, here.nbytes, runtime.memcpyDeviceToHost, self._copies.ptr)
        copied.record(self._copies)
        self._parts.clear()
        self._beside, self._start = 0, None
        ring = self._ring

        def format_records(records: NDArray[Any]) -> None:
            for rows in batch.rows(records, self.slice_size):
                self.sink.rows(rows)

        def write() -> None:
            try:
                copied.synchronize()
                format_records(here)
            finally:
                ring.give_back()

        def set_aside() -> Callable[[], None]:
            copied.synchronize()
            spooled = self._spool.put(here)
            ring.give_back()
            return lambda: format_records(spooled.take())

        self.writer.put(write, here.nbytes, ring.give_back, set_aside)
