"""Checkpoints in captured CUDA graphs: the Python recorder's part that makes every replay leave its values.

A captured stream computes nothing, and its replays call none of our code. So a checkpoint becomes nodes of the graph. A replay copies
values to staged memory, in line, and then all staged memory to kept memory, in parallel with its further work; the next replay begins
by copying kept memory to pinned host memory, also in parallel, and a host node reports that it has arrived. The driver's own functions
are called, through ctypes: they are the same whatever framework captures, and their binary interface does not change.
"""

import ctypes
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cuda_driver import (
    DEVICE,
    HOST,
    HOST_FUNCTION,
    RELAXED,
    SET_DEPENDENCIES,
    CopyOfBytes,
    HostCall,
    add_dependency,
    call_driver,
    copy_node,
    on_device,
    stream_of,
)

_ARENA = 4 << 20  # bytes that are allocated at a time, three times: a graph has an arena or two
_WAITING = 1 << 30  # bytes of replays that may wait to be written; beyond that, replays wait
_QUIET = 0.1  # seconds without a replay that count as idle: lines are made then, since that takes Python from the engine
_KEPT: "list[Any]" = []  # objects that graphs refer to, which may be replayed after the recorder is gone


class _Row:
    """A device array as the graph copies it: its address, and how the host reads its bytes."""

    def __init__(self, value: Any) -> None:
        bfloat = str(value.dtype) == "torch.bfloat16"
        name = "uint16" if bfloat else str(value.dtype).removeprefix("torch.")
        if name not in ("float32", "float16", "uint16", "int32", "int64") or (name == "uint16" and not bfloat):
            raise TypeError(
                f"values of {value.dtype} cannot be recorded in a captured graph; give float32, float16 or bfloat16"
            )
        # If it isn't contiguous this adds nodes to the graph. The graph reads it at every replay: it must not be freed.
        self.value = value.contiguous() if hasattr(value, "contiguous") else sys.modules["cupy"].ascontiguousarray(value)
        self.shape = tuple(int(size) for size in value.shape)
        self.dtype, self.bfloat = np.dtype(name), bfloat
        self.size = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
        self.pointer = int(self.value.data_ptr() if hasattr(self.value, "data_ptr") else self.value.data.ptr)

    def read(self, brought: bytes) -> "NDArray[Any]":
        """The array from a replay's bytes."""
        flat = np.frombuffer(brought, self.dtype)
        if self.bfloat:
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.reshape(self.shape)


class _Arena:
    """Staged, kept and pinned memory of a graph's checkpoints, with one copy node between each, whatever they contain."""

    def __init__(self, graph: Any, hand_over: Any, size: int) -> None:
        self.capacity, self.used = max(size, _ARENA), size
        self.staged, self.kept, self.pinned = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_void_p()
        for memory in (self.staged, self.kept):
            call_driver("cuMemAlloc_v2", ctypes.byref(memory), ctypes.c_size_t(self.capacity))
        call_driver("cuMemHostAlloc", ctypes.byref(self.pinned), ctypes.c_size_t(self.capacity), 0)
        to_host, on_device = self._copies()
        self._bring = copy_node(graph, to_host, [])
        self.keep = copy_node(graph, on_device, [self._bring])
        add_dependency(graph, self._bring, hand_over)

    def _copies(self) -> "tuple[CopyOfBytes, CopyOfBytes]":
        to_host = CopyOfBytes(
            srcMemoryType=DEVICE, srcDevice=self.kept.value, dstMemoryType=HOST, dstHost=self.pinned.value,
            WidthInBytes=self.used, Height=1, Depth=1,
        )  # fmt: skip
        return to_host, on_device(self.staged.value, self.kept.value, self.used)

    def take(self, size: int) -> int:
        """Reserve so many bytes and return their offset; everything reserved is copied."""
        start, self.used = self.used, self.used + size
        self._resize()
        return start

    def _resize(self) -> None:
        for node, copy in zip((self._bring, self.keep), self._copies(), strict=True):
            call_driver("cuGraphMemcpyNodeSetParams", ctypes.c_void_p(node), ctypes.byref(copy))


class _Slot:
    """The place in an arena of one checkpoint of one graph, or, without a name, of the position of its pass."""

    def __init__(self, point: str, row: _Row, place: "_Slot | None", arena: _Arena, at: int) -> None:
        self.point, self.row, self.place, self.arena, self.at = point, row, place, arena, at

    def stage(self, graph: Any, before: "list[Any]") -> Any:
        """Add the node that copies it in line."""
        node = copy_node(graph, on_device(self.row.pointer, self.arena.staged.value + self.at, self.row.size), before)
        add_dependency(graph, node, self.arena.keep)
        return node

    def brought(self) -> bytes:
        """What stands in pinned memory."""
        return ctypes.string_at((self.arena.pinned.value or 0) + self.at, self.row.size)


class _Replayed:
    """A value and the position of its pass as a replay left them."""

    def __init__(self, slot: _Slot, place: _Slot) -> None:
        self.slot, self.place, self.value, self.position = slot, place, slot.brought(), place.brought()

    @property
    def size(self) -> int:
        """The size in bytes."""
        return len(self.value)

    def rows(self) -> "tuple[NDArray[np.float32], list[int]]":
        """The value and its positions: as given, or consecutive ones from a single one."""
        value = self.slot.row.read(self.value).astype(np.float32)
        positions = self.place.row.read(self.position).ravel()
        rows = 1 if value.ndim < 2 else value.shape[-2]
        at = positions if positions.size == rows else positions[0] + np.arange(rows)
        return value, [int(position) for position in at]


