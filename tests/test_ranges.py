"""Large dumps are read by several processes, with the same result as by one."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from checkpoints.errors import DumpError
from checkpoints.jsonl import Writer
from checkpoints.lines import header_line
from checkpoints.reading import parallel as ranges
from checkpoints.reading.reader import read
from checkpoints.reading.scan import Scan
from checkpoints.record import Dump, Header, ModelInfo, Rows, Token
from checkpoints.summary import summarise

PASSES = 60  # some 300 KB: thirty ranges


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of a few lines, in files of any size."""
    monkeypatch.setattr(ranges, "_LARGE", 1)
    monkeypatch.setattr(ranges, "_RANGE", 10_000)
    monkeypatch.setattr("checkpoints.reading.scan.BLOCK", 4096)
    monkeypatch.setattr("checkpoints.reading.parallel.Readers.ready", _wait_until_ready)


def _wait_until_ready(readers: ranges.Readers) -> bool:
    """As `ready`, but the file isn't read to its end before the processes are there."""
    while readers._children and not all(child.started() for child in readers._children):
        time.sleep(0.01)
    return bool(readers._children)


def write(path: Path, passes: int = PASSES) -> Path:
    """A dump of three points and a token a pass, some values not finite, with log lines between."""
    rng = np.random.default_rng(0)
    with Writer(path, Header("engine", ModelInfo(layers=24))) as writer:
        for step in range(passes):
            values = rng.standard_normal((2, 64)).astype(np.float32)
            values[0, 3] = np.nan if step % 7 == 0 else 1
            for point in ("embd", "blk.5.l_out", "layer_3"):
                writer.rows(summarise(point, values, np.arange(2) + 2 * step, step=step, decode=step > 0))
            writer.token(Token(2 * step, step))
    lines = path.read_bytes().splitlines(keepends=True)
    lines[5:5] = [b"log: loaded\n"]
    lines[-8:-8] = [b"log: nearly done\n", b"\n"]
    path.write_bytes(b"".join(lines))
    return path


def same(a: Dump, b: Dump) -> None:
    """Everything of two dumps is equal to the bit."""
    assert list(a.points) == list(b.points)
    for name, rows in a.points.items():
        other = b.points[name]
        assert rows.shapes == other.shapes
        for field in ("seq", "token_idx", "step", "decode", "values", "counts", "sketch"):
            np.testing.assert_array_equal(getattr(rows, field), getattr(other, field), err_msg=f"{name} {field}")
        for key, column in rows.stats.items():
            np.testing.assert_array_equal(column, other.stats[key])
    assert (a.tokens, a.end, a.skipped, a.notes, a.torn, a.header) == (b.tokens, b.end, b.skipped, b.notes, b.torn, b.header)


def read_by(processes: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> Dump:
    """The dump as so many processes read it."""
    monkeypatch.setattr("checkpoints.reading.reader.Scan", lambda name: Scan(name, processes=processes))
    return read(path)


@pytest.mark.parametrize("end", [None, -1, -40])
def test_several_processes_read_what_one_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: int | None) -> None:
    """A dump with words for numbers, log lines and tokens, whole or cut short, is the same however many read it."""
    path = write(tmp_path / "d.jsonl")
    path.write_bytes(path.read_bytes()[:end])
    alone = read_by(0, path, monkeypatch)
    assert alone.records == PASSES * 6
    same(read_by(2, path, monkeypatch), alone)


def test_a_second_header_is_read_here_and_so_is_what_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two dumps in one file, of models with different numbers of layers, mean the same points however many read it."""
    first, second = write(tmp_path / "a.jsonl").read_bytes(), write(tmp_path / "b.jsonl").read_bytes()
    path = tmp_path / "d.jsonl"
    path.write_bytes(first + second.replace(b'"layers":24', b'"layers":4'))
    same(read_by(3, path, monkeypatch), read_by(0, path, monkeypatch))


def test_an_error_names_the_line_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that contradicts itself, far behind the first range, is named by its line in the file."""
    path = write(tmp_path / "d.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[400] = b'{"checkpoint":"embd","token_idx":-3,"values":[1]}\n'
    path.write_bytes(b"".join(lines))
    for processes in (0, 2):
        with pytest.raises(DumpError, match="line 401: "):
            read_by(processes, path, monkeypatch)


def test_a_process_that_dies_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the processes are killed in the middle, the rest is read here."""
    path = write(tmp_path / "d.jsonl")
    answer = ranges._Child.answer
    asked: list[int] = []

    def killed(child: ranges._Child) -> ranges.RangeContent | None:
        asked.append(1)
        if len(asked) == 5:
            child._process.kill()
            child._process.wait()
        return answer(child)

    monkeypatch.setattr(ranges._Child, "answer", killed)
    alone = read_by(0, path, monkeypatch)
    same(read_by(2, path, monkeypatch), alone)
    assert len(asked) >= 5


def test_who_stops_early_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that is given up after its first rows ends the processes that it started."""
    path = write(tmp_path / "d.jsonl")
    started: list[int] = []
    begin = ranges._Child.__init__

    def noted(child: ranges._Child) -> None:
        begin(child)
        started.append(child._process.pid)

    monkeypatch.setattr(ranges._Child, "__init__", noted)
    items = iter(Scan(path, processes=2))
    next(item for item in items if isinstance(item, Rows))
    items.close()  # type: ignore[attr-defined]
    assert len(started) == 2
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_header_is_what_the_processes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that mean a layer only with the header's number of layers mean it in every range."""
    rows = summarise("blk.0.l_out", np.ones((1, 64), np.float32), np.arange(1))
    path = tmp_path / "d.jsonl"
    with Writer(path, Header("engine", ModelInfo(layers=24))) as writer:
        for _ in range(400):
            writer.rows(rows)
    path.write_bytes(path.read_bytes().replace(b"blk.0.l_out", b"C25"))
    assert header_line(Header("engine", ModelInfo(layers=24)))["model"] == {"layers": 24}
    same(read_by(2, path, monkeypatch), read_by(0, path, monkeypatch))


def test_without_room_for_processes_it_is_read_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the second process cannot be started, the first is ended and the dump is read all the same."""
    path = write(tmp_path / "d.jsonl")
    alone = read_by(0, path, monkeypatch)
    begin, started = ranges._Child.__init__, list[ranges._Child]()

    def refused(child: ranges._Child) -> None:
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        begin(child)
        started.append(child)

    monkeypatch.setattr(ranges._Child, "__init__", refused)
    same(read_by(2, path, monkeypatch), alone)
    assert started[0]._process.returncode is not None
