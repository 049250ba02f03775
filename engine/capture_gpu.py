"""The tap on a device: records are made where the value was computed and reach the host in one copy a pass.

A kernel in the stream that computed the value makes slice, statistics and sketch of its rows into a staging buffer; when
the pass is over, one asynchronous copy brings the staged rows to a slab of pinned memory, allocated once and used as a
ring. The writer thread waits for that copy's event, hands the rows on and gives their place back. The engine waits only
where the ring has no place left, and counts that.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.record import DEFAULT_SLICE, SKETCH_SIZE
from checkpoints.tensors import TensorWriter

from .backend import Array, Backend
from .capture import Capture, Pass, Positions, RowSink
from .device import kernel
from .ring import Ring
from .staged import CAUSAL, PLAIN, Batch, Part, layout, record_type

_CHUNK = 1024  # elements a block takes: the logits of one row are 149 blocks, one for each multiprocessor of an H200
_STEP_CHUNK = 2048  # … of one row after a step, which is all latency: fewer chunks are put together sooner
_LARGE_CHUNK = 8192  # … and where many rows fill the device anyway, larger chunks are less overhead
_MANY_BLOCKS = 8192
_PART = SKETCH_SIZE + 8  # doubles of a chunk, PART of summary.cu
_LARGEST = 3  # passes of any size that the slab holds: one is not half of it, so that the writer lets the next begin in peace
_RING = 256  # decode passes that the slab holds: as many batches as the blocking tap lets wait


def tap(
    sink: RowSink,
    points: Collection[str],
    backend: Backend,
    *,
    positions: Positions = "all",
    slice_size: int | None = DEFAULT_SLICE,
    tensors: TensorWriter | None = None,
) -> Capture:
    """The tap for a backend: pinned copies on the current device; on the host, on other devices or for whole tensors the blocking one."""
    if backend.name == "numpy" or backend.spread or tensors is not None or slice_size is None:
        return Capture(sink, points, backend, positions=positions, slice_size=slice_size, tensors=tensors)
    return DeviceCapture(sink, points, backend, positions=positions, slice_size=slice_size)


class DeviceCapture(Capture):
    """The tap of a device; the same interface as `Capture`, and the same records to float64's rounding.

    Raises (in a call):
        TypeError: the value is not a float32 array on the device.
    """

    def __init__(
        self,
        sink: RowSink,
        points: Collection[str],
        backend: Backend,
        *,
        positions: Positions = "all",
        slice_size: int = DEFAULT_SLICE,
        ring: int = _RING,
    ) -> None:
        super().__init__(sink, points, backend, positions=positions, slice_size=slice_size)
        self._xp = backend.xp
        self._record = record_type(slice_size)
        self._passes = ring
        self.slice_size = slice_size
        self._ring = Ring(0, self._writer.hurry)
        self._staging: list[Array] = []  # two halves: one is copied out while the next pass fills the other
        self._half = 0
        self._copied: list[Any] = [None, None]
        self._copies = self._xp.cuda.Stream(non_blocking=True)
        self._slab: NDArray[Any] = np.zeros(0, self._record)
        self._parts: list[Part] = []
        self._seen = np.zeros(0, dtype=np.int64)
        self._kept_there: Array = None
        self._scratch: Array = None
        self._counters: Array = None
        self._kernel = kernel("summary", "summarise_value")

    def begin(self, now: Pass) -> None:
        """Say where the pass that starts now stands; what the last one staged goes to the writer."""
        super().begin(now)
        self._seen = now.token_idx[self._kept] - now.first + 1
        self._allocate(len(self.points) * len(self._kept))
        self._kept_there = None

    def _allocate(self, records: int) -> None:
        """Slab and staging buffer for passes of that many records; made again only if a later pass is larger."""
        if (
            self._staging
            and len(self._slab) >= _LARGEST * records
            and self._staging[0].nbytes >= records * self._record.itemsize
        ):
            return
        self._ring.drain()
        capacity = max(_LARGEST * records, self._passes * len(self.points), 1)
        self._ring = Ring(capacity, self._writer.hurry)
        self._writer.limit = capacity * self._record.itemsize
        pinned = self._xp.cuda.alloc_pinned_memory(
            capacity * self._record.itemsize
        )  # cupyx takes as long to import as a model to load
        self._slab = np.frombuffer(pinned, self._record, capacity)
        self._xp.cuda.get_current_stream().synchronize()
        self._staging = [self._xp.empty(max(records, 1) * self._record.itemsize, dtype=np.uint8) for _ in range(2)]

    def __call__(self, name: str, value: Array) -> None:
        """Record a value; called by the loop right after the step."""
        if self.on_value is not None:
            self.on_value(name)
        if name not in self.points or not len(self._kept):
            return
        self._check(name, value)
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
        start = sum(len(self._kept) for _ in self._parts)
        arguments = (
            *(value, np.int32(kind), np.int32(len(self._now.token_idx)), np.int32(s), np.int32(heads), np.int32(width)),
            *(
                self._kept_there[0],
                self._kept_there[1],
                np.int32(size),
                np.int32(self.slice_size),
                np.int32(self._record.itemsize),
            ),
            *(self._scratch, self._counters, self._staging[self._half][start * self._record.itemsize :]),
        )
        self._kernel((chunks, rows), (256,), arguments)
        self._parts.append(Part(name, kind, start, width, heads))

    # What a graph of decode steps needs to make the records itself.
    chunk = _STEP_CHUNK
    part_doubles = _PART

    @property
    def record_bytes(self) -> int:
        """The size of one record in staging buffer and slab."""
        return self._record.itemsize

    @property
    def keeps_rows(self) -> bool:
        """Whether anything of the pass in progress is recorded."""
        return len(self._kept) > 0

    def staging(self, records: int) -> Array:
        """The half of the staging buffer that this pass fills, with room for so many records."""
        self._allocate(records)
        return self._staging[self._half]

    def staged(self, parts: Collection[Part]) -> None:
        """A graph has put the records of these points, one row each, into the staging buffer."""
        self._parts.extend(parts)

    def _check(self, name: str, value: Array) -> None:
        if not isinstance(value, self._xp.ndarray):
            raise TypeError(
                f"{name}: the device's tap takes device memory, got {type(value).__name__} in host memory; "
                "use engine.capture.Capture for a host engine"
            )
        if value.dtype != np.float32:
            raise TypeError(f"{name}: expected float32, got {value.dtype}")
        if not value.flags.c_contiguous:
            raise TypeError(f"{name}: the value's memory is not contiguous; copy it first")

    def _room(self, rows: int, chunks: int) -> None:
        """Scratch for the chunks of so many rows; the counters begin, and stay between kernels, at zero."""
        if self._scratch is None or self._scratch.size < rows * chunks * _PART:
            self._scratch = self._xp.empty(rows * chunks * _PART, dtype=np.float64)
        if self._counters is None or self._counters.size < rows:
            self._counters = self._xp.zeros(rows, dtype=np.uint32)

    def _hand_over(self) -> None:
        """Copy what this pass staged into the slab, without waiting for it, and tell the writer."""
        if not self._parts:
            return
        self._writer.check()
        batch = Batch(self._now, self._kept, self._seen, tuple(self._parts))
        count = len(self._parts) * len(self._kept)
        start = self._ring.take(count)
        here = self._slab[start : start + count]
        half, runtime = self._half, self._xp.cuda.runtime
        made, copied = self._xp.cuda.Event(disable_timing=True), self._xp.cuda.Event(block=True, disable_timing=True)
        made.record(self._xp.cuda.get_current_stream())
        self._copies.wait_event(made)
        source = self._staging[half].data.ptr
        runtime.memcpyAsync(here.ctypes.data, source, here.nbytes, runtime.memcpyDeviceToHost, self._copies.ptr)
        copied.record(self._copies)
        self._copied[half] = copied
        self._half = 1 - half
        before = self._copied[self._half]
        if before is not None:  # the half that comes next must have been copied out
            self._xp.cuda.get_current_stream().wait_event(before)
        self._parts.clear()
        ring = self._ring

        def write() -> None:
            try:
                copied.synchronize()
                for rows in batch.rows(here, self.slice_size):
                    self._sink.rows(rows)
            finally:
                ring.give_back()

        self._writer.put(write, here.nbytes, ring.give_back)
