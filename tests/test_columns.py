"""Dumps with their records as arrays beside the lines: the same records, the same verdict, and one line where the files don't fit."""

import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import Cli
from msgspec.structs import replace

from checkpoints.columns import ColumnsWriter, beside
from checkpoints.errors import DumpError, InputError
from checkpoints.formats import load
from checkpoints.jsonl import write
from checkpoints.record import Dump, Header, Rows
from parity.__main__ import run


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same run of our engine as JSON lines and with arrays."""
    folder = tmp_path_factory.mktemp("both_ways")
    for name, more in (("lines", ()), ("arrays", ("--binary",))):
        points = ("--points", "blk.{0,23}.*,embd,logits")
        assert run(["dump", "ours", "--tokens", "1,2,3,4,5", *points, "-o", str(folder / f"{name}.jsonl"), *more]) == 0
    return folder


@pytest.fixture
def both_ways(dumped: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of that run for one test: the file of lines, and the one with arrays beside it."""
    shutil.copytree(dumped, tmp_path, dirs_exist_ok=True)
    return tmp_path / "lines.jsonl", tmp_path / "arrays.jsonl"


def same(left: Rows, other: Rows) -> bool:
    """Whether two points' records are the same to the bit."""
    equal = all(
        np.array_equal(getattr(left, name), getattr(other, name), equal_nan=True)
        for name in ("seq", "token_idx", "step", "decode", "values", "counts")
    )
    sketches = left.sketch is not None and other.sketch is not None and np.array_equal(left.sketch, other.sketch)
    stats = left.stats.keys() == other.stats.keys() and all(
        np.array_equal(left.stats[name], other.stats[name]) for name in left.stats
    )
    return equal and sketches and stats and left.shapes == other.shapes and left.dtype == other.dtype


def test_arrays_and_lines_hold_the_same_records(both_ways: tuple[Path, Path]) -> None:
    """Every record of every point, read back from arrays, equals that of the JSON lines: values, statistics, sketch, shapes, places.

    A dump under 64 MB is one part a point.
    """
    lines, arrays = (load(path) for path in both_ways)
    assert both_ways[1].read_text(encoding="utf-8").count('"type":"columns"') == len(lines.points)
    assert list(arrays.points) == list(lines.points)
    assert all(same(arrays.points[name], rows) for name, rows in lines.points.items())
    assert arrays.end == lines.end
    assert arrays.notes == lines.notes


@pytest.mark.slow
def test_a_run_with_arrays_reaches_the_same_verdict(parity: Cli, tmp_path: Path) -> None:
    """`run --binary`: the figures of every record are those of the run with lines, to the bit, generated tokens included."""
    answers = []
    for name, more in (("lines", ()), ("arrays", ("--binary",))):
        done = parity("run", "--tokens", "1,2,3", "--generate", 2, "--format", "json", "-o", tmp_path / name, *more)
        assert done.code == 0, done.err
        answers.append(json.loads(done.out))
    assert answers[0]["worst"] == answers[1]["worst"]
    assert answers[0]["compared"] == answers[1]["compared"]
    assert {path.name for path in (tmp_path / "arrays").iterdir()} > {"ours.columns.safetensors", "ref.columns.safetensors"}


def test_parts_of_a_point_are_put_together(both_ways: tuple[Path, Path], tmp_path: Path) -> None:
    """Records that were written in several parts are one point's again, in their order."""
    written, wanted = tmp_path / "parts.jsonl", load(both_ways[0])
    rows = [rows.take([i]) for rows in wanted.points.values() for i in range(len(rows))]
    with ColumnsWriter(written, Header(source="engine"), held=4096) as writer:
        for row in rows:
            writer.rows(row)
    assert written.read_text(encoding="utf-8").count('"type":"columns"') > len(wanted.points)
    arrays = load(written)
    assert all(same(arrays.points[name], rows) for name, rows in wanted.points.items())


