"""Text files that reports are written to."""

from pathlib import Path

from checkpoints.errors import InputError
from checkpoints.whole_file import put


def save(text: str, path: Path) -> None:
    """Write a text file, as a whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    put(path, text.encode("utf-8", "replace"))


def append(text: str, path: Path) -> None:
    """Append to a text file, which is created if it does not exist.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError as problem:
        reason = problem.strerror or problem
        raise InputError(f"cannot write {path}: {reason}.", "Choose another path.", code="output") from problem
