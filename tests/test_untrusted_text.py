"""Text from outside never reaches a terminal or CI as a command, nor a screen in megabytes."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from cli import Cli

from checkpoints.gguf_file import contents, header_bytes
from checkpoints.gguf_values import Value, string_value
from checkpoints.printable import no_command, printable

ROOT = Path(__file__).parent.parent
EVIL = "\x1b[31mred\x07\x9b2J\u202e\r::error::x"
RECORD = {"token_idx": 0, "values": [1.0, 2.0, 3.5]}


def with_metadata(source: Path, path: Path, **changes: Value) -> Path:
    """A model with some of its metadata replaced; "_" in a name stands for "."."""
    file = contents(source)
    metadata = dict(file.metadata) | {key.replace("_", "."): value for key, value in changes.items()}
    path.write_bytes(header_bytes(metadata, list(file.tensors)) + source.read_bytes()[file.data :])
    return path


def harmless(*texts: str) -> None:
    """No control character but line breaks, and no line that a CI would obey or that fills a screen."""
    for text in texts:
        assert all(char.isprintable() or char == "\n" for char in text), text[:500]
        for line in text.splitlines():
            assert len(line) < 3000
            allowed = ("::error title=parity", "::error title=divergence", "::notice title=parity", "::warning title=parity")
            assert not line.lstrip().startswith("::") or line.startswith(allowed), line[:200]
            assert "##[" not in line


def test_text_is_printable_and_bounded() -> None:
    """Control characters, line breaks, bidi marks and lone surrogates become U+FFFD; what is long is cut."""
    assert printable("a\x1bb\nc\u202ed\ud800e\x9bf") == "a\ufffdb\ufffdc\ufffdd\ufffde\ufffdf"
    assert printable("é 日本 🎉") == "é 日本 🎉"
    assert len(printable("x" * 10**6)) == 300
    assert no_command("  ::error::x") == "\\  ::error::x"
    assert no_command("a ##[group]b") == "a ##(group]b"


def dump(path: str, *names: str, **header: object) -> Path:
    """A dump with these checkpoints."""
    lines = [{"type": "header", "source": "x", "compute": "f32", "mode": "exact", "tokens": [1]} | header]
    lines += [{"checkpoint": name} | RECORD for name in names]
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Path(path)


NAMES = ("::stop-commands::x", "::error::y", "##[error]z", EVIL, "embd", "x" * 1000)


@pytest.mark.parametrize("output_format", ["text", "github", "markdown"])
def test_names_in_a_dump_are_no_commands(parity: Cli, output_format: str) -> None:
    """Checkpoints, sources and prompts named like commands of a terminal or of GitHub's runner stand as text."""
    ours = dump("a.jsonl", *NAMES, prompt=EVIL, pieces=[EVIL], source="::add-mask::x", model={"name": EVIL})
    theirs = dump("b.jsonl", *NAMES, prompt=EVIL, pieces=[EVIL], source=EVIL, model={"name": "::error::m"})
    theirs.write_text(theirs.read_text().replace("3.5", "4.5"))
    ran = parity("diff", ours, theirs, "--format", output_format)
    assert ran.code == 1
    harmless(ran.out, ran.err)


def test_lint_and_convert_print_names_as_text(parity: Cli) -> None:
    """The same for lint's table and for what stands on stderr."""
    ran = parity("lint", dump("a.jsonl", *NAMES, source=EVIL))
    harmless(ran.out, ran.err)
    Path(EVIL.replace("/", "")).mkdir()
    ran = parity("convert", "a.jsonl", "-o", Path(EVIL) / "::error::b.jsonl")
    assert ran.code == 0
    harmless(ran.out, ran.err)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["tokenizer_ggml_pre", "general_architecture", "general_name", "tokenizer_ggml_model"])
