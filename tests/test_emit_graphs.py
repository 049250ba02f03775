"""Checkpoints of engines that replay CUDA graphs: every replay is recorded, as a blocking copy would record it."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from checkpoints.reading.reader import read
from parity import emit
from parity.emit import graph_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        shutil.which("nvcc") is None or shutil.which("nvidia-smi") is None, reason="needs nvcc and a CUDA device"
    ),
]
SMALL = ("24", "64", "128", "1000")  # layers, width, feed-forward, vocabulary


def compiled(folder: Path, *flags: str) -> Path:
    (folder / "parity_dump.h").write_text(emit.source("c"))
    source = Path(__file__).with_name("graph_engine.cu")
    subprocess.run(["nvcc", "-O2", "-std=c++17", *flags, "-I", folder, source, "-o", folder / "engine"], check=True)
    return folder / "engine"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine of graph_engine.cu, compiled."""
    return compiled(tmp_path_factory.mktemp("graphs"))


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a ring of eight replays, of which three may wait for the writers: replays wait at every turn."""
    return compiled(tmp_path_factory.mktemp("tight"), "-DPARITY_RING=1", "-DPARITY_WAITING=20000")


def ran(engine: Path, out: Path, mode: str, passes: int, shape: tuple[str, ...] = SMALL) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([engine, out, mode, str(passes), *shape], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("mode", ["graph", "counted", "recapture"])
def test_ten_thousand_replays_are_recorded_as_blocking_copies_are(engine: Path, tmp_path: Path, mode: str) -> None:
    """The dump of 10,000 replays is the one of 10,000 passes without a graph, byte for byte: values, positions, steps."""
    for name in (mode, "eager"):
        done = ran(engine, tmp_path / name, name, 10_000)
        assert done.returncode == 0, done.stderr
    graph, eager = ((tmp_path / name).read_bytes().splitlines() for name in (mode, "eager"))
    if mode == "recapture":  # the last replay of a graph comes when the graph is gone
        graph, eager = sorted(graph), sorted(eager)
    assert len(graph) == 70_002
    assert graph == eager


def test_replays_wait_for_room_and_lose_nothing(tight: Path, engine: Path, tmp_path: Path) -> None:
    """Where the host is slower than the device, replays wait in front of their first checkpoint: the dump is the same."""
    for name, program, mode in (("tight", tight, "graph"), ("eager", engine, "eager")):
        done = ran(program, tmp_path / name, mode, 3_000)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "tight").read_bytes() == (tmp_path / "eager").read_bytes()


def test_a_graph_is_captured_while_replays_of_another_wait_for_room(tight: Path, engine: Path, tmp_path: Path) -> None:
    """Memory for a new graph, whose ring grows with its rows, is had while more replays of another are queued than its ring holds."""
    shape = ("24", "64", "128", "40000")
    for name, program, mode in (("tight", tight, "ahead"), ("roomy", engine, "ahead"), ("eager", engine, "eager")):
        done = ran(program, tmp_path / name, mode, 600, shape)
        assert done.returncode == 0, done.stderr
    tight_lines, roomy_lines, eager_lines = (
        sorted((tmp_path / name).read_bytes().splitlines()) for name in ("tight", "roomy", "eager")
    )
    assert tight_lines == eager_lines
    assert roomy_lines == eager_lines


def test_a_second_captured_stream_records_the_same_replay(engine: Path, tmp_path: Path) -> None:
    """A checkpoint in a branch that nothing orders after the first one writes to the same replay's place."""
    for mode in ("forked", "forked eager"):
        done = ran(engine, tmp_path / mode, mode, 3_000)
        assert done.returncode == 0, done.stderr
    graph, eager = ((tmp_path / mode).read_bytes() for mode in ("forked", "forked eager"))
    assert graph.count(b"blk.0.attn_norm") == 3_000
    assert graph == eager


def test_both_recorders_have_one_kernel() -> None:
    """The header's PTX is the Python recorder's."""
    lines = emit.source("c").partition("parity__ptx[] =\n")[2].partition(";\n\n")[0].splitlines()
    assert "".join(line.strip()[1:-3] + "\n" for line in lines) == graph_kernel.PTX.lstrip("\n")


