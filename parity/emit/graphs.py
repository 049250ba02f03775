"""Checkpoints in captured CUDA graphs: the Python recorder's part that makes every replay leave its values.

A captured stream computes nothing, and its replays call nothing of ours. So a checkpoint becomes a kernel of the graph, which copies
the value to the replay's place in a ring of device memory; each replay begins, beside its work, with the copy of the ring's counts to
pinned host memory. A thread of ours looks at those and brings complete replays to the host, beside the graph, which waits for nothing
but room in the ring. (It waits ten seconds at most. An engine that has launched so many replays ahead that the driver makes it wait
can hold the driver's lock meanwhile, which our thread needs: then what finds no room is lost, and that is an error.) The driver's own
functions are called, through ctypes: they are the same whatever framework captures, and their binary interface does not change.
"""

import ctypes
import functools
import mmap
import os
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_RELAXED, _LEGACY_STREAM, _NON_BLOCKING, _HOST, _DEVICE = 2, 1, 1, 1, 2  # of cuda.h
_ACTIVE, _INVALIDATED, _IMPLICIT = 1, 2, 906
_KERNEL_NODE, _MAJOR, _OVERLAPS, _SET_DEPENDENCIES = 0, 75, 6, 1
_THREADS, _CHUNK = 256, 16  # of a block of the kernel, and the bytes that one of them copies
_TOGETHER = 8  # rows that one kernel can copy
_RING = 32 << 20  # bytes of device memory that a graph's replays take turns in, at most, unless eight of them need more
_WAITING = 1 << 30  # bytes of replays that wait in memory to be written; what comes then waits in temporary files
_QUIET = 0.1  # seconds without a replay that count as rest: the lines are made then, since that takes Python from the engine
_BUSY, _IDLE = 0.002, 0.005  # seconds between two looks at the counts
_KEPT: "list[Any]" = []  # what graphs refer to: they may be replayed after the recorder is gone
# Copies rows to the present replay's place, 16 bytes a thread. Its blocks may start when those of the kernel before it end
# (griddepcontrol, on devices that have it), and look up the place meanwhile. The first kernel of a replay waits where the ring is
# full, ten seconds at most, and counts the replay when all of its blocks have read the count.
_PTX = """
.version 7.8
.target sm_90
.address_size 64
.visible .entry parity_record(.param .align 8 .b8 rows[144]) {
.reg .pred %p, %q, %whole, %first;
.reg .b16 %h;
.reg .b32 %a, %b, %i, %at, %bytes, %begun, %room, %slots, %looks, %thread, %v<4>;
.reg .b64 %x, %y, %control, %from, %to, %now, %size;
ld.param.u64 %control, [rows];
ld.param.u32 %a, [rows+8];
ld.param.u32 %b, [rows+12];
setp.ne.u32 %first, %a, 0;
mov.u32 %a, %ctaid.x;
mov.u32 %thread, %tid.x;
mad.lo.u32 %i, %a, 256, %thread;
mov.b64 %x, rows;
ROW:
ld.param.u64 %from, [%x+16];
ld.param.u32 %at, [%x+24];
ld.param.u32 %bytes, [%x+28];
add.u32 %a, %bytes, 15;
shr.u32 %a, %a, 4;
setp.lt.u32 %p, %i, %a;
@%p bra HERE;
sub.u32 %i, %i, %a;
add.u64 %x, %x, 16;
sub.u32 %b, %b, 1;
setp.ne.u32 %p, %b, 0;
@%p bra ROW;
mov.u32 %bytes, 0;
HERE:
shl.b32 %i, %i, 4;
ld.volatile.global.u64 %now, [%control+32];
@!%first bra WAIT;
ld.volatile.global.u32 %begun, [%control];
ld.volatile.global.u32 %room, [%control+4];
ld.volatile.global.u32 %slots, [%control+8];
ld.volatile.global.u32 %size, [%control+12];
ld.volatile.global.u64 %now, [%control+24];
WAIT:
griddepcontrol.wait;
cvt.u64.u32 %y, %i;
add.u64 %from, %from, %y;
cvt.u64.u32 %to, %at;
add.u64 %to, %to, %y;
cvt.u64.u32 %y, %bytes;
or.b64 %y, %y, %from;
and.b64 %y, %y, 15;
setp.eq.u64 %whole, %y, 0;
setp.lt.u32 %p, %i, %bytes;
and.pred %whole, %whole, %p;
@%whole ld.global.v4.u32 {%v0, %v1, %v2, %v3}, [%from];
@!%first bra STORE;
mov.u32 %looks, 0;
ROOM:
setp.eq.u32 %q, %slots, 0;
@%q bra CLOSED;
sub.u32 %a, %begun, %room;
setp.lt.s32 %q, %a, 0;
@%q bra FOUND;
nanosleep.u32 2000;
ld.volatile.global.u32 %room, [%control+4];
add.u32 %looks, %looks, 1;
setp.ne.u32 %q, %looks, 5000000;
@%q bra ROOM;
mov.u32 %a, 1;
st.volatile.global.u32 [%control+20], %a;
CLOSED:
mov.u64 %now, 0;
bra STORE;
FOUND:
rem.u32 %a, %begun, %slots;
cvt.u64.u32 %y, %a;
mad.lo.u64 %now, %y, %size, %now;
STORE:
setp.eq.u64 %q, %now, 0;
@%q bra END;
add.u64 %to, %to, %now;
@%whole st.global.v4.u32 [%to], {%v0, %v1, %v2, %v3};
@%whole bra END;
add.u32 %b, %i, 16;
min.u32 %b, %b, %bytes;
NEXT:
setp.ge.u32 %q, %i, %b;
@%q bra END;
ld.global.u16 %h, [%from];
st.global.u16 [%to], %h;
add.u64 %from, %from, 2;
add.u64 %to, %to, 2;
add.u32 %i, %i, 2;
bra NEXT;
END:
@!%first bra DONE;
bar.sync 0;
setp.ne.u32 %q, %thread, 0;
@%q bra DONE;
mov.u32 %a, %nctaid.x;
sub.u32 %a, %a, 1;
setp.eq.u32 %q, %a, 0;
@%q bra COUNT;
atom.global.inc.u32 %b, [%control+16], %a;
setp.ne.u32 %q, %b, %a;
@%q bra DONE;
COUNT:
st.volatile.global.u64 [%control+32], %now;
setp.eq.u64 %q, %now, 0;
add.u32 %begun, %begun, 1;
@!%q st.volatile.global.u32 [%control], %begun;
mov.u32 %a, 0;
@%q st.volatile.global.u32 [%control+8], %a;
DONE:
ret;
}
"""