class _Graph:
    """One capture: its host node, and its slots. At the beginning of replay r the pinned bytes are those of replay r − 1."""

    def __init__(self, graph: Any, hand_over: "Callable[[_Graph], None]") -> None:
        self.slots: list[_Slot] = []
        self.arenas: list[_Arena] = []
        self.place: _Slot | None = None  # the position of the pass that is being captured
        self.replays, self.written = 0, 0
        self.node = ctypes.c_void_p()
        self._function = HOST_FUNCTION(lambda _: hand_over(self))
        call = HostCall(self._function, None)
        call_driver("cuGraphAddHostNode", ctypes.byref(self.node), graph, None, ctypes.c_size_t(0), ctypes.byref(call))
        _KEPT.append(self)

    def slot(self, graph: Any, point: str, row: _Row, place: "_Slot | None") -> _Slot:
        """A new slot, in an arena with room for it."""
        size = -(-row.size // 8) * 8
        if self.arenas and self.arenas[-1].capacity - self.arenas[-1].used >= size:
            arena = self.arenas[-1]
            at = arena.take(size)
        else:
            arena, at = _Arena(graph, self.node.value, size), 0
            self.arenas.append(arena)
        self.slots.append(_Slot(point, row, place, arena, at))
        return self.slots[-1]

    def brought(self) -> "list[_Replayed]":
        """What stands in pinned memory."""
        return [_Replayed(slot, slot.place) for slot in self.slots if slot.place is not None]


class Graphs:
    """All captured graphs of a recorder, and the thread that gives it their replays: `take(point, value, positions)`."""

    def __init__(self, take: "Callable[[str, NDArray[np.float32], list[int]], None]") -> None:
        self._take = take
        self._graphs: dict[int, _Graph] = {}
        self._waiting: deque[_Replayed] = deque()
        self._size, self._busy, self._closing, self._hurried = 0, False, False, False
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def add(self, point: str, value: Any, position: Any) -> None:
        """Make a checkpoint part of the graph that is being captured.

        Raises:
            ValueError: it is not known where the position is read from.
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
            self._put_in_line(point, _Row(value), position, ctypes.c_void_p(stream_of(value)))
        finally:
            call_driver("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    def _put_in_line(self, point: str, row: _Row, position: Any, stream: Any) -> None:
        """Add a checkpoint after what the stream has captured so far, with the position of its pass if it is the first one of it."""
        state, number, graph, count = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p(), ctypes.c_size_t()
        before = ctypes.POINTER(ctypes.c_void_p)()
        call_driver(
            "cuStreamGetCaptureInfo_v2", stream, ctypes.byref(state), ctypes.byref(number), ctypes.byref(graph),
            ctypes.byref(before), ctypes.byref(count),
        )  # fmt: skip
        so_far = [before[i] for i in range(count.value)]
        captured = self._graphs.get(number.value)
        if captured is None:
            captured = self._graphs[number.value] = _Graph(graph, self._replayed)
        # A point that occurs again belongs to another pass in the same graph, which has a position of its own.
        if captured.place is None or any(slot.point == point and slot.place is captured.place for slot in captured.slots):
            captured.place = captured.slot(graph, "", _Row(position), None)
            staged = [captured.place.stage(graph, so_far)]
        else:
            staged = []
        staged.append(captured.slot(graph, point, row, captured.place).stage(graph, so_far))
        last = (ctypes.c_void_p * len(staged))(*staged)
        call_driver(
            "cuStreamUpdateCaptureDependencies", stream, last, ctypes.c_size_t(len(staged)), ctypes.c_uint(SET_DEPENDENCIES)
        )

    def _replayed(self, graph: _Graph) -> None:
        """Called by the driver's thread, once a replay."""
        self._hand_over(graph)
        graph.replays += 1

    def _hand_over(self, graph: _Graph) -> None:
        if self._closing or graph.written >= graph.replays:
            return
        graph.written = graph.replays
        brought = graph.brought()
        size = sum(replayed.size for replayed in brought)
        with self._change:
            if self._size and self._size + size > _WAITING:
                self._hurried = True
                self._change.notify_all()
                self._change.wait_for(lambda: self._closing or not self._size or self._size + size <= _WAITING)
            self._waiting.extend(brought)
            self._size += size
            self._change.notify_all()

    def _run(self) -> None:
        """Write when there was no replay for a while, when memory runs short, or when everything must be written."""
        while True:
            with self._change:
                while not (self._waiting and (self._hurried or self._closing)):
                    before = len(self._waiting)
                    if self._closing:
                        return
                    if not self._change.wait(_QUIET) and self._waiting and len(self._waiting) == before:
                        break
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
                self._hurried = self._hurried and bool(self._waiting)
                self._change.notify_all()

    def check(self) -> None:
        """Raise an error that ended the thread."""
        if self._failure is not None:
            raise self._failure

    def flush(self) -> None:
        """Wait for the device, and until what the last replay of each graph staged is written."""
        if self._thread is None:
            return
        call_driver("cuCtxSynchronize")
        for graph in self._graphs.values():
            if graph.written < graph.replays:
                for arena in graph.arenas:
                    call_driver("cuMemcpyDtoH_v2", arena.pinned, arena.kept, ctypes.c_size_t(arena.used))
                self._hand_over(graph)
        with self._change:
            self._hurried = bool(self._waiting)
            self._change.notify_all()
            self._change.wait_for(lambda: not self._waiting and not self._busy)
        self.check()

    def close(self) -> None:
        """Flush; replays that come later are not recorded. Their memory stays: the graphs still copy to it."""
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
