"""Finished cells on disk: one small file each, named by the key of what the result depends on.

They are sorted into folders by the first two digits of the key: each write looks through its folder, which therefore has to stay small.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec.structs import replace

from checkpoints.answers.conform import CellResult
from checkpoints.errors import InputError
from checkpoints.whole_file import put, unwritable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FOLDER = "results"
_LOCK = ".lock"


def load(folder: Path, key: str) -> CellResult | None:
    """A stored result; None if there is none, or only one of another version."""
    try:
        facts = json.loads(_path(folder, key).read_text(encoding="utf-8"))
        return replace(CellResult.from_dict(facts), kept=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(folder: Path, result: CellResult) -> None:
    """Store a result.

    Raises:
        InputError: it cannot be written.
    """
    put(_path(folder, result.key), json.dumps(result.as_dict()).encode())


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