class _Control(ctypes.Structure):
    """What a graph's kernels read and write in device memory. Without places nothing is recorded."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("begun", "room", "places", "size", "ticket", "lost")),
        *((name, ctypes.c_uint64) for name in ("ring", "now")),
    ]


class _Segment(ctypes.Structure):
    """A row to copy: from where, where to in the replay's place, and its bytes."""

    _fields_ = [("source", ctypes.c_uint64), ("at", ctypes.c_uint32), ("bytes", ctypes.c_uint32)]


class _Segments(ctypes.Structure):
    """The kernel's argument; the first kernel of a replay finds its place."""

    _fields_ = [
        ("control", ctypes.c_uint64),
        ("first", ctypes.c_uint32),
        ("n", ctypes.c_uint32),
        ("of", _Segment * _TOGETHER),
    ]


class _Copy(ctypes.Structure):
    """CUDA_MEMCPY3D."""

    _fields_ = [
        *((f"src{field}", ctypes.c_size_t) for field in ("XInBytes", "Y", "Z", "LOD")),
        ("srcMemoryType", ctypes.c_int),
        *((f"src{field}", ctypes.c_void_p) for field in ("Host", "Device", "Array", "Reserved")),
        *((f"src{field}", ctypes.c_size_t) for field in ("Pitch", "Height")),
        *((f"dst{field}", ctypes.c_size_t) for field in ("XInBytes", "Y", "Z", "LOD")),
        ("dstMemoryType", ctypes.c_int),
        *((f"dst{field}", ctypes.c_void_p) for field in ("Host", "Device", "Array", "Reserved")),
        *((f"dst{field}", ctypes.c_size_t) for field in ("Pitch", "Height")),
        *((name, ctypes.c_size_t) for name in ("WidthInBytes", "Height", "Depth")),
    ]


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_int), ("unused", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    ]


