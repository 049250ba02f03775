"""The command line as a test calls it: in this process, with what it printed and its exit code, or on a disk that fills up."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from parity.__main__ import run


@dataclass(frozen=True)
class Ran:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        answer: dict[str, Any] = json.loads(self.out)
        return answer


class Cli:
    """Calls `parity` with arguments; every path is turned into text."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capture = capfd

    def __call__(self, *arguments: object) -> Ran:
        self._capture.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = self._capture.readouterr()
        return Ran(code, out, err)

    def json(self, *arguments: object) -> tuple[int, dict[str, Any]]:
        """The exit code and the JSON answer."""
        ran = self(*arguments, "--format", "json")
        return ran.code, ran.json


def one_line(message: str, *parts: str) -> None:
    """Check that an error is one line that begins with the program's name and contains these parts."""
    assert message.startswith("parity: "), message
    assert len(message.splitlines()) == 1, message
    for part in parts:
        assert part in message, message


def refused(ran: Ran, *parts: str) -> None:
    """Check for exit code 2, one line on stderr with these parts, and nothing on stdout."""
    assert (ran.code, ran.out) == (2, ""), ran
    one_line(ran.err, *parts)


def limited(arguments: Sequence[object], size: int) -> subprocess.CompletedProcess[str]:
    """A parity whose files may not grow beyond `size` bytes, as on a disk that fills up."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "parity", *map(str, arguments)],
        capture_output=True,
        text=True,
        # CPython leaves bytecode cut short where a file may not grow: later programs would fail on it.
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        check=False,
    )


def recorded(parity: Cli, folder: Path, prompts: int) -> tuple[object, ...]:
    """Record golden dumps of so many prompts; the words that check our engine against them on one thread, without a ledger."""
    (folder / "prompts.txt").write_text("".join(f"Once upon a time {n}\n" for n in range(prompts)))
    words = ("--prompts", folder / "prompts.txt", "-o", folder / "golden", "--generate", "0", "--threads", "1")
    assert parity("drift", "record", *words).code == 0
    return "drift", "check", folder / "golden", "--side", "ours", "--threads", "1", "--no-ledger"
