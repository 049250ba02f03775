"""In any surroundings (pipes, full disks, closed streams, terminals without UTF-8) parity gives an answer or one clear line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli import Cli, limited, one_line, refused
from slow import slow_but

from checkpoints.reading.reader import read


def shell(line: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which `parity` is this one; $1, $2, … are the arguments."""
    words = ["bash", "-c", f'parity() {{ "{sys.executable}" -P -m parity "$@"; }}; {line}', "bash", *map(str, arguments)]
    here = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.run(words, capture_output=True, text=True, env=os.environ | here | environment, check=False)


@pytest.mark.slow
def test_a_dump_comes_through_a_pipe_as_standard_input_only(stories_run: Path) -> None:
    """An engine's output is piped in as `-`, on either side; `<(…)` names a pipe, which could be waited for without end."""
    dumps = (stories_run / "ours.jsonl", stories_run / "ref.jsonl")
    for line in ('cat "$1" | parity diff - "$2"', 'cat "$2" | parity diff "$1" -'):
        ran = shell(line, *dumps)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert "35 of 35 records agree" in ran.stdout
    for line in ('parity diff <(cat "$1") "$2"', 'parity diff "$1" <(cat "$2")', 'parity lint <(cat "$1")'):
        ran = shell(line, *dumps)
        assert (ran.returncode, ran.stdout) == (2, "")
        one_line(ran.stderr, "is a pipe. Write the dump to a file, or give - and pipe JSON lines in.")


def test_an_answer_that_nobody_reads_is_neither_parity_nor_divergence(stories_run: Path) -> None:
    """Where the reader of the output goes away parity ends in silence with a shell's 141; 0 and 1 are verdicts."""
    ran = shell(
        'parity diff "$1" "$2" --format json | true; exit ${PIPESTATUS[0]}',
        stories_run / "ours.jsonl",
        stories_run / "ref.jsonl",
    )
    assert (ran.returncode, ran.stderr) == (141, "")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_an_answer_that_cannot_be_written_is_said(stories_run: Path) -> None:
    """A full disk behind stdout is one line and exit 2; a closed stdout leaves the exit code."""
    ran = shell('parity lint "$1" > /dev/full', stories_run / "ours.jsonl")
    assert ran.returncode == 2
    one_line(ran.stderr, "cannot be written or read: No space left on device")
    ran = shell('parity lint "$1" >&-', stories_run / "ours.jsonl")
    assert (ran.returncode, ran.stderr) == (0, "")
    ran = shell("parity lint nothing.jsonl > /dev/full 2> /dev/full")
    assert ran.returncode == 2, "1 would be a divergence"


def test_an_answer_of_which_the_disk_takes_a_part_is_said_to_be_cut(tmp_path: Path) -> None:
    """PYTHONUNBUFFERED, which containers set, loses nothing without a word: a header that is cut off is exit 2, as with a buffer."""
    for unbuffered in ("", "1"):
        ran = shell('ulimit -f 8; parity emit c > "$1"', tmp_path / "dump.h", PYTHONUNBUFFERED=unbuffered)
        assert ran.returncode == 2
        one_line(ran.stderr, "cannot be written or read: File too large")


@pytest.mark.slow
def test_a_terminal_without_unicode_is_served(stories_run: Path) -> None:
    """In a locale without UTF-8 the prompt's bytes are taken as UTF-8 and what cannot be printed is a question mark."""
    plain = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ran = shell('parity diff "$1" "$2"', stories_run / "ours.jsonl", stories_run / "ref.jsonl", **plain)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "stories-14m ? qwen2" in ran.stdout
    ran = shell('parity tokens --prompt "$1"', "hé", **plain)
    assert (ran.returncode, ran.stdout.count("\n")) == (0, 5), "BOS, h, the two bytes of é, the sum"
    ran = shell(r"parity tokens --prompt $'\xff'")
    assert ran.returncode == 2
    one_line(ran.stderr, "the prompt is not UTF-8")


@pytest.mark.parametrize("width", slow_but(["0", "\u00b2"], "0"))
def test_a_terminal_without_a_width_is_served(stories_run: Path, width: str) -> None:
    """A width that is none is not taken: with COLUMNS=0 nothing was printed, not even the verdict."""
    ran = shell('parity diff "$1" "$2"', stories_run / "ours.jsonl", stories_run / "ref.jsonl", COLUMNS=width)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "parity: 35 of 35 records agree" in ran.stdout


@pytest.mark.parametrize("option", [("--html", "answer.html"), ("--junit", "answer.xml"), ("--table", "answer.csv")])
def test_a_full_disk_leaves_the_old_report(stories_run: Path, tmp_path: Path, option: tuple[str, str]) -> None:
    """A report that cannot be written whole is one line, and neither replaces the one before it nor leaves a half."""
    path = tmp_path / option[1]
    path.write_text("the one before")
    ran = limited(("diff", stories_run / "ours.jsonl", stories_run / "ref.jsonl", option[0], path), 400)
    assert ran.returncode == 2
    one_line(ran.stderr, f"cannot write {path}: File too large")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(option[1], "the one before")]


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_tensors(parity: Cli, tmp_path: Path) -> None:
    """Whole tensors are made in a folder of their own if need be, and replaced by others only when these are there."""
    words = ("dump", "ours", "--tokens", "5", "--points", "logits", "--full", "-o", tmp_path / "new" / "ours.jsonl")
    assert parity(*words).code == 0
    before = (tmp_path / "new" / "ours.safetensors").read_bytes()
    ran = limited(words, len(before) - 8)  # the values alone still fit
    assert ran.returncode == 2
    one_line(ran.stderr, "ours.safetensors: File too large")
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"ours.jsonl", "ours.safetensors"}
    assert (tmp_path / "new" / "ours.safetensors").read_bytes() == before


