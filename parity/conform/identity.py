"""A key of everything a result depends on: the engine's command and programs, the model, the prompt, the settings, and this code."""

import hashlib
import shlex
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import checkpoints
import engine
import parity
import reference

from ..run.command import Command
from ..run.hugging_face import HuggingFace

_LARGEST_PROGRAM = (
    1 << 30
)  # bytes: larger files of a command line are data, not the program; they are identified by size and time


def digest(*parts: object) -> str:
    """32 hex digits."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]


@cache
def program() -> str:
    """This code: every module and kernel that computes, judges or explains."""
    hashed = hashlib.sha256()
    for package in (checkpoints, engine, parity, reference):
        root = Path(str(package.__file__)).parent
        for path in sorted(path for suffix in ("*.py", "*.cu*", "*.so") for path in root.rglob(suffix)):
            hashed.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return hashed.hexdigest()[:32]


def of_file(path: Path) -> str:
    """A file by its content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def of_side(command: Command | None, hugging_face: HuggingFace | None = None) -> str:
    """An external engine's command, Hugging Face's versions, or our engine."""
    if command is not None:
        return of_command(command)
    if hugging_face is not None:
        return digest(hugging_face.python, hugging_face.device, hugging_face.versions())
    return "ours"


def of_command(command: Command) -> str:
    """A command line and the content of every file that it names, the program first of all: a new build is another engine."""
    parts: list[object] = [command.line, command.shell]
    for path in _files(command):
        info = path.stat()
        small = info.st_size <= _LARGEST_PROGRAM
        parts += [path, of_file(path) if small else (info.st_size, info.st_mtime_ns)]
    return digest(*parts)


def stamps(command: Command) -> tuple[tuple[Path, int, int], ...]:
    """Size and time of the same files, which tell at once whether one was replaced while cells ran."""
    return tuple((path, (info := path.stat()).st_size, info.st_mtime_ns) for path in _files(command))


def _files(command: Command) -> Iterator[Path]:
    for word in shlex.split(command.line):
        for text in (word, word.partition("=")[2]):
            program = shutil.which(text) if text else None
            path = Path(program or text)
            if text and path.is_file():
                yield path
