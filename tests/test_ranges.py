"""Large dumps are read by several processes, with the same result as by one."""

import os
import resource
import signal
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from checkpoints.errors import DumpError
from checkpoints.jsonl import Writer
from checkpoints.lines import header_line
from checkpoints.reading.parallel import Sharing
from checkpoints.reading.reader import read
from checkpoints.reading.scan import Scan
from checkpoints.record import Dump, Header, ModelInfo, Rows, Token
from checkpoints.summary import summarise

PASSES = 60  # some 300 KB: thirty ranges


# Ranges of a few lines in files of any size, whose processes are waited for.
SMALL = Sharing(smallest=1, portion=10_000, block=4096, wait=True)


def shared(processes: int) -> Sharing:
    """A file read in small ranges by so many processes."""
    return replace(SMALL, processes=processes)


def processes_reading() -> list[int]:
    """The processes that read ranges for this one."""
    return [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit() and _is_reader(folder)]


def _is_reader(folder: Path) -> bool:
    try:
        parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        return parent == os.getpid() and b"checkpoints.reading.parallel" in (folder / "cmdline").read_bytes()
    except (OSError, ValueError):  # it has ended meanwhile
        return False


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


@pytest.mark.parametrize("end", [None, -1, -40])
def test_several_processes_read_what_one_reads(tmp_path: Path, end: int | None) -> None:
    """A dump with words for numbers, log lines and tokens, whole or cut short, is the same however many read it."""
    path = write(tmp_path / "d.jsonl")
    path.write_bytes(path.read_bytes()[:end])
    alone = read(path, shared(0))
    assert alone.records == PASSES * 6
    same(read(path, shared(2)), alone)


def test_a_second_header_is_read_here_and_so_is_what_follows(tmp_path: Path) -> None:
    """Two dumps in one file, of models with different numbers of layers, mean the same points however many read it."""
    first, second = write(tmp_path / "a.jsonl").read_bytes(), write(tmp_path / "b.jsonl").read_bytes()
    path = tmp_path / "d.jsonl"
    path.write_bytes(first + second.replace(b'"layers":24', b'"layers":4'))
    same(read(path, shared(3)), read(path, shared(0)))


def test_an_error_names_the_line_of_the_file(tmp_path: Path) -> None:
    """A record that contradicts itself, far after the first range, is named by its line in the file."""
    path = write(tmp_path / "d.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[400] = b'{"checkpoint":"embd","token_idx":-3,"values":[1]}\n'
    path.write_bytes(b"".join(lines))
    for processes in (0, 2):
        with pytest.raises(DumpError, match="line 401: "):
            read(path, shared(processes))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are found in /proc")
def test_a_process_that_dies_loses_nothing(tmp_path: Path) -> None:
    """When the processes are killed in the middle, the rest is read here."""
    path = write(tmp_path / "d.jsonl")
    alone = read(path, shared(0))
    parts: dict[str, list[Rows]] = {}
    killed: list[int] = []
    for item in Scan(path, shared(2)):
        if isinstance(item, Rows):
            parts.setdefault(item.point, []).append(item)
        if len(parts.get("embd", ())) == 3 and not killed:
            killed += processes_reading()
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
    assert len(killed) == 2
    same(replace(alone, points={name: Rows.stack(rows) for name, rows in parts.items()}), alone)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are found in /proc")
def test_who_stops_early_leaves_no_process(tmp_path: Path) -> None:
    """A reader that is given up after its first rows ends the processes that it started."""
    path = write(tmp_path / "d.jsonl")
    items = iter(Scan(path, shared(2)))
    next(item for item in items if isinstance(item, Rows))
    assert len(processes_reading()) == 2
    items.close()  # type: ignore[attr-defined]
    assert processes_reading() == []


def test_a_header_is_what_the_processes_are_told(tmp_path: Path) -> None:
    """Names that mean a layer only with the header's number of layers mean it in every range."""
    rows = summarise("blk.0.l_out", np.ones((1, 64), np.float32), np.arange(1))
    path = tmp_path / "d.jsonl"
    with Writer(path, Header("engine", ModelInfo(layers=24))) as writer:
        for _ in range(400):
            writer.rows(rows)
    path.write_bytes(path.read_bytes().replace(b"blk.0.l_out", b"C25"))
    assert header_line(Header("engine", ModelInfo(layers=24)))["model"] == {"layers": 24}
    same(read(path, shared(2)), read(path, shared(0)))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are found in /proc")
def test_without_room_for_processes_it_is_read_here(tmp_path: Path) -> None:
    """Where the operating system refuses the first process, or the second, the dump is read all the same, and no process is left."""
    path = write(tmp_path / "d.jsonl")
    alone = read(path, shared(0))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = list(islice((number for number in count() if not Path(f"/proc/self/fd/{number}").exists()), 7))
    for room in range(1, 7):  # files that may be open: one is the dump, five are for a process and its pipe
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[room], limits[1]))
        try:
            dump = read(path, shared(2))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        same(dump, alone)
        assert processes_reading() == []
