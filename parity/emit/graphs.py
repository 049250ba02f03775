"""Checkpoints in captured CUDA graphs: the Python recorder's part that makes every replay leave its values.

A captured stream computes nothing, and its replays call none of our code. So a checkpoint becomes a kernel of the graph, which copies
the value to the replay's place in a ring of device memory. Beside its own work, each replay first copies the ring's counts to pinned
host memory. A thread of ours watches those and brings complete replays to the host while the graph runs on; the graph waits only if the
ring is full. (It waits ten seconds at most. An engine that has launched so many replays ahead that the driver makes it wait
can hold the driver's lock meanwhile, which our thread needs: then what finds no room is lost, and that is an error.) The driver's own
functions are called, through ctypes: they are the same whatever framework captures, and their binary interface does not change.
"""

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cuda_driver import (
    DEVICE,
    HOST,
    KERNEL_NODE,
    NON_BLOCKING,
    PROGRAMMATIC_STREAM_SERIALIZATION,
    RELAXED,
    CopyOfBytes,
    KernelNodeParams,
    LaunchAttribute,
    LaunchConfig,
    add_dependency,
    call_driver,
    captured_nodes,
    in_context,
    overlaps,
    stream_of,
)
from .graph_kernel import CHUNK, THREADS, TOGETHER, Control, Segment, Segments, record_kernel
from .graph_rows import DeviceRow, Replayed, Slot, in_file_of_its_own, in_memory

# Bytes of device memory that a graph's replays take turns in, at most, unless eight of them need more; so many because a replay must not
# wait where our thread loses its core, for tens of milliseconds on a busy host. Further graphs get a share.
_RING = 256 << 20
_WAITING = 1 << 30  # bytes of replays that wait in memory to be written; what comes then waits in temporary files
_QUIET = 0.1  # seconds without a replay that count as rest: the lines are made then, since that takes Python from the engine
_BUSY, _IDLE = 0.002, 0.005  # seconds between two looks at the counts
_KEPT: "list[Any]" = []  # what graphs refer to: they may be replayed after the recorder is gone


def places_of(size: int, most: int = _RING) -> int:
    """How many replays of `size` bytes fit into a ring of `most` bytes: a power of two, 8 to 1,024."""
    places = 1024
    while places > 8 and places * size > most:
        places //= 2
    return places


