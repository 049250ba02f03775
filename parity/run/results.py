"""A run into a folder with an earlier run: the earlier one stays complete until all dumps of this one are written."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

from checkpoints import columns
from checkpoints.errors import InputError
from checkpoints.whole_file import lock

_ENDINGS = (".jsonl", ".safetensors", columns.ENDING)
DUMPS = (*(f"{side}{ending}" for side in ("ours", "ref") for ending in _ENDINGS), "ours-odd.jsonl")
ANSWERS = ("diff.json", "report.html", "server.json")
_OTHERS = ("hf.jsonl", "ref-[0-9]*.jsonl")  # dumps of further sides, which belong to their run's answer
_PREFIX = ".parity-run-"


@contextmanager
def dumps_of(folder: Path) -> Iterator[Path]:
    """Where a run writes its dumps: `folder`, or, if that has a run, a folder inside it whose files replace the old ones at the end.

    If this run fails, the earlier one stays as it was; an old answer never lies beside new dumps.

    Raises:
        InputError: the folder cannot be written to.
    """
    if not any((folder / name).exists() for name in (*DUMPS, *ANSWERS)):
        yield folder
        return
    _sweep(folder)
    descriptor = -1
    work = folder
    try:
        try:
            work = Path(mkdtemp(prefix=_PREFIX, dir=folder))
            descriptor = os.open(work, os.O_RDONLY)
            lock(descriptor)
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror}.", "Choose another --out.", code="output") from error
        yield work
        forget_answer(folder)
        for name in DUMPS:
            if (work / name).exists():
                (work / name).replace(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
    finally:
        if work != folder:
            shutil.rmtree(work, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)


def forget_answer(folder: Path) -> None:
    """Remove an earlier run's answer before the new dumps are put there."""
    for name in ANSWERS:
        (folder / name).unlink(missing_ok=True)
    for pattern in _OTHERS:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove leftovers of killed runs."""
    for left in folder.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | getattr(os, "O_NOFOLLOW", 0))
            try:
                if lock(descriptor):
                    shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(descriptor)