@pytest.mark.slow
def test_golden_dumps_are_replaced_together(parity: Cli, tmp_path: Path) -> None:
    """A recording that fails leaves the golden dumps of the one before it, byte for byte."""
    (tmp_path / "prompts.txt").write_text("Once\nThe dog\n")
    words = ("drift", "record", "--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "golden")
    assert parity(*words).code == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "golden").iterdir()}
    (tmp_path / "engine").write_text(
        '#!/bin/sh\ncase "$1" in *,*,*) exit 1;; esac\necho \'{"checkpoint":"embd","values":[1]}\'\n'
    )
    (tmp_path / "engine").chmod(0o755)
    ran = parity(*words, "--exec", f"{tmp_path}/engine {{tokens}}")
    refused(ran, "failed with exit code 1")
    assert {file.name: file.read_bytes() for file in (tmp_path / "golden").iterdir()} == before
    assert parity("drift", "record", "--prompts", tmp_path / "prompts.txt", "-o", "/dev/null/x").code == 2


@pytest.mark.slow
def test_what_an_earlier_run_left_is_not_this_engines(parity: Cli, tmp_path: Path) -> None:
    """An engine that writes nothing is said to, also where the folder holds the dump of a run before."""
    assert parity("run", "--prompt", "hi", "-o", tmp_path / "again").code == 0
    ran = parity("run", "--prompt", "hi", "-o", tmp_path / "again", "--exec", "true {out}")
    refused(ran, "exited with code 0 but did not write")


def test_a_cut_dump_stays_cut_when_it_is_converted(stories_run: Path, parity: Cli, tmp_path: Path) -> None:
    """`convert` gives no end record to a dump that was cut short, and one to a dump that was whole."""
    lines = (stories_run / "ours.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[:20]))
    for source, ended in ((tmp_path / "cut.jsonl", False), (stories_run / "ours.jsonl", True)):
        assert parity("convert", source, "-o", tmp_path / "made.jsonl").code == 0
        assert (read(tmp_path / "made.jsonl").end is not None) == ended


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder, stories: stories, "It is a model: give it as --model."),
        (lambda folder, stories: folder / ("x" * 300), "File name too long"),
        (lambda folder, stories: folder, "Name one of the dumps in it: ours.jsonl, ref.jsonl."),
    ],
    ids=["a-model", "a-long-name", "a-folder"],
)
def test_what_is_no_dump_is_called_by_its_name(
    stories_run: Path, stories: Path, parity: Cli, make: object, message: str
) -> None:
    """A model, a folder or an impossible name in a dump's place is said to be that."""
    ran = parity("lint", make(stories_run, stories))  # type: ignore[operator]
    refused(ran, message)


def test_weights_are_not_read_from_an_endless_line(parity: Cli, tmp_path: Path) -> None:
    """A file of --theirs without line breaks is refused after 64 MiB, not read into memory."""
    with (tmp_path / "zeros.jsonl").open("wb") as file:
        file.truncate(1 << 33)
    ran = parity("weights", "--theirs", tmp_path / "zeros.jsonl")
    refused(ran, "a line of more than 64 MiB")


def test_a_cache_that_cannot_be_written_is_named(parity: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where F32 twins have no place the line names the cache and the variable that moves it."""
    monkeypatch.setenv("PARITY_CACHE", "/dev/null/cache")
    refused(parity("dump", "ref", "--prompt", "hi", "-o", "ref.jsonl"), "/dev/null/cache", "Set PARITY_CACHE")


def test_nothing_is_written_over_what_is_read(parity: Cli, stories_run: Path, stories: Path, tmp_path: Path) -> None:
    """Each command refuses an output that is one of its inputs, links included, and leaves it byte for byte."""
    model, dump, link = tmp_path / "m.gguf", tmp_path / "ours.jsonl", tmp_path / "link.jsonl"
    model.write_bytes(stories.read_bytes())
    dump.write_bytes((stories_run / "ours.jsonl").read_bytes())
    link.symlink_to(dump)
    ref = stories_run / "ref.jsonl"
    for words in (
        ("twin", model, "-o", model),
        ("dump", "ours", "--model", model, "--prompt", "hi", "-o", model),
        ("dump", "ref", "--follow", dump, "-o", dump),
        ("convert", dump, "-o", link),
        *(("diff", dump, ref, option, dump) for option in ("--html", "--junit", "--table")),
    ):
        refused(parity(*words), "is an input of this command and must not be overwritten")
    assert model.read_bytes() == stories.read_bytes()
    assert dump.read_bytes() == (stories_run / "ours.jsonl").read_bytes()