@pytest.mark.parametrize(
    ("mode", "message"),
    [("unplaced", "give parity_position_device the device memory"), ("elsewhere", "give the captured stream")],
)
def test_what_cannot_be_captured_is_an_error_at_the_time_of_capture(
    engine: Path, tmp_path: Path, mode: str, message: str
) -> None:
    """Without a position in device memory, and in another stream than the captured one, the call itself fails and says why."""
    done = ran(engine, tmp_path / "d.jsonl", mode, 0)
    assert done.returncode == 3
    assert message in done.stderr


def test_one_replay_is_recorded_when_the_dump_is_closed(engine: Path, tmp_path: Path) -> None:
    """Nothing of a single replay is lost, though no later one brings it to the host."""
    assert ran(engine, tmp_path / "d.jsonl", "graph", 1).returncode == 0
    assert [len(rows) for rows in read(tmp_path / "d.jsonl").points.values()] == [1] * 7


@pytest.mark.parametrize(("framework", "passes"), [("torch", 10_000), ("cupy", 2_000)])
def test_replays_of_a_python_engine_are_recorded_as_copies_are(tmp_path: Path, framework: str, passes: int) -> None:
    """What the emitted recorder writes of thousands of replays captured by PyTorch or CuPy is what it writes of as many passes without."""
    pytest.importorskip(framework, reason=f"{framework} is not installed")
    (tmp_path / "parity_dump.py").write_text(emit.source("python"))
    program = Path(__file__).with_name("graph_engine.py")
    modes = ("graph", "eager", "tight", "ahead") if framework == "cupy" else ("graph", "eager")
    for mode in modes:
        command = [sys.executable, program, framework, mode, str(passes), *SMALL, f"{mode}.jsonl"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert len({(tmp_path / f"{mode}.jsonl").read_bytes() for mode in modes if mode not in ("eager", "ahead")}) == 1
    graph, eager = read(tmp_path / "graph.jsonl"), read(tmp_path / "eager.jsonl")
    assert len(graph.points) == 7
    assert graph.points.keys() == eager.points.keys()
    for name, rows in graph.points.items():
        assert rows.token_idx.tolist() == list(range(7, 7 + passes))
        for column in ("token_idx", "step", "values", "sketch"):
            np.testing.assert_array_equal(getattr(rows, column), getattr(eager.points[name], column), err_msg=name)
    if "ahead" in modes:  # the first graph's last replay comes when both are flushed, as the last step
        for name, rows in read(tmp_path / "ahead.jsonl").points.items():
            order = rows.token_idx.argsort()
            for column in ("token_idx", "values", "sketch"):
                np.testing.assert_array_equal(getattr(rows, column)[order], getattr(eager.points[name], column), err_msg=name)


def test_replays_on_two_devices_are_recorded_as_copies_are(tmp_path: Path) -> None:
    """Of two graphs on two devices that replay in turns nothing is lost, and the caller's device is what it was after a flush."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two CUDA devices")
    (tmp_path / "parity_dump.py").write_text(emit.source("python"))
    program = Path(__file__).with_name("graph_engine.py")
    for mode in ("devices", "devices eager"):
        command = [sys.executable, program, "cupy", mode, "500", *SMALL, f"{mode}.jsonl"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    graphs, eager = read(tmp_path / "devices.jsonl"), read(tmp_path / "devices eager.jsonl")
    assert len(graphs.points) == 24
    assert graphs.points.keys() == eager.points.keys()
    for name, rows in graphs.points.items():
        assert rows.token_idx.tolist() == list(range(7, 507))
        for column in ("token_idx", "step", "values", "sketch"):
            np.testing.assert_array_equal(getattr(rows, column), getattr(eager.points[name], column), err_msg=name)


@pytest.mark.parametrize(
    ("mode", "message"), [("unplaced", "call positions_from"), ("elsewhere", "record in the captured stream")]
)
def test_a_python_engine_is_told_at_the_time_of_capture(tmp_path: Path, mode: str, message: str) -> None:
    """Without a device array of positions, and in another stream than the captured one, the call itself raises."""
    pytest.importorskip("cupy", reason="cupy is not installed")
    (tmp_path / "parity_dump.py").write_text(emit.source("python"))
    command = [sys.executable, Path(__file__).with_name("graph_engine.py"), "cupy", mode, "0", *SMALL, "d.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert message in done.stderr
