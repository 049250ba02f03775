"""A conformance run as a table: one row a cell, for pandas and whatever reads Parquet."""

from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints.answers.conform import Conformance
from checkpoints.errors import InputError
from checkpoints.whole_file import put

from ..diff.table import check_ending

if TYPE_CHECKING:
    import pandas


def table(conformance: Conformance) -> "pandas.DataFrame":
    """A data frame with a row for each cell."""
    import pandas

    return pandas.DataFrame([result.as_dict() for result in conformance.results])


def write_table(conformance: Conformance, path: Path) -> None:
    """Write it as .csv or .parquet, which the name's ending chooses.

    Raises:
        InputError: another ending, Parquet without pyarrow, or the file cannot be written.
    """
    check_ending(path)
    frame = table(conformance)
    try:
        data = frame.to_csv(index=False).encode() if path.suffix == ".csv" else frame.to_parquet(index=False)
    except ImportError as error:
        raise InputError("Parquet needs pyarrow, which is not installed.", "Write .csv, or install pyarrow.") from error
    put(path, data)