class _NodeParams(ctypes.Structure):
    """The first CUDA_KERNEL_NODE_PARAMS."""

    _fields_ = [
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("extra", ctypes.c_void_p),
    ]


@functools.lru_cache(maxsize=1)
def _driver() -> "Any":
    """The CUDA driver's library; None where there is none."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()}")


def _stream_of(value: Any) -> "int | None":
    """The handle of the stream that a device array of PyTorch or CuPy is computed in; None for arrays in host memory and others."""
    if getattr(value, "is_cuda", False):
        return int(sys.modules["torch"].cuda.current_stream(value.device).cuda_stream)
    if hasattr(value, "__cuda_array_interface__") and "cupy" in sys.modules:
        return int(sys.modules["cupy"].cuda.get_current_stream().ptr)
    return None


def is_captured(value: Any) -> bool:
    """Whether a value is computed in a stream that is being captured.

    Raises:
        RuntimeError: another stream is, or this capture has failed.
    """
    stream = _stream_of(value)
    if stream is None or _driver() is None:
        return False
    state = ctypes.c_int()
    status = _driver().cuStreamIsCapturing(ctypes.c_void_p(stream), ctypes.byref(state))
    if not status and not state.value and stream > _LEGACY_STREAM:
        status = _driver().cuStreamIsCapturing(ctypes.c_void_p(_LEGACY_STREAM), ctypes.byref(ctypes.c_int()))
    if status == _IMPLICIT:
        raise RuntimeError("another stream is being captured into a CUDA graph: record in the captured stream")
    if state.value == _INVALIDATED:
        raise RuntimeError("the capture of this stream has already failed")
    return not status and state.value == _ACTIVE


class _Row:
    """A device array as the graph copies it: where it lies, and how the host reads its bytes."""

    def __init__(self, value: Any) -> None:
        bfloat = str(value.dtype) == "torch.bfloat16"
        name = "uint16" if bfloat else str(value.dtype).removeprefix("torch.")
        if name not in ("float32", "float16", "uint16", "int32", "int64") or (name == "uint16" and not bfloat):
            raise TypeError(
                f"values of {value.dtype} cannot be recorded in a captured graph; give float32, float16 or bfloat16"
            )
        # As nodes of the graph, where it isn't contiguous. The graph reads it at every replay: it must not be freed.
        self.value = value.contiguous() if hasattr(value, "contiguous") else sys.modules["cupy"].ascontiguousarray(value)
        self.shape = tuple(int(size) for size in value.shape)
        self.dtype, self.bfloat = np.dtype(name), bfloat
        self.size = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
        self.pointer = int(self.value.data_ptr() if hasattr(self.value, "data_ptr") else self.value.data.ptr)

    def read(self, brought: bytes) -> "NDArray[Any]":
        """The array of a replay."""
        flat = np.frombuffer(brought, self.dtype)
        if self.bfloat:
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.reshape(self.shape)


@functools.lru_cache(maxsize=64)
def _overlaps(_context: int) -> bool:
    """Whether the current device's kernels can start before the one that they follow has ended."""
    device, major = ctypes.c_int(), ctypes.c_int()
    _call("cuCtxGetDevice", ctypes.byref(device))
    _call("cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, device)
    return major.value >= 9 and hasattr(_driver(), "cuLaunchKernelEx")


@functools.lru_cache(maxsize=64)
def _kernel(context: int) -> int:
    """The kernel in the current context."""
    text = _PTX if _overlaps(context) else _PTX.replace("sm_90", "sm_70").replace("griddepcontrol.wait;", "")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cuModuleLoadData", ctypes.byref(module), text.encode())
    _call("cuModuleGetFunction", ctypes.byref(function), module, b"parity_record")
    return function.value or 0


def _captured(stream: Any) -> "tuple[int, Any, list[int]]":
    """Of a stream that is being captured: the capture's number, its graph, and the nodes that the next one follows."""
    state, number, graph, count = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p(), ctypes.c_size_t()
    before = ctypes.POINTER(ctypes.c_void_p)()
    _call(
        "cuStreamGetCaptureInfo_v2", stream, ctypes.byref(state), ctypes.byref(number), ctypes.byref(graph),
        ctypes.byref(before), ctypes.byref(count),
    )  # fmt: skip
    return number.value, graph, [before[i] or 0 for i in range(count.value)]


class _Slot:
    """One checkpoint of one graph, or, without a name, the position of its pass: where it stands among a replay's rows."""

    def __init__(self, point: str, row: _Row, place: "_Slot | None", at: int) -> None:
        self.point, self.row, self.place, self.at = point, row, place, at

    def of(self, rows: "NDArray[np.uint8]") -> bytes:
        """Its bytes among those of a replay."""
        return rows[self.at : self.at + self.row.size].tobytes()


class _Replayed:
    """A value and the place of its pass as a replay left them."""

    def __init__(self, slot: _Slot, place: _Slot, rows: "NDArray[np.uint8]") -> None:
        self.slot, self.place, self._rows, self.size = slot, place, rows, slot.row.size

    def rows(self) -> "tuple[NDArray[np.float32], list[int]]":
        """The value, and its positions: as they are, or one after the other from the only one that there is."""
        value = self.slot.row.read(self.slot.of(self._rows)).astype(np.float32)
        positions = self.place.row.read(self.place.of(self._rows)).ravel()
        rows = 1 if value.ndim < 2 else value.shape[-2]
        at = positions if positions.size == rows else positions[0] + np.arange(rows)
        return value, [int(position) for position in at]


def _in_memory(size: int) -> "NDArray[np.uint8]":
    return np.empty(size, np.uint8)


def _in_file(size: int) -> "NDArray[np.uint8]":
    """Memory whose pages the system may write to a temporary file, which is gone with it."""
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, size) if hasattr(os, "posix_fallocate") else file.truncate(size)
        return np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8)


