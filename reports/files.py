"""Text files that reports are written to."""

from pathlib import Path

from checkpoints.errors import InputError


def save(text: str, path: Path) -> None:
    """Write a text file.

    Raises:
        InputError: it cannot be written.
    """
    _put(text, path, "w")


def append(text: str, path: Path) -> None:
    """Add to a text file, which need not be there.

    Raises:
        InputError: it cannot be written.
    """
    _put(text, path, "a")


def _put(text: str, path: Path, mode: str) -> None:
    try:
        with path.open(mode, encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError as problem:
        reason = problem.strerror or problem
        raise InputError(f"cannot write {path}: {reason}.", "Choose another path.", code="output") from problem
