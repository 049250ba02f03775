"""A conformance run as a table: one row for each cell, for pandas and anything that reads Parquet."""

from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints.answers.conform import Conformance

from ..diff.table import write_frame

if TYPE_CHECKING:
    import pandas


def table(conformance: Conformance) -> "pandas.DataFrame":
    """A data frame with a row for each cell."""
    import pandas

    return pandas.DataFrame([result.as_dict() for result in conformance.results])


def write_table(conformance: Conformance, path: Path) -> None:
    """Write it as .csv or .parquet, as the name's ending says.

    Raises:
        InputError: another ending, Parquet without pyarrow, or the file cannot be written.
    """
    write_frame(table(conformance), path)