def test_decode_steps_and_a_long_header_come_back(both_ways: tuple[Path, Path], tmp_path: Path) -> None:
    """Which records are decode steps, and a header of thousands of tokens, which is still recognised as one that names arrays."""
    rows = load(both_ways[1]).points["embd"]
    decode = np.array([False, False, False, True, True])
    header = Header(source="engine", tokens=tuple(range(5000)))
    with ColumnsWriter(tmp_path / "long.jsonl", header) as writer:
        writer.rows(replace(rows, decode=decode))
    dump = load(tmp_path / "long.jsonl")
    assert np.array_equal(dump.points["embd"].decode, decode)
    assert dump.header is not None
    assert dump.header.tokens == header.tokens


def test_an_unfinished_dump_that_is_kept_has_its_arrays(both_ways: tuple[Path, Path], tmp_path: Path) -> None:
    """What an interrupted run keeps is read as a dump that was cut short, with all records that were written."""
    rows = load(both_ways[1]).points["embd"]
    writer = ColumnsWriter(tmp_path / "cut.jsonl", Header(source="engine"))
    writer.rows(rows)
    writer.close(complete=False, kept=True)
    dump = load(tmp_path / "cut.jsonl")
    assert same(dump.points["embd"], rows)
    assert dump.end is None


def test_a_full_disk_leaves_neither_file(both_ways: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk refuses the arrays when the dump is closed, nothing is left of either file, and the error says so."""
    folder, rows = tmp_path / "full", load(both_ways[1]).points["logits"]
    folder.mkdir()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # CPython would leave it cut short
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        writer = ColumnsWriter(folder / "ours.jsonl", Header(source="engine"))
        writer.rows(replace(rows, values=np.zeros((len(rows), 2000), np.float32), counts=np.full(len(rows), 2000)))
        with pytest.raises(InputError, match="cannot write"):
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(folder.iterdir()) == []


def test_what_is_no_record_is_counted_and_unknown_statistics_are_left_out(both_ways: tuple[Path, Path]) -> None:
    """As in a dump of lines: a line of somebody's log is skipped and counted, an empty one is nothing, a statistic of theirs is ignored."""
    text = both_ways[1].read_text(encoding="utf-8")
    both_ways[1].write_text(text.replace('"l2"', '"energy"', 1) + "loading took 3 s\n\n", encoding="utf-8")
    dump = load(both_ways[1])
    assert dump.skipped == 1
    assert [name for name, rows in dump.points.items() if "l2" not in rows.stats] == [next(iter(dump.points))]
    assert all("energy" not in rows.stats for rows in dump.points.values())


def _other_identity(dump: Path) -> None:
    text = dump.read_text(encoding="utf-8")
    dump.write_text(text.replace('"id":"', '"id":"0', 1), encoding="utf-8")


def _short(dump: Path) -> None:
    arrays = beside(dump)
    arrays.write_bytes(arrays.read_bytes()[:5000])


def _elsewhere(dump: Path) -> None:
    dump.write_text(dump.read_text(encoding="utf-8").replace(beside(dump).name, "../secret.safetensors", 1), encoding="utf-8")


def _miscounted(dump: Path) -> None:
    dump.write_text(dump.read_text(encoding="utf-8").replace('"records":5', '"records":7', 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_other_identity, "the arrays of a dump other than"),
        (_short, "cannot read"),
        (_elsewhere, "is not a file beside it"),
        (_miscounted, "do not fit together"),
        (lambda dump: beside(dump).unlink(), "cannot read"),
    ],
)
def test_files_that_do_not_belong_together_are_one_line(
    both_ways: tuple[Path, Path], parity: Cli, damage: Callable[[Path], None], message: str
) -> None:
    """A missing, damaged, foreign or miscounted file of arrays is refused in one line with exit code 2."""
    _, arrays = both_ways
    damage(arrays)
    with pytest.raises(DumpError, match=message):
        load(arrays)
    assert parity("lint", arrays).code == 2


def test_convert_reads_arrays(both_ways: tuple[Path, Path], tmp_path: Path) -> None:
    """A dump recorded as arrays is converted to JSON lines like any other dump."""
    lines, arrays = both_ways
    dump: Dump = load(arrays)
    out = tmp_path / "converted.jsonl"
    write(dump, out, Header(source="engine"))
    converted, right = load(out), load(lines)
    assert all(same(converted.points[name], rows) for name, rows in right.points.items())


