"""Finished cells on disk: one small file each, named by the key of what the result depends on."""

import json
from dataclasses import replace
from pathlib import Path

from checkpoints.answers.conform import CellResult
from checkpoints.whole_file import put

FOLDER = "results"


def load(folder: Path, key: str) -> CellResult | None:
    """A stored result; None if there is none, or only one of another version."""
    try:
        facts = json.loads((folder / FOLDER / f"{key}.json").read_text(encoding="utf-8"))
        return replace(CellResult.from_dict(facts), kept=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(folder: Path, result: CellResult) -> None:
    """Store a result.

    Raises:
        InputError: it cannot be written.
    """
    put(folder / FOLDER / f"{result.key}.json", json.dumps(result.as_dict()).encode())