class _Graph:
    """What one capture made: its slots, and the ring that its replays take turns in."""

    def __init__(self, graph: Any, most: int) -> None:
        self.slots: list[Slot] = []
        self._most = most  # bytes of the ring, unless eight replays need more
        self.place: Slot | None = None  # of the pass that is being captured
        self.size, self.places, self.collected = 0, 0, 0
        self._context, self.stream = ctypes.c_void_p(), ctypes.c_void_p()
        self._control, self._ring, self._capacity = ctypes.c_uint64(), ctypes.c_uint64(), 0
        self._first = self._last = 0  # its kernels
        self._first_stream: int | None = None
        self._rows = Segments()  # of the last kernel
        call_driver("cuCtxGetCurrent", ctypes.byref(self._context))
        call_driver("cuStreamCreate", ctypes.byref(self.stream), ctypes.c_uint(NON_BLOCKING))
        call_driver("cuMemAlloc_v2", ctypes.byref(self._control), ctypes.c_size_t(ctypes.sizeof(Control)))
        seen = ctypes.c_void_p()
        call_driver("cuMemHostAlloc", ctypes.byref(seen), ctypes.c_size_t(ctypes.sizeof(Control)), 0)
        self._seen = Control.from_address(seen.value or 0)
        self._seen.begun = 0
        # Beside the kernels, and lets them overlap: in a graph that is one line they would not.
        copy, node = CopyOfBytes(
            srcMemoryType=DEVICE, srcDevice=self._control.value, dstMemoryType=HOST, dstHost=seen.value,
            WidthInBytes=ctypes.sizeof(Control), Height=1, Depth=1,
        ), ctypes.c_void_p()  # fmt: skip
        call_driver(
            "cuGraphAddMemcpyNode", ctypes.byref(node), graph, None, ctypes.c_size_t(0), ctypes.byref(copy), self._context
        )
        _KEPT.append(self)

    def slot(self, point: str, row: DeviceRow, place: "Slot | None") -> Slot:
        """A new slot. The ring is resized for it, to a power of two of places, none of which is in use yet."""
        self.slots.append(Slot(point, row, place, self.size))
        self.size += -(-row.size // 16) * 16
        self.places = places_of(self.size, self._most)
        if self._capacity < self.places * self.size:
            # A ring that was too small, half of this one, stays: to free memory is to wait for the device.
            self._capacity = max(1 << 20, 2 * self._capacity, self.places * self.size)
            while not self._allocated(self._capacity) and self.places > 8:
                self.places //= 2
                self._capacity = self.places * self.size
        self._set(Control(room=self.places, places=self.places, size=self.size, ring=self._ring.value), 0)
        return self.slots[-1]

    def _allocated(self, size: int) -> bool:
        """Whether the device had memory for a ring of so many bytes, or for less.

        Raises:
            RuntimeError: not even for eight replays.
        """
        try:
            call_driver("cuMemAlloc_v2", ctypes.byref(self._ring), ctypes.c_size_t(size))
        except RuntimeError:
            if self.places == 8:
                raise
            return False
        return True

    def _set(self, value: Any, at: int) -> None:
        """Write to the control in a stream of its own, and wait for that."""
        target, size = ctypes.c_uint64((self._control.value or 0) + at), ctypes.c_size_t(ctypes.sizeof(value))
        call_driver("cuMemcpyHtoDAsync_v2", target, ctypes.byref(value), size, self.stream)
        call_driver("cuStreamSynchronize", self.stream)

    def put_in_line(self, slots: "list[Slot]", stream: Any) -> None:
        """Copy these rows after what the stream has captured so far: in the last kernel, if nothing was captured after it."""
        _, graph, before = captured_nodes(stream)
        joins = before == [self._last] and self._rows.n + len(slots) <= TOGETHER
        if not joins:
            self._rows = Segments(control=self._control.value, first=not self._first)
        for slot in slots:
            self._rows.of[self._rows.n] = Segment(slot.row.pointer, slot.at, slot.row.size)
            self._rows.n += 1
        chunks = sum(-(-self._rows.of[i].bytes // CHUNK) for i in range(self._rows.n))
        grid, block = (ctypes.c_uint * 3)(-(-chunks // THREADS), 1, 1), (ctypes.c_uint * 3)(THREADS, 1, 1)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(self._rows))
        kernel = ctypes.c_void_p(record_kernel(self._context.value or 0))
        if joins:
            params = KernelNodeParams(kernel, grid, block, 0, arguments, None)
            call_driver("cuGraphKernelNodeSetParams", ctypes.c_void_p(self._last), ctypes.byref(params))
            return
        kind = ctypes.c_int(-1)
        if len(before) == 1 and before[0] != self._last:
            call_driver("cuGraphNodeGetType", ctypes.c_void_p(before[0]), ctypes.byref(kind))
        in_order = self._first_stream in (None, stream.value)
        attribute = LaunchAttribute(id=PROGRAMMATIC_STREAM_SERIALIZATION, value=(ctypes.c_int * 16)(1))
        if kind.value == KERNEL_NODE and in_order and overlaps(self._context.value or 0):
            config = LaunchConfig(grid, block, 0, stream, ctypes.pointer(attribute), 1)
            call_driver("cuLaunchKernelEx", ctypes.byref(config), kernel, arguments, None)
        else:
            call_driver("cuLaunchKernel", kernel, *map(ctypes.c_uint, (*grid, *block, 0)), stream, arguments, None)
        self._last = captured_nodes(stream)[2][0]
        if not self._first:
            self._first, self._first_stream = self._last, stream.value
        elif not in_order and self._first not in before:  # a branch that may be ahead of the first kernel
            add_dependency(graph, self._first, self._last)

    def complete(self) -> int:
        """How many replays have ended, by the counts with which a replay began; the last replay may still be running."""
        begun = (int(self._seen.begun) - self.collected) % (1 << 32)
        return self.collected + begun - 1 if 1 < begun <= self.places + 1 else self.collected

    def wait(self) -> None:
        """Wait for the graph's device."""
        with in_context(self._context):
            call_driver("cuCtxSynchronize")

    def begun(self) -> int:
        """How many replays have begun, by the device.

        Raises:
            RuntimeError: the device has waited for room for ten seconds, and gave up.
        """
        now = Control()
        size = ctypes.c_size_t(ctypes.sizeof(now))
        with in_context(self._context):
            call_driver("cuMemcpyDtoHAsync_v2", ctypes.byref(now), self._control, size, self.stream)
            call_driver("cuStreamSynchronize", self.stream)
        if now.lost:
            raise RuntimeError("a replay found no room for its rows for ten seconds; they are lost")
        return self.collected + (int(now.begun) - self.collected) % (1 << 32)

    def collect(self, complete: int, in_file: bool) -> "list[Replayed]":
        """The rows of the next replays before number `complete`, of which their places are then free.

        Raises:
            OSError: there is no room for a temporary file.
        """
        start = self.collected % self.places
        count = min(complete - self.collected, self.places - start, max(1, self.places // 8))
        rows = (in_file_of_its_own if in_file else in_memory)(count * self.size).reshape(count, self.size)
        source, size = ctypes.c_uint64((self._ring.value or 0) + start * self.size), ctypes.c_size_t(rows.nbytes)
        with in_context(self._context):
            call_driver("cuMemcpyDtoHAsync_v2", ctypes.c_void_p(rows.ctypes.data), source, size, self.stream)
            call_driver("cuStreamSynchronize", self.stream)
            self.collected += count
            self._set(ctypes.c_uint32((self.collected + self.places) % (1 << 32)), Control.room.offset)
        return [Replayed(slot, slot.place, replay) for replay in rows for slot in self.slots if slot.place is not None]

    def end(self) -> None:
        """Record no replay that comes later."""
        with in_context(self._context):
            self._set(ctypes.c_uint32(0), Control.places.offset)


class Graphs:
    """All captured graphs of a recorder, and the thread that gives it their replays: `take(point, value, positions)`."""

    def __init__(self, take: "Callable[[str, NDArray[np.float32], list[int]], None]") -> None:
        self._take = take
        self._graphs: dict[int, _Graph] = {}
        self._waiting: deque[Replayed] = deque()
        self._size, self._busy, self._closing, self._hurried = 0, False, False, False
        self._change = threading.Condition()
        self._capturing = threading.Lock()
        # Never held while memory for a capture is allocated: that may wait for replays, and these for room, which is made under it.
        self._collecting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def add(self, point: str, value: Any, position: Any) -> None:
        """Make a checkpoint part of the graph that is being captured.

        Raises:
            ValueError: it isn't known where the position is read.
            TypeError, RuntimeError: the value or the capture does not allow it.
        """
        if position is None:
            raise ValueError(
                f"{point}: this stream is being captured into a CUDA graph: call positions_from with the device array from which"
                " each replay reads its position"
            )
        self.check()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
            self._thread.start()
        mode = ctypes.c_int(RELAXED)  # memory may be allocated meanwhile: the capture is of the stream, not of that
        call_driver("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            self._put_in_line(point, DeviceRow(value), position, ctypes.c_void_p(stream_of(value)))
        finally:
            call_driver("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    def _put_in_line(self, point: str, row: DeviceRow, position: Any, stream: Any) -> None:
        """Put a checkpoint behind what the stream has captured so far, with the place of its pass where it is the first of one."""
        number, graph, _ = captured_nodes(stream)
        with self._capturing:
            captured = self._graphs.get(number) or _Graph(graph, _RING // (1 + len(self._graphs)))
            # A point that comes again is of another pass in the same graph, which has a position of its own.
            slots = []
            if captured.place is None or any(slot.point == point and slot.place is captured.place for slot in captured.slots):
                captured.place = captured.slot("", DeviceRow(position), None)
                slots.append(captured.place)
            slots.append(captured.slot(point, row, captured.place))
            with self._collecting:
                self._graphs[number] = captured
            captured.put_in_line(slots, stream)

    def _collect(self) -> bool:
        """Bring some complete replays of each graph to the host; returns whether there were any."""
        any_complete = False
        with self._collecting:
            for graph in list(self._graphs.values()):
                complete = graph.complete()
                if complete > graph.collected:
                    self._wait_with(graph.collect(complete, self._size >= _WAITING))
                    any_complete = True
        return any_complete

    def _wait_with(self, replayed: "list[Replayed]") -> None:
        with self._change:
            self._waiting.extend(replayed)
            self._size += sum(rows.size for rows in replayed)

    def _run(self) -> None:
        """Bring replays to the host, and write them when none has come for a while, or when everything must be written."""
        mode = ctypes.c_int(RELAXED)  # others may be capturing
        call_driver("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        last = time.monotonic()
        pause = _BUSY
        while True:
            collected = False
            try:
                collected = self._collect()
            except BaseException as error:
                self._failure = self._failure or error
                self._end()
            if collected:
                last, pause = time.monotonic(), _BUSY
            with self._change:
                self._hurried = self._hurried and bool(self._waiting)
                rests = time.monotonic() - last > _QUIET
                if not self._waiting or not (rests or self._hurried or self._closing):
                    if self._closing and not self._waiting:
                        return
                    self._change.wait(pause)
                    pause = min(2 * pause, _IDLE)
                    continue
                replayed = self._waiting.popleft()
                self._busy = True
            try:
                if self._failure is None:
                    self._take(replayed.slot.point, *replayed.rows())
            except BaseException as error:
                self._failure = error
            with self._change:
                self._busy = False
                self._size -= replayed.size
                self._change.notify_all()

    def _end(self) -> None:
        """Record no further replays, and let those go on that wait for room."""
        with self._collecting:
            graphs, self._graphs = self._graphs, {}
            for graph in graphs.values():
                graph.end()

    def check(self) -> None:
        """Raise what has failed in the thread."""
        if self._failure is not None:
            raise self._failure

    def flush(self) -> None:
        """Wait for the device, and until what all replays so far have left is written."""
        if self._thread is None:
            return
        for graph in list(self._graphs.values()):  # each may be of another device
            graph.wait()
            with self._collecting:
                begun = graph.begun()
                while graph.collected < begun:
                    self._wait_with(graph.collect(begun, self._size >= _WAITING))
        with self._change:
            self._hurried = bool(self._waiting)
            self._change.notify_all()
            self._change.wait_for(lambda: not self._waiting and not self._busy)
        self.check()

    def close(self) -> None:
        """Flush; replays that come later are not recorded. Their memory stays: the graphs still read it."""
        if self._thread is None:
            return
        try:
            self.flush()
        finally:
            with self._change:
                self._closing = True
                self._change.notify_all()
            self._thread.join()
            self._thread = None
            self._end()