class _Graph:
    """What one capture made: its slots, and the ring that its replays take turns in."""

    def __init__(self, graph: Any) -> None:
        self.slots: list[_Slot] = []
        self.place: _Slot | None = None  # of the pass that is being captured
        self.size, self.places, self.collected = 0, 0, 0
        self._context, self.stream = ctypes.c_void_p(), ctypes.c_void_p()
        self._control, self._ring, self._capacity = ctypes.c_uint64(), ctypes.c_uint64(), 0
        self._first = self._last = 0  # its kernels
        self._first_stream: int | None = None
        self._rows = _Segments()  # of the last kernel
        _call("cuCtxGetCurrent", ctypes.byref(self._context))
        _call("cuStreamCreate", ctypes.byref(self.stream), ctypes.c_uint(_NON_BLOCKING))
        _call("cuMemAlloc_v2", ctypes.byref(self._control), ctypes.c_size_t(ctypes.sizeof(_Control)))
        seen = ctypes.c_void_p()
        _call("cuMemHostAlloc", ctypes.byref(seen), ctypes.c_size_t(ctypes.sizeof(_Control)), 0)
        self._seen = _Control.from_address(seen.value or 0)
        self._seen.begun = 0
        # Beside the kernels, and lets them overlap: in a graph that is one line they would not.
        copy, node = _Copy(
            srcMemoryType=_DEVICE, srcDevice=self._control.value, dstMemoryType=_HOST, dstHost=seen.value,
            WidthInBytes=ctypes.sizeof(_Control), Height=1, Depth=1,
        ), ctypes.c_void_p()  # fmt: skip
        _call("cuGraphAddMemcpyNode", ctypes.byref(node), graph, None, ctypes.c_size_t(0), ctypes.byref(copy), self._context)
        _KEPT.append(self)

    def slot(self, point: str, row: _Row, place: "_Slot | None") -> _Slot:
        """A new one, for which the ring is made to fit: a power of two of places, of which none is in use yet."""
        self.slots.append(_Slot(point, row, place, self.size))
        self.size += -(-row.size // 16) * 16
        self.places = 64
        while self.places > 8 and self.places * self.size > _RING:
            self.places //= 2
        if self._capacity < self.places * self.size:
            if self._ring:
                _call("cuMemFree_v2", self._ring)
            self._capacity = max(1 << 20, 1 << (self.places * self.size - 1).bit_length())
            _call("cuMemAlloc_v2", ctypes.byref(self._ring), ctypes.c_size_t(self._capacity))
        self._set(_Control(room=self.places, places=self.places, size=self.size, ring=self._ring.value), 0)
        return self.slots[-1]

    def _set(self, value: Any, at: int) -> None:
        """Write to the control, beside everything else, and wait for that."""
        target, size = ctypes.c_uint64((self._control.value or 0) + at), ctypes.c_size_t(ctypes.sizeof(value))
        _call("cuMemcpyHtoDAsync_v2", target, ctypes.byref(value), size, self.stream)
        _call("cuStreamSynchronize", self.stream)

    def put_in_line(self, slots: "list[_Slot]", stream: Any) -> None:
        """Copy these rows behind what the stream has captured so far: by the last kernel, where nothing came behind it."""
        _, graph, before = _captured(stream)
        joins = before == [self._last] and self._rows.n + len(slots) <= _TOGETHER
        if not joins:
            self._rows = _Segments(control=self._control.value, first=not self._first)
        for slot in slots:
            self._rows.of[self._rows.n] = _Segment(slot.row.pointer, slot.at, slot.row.size)
            self._rows.n += 1
        chunks = sum(-(-self._rows.of[i].bytes // _CHUNK) for i in range(self._rows.n))
        grid, block = (ctypes.c_uint * 3)(-(-chunks // _THREADS), 1, 1), (ctypes.c_uint * 3)(_THREADS, 1, 1)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(self._rows))
        kernel = ctypes.c_void_p(_kernel(self._context.value or 0))
        if joins:
            params = _NodeParams(kernel, grid, block, 0, arguments, None)
            _call("cuGraphKernelNodeSetParams", ctypes.c_void_p(self._last), ctypes.byref(params))
            return
        kind = ctypes.c_int(-1)
        if len(before) == 1 and before[0] != self._last:
            _call("cuGraphNodeGetType", ctypes.c_void_p(before[0]), ctypes.byref(kind))
        in_order = self._first_stream in (None, stream.value)
        attribute = _Attribute(id=_OVERLAPS, value=(ctypes.c_int * 16)(1))
        if kind.value == _KERNEL_NODE and in_order and _overlaps(self._context.value or 0):
            config = _Config(grid, block, 0, stream, ctypes.pointer(attribute), 1)
            _call("cuLaunchKernelEx", ctypes.byref(config), kernel, arguments, None)
        else:
            _call("cuLaunchKernel", kernel, *map(ctypes.c_uint, (*grid, *block, 0)), stream, arguments, None)
        self._last = _captured(stream)[2][0]
        if not self._first:
            self._first, self._first_stream = self._last, stream.value
        elif not in_order and self._first not in before:  # a branch that may be ahead of the first kernel
            pair = (ctypes.c_void_p * 1)(self._first), (ctypes.c_void_p * 1)(self._last)
            _call("cuGraphAddDependencies", graph, *pair, ctypes.c_size_t(1))

    def complete(self) -> int:
        """How many replays have ended, by the counts as a replay began with them: the last one may be under way."""
        begun = (int(self._seen.begun) - self.collected) % (1 << 32)
        return self.collected + begun - 1 if 1 < begun <= self.places + 1 else self.collected

    def begun(self) -> int:
        """How many replays have begun, by the device; the context must be current.

        Raises:
            RuntimeError: the device has waited for room for ten seconds, and gave up.
        """
        now = _Control()
        size = ctypes.c_size_t(ctypes.sizeof(now))
        _call("cuMemcpyDtoHAsync_v2", ctypes.byref(now), self._control, size, self.stream)
        _call("cuStreamSynchronize", self.stream)
        if now.lost:
            raise RuntimeError("a replay found no room for its rows for ten seconds; they are lost")
        return self.collected + (int(now.begun) - self.collected) % (1 << 32)

    def collect(self, complete: int, in_file: bool) -> "list[_Replayed]":
        """The rows of the next replays before number `complete`, of which their places are then free.

        Raises:
            OSError: there is no room for a temporary file.
        """
        start = self.collected % self.places
        count = min(complete - self.collected, self.places - start, max(1, self.places // 4))
        rows = (_in_file if in_file else _in_memory)(count * self.size).reshape(count, self.size)
        _call("cuCtxSetCurrent", self._context)
        source, size = ctypes.c_uint64((self._ring.value or 0) + start * self.size), ctypes.c_size_t(rows.nbytes)
        _call("cuMemcpyDtoHAsync_v2", ctypes.c_void_p(rows.ctypes.data), source, size, self.stream)
        _call("cuStreamSynchronize", self.stream)
        self.collected += count
        self._set(ctypes.c_uint32((self.collected + self.places) % (1 << 32)), _Control.room.offset)
        return [_Replayed(slot, slot.place, one) for one in rows for slot in self.slots if slot.place is not None]

    def end(self) -> None:
        """Record no replay that comes later."""
        _call("cuCtxSetCurrent", self._context)
        self._set(ctypes.c_uint32(0), _Control.places.offset)


class Graphs:
    """All captured graphs of a recorder, and the thread that gives it their replays: `take(point, value, positions)`."""

    def __init__(self, take: "Callable[[str, NDArray[np.float32], list[int]], None]") -> None:
        self._take = take
        self._graphs: dict[int, _Graph] = {}
        self._waiting: deque[_Replayed] = deque()
        self._size, self._busy, self._closing, self._hurried = 0, False, False, False
        self._change = threading.Condition()
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
        mode = ctypes.c_int(_RELAXED)  # memory may be allocated meanwhile: the capture is of the stream, not of that
        _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            self._put_in_line(point, _Row(value), position, ctypes.c_void_p(_stream_of(value)))
        finally:
            _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    def _put_in_line(self, point: str, row: _Row, position: Any, stream: Any) -> None:
        """Put a checkpoint behind what the stream has captured so far, with the place of its pass where it is the first of one."""
        number, graph, _ = _captured(stream)
        with self._collecting:
            captured = self._graphs.get(number)
            if captured is None:
                captured = self._graphs[number] = _Graph(graph)
            # A point that comes again is of another pass in the same graph, which has a position of its own.
            slots = []
            if captured.place is None or any(slot.point == point and slot.place is captured.place for slot in captured.slots):
                captured.place = captured.slot("", _Row(position), None)
                slots.append(captured.place)
            slots.append(captured.slot(point, row, captured.place))
            captured.put_in_line(slots, stream)

    def _collect(self) -> bool:
        """Bring complete replays to the host, some of each graph; whether there were any."""
        found = False
        with self._collecting:
            for graph in list(self._graphs.values()):
                complete = graph.complete()
                if complete > graph.collected:
                    self._wait_with(graph.collect(complete, self._size >= _WAITING))
                    found = True
        return found

    def _wait_with(self, replayed: "list[_Replayed]") -> None:
        with self._change:
            self._waiting.extend(replayed)
            self._size += sum(one.size for one in replayed)

    def _run(self) -> None:
        """Bring replays to the host, and write them when none came for a while, or when everything must be written."""
        mode = ctypes.c_int(_RELAXED)  # others may be capturing
        _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        last = time.monotonic()
        pause = _BUSY
        while True:
            found = False
            try:
                found = self._collect()
            except BaseException as error:
                self._failure = self._failure or error
                self._end()
            if found:
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
        _call("cuCtxSynchronize")
        for graph in list(self._graphs.values()):
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
