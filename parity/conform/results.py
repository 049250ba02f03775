"""Finished cells on disk: one small file each, named by the key of what the result depends on.

They are sorted into folders by the first two digits of the key: each write looks through its folder, which therefore has to stay small.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec.structs import replace

from checkpoints.answers.conform import Cell, CellResult
from checkpoints.errors import InputError
from checkpoints.given_json import decoded
from checkpoints.regular import read_text, require_regular
from checkpoints.whole_file import put, unwritable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FOLDER = "results"
_LOCK = ".lock"


def load(folder: Path, cell: Cell, key: str) -> CellResult | None:
    """A cell's stored result; None if there is none, or only one of another version, cell or key."""
    try:
        result = CellResult.from_dict(decoded(read_text(_path(folder, key))))
    except (OSError, ValueError, KeyError, TypeError, InputError):
        return None
    return replace(result, kept=True) if (result.cell, result.key) == (cell, key) else None


def save(folder: Path, result: CellResult) -> None:
    """Store a result.

    Raises:
        InputError: it cannot be written, or its path is not a regular file: a pipe would make the run wait.
    """
    path = _path(folder, result.key)
    require_regular(path, advice="Remove it, or choose another --out.")
    put(path, json.dumps(result.as_dict()).encode())


def _path(folder: Path, key: str) -> Path:
    return folder / FOLDER / key[:2] / f"{key[2:]}.json"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a run's folder: another run in it would write its engine's dumps to the same places.

    Raises:
        InputError: another run holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("wb")
    except OSError as error:
        raise unwritable(folder, error, "Choose another --out.") from error
    with file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another run of parity conform uses {folder}.", "Wait until it ends, or choose another --out.", code="output"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