def test_a_part_is_named_once(both_ways: tuple[Path, Path]) -> None:
    """A line that names the same arrays again, which could fill the memory, is refused."""
    dump = both_ways[1]
    header, part, *others = dump.read_text(encoding="utf-8").splitlines()
    dump.write_text("\n".join([header, part, part, *others]), encoding="utf-8")
    with pytest.raises(DumpError, match="is named by two lines"):
        load(dump)


def test_a_type_that_numpy_lacks_and_an_empty_name_are_said(both_ways: tuple[Path, Path]) -> None:
    """Arrays of 8-bit floats and a header that names no file end in one line."""
    dump = both_ways[1]
    arrays = beside(dump)
    data = arrays.read_bytes()
    arrays.write_bytes(data.replace(b'"F32", "shape": [5, 16]', b'"F8_E4M3","shape":[320]', 1))
    with pytest.raises(DumpError, match="is F8_E4M3, not float32"):
        load(dump)
    arrays.write_bytes(data)
    dump.write_text(dump.read_text(encoding="utf-8").replace(f'"file":"{arrays.name}"', '"file":""', 1), encoding="utf-8")
    with pytest.raises(DumpError, match="not a file beside it"):
        load(dump)


def test_arrays_that_are_a_pipe_are_not_waited_for(both_ways: tuple[Path, Path]) -> None:
    """A file of arrays that became a pipe without a writer is refused at once."""
    dump = both_ways[1]
    beside(dump).unlink()
    os.mkfifo(beside(dump))
    with pytest.raises(DumpError, match="is a pipe"):
        load(dump)


def test_steps_of_decimals_are_finite(both_ways: tuple[Path, Path], tmp_path: Path) -> None:
    """An infinite step of decimals, with which everything would agree, is refused, as in lines."""
    rows = load(both_ways[1]).points["embd"]
    with ColumnsWriter(tmp_path / "steps.jsonl", Header(source="engine")) as writer:
        writer.rows(replace(rows, quantum=np.full(rows.values.shape, np.inf)))
    with pytest.raises(DumpError, match="do not fit together"):
        load(tmp_path / "steps.jsonl")


def test_a_step_larger_than_the_values_makes_nothing_agree(both_ways: tuple[Path, Path], tmp_path: Path) -> None:
    """Decimals cannot have been printed in steps of 1e300: such a record is refused, in lines as in arrays."""
    line = {"checkpoint": "embd", "token_idx": 0, "values": [0.5, -0.25], "quantum": 1e300}
    (tmp_path / "odd.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    with pytest.raises(DumpError, match='"quantum" of embd is larger than all of its values'):
        load(tmp_path / "odd.jsonl")
    rows = load(both_ways[0]).points["embd"]
    with ColumnsWriter(tmp_path / "arrays.jsonl", Header(source="engine")) as writer:
        writer.rows(replace(rows, quantum=np.full(rows.values.shape, 1e300)))
    with pytest.raises(DumpError, match="do not fit together"):
        load(tmp_path / "arrays.jsonl")


@pytest.mark.parametrize(
    "changes",
    [
        {"token_idx": np.full(5, 1 << 62)},
        {"seq": np.full(5, 1 << 40)},
        {"step": np.full(5, 1 << 50)},
        {"decode": np.full(5, 2)},
        {"shapes": ((2,) * 17,) * 5},
        {"shapes": ((8,),) * 5},
        {"indices": np.full((5, 16), 3)},
        {"indices": np.tile(np.arange(16) + (1 << 50), (5, 1))},
    ],
    ids=["position", "sequence", "pass", "phase", "axes", "fewer elements than values", "an element twice", "index"],
)
def test_arrays_have_the_bounds_of_lines(both_ways: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any]) -> None:
    """A position, sequence, pass, shape or index that no line may have is refused in arrays, too."""
    rows = load(both_ways[1]).points["embd"]
    with ColumnsWriter(tmp_path / "odd.jsonl", Header(source="engine")) as writer:
        writer.rows(replace(rows, **changes))
    with pytest.raises(DumpError, match=r"do not fit together|dimensions|than its shape holds"):
        load(tmp_path / "odd.jsonl")
