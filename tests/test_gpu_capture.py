"""The device's tap loses and changes nothing: slow, dying and full writers, reused buffers, both kinds of memory."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sinks import Sink

from checkpoints.errors import InputError
from checkpoints.jsonl import Writer
from engine.backend import choose
from engine.capture.device import DeviceStage
from engine.capture.host import HostStage
from engine.capture.tap import Capture, CapturedPass
from engine.fast.transformer import FastTransformer
from engine.synth import shape_like, synthesize
from engine.weights.gguf_model import GgufModel

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not cupy.cuda.is_available(), reason="no CUDA device")]
DEFAULTS = ("embd", "blk.0.l_out", "blk.5.l_out", "blk.10.l_out", "blk.23.l_out", "output_norm", "logits")


def one_pass(position: int = 0, count: int = 3) -> CapturedPass:
    return CapturedPass(np.arange(position, position + count), position, decode=position > 0)


def test_buffers_that_swap_each_layer_give_different_records() -> None:
    """Two device buffers that alternate and are overwritten at once give 24 records of what was computed."""
    sink, buffers = Sink(delay=0.001), [cupy.zeros((3, 32), np.float32), cupy.zeros((3, 32), np.float32)]
    with Capture(DeviceStage(sink, [f"blk.{i}.l_out" for i in range(24)], choose("cupy"))) as tap:
        tap.begin(one_pass())
        for layer in range(24):
            buffers[layer % 2][:] = layer + cupy.arange(32, dtype=np.float32)
            tap(f"blk.{layer}.l_out", buffers[layer % 2])
        for buffer in buffers:
            buffer[:] = -1
    assert [rows.values[0, 0] for rows in sink.taken] == list(range(24))


@pytest.mark.parametrize(("ring", "delay"), [(8, 0.0005), (256, 0.0001)])
def test_ten_thousand_steps_with_a_slow_writer_lose_nothing(ring: int, delay: float) -> None:
    """10,000 passes over two swapped buffers arrive complete and in order, also through a ring of eight."""
    sink, buffers = Sink(delay=delay), [cupy.zeros((1, 32), np.float32), cupy.zeros((1, 32), np.float32)]
    with Capture(DeviceStage(sink, ["embd"], choose("cupy"), ring=ring)) as tap:
        for step in range(10_000):
            tap.begin(one_pass(step, 1))
            buffers[step % 2].fill(step)
            tap("embd", buffers[step % 2])
    assert [rows.values[0, 15] for rows in sink.taken] == list(range(10_000))
    assert [int(rows.token_idx[0]) for rows in sink.taken] == list(range(10_000))
    assert tap.waits > 0 or ring == 256


def test_a_long_slice_takes_room_for_few_passes() -> None:
    """Slices of a million values, which hold whole rows, take a gigabyte for ten points of one position, not ten."""
    sink, points = Sink(), [f"blk.{i}.l_out" for i in range(10)]
    before = cupy.cuda.runtime.memGetInfo()[0]
    with Capture(DeviceStage(sink, points, choose("cupy"), slice_size=1_000_000)) as tap:
        tap.begin(one_pass(0, 1))
        for layer, point in enumerate(points):
            tap(point, cupy.full((1, 32), layer, np.float32))
        assert before - cupy.cuda.runtime.memGetInfo()[0] < 1 << 30
    assert [rows.values.tolist() for rows in sink.taken] == [[[layer] * 32] for layer in range(10)]


def test_records_for_which_there_is_no_room_are_refused_in_one_line() -> None:
    """More memory than the device has is an error of the request, which says how much it would take."""
    stage = DeviceStage(Sink(), [f"blk.{i}.l_out" for i in range(1000)], choose("cupy"), slice_size=1_000_000)
    with Capture(stage) as tap, pytest.raises(InputError, match=r"1,000,000 values of each, needs .* GiB of device memory"):
        tap.begin(one_pass(0, 100))


def test_a_dying_writer_stops_the_engine_also_where_the_ring_is_full() -> None:
    """What fails in the thread comes out in the engine's next calls and in close; nothing waits for ever."""
    tap = Capture(DeviceStage(Sink(fail_at=3), ["embd"], choose("cupy"), ring=4))

    def many() -> None:
        for step in range(10_000):
            tap.begin(one_pass(step, 1))
            tap("embd", cupy.zeros((1, 8), np.float32))

    with pytest.raises(OSError, match="disk full"):
        many()
    with pytest.raises(OSError, match="disk full"):
        tap.close()


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    """On a small tmpfs the dump ends in an InputError that names the file."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=False, capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")

    def many(tap: Capture) -> None:
        for step in range(5_000):
            tap.begin(one_pass(step, 1))
            tap("embd", cupy.zeros((1, 64), np.float32))
        tap.close()

    try:
        tap = Capture(DeviceStage(Writer(small / "ours.jsonl"), ["embd"], choose("cupy")))
        with pytest.raises(InputError, match="No space left"):
            many(tap)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)


def test_memory_of_the_wrong_side_is_a_type_error() -> None:
    """A host array for the kernel and a device array for the writer are refused by name."""
    from checkpoints.summary import summarise

    with Capture(DeviceStage(Sink(), ["embd"], choose("cupy"))) as tap:
        tap.begin(one_pass())
        with pytest.raises(TypeError, match="host memory"):
            tap("embd", np.zeros((3, 4), np.float32))
        with pytest.raises(TypeError, match="float32"):
            tap("embd", cupy.zeros((3, 4), np.float64))
    with pytest.raises(TypeError, match="host memory"):
        summarise("embd", cupy.zeros((3, 4), np.float32), np.arange(3))


def test_non_finite_values_are_counted() -> None:
    """NaN and infinities count as non-finite and are zero to sums and sketch; the slice shows them as they are."""
    value = np.array([[1, np.nan, -3, np.inf], [np.nan] * 4], np.float32)
    ours, theirs = Sink(), Sink()
    for stage, sink, there in ((DeviceStage, ours, cupy.asarray(value)), (HostStage, theirs, cupy.asarray(value))):
        with Capture(stage(sink, ["embd"], choose("cupy"))) as tap:
            tap.begin(one_pass(0, 2))
            tap("embd", there)
    for name in ("n", "sum", "l2", "min", "max", "nonfinite", "absmax_at"):
        np.testing.assert_array_equal(ours.taken[0].stats[name], theirs.taken[0].stats[name], err_msg=name)
    np.testing.assert_array_equal(ours.taken[0].sketch, theirs.taken[0].sketch)
    np.testing.assert_array_equal(ours.taken[0].values, theirs.taken[0].values)


def test_fast_logits_do_not_depend_on_what_is_captured(stories: Path) -> None:
    """Logits of prefill and 40 steps of the graph are bit-identical with nothing, the default set and every point."""
    engine = FastTransformer(GgufModel(stories), choose("cupy"), positions=128)
    runs = []
    for points in ((), DEFAULTS, tuple(engine.points)):
        with Capture(DeviceStage(Sink(), points, engine.backend)) as tap:
            sequence = engine.start()
            logits = [engine.forward([2047, 9, 8, 7], sequence, tap)]
            logits += [engine.forward([token], sequence, tap) for token in range(40)]
            runs.append((np.stack(logits), engine.generate(20, sequence, tap)))
    for logits, tokens in runs[1:]:
        np.testing.assert_array_equal(logits.view(np.uint32), runs[0][0].view(np.uint32))
        np.testing.assert_array_equal(tokens, runs[0][1])


def test_a_step_with_a_tap_of_the_host_is_refused_before_it_runs(stories: Path) -> None:
    """The blocking tap is a TypeError, and the sequence goes on as if the step had not been asked for."""
    engine = FastTransformer(GgufModel(stories), choose("cupy"), positions=16)
    progress, logits = engine.start(), []
    engine.forward([2047, 9, 8], progress)
    with Capture(HostStage(Sink(), ["embd"], engine.backend)) as tap, pytest.raises(TypeError, match="DeviceStage"):
        engine.forward([7], progress, tap)
    logits.append(engine.forward([7], progress))
    two = engine.start()
    engine.forward([2047, 9, 8], two)
    logits.append(engine.forward([7], two))
    np.testing.assert_array_equal(*logits)


_SHORT_RUN = """
import sys
import cupy
import engine.device as sources
def module(name, device, defines=()):
    options = ("-std=c++17", "-lineinfo", *(f"-D{define}" for define in defines))
    return cupy.RawModule(code=sources.source(f"{name}.cu"), options=options)
