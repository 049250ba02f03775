"""Several references: another llama.cpp beside the installed one, what moved between them, and what that allows an engine."""

import os
import subprocess
import sys
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from cli import Cli, refused
from msgspec.structs import replace

from checkpoints.reading.reader import read
from checkpoints.record import Dump
from parity.diff.compare import Options, comparison
from parity.run import references
from parity.run.request import Request
from parity.run.session import Outcome
from reference.builds import of_interpreter

LIBRARY = Path(llama_cpp.__file__).parent / "lib"
OLDER = os.environ.get("PARITY_REF_PYTHON", "")


def changed(dump: Dump, point: str, scale: float) -> Dump:
    """The dump with one point's values, statistics and sketch off by random parts of their size."""
    random = np.random.default_rng(5)
    rows = dump.points[point]
    values = (rows.values * (1 + scale * random.normal(size=rows.values.shape))).astype(np.float32)
    return replace(dump, points={**dump.points, point: replace(rows, values=values, sketch=None, stats={})})


@pytest.fixture
def outcome(stories_run: Path) -> Outcome:
    """A run's outcome in which our side's blk.5.l_out is off by 3e-5 of its values: an NMSE of about 1e-9."""
    ours, ref = changed(read(stories_run / "ours.jsonl"), "blk.5.l_out", 3e-5), read(stories_run / "ref.jsonl")
    compared = comparison(ours, ref, Options(placed=True, strict=True))
    return Outcome(stories_run, ours, ref, compared.verdict, compared.picture, 1.0)


@pytest.mark.slow
def test_the_same_library_through_another_interpreter_is_identical(parity: Cli) -> None:
    """The bindings of a named interpreter are bound in a process of their own: another path, the same numbers to the bit."""
    code, answer = parity.json(
        "run", "--prompt", "Once upon", "--points", "embd,blk.0.*,logits", "--ref-python", sys.executable, "--out", "folder"
    )
    (moved,) = answer["references"]["moved"]
    assert (code, moved["first"], moved["missing"]) == (0, None, [])
    assert moved["compared"] == answer["compared"]
    assert sys.executable in moved["other"]
    assert Path("folder/ref-2.jsonl").exists()
    ran = parity("run", "--prompt", "Once upon", "--ref-lib", LIBRARY, "--out", "folder")
    assert (ran.code, "are identical in" in " ".join(ran.out.split())) == (0, True)
    assert parity("run", "--prompt", "Once upon", "--out", "folder").code == 0
    assert not Path("folder/ref-2.jsonl").exists()


@pytest.mark.slow
@pytest.mark.skipif(not OLDER, reason="PARITY_REF_PYTHON names no interpreter with another version of llama-cpp-python")
def test_another_version_moves_within_rounding(parity: Cli) -> None:
    """Every point that an older llama.cpp has under its own names is found, and moved no more than float32 rounds."""
    code, answer = parity.json(
        "run", "--prompt", "Once upon a time", "--points", "all", "--ref-python", OLDER, "--out", "folder"
    )
    (moved,) = answer["references"]["moved"]
    assert (code, moved["rounding"]) == (0, True)
    assert moved["compared"] > 0.9 * answer["compared"]
    assert moved["worst"]["nmse"] < 1e-10


def test_what_moved_is_a_table_by_kind(stories_run: Path) -> None:
    """Layers are folded into one row, which names the layer and position of its worst record."""
    base = read(stories_run / "ref.jsonl")
    compared = comparison(changed(base, "blk.10.l_out", 1e-5), base, Options(placed=True))
    moved, points = references._moved(compared, base.header, base.header, "here", {"blk.0.gone"})
    kinds = {point.kind: point for point in moved.points}
    assert list(kinds) == ["embd", "blk.*.l_out", "output_norm", "logits"]
    assert moved.worst is kinds["blk.*.l_out"]
    assert (moved.worst.layer, moved.worst.records, moved.missing) == (10, 20, ("blk.0.gone",))
    assert points["blk.5.l_out"] == 0 < points["blk.10.l_out"] == moved.worst.nmse
    assert moved.rounding


def test_more_than_rounding_is_no_floor(stories_run: Path) -> None:
    """A reference with another formula moves by more than rounding can: it allows nobody anything, and the answer says so."""
    base = read(stories_run / "ref.jsonl")
    compared = comparison(changed(base, "blk.10.l_out", 1e-2), base, Options(placed=True))
    moved, _ = references._moved(compared, base.header, base.header, "here", set())
    assert not moved.rounding


def test_the_spread_is_a_floor(outcome: Outcome, stories: Path) -> None:
    """Our side's distance is let pass where references differ by a tenth of it or more, and nowhere else."""
    request = Request(stories, strict=True)
    assert not outcome.verdict
    worst = outcome.verdict.worst
    assert worst is not None
    assert worst.checkpoint == "blk.5.l_out"
    judged, notes = references._judged(outcome, request, (), {"blk.5.l_out": worst.nmse / 5}, comparison)
    assert (bool(judged.verdict), notes.within) == (True, True)
    assert any("the difference between the references" in note for note in judged.verdict.notes)
    narrow, notes = references._judged(outcome, request, (), {"blk.5.l_out": worst.nmse / 50}, comparison)
    assert (bool(narrow.verdict), notes.within) == (False, False)
    elsewhere, _ = references._judged(outcome, request, (), {"blk.0.l_out": 1.0}, comparison)
    assert not elsewhere.verdict


def test_what_is_no_reference_is_one_line(parity: Cli, tmp_path: Path) -> None:
    """Interpreters that are not there, are none, or have no llama.cpp; libraries that are none: one line each, and no folder."""
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    run = ("run", "--prompt", "hi", "--out", "folder")
    refused(parity(*run, "--ref-python", "no-such-python"), "cannot run no-such-python")
    refused(parity(*run, "--ref-python", "/bin/ls"), "is not Python")
    refused(parity(*run, "--ref-python", bare / "bin" / "python"), "has no llama-cpp-python")
    refused(parity(*run, "--ref-lib", tmp_path), "is neither a libllama")
    refused(parity(*run, "--ref-python", sys.executable, "--server", "http://127.0.0.1:1"), "cannot be combined with")
    assert not Path("folder").exists()


def test_a_library_that_cannot_be_loaded_is_one_line(parity: Cli, tmp_path: Path) -> None:
    """A file that only has the name: the other reference is named, and why it cannot be loaded."""
    (tmp_path / "libllama.so").write_bytes(b"no library")
    refused(parity("run", "--prompt", "hi", "--ref-lib", tmp_path / "libllama.so"), "libllama.so", "cannot be loaded")


def test_a_package_of_the_name_without_bindings_is_one_line(tmp_path: Path, parity: Cli) -> None:
    """Another package called llama_cpp is not imported."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '[\"{tmp_path}\"]'\n")
    python.chmod(0o755)
    refused(parity("run", "--prompt", "hi", "--ref-python", python), "without bindings")
    assert of_interpreter(sys.executable).package == Path(llama_cpp.__file__).parent
