"""The kernel that records in captured CUDA graphs, its argument, and the counts that it and the host share."""

import ctypes
import functools

from .cuda_driver import call_driver, overlaps

THREADS, CHUNK = 256, 16  # threads of a block, and the bytes that each one copies
TOGETHER = 8  # rows that one kernel can copy
# Copies rows to the present replay's place, 16 bytes per thread. Its blocks may start when those of the kernel before it end
# (griddepcontrol, on devices that have it), and look up the place meanwhile; those that are allowed to start when all rows are read
# (parity_dump.h does so) start then. The first kernel of a replay waits where the ring is
# full, ten seconds at most, and counts the replay when all of its blocks have read the count.
PTX = """
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
@%first bra LOOK;
bar.sync 0;
@%whole griddepcontrol.launch_dependents;
@!%p griddepcontrol.launch_dependents;
bra STORE;
LOOK:
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


class Control(ctypes.Structure):
    """What a graph's kernels read and write in device memory. Without places nothing is recorded."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("begun", "room", "places", "size", "ticket", "lost")),
        *((name, ctypes.c_uint64) for name in ("ring", "now")),
    ]


class Segment(ctypes.Structure):
    """A row to copy: from where, where to in the replay's place, and its bytes."""

    _fields_ = [("source", ctypes.c_uint64), ("at", ctypes.c_uint32), ("bytes", ctypes.c_uint32)]


class Segments(ctypes.Structure):
    """The kernel's argument; the first kernel of a replay finds its place."""

    _fields_ = [
        ("control", ctypes.c_uint64),
        ("first", ctypes.c_uint32),
        ("n", ctypes.c_uint32),
        ("of", Segment * TOGETHER),
    ]


@functools.lru_cache(maxsize=64)
def record_kernel(context: int) -> int:
    """The kernel in the current context."""
    text = PTX
    if not overlaps(context):
        text = "\n".join(line for line in PTX.replace("sm_90", "sm_70").splitlines() if "griddepcontrol" not in line)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    call_driver("cuModuleLoadData", ctypes.byref(module), text.encode())
    call_driver("cuModuleGetFunction", ctypes.byref(function), module, b"parity_record")
    return function.value or 0
