"""Ctrl-C in the middle of each command that takes long: one line, exit 130, no process and no half file left behind."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import comes_true

from parity.__main__ import run

IDS = ",".join(str(5 + i % 900) for i in range(400))
# Seconds of processor time after which Ctrl-C comes: after the start, in the middle of the work. A machine on which the work is done
# by then is interrupted earlier.
MOMENTS = (0.8, 0.4, 0.2, 0.1)
# The command, and what it may leave: dumps end with their last whole line and say so, finished cells are kept.
COMMANDS: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "run": (("run", "--tokens", IDS, "--points", "all", "-o", "run"), {"run/ours.jsonl", "run/ref.jsonl"}),
    "dump ref": (("dump", "ref", "--tokens", IDS, "--points", "all", "-o", "ref.jsonl"), {"ref.jsonl"}),
    "diff": (("diff", "lines.jsonl", "lines.jsonl", "--html", "diff.html"), set()),
    "convert": (("convert", "lines.jsonl", "-o", "converted.jsonl"), set()),
    "isolate": (("isolate", "--tokens", IDS), set()),
    "explain": (("explain", "lines.jsonl", "--tokens", IDS), set()),
    "weights": (("weights", "--model", "wide.gguf"), set()),
    "consistency": (("consistency", "--tokens", IDS), set()),
    "conform": (("conform", "--side", "ours", "--profile", "all", "-o", "cells"), {"cells"}),
    "drift": (("drift", "record", "--prompts", "prompts.txt", "-o", "golden"), set()),
    "score": (("score", "--text", "prompts.txt"), set()),
    "synth": (("synth", "--width", "1536", "--ff", "6144", "--type", "q4_k_m", "-o", "made.gguf"), set()),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder to work in, with a dump of 20,000 positions and a text, and beside it one for temporary files and one for the cache."""
    for name in ("work", "temporary", "cache"):
        (tmp_path / name).mkdir()
    values = ",".join(str(0.37 * i - 2) for i in range(16))
    lines = (f'{{"checkpoint":"blk.{n}.l_out","token_idx":{t},"values":[{values}]}}' for n in range(8) for t in range(20_000))
    (tmp_path / "work" / "lines.jsonl").write_text("\n".join(lines))
    (tmp_path / "work" / "prompts.txt").write_text("\n".join(f"There were {n} dogs. " * 20 for n in range(60)))
    return tmp_path / "work"


def started(place: Path, words: tuple[str, ...]) -> "subprocess.Popen[str]":
    """The command as a terminal starts it: the leader of a group, which Ctrl-C ends."""
    own = {"TMPDIR": str(place.parent / "temporary"), "PARITY_CACHE": str(place.parent / "cache")}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "parity", *words],
        cwd=place,
        env=os.environ | own | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        # A shell's background job ignores SIGINT, and so would this child of it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - it only sets a signal
    )


def group(leader: int) -> dict[int, float]:
    """The processes of a group that have not ended, and the processor time of each in seconds."""
    times = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[2]) == leader and fields[0] != "Z":
            times[int(path.parent.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return times


def interrupted(process: "subprocess.Popen[str]") -> bool:
    """Ctrl-C: a signal to the whole group, one line, 130, and nobody left of the group. False if the command was done before it."""
    done = process.poll() is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    _, message = process.communicate(timeout=30)  # conform's workers once computed on for 45 s
    assert comes_true(lambda: group(process.pid) == {})
    said = bool(message) and process.returncode in (0, -signal.SIGINT)  # it had said its answer, and Python was ending
    if done or said or (process.returncode in (0, 1) and not message):
        return False
    assert (process.returncode, message) == (130, "parity: interrupted\n")
    return True


def files(place: Path) -> set[str]:
    """The files below a folder."""
    return {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_ends_it_in_one_line(name: str, place: Path) -> None:
    """What was made so far is whole lines, or is gone, temporary files too."""
    words, kept = COMMANDS[name]
    if "wide.gguf" in words:
        assert (
            run(["synth", "--width", "1024", "--ff", "4096", "--layers", "6", "--type", "q8_0", "-o", str(place / "wide.gguf")])
            == 0
        )
    before = files(place)

    def ended_at(moment: float) -> bool:
        process = started(place, words)
        while process.poll() is None and sum(group(process.pid).values()) < moment:
            time.sleep(0.01)
        return interrupted(process)

    for moment in MOMENTS:
        if ended_at(moment):
            break
        for path in files(place) - before:
            (place / path).unlink()
    else:
        pytest.fail("it was done before it could be interrupted")
    assert {path for path in files(place) - before if path not in kept and path.split("/")[0] not in kept} == set()
    assert list((place.parent / "temporary").iterdir()) == []
    assert [path for path in (place.parent / "cache").rglob("*") if path.suffix == ".part"] == []


@pytest.mark.slow
@pytest.mark.parametrize("out", ["twin.gguf", None], ids=["a file", "the cache"])
def test_half_a_model_is_removed(place: Path, out: str | None, stories: Path) -> None:
    """Ctrl-C while llama.cpp writes a model ends its process, which cannot remove the file: the command does."""
    folder = place if out else place.parent / "cache"
    for _ in range(20):  # the file is whole after a tenth of a second, in which a busy machine may not look at it
        shutil.rmtree(folder)
        folder.mkdir()
        process = started(place, ("twin", str(stories), "-o", out) if out else ("run", "--tokens", "5,6", "-o", "../run"))
        while process.poll() is None and not list(folder.glob(".*.part")):
            time.sleep(0.002)
        if interrupted(process):
            break
    else:
        pytest.fail("it was done before it could be interrupted")
    assert list(folder.glob(".*")) == []
