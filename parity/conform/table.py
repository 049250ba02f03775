"""A conformance run as a table: one row for each cell, for pandas and anything that reads Parquet; written while cells end."""

from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Self

from checkpoints.answers.conform import CellResult, Conformance

from ..diff.verdict.table import write_frame

if TYPE_CHECKING:
    import pandas

_PAUSE = 2.0  # seconds between two versions of the file, at the least
_SHARE = 20.0  # and so many times what the last one took: writing stays below 5 % of a run


def table(results: Sequence[CellResult]) -> "pandas.DataFrame":
    """A data frame with a row for each cell."""
    import pandas

    return pandas.DataFrame([result.as_dict() for result in results])


def write_table(conformance: Conformance, path: Path) -> None:
    """Write it as .csv or .parquet, as the name's ending says.

    Raises:
        InputError: another ending, Parquet without pyarrow, or the file cannot be written.
    """
    write_frame(table(conformance.results), path)


class GrowingTable:
    """The table of a run in progress; a context manager.

    Parquet's index stands at its end, so that a file which is appended to cannot be read before it is closed. This one is written anew
    with all cells until then and takes the place of the last one at once: whoever reads it, or kills the run, has a whole file.
    Without a path there is no table.
    """

    def __init__(self, path: Path | None, pause: float = _PAUSE) -> None:
        self._path, self._pause = path, pause
        self._results: list[CellResult] = []
        self._written = 0
        self._next = monotonic() + pause

    def __enter__(self) -> Self:
        return self

    def __call__(self, result: CellResult, _done: int, _total: int) -> None:
        """A cell is finished."""
        self._results.append(result)
        if monotonic() >= self._next:
            self._write()

    def _write(self) -> None:
        if self._path is None or self._written == len(self._results):
            return
        began, first = monotonic(), not self._written
        write_frame(table(self._results), self._path)
        self._written = len(self._results)
        cost = 0.0 if first else monotonic() - began  # the first one's is that of importing pandas
        self._next = monotonic() + max(self._pause, _SHARE * cost)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._write()