@pytest.mark.parametrize("command", ["model", "tokens", "run", "isolate"])
def test_metadata_of_a_model_are_text(parity: Cli, stories: Path, tmp_path: Path, key: str, command: str) -> None:
    """Escape sequences and megabytes in a model's metadata end in an answer or in one line, printable and short."""
    for value in (EVIL, "x" * 10**6):
        model = with_metadata(stories, tmp_path / "m.gguf", **{key: string_value(value)})
        words = {"model": (model,), "isolate": ("--model", model, "--tokens", "5", "--points", "embd")}
        ran = parity(command, *words.get(command, ("--model", model, "--prompt", "hi")))
        assert ran.code in (0, 2), ran.err
        harmless(ran.out, ran.err)


def test_arguments_and_engines_are_text(parity: Cli) -> None:
    """File names, options and an engine's last words are printed without what a terminal would obey."""
    evil_file = Path("\x1b[2Jx.jsonl")
    evil_file.write_text("{}\n")
    Path("engine").write_text("#!/bin/sh\nprintf '\\033[31m::error::bad\\a\\n' >&2\nexit 3\n")
    Path("engine").chmod(0o755)
    for words in (
        ("lint", evil_file),
        ("lint", "no\x1b[2Jsuch"),
        ("run", "--prompt", "hi", "--points", "\x1b[2J" + "x" * 10**5),
        ("run", "--prompt", "hi", "--exec", "./engine {out}"),
        ("run", "--prompt", "hi", "--mode", "\x1b[2J"),
        ("\x1b[2J",),
    ):
        ran = parity(*words)
        assert ran.code == 2
        harmless(ran.out, ran.err)
        assert len(ran.err) < 2000


@pytest.mark.slow
def test_a_log_that_was_asked_for_is_text_too(stories: Path, tmp_path: Path) -> None:
    """llama.cpp's own log, which repeats metadata, has no escape sequences in it."""
    model = with_metadata(stories, tmp_path / "m.gguf", general_name=string_value(EVIL))
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "parity", "dump", "ref", "--verbose", "--model", model, "--tokens", "5", "-o", "a.jsonl"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
    )
    assert b"general.name" in ran.stderr
    assert b"\x1b" not in ran.stderr


@pytest.mark.parametrize(
    "words",
    [pytest.param(("run", "--prompt", "hi"), marks=pytest.mark.slow), ("diff", "a.jsonl", "a.jsonl"), ("lint", "none.jsonl")],
)
def test_an_answer_that_cannot_be_written_is_said(tmp_path: Path, words: tuple[str, ...]) -> None:
    """With stdout on a full disk the reason stands on stderr, also where the answer was to be JSON."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"checkpoint": "embd"} | RECORD) + "\n")
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(
            [sys.executable, "-P", "-m", "parity", *words, "--format", "json"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ran.returncode == 2
    assert ran.stderr.startswith("parity: ")
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "value",
    [Value(7, b"\x01"), Value(6, struct.pack("<f", float("nan"))), Value(12, struct.pack("<d", 1e300)), Value(5, b"\xff" * 4)],
    ids=["bool", "nan", "huge", "negative"],
)
@pytest.mark.parametrize("command", ["model", "run", "isolate", "tokens"])
def test_a_count_of_another_type_is_refused(parity: Cli, stories: Path, tmp_path: Path, value: Value, command: str) -> None:
    """A number of layers that is a truth value, a float or negative ends in one line."""
    file = contents(stories)
    metadata = dict(file.metadata) | {"qwen2.block_count": value}
    model = tmp_path / "m.gguf"
    model.write_bytes(header_bytes(metadata, list(file.tensors)) + stories.read_bytes()[file.data :])
    words = {"model": (model,), "isolate": ("--model", model, "--tokens", "5", "--points", "embd")}
    ran = parity(command, *words.get(command, ("--model", model, "--prompt", "hi")))
    assert (ran.code, len(ran.err.splitlines())) in ((2, 1), (0, 0)), ran.err
