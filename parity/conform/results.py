"""Finished cells on disk: one small file each, named by the key of what the result depends on.

They are sorted into folders by the first two digits of the key: each write looks through its folder, which therefore has to stay small.
"""

import json
from dataclasses import replace
from pathlib import Path

from checkpoints.answers.conform import CellResult
from checkpoints.whole_file import put

FOLDER = "results"


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
