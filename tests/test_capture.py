"""The tap takes copies at the moment the value is computed, and loses nothing."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import comes_true
from sinks import Sink

from checkpoints.errors import InputError
from checkpoints.jsonl import Writer
from checkpoints.reading.reader import read
from checkpoints.record import Rows
from checkpoints.summary import kept_copy, summarise, summarise_pass
from engine.backend import choose
from engine.capture.host import HostStage
from engine.capture.tap import Capture, CapturedPass
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel

DEFAULTS = ("embd", "blk.0.l_out", "blk.5.l_out", "blk.10.l_out", "blk.23.l_out", "output_norm", "logits")


def one_pass(positions: int = 3) -> CapturedPass:
    return CapturedPass(np.arange(positions), 0, decode=False)


def test_buffers_that_are_reused_do_not_change_what_was_captured() -> None:
    """Two buffers that swap each layer give 24 different records, each what was computed, also with a slow writer."""
    sink = Sink(delay=0.002)
    buffers = [np.zeros((3, 32), dtype=np.float32), np.zeros((3, 32), dtype=np.float32)]
    with Capture(HostStage(sink, [f"blk.{i}.l_out" for i in range(24)], choose("numpy"))) as tap:
        tap.begin(one_pass())
        for layer in range(24):
            buffer = buffers[layer % 2]
            buffer[:] = layer + np.arange(32)
            tap(f"blk.{layer}.l_out", buffer)
        for buffer in buffers:
            buffer[:] = -1
    assert [rows.values[0, 0] for rows in sink.taken] == list(range(24))
    assert len({rows.values.tobytes() for rows in sink.taken}) == 24


def test_full_tensors_are_copies_too(tmp_path: Path) -> None:
    """A tensor that goes to the tensors file is copied before the engine reuses its buffer."""
    from checkpoints.tensors import TensorReader, TensorWriter

    path = tmp_path / "full.safetensors"
    value = np.ones((3, 8), dtype=np.float32)
    with TensorWriter(path) as tensors, Capture(HostStage(Sink(), ["embd"], choose("numpy"), tensors=tensors)) as tap:
        tap.begin(one_pass())
        tap("embd", value)
        value[:] = 7
    assert (TensorReader(path).get("embd") == 1).all()


def test_the_seven_default_checkpoints_are_seven_different_vectors(stories: Path, tmp_path: Path) -> None:
    """At every position of a right engine's dump, the seven default points hold seven different vectors."""
    engine = Transformer(GgufModel(stories), choose("numpy"))
    with Writer(tmp_path / "ours.jsonl") as writer, Capture(HostStage(writer, DEFAULTS, engine.backend)) as tap:
        engine.forward([2047, 5, 6, 7], engine.start(), tap)
    points = read(tmp_path / "ours.jsonl").points
    assert tuple(points) == DEFAULTS
    for position in range(4):
        assert len({rows.values[position].tobytes() for rows in points.values()}) == 7


def test_a_late_capture_would_be_seen(stories: Path) -> None:
    """Holding references and copying at the end, as the old engine did, gives other values: the tap's own are not that."""
    engine = Transformer(GgufModel(stories), choose("numpy"))
    shared = [np.zeros((4, 256), dtype=np.float32), np.zeros((4, 256), dtype=np.float32)]
    kept: dict[str, np.ndarray] = {}
    sink = Sink()

    class InSharedBuffers(HostStage):
        def record(self, name: str, value: np.ndarray) -> None:
            if value.shape == (4, 256):
                buffer = shared[len(kept) % 2]
                buffer[:] = value
                kept[name] = buffer
                super().record(name, buffer)

    with Capture(InSharedBuffers(sink, DEFAULTS, engine.backend)) as tap:
        engine.forward([2047, 5, 6, 7], engine.start(), tap)
    taken = {rows.point: rows.values for rows in sink.taken}
    late = {name: summarise(name, value, np.arange(4)).values for name, value in kept.items()}
    assert (late["embd"] == late["blk.5.l_out"]).all()
    assert len({values.tobytes() for values in taken.values()}) == len(taken) == 6


def test_a_failing_writer_stops_the_engine() -> None:
    """A failure in the writer's thread is raised in the engine's thread, at the latest when the tap closes."""
    tap = Capture(HostStage(Sink(fail_at=1), ["embd"], choose("numpy")))

    def many() -> None:
        for _ in range(1000):
            tap.begin(one_pass())
            tap("embd", np.zeros((3, 4), dtype=np.float32))
            time.sleep(0.01)

    with pytest.raises(OSError, match="disk full"):
        many()
    with pytest.raises(OSError, match="disk full"):
        tap.close()


def test_a_slow_writer_loses_nothing_and_the_waits_are_counted() -> None:
    """When more copies wait than the writer may hold, the engine waits, says how often, and every record arrives."""

    class Resting(Sink):
        """A sink that takes nothing until the engine has had to wait."""

        def rows(self, rows: Rows) -> None:
            assert comes_true(lambda: tap.waits > 0)
            super().rows(rows)

    sink = Resting()
    with Capture(HostStage(sink, ["embd"], choose("numpy"))) as tap:
        for number in range(400):
            tap.begin(one_pass())
            tap("embd", np.full((3, 1 << 15), number, dtype=np.float32))
    assert [rows.values[0, 0] for rows in sink.taken] == list(range(400))
    assert tap.waits > 0