sources.module = module  # places are named by the function that they were written in
from pathlib import Path
from engine.backend import choose
from engine.capture.device import DeviceStage
from engine.capture.tap import Capture
from engine.fast.transformer import FastTransformer
from engine.weights.gguf_model import GgufModel
from engine.transformer import Transformer
class Sink:
    def rows(self, rows): pass
    def token(self, token): pass
for make in (Transformer, FastTransformer):
    engine = make(GgufModel(Path(sys.argv[1])), choose("cupy"))
    with Capture(DeviceStage(Sink(), engine.points, engine.backend)) as tap:
        sequence = engine.start()
        for tokens in ([5, 6, 7], [1], [2], [3]):
            engine.forward(tokens, sequence, tap)
print("all passes made")
"""
# Racecheck does not follow the barriers (mbarrier) by which `produce` in near.cuh learns that a place may be filled again: it
# takes every refill for a race with the reads before it. Nor does it follow, beside barriers of the computing warps alone, those of
# these and the warp that adds up a norm's squares: `test_racecheck_takes_a_right_program_for_a_race`. Each other pair of accesses counts.
_RACE = re.compile(r"Race reported between \w+ access at (\S+).*?and \w+ access at (\S+)", re.DOTALL)


def _misread(pair: tuple[str, str]) -> bool:
    squares = all(any(name in place for place in pair) for name in ("Norm::leave", "Norm::find_scales"))
    return squares or any("produce" in place.lower() for place in pair)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tmp_path: Path, tool: str) -> None:
    """compute-sanitizer is clean on an exact and a fast run of a small model, prompt and decode steps, every point captured."""
    model, script = tmp_path / "model.gguf", tmp_path / "short.py"
    synthesize(model, shape_like("tiny", ff=4096 if tool == "memcheck" else None), weight_type="f16")  # logits by shared memory
    script.write_text(_SHORT_RUN)
    done = _sanitized(tool, script, str(model))
    printed = done.stdout[-3000:] + done.stderr[-2000:]
    assert "all passes made" in done.stdout, printed
    if tool == "memcheck":
        assert done.returncode == 0, printed
    else:
        assert [pair for pair in _RACE.findall(done.stdout) if not _misread(pair)] == []


def _sanitized(tool: str, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    from shutil import which

    if which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


_BESIDE = """
import sys
import cupy
source = r'''
extern "C" __global__ void beside(double* out) {   // 16 warps leave squares, a 17th adds them up between two barriers of all
    __shared__ double squares[512];
    __shared__ float scale;
    const int t = threadIdx.x;
    float heard = 0;
    if (t < 512)
        for (int n = 0; n < 49; n++) {
            squares[t] = t * n;
            asm volatile("bar.sync 3, 544;" ::: "memory");
            if (SECOND) asm volatile("bar.sync 4, 544;" ::: "memory");
            heard += scale;
            asm volatile("bar.sync 1, %0;" :: "n"(THIRD) : "memory");
        }
    else
        for (int n = 0; n < 49; n++) {
            asm volatile("bar.sync 3, 544;" ::: "memory");
            double sum = 0;
            for (int i = 0; i < 16; i++) sum += squares[t % 32 + 32 * i];
            for (int far = 16; far; far >>= 1) sum += __shfl_xor_sync(~0u, sum, far);
            if (t == 512) scale = sum;
            if (SECOND) asm volatile("bar.sync 4, 544;" ::: "memory");
            if (THIRD == 544) asm volatile("bar.sync 1, %0;" :: "n"(THIRD) : "memory");
        }
    out[blockIdx.x * 544 + t] = heard;
}'''
second, third = sys.argv[1:]
kernel = cupy.RawKernel(source, "beside", options=(f"-DSECOND={second}", f"-DTHIRD={third}", "-lineinfo"))
kernel((32,), (544,), (cupy.zeros(32 * 544),))
cupy.cuda.Device().synchronize()
print("all passes made")
"""


@pytest.mark.parametrize(
    ("second", "third", "reported"),
    [(1, 544, False), (0, 512, True), (1, 512, True)],
    ids=["right", "race", "right, but reported"],
)
def test_racecheck_takes_a_right_program_for_a_race(tmp_path: Path, second: int, third: int, reported: bool) -> None:
    """Barriers of 17 warps are followed until a third is of 16 of them alone, as a decode step has; a real race is reported."""
    script = tmp_path / "beside.py"
    script.write_text(_BESIDE)
    done = _sanitized("racecheck", script, str(second), str(third))
    assert "all passes made" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert (done.returncode == 9) == reported, done.stdout[-2000:]