def test_a_full_disk_is_one_clear_error() -> None:
    """Writing to a device that is always full ends in an InputError that names the file."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(InputError, match="No space left"):
        Writer(Path("/dev/full")).rows(summarise("embd", np.zeros((1, 4), dtype=np.float32), np.arange(1)))


def test_a_device_array_is_refused_by_the_writer() -> None:
    """A record is made of host memory: anything else is a TypeError that says so."""

    class DeviceArray:
        pass

    with pytest.raises(TypeError, match="host memory"):
        summarise("embd", DeviceArray(), np.arange(1))  # type: ignore[arg-type]


def test_logits_do_not_depend_on_what_is_captured(stories: Path) -> None:
    """The logits are bit-identical with nothing, the default set and every point captured."""
    engine = Transformer(GgufModel(stories), choose("numpy"))
    plain = engine.forward([2047, 9, 8, 7], engine.start())
    for points in (DEFAULTS, engine.points):
        with Capture(HostStage(Sink(), points, engine.backend)) as tap:
            assert (engine.forward([2047, 9, 8, 7], engine.start(), tap) == plain).all()


def test_a_process_that_forgets_to_close_loses_nothing(tmp_path: Path) -> None:
    """What was handed over is written when the process ends, even if the tap was never closed."""
    script = """
import sys, numpy
from checkpoints.jsonl import Writer
from engine.backend import choose
from engine.capture.host import HostStage
from engine.capture.tap import Capture, CapturedPass
tap = Capture(HostStage(Writer(sys.argv[1]), ["embd"], choose("numpy")))
for step in range(50):
    tap.begin(CapturedPass(numpy.array([step]), step, decode=step > 0))
    tap("embd", numpy.full((1, 8), step, dtype=numpy.float32))
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "ours.jsonl")], check=True)
    dump = read(tmp_path / "ours.jsonl")
    assert dump.points["embd"].values[:, 0].tolist() == list(range(50))
    assert dump.end is None


@pytest.mark.slow
def test_a_failure_that_was_raised_is_not_told_again_at_exit() -> None:
    """A process that caught the writer's failure ends silently; one that never saw it gets the error at its end."""
    script = """
import sys, time, numpy
from engine.backend import choose
from engine.capture.host import HostStage
from engine.capture.tap import Capture, CapturedPass
class Full:
    def rows(self, rows): raise OSError("disk full")
tap = Capture(HostStage(Full(), ["embd"], choose("numpy")))
for step in range(2):
    tap.begin(CapturedPass(numpy.array([step]), step, decode=step > 0))
    tap("embd", numpy.ones((1, 8), dtype=numpy.float32))
if sys.argv[1] == "heard":
    for step in range(2, 6000):
        time.sleep(0.01)
        try:
            tap.begin(CapturedPass(numpy.array([step]), step, decode=True))
        except OSError as error:
            print(error)
            break
"""
    ended = {
        kind: subprocess.run([sys.executable, "-c", script, kind], check=True, capture_output=True, text=True)
        for kind in ("heard", "unheard")
    }
    assert (ended["heard"].stdout.strip(), ended["heard"].stderr) == ("disk full", "")
    assert "disk full" in ended["unheard"].stderr


def test_an_exception_in_a_pass_keeps_what_was_computed_before_it() -> None:
    """When a step fails, the records of the steps before it are still written."""
    sink = Sink()

    def failing(tap: Capture) -> None:
        with tap:
            tap.begin(one_pass())
            tap("embd", np.ones((3, 4), dtype=np.float32))
            raise RuntimeError("step")

    with pytest.raises(RuntimeError, match="step"):
        failing(Capture(HostStage(sink, ["embd", "logits"], choose("numpy"))))
    assert [rows.point for rows in sink.taken] == ["embd"]


def test_points_summarised_together_are_those_summarised_alone() -> None:
    """A pass's values in one call have the slices of each alone to the bit, its statistics and sketch to rounding, garbage too."""
    rng = np.random.default_rng(5)
    values = {f"blk.{i}.l_out": rng.standard_normal((4, 48)).astype(np.float32) for i in range(3)}
    values["logits"] = rng.standard_normal((4, 300)).astype(np.float32)
    values["blk.1.l_out"][2, 5:8] = np.nan, np.inf, -np.inf
    kept, at = np.array([1, 2, 3]), np.arange(4)
    copies = [(name, kept_copy(name, value, 4, kept)) for name, value in values.items()]
    together = summarise_pass(copies, at, kept, step=0, decode=False, slice_size=16, first=0)
    for rows, (name, value) in zip(together, values.items(), strict=True):
        alone = summarise(name, value, at, keep=kept)
        assert rows.point == name
        np.testing.assert_array_equal(rows.values, alone.values)
        for statistic, column in alone.stats.items():
            np.testing.assert_allclose(rows.stats[statistic], column, rtol=1e-12, err_msg=statistic)  # float64, in any order
        assert rows.sketch is not None
        assert alone.sketch is not None
        np.testing.assert_allclose(rows.sketch, alone.sketch, rtol=1e-6, atol=1e-6)  # float32's rounding of float64 sums
