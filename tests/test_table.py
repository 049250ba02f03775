"""The table of every record: one row each, the numbers of the comparison, written as CSV."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from dumps import DEFAULT, dump, noisy, random, spoiled

from checkpoints.errors import InputError
from parity.diff.compare import comparison
from parity.diff.verdict.table import table, write_table


def test_one_row_a_record() -> None:
    """The table has every record in dataflow order, with its figures and its verdict."""
    ref = random()
    records = comparison(dump(spoiled(noisy(ref), DEFAULT[3:], slice(2, None))), dump(ref)).records
    frame = table(records)
    assert len(frame) == 84
    assert frame["checkpoint"].drop_duplicates().tolist() == list(DEFAULT)
    assert np.array_equal(frame["nmse"], records.measures.nmse)
    assert (frame["verdict"] == "differs").sum() == 4 * 10
    assert frame.loc[frame["fresh"], "checkpoint"].unique().tolist() == ["blk.10.l_out"]
    assert frame.loc[frame["checkpoint"] == "embd", "layer"].isna().all()


def test_written_as_csv(tmp_path: Path) -> None:
    """A CSV file reads back as the same rows; another ending is refused before it is written."""
    side = dump(random())
    records = comparison(side, side).records
    write_table(records, tmp_path / "t.csv")
    assert len(pd.read_csv(tmp_path / "t.csv")) == 84
    with pytest.raises(InputError, match=r"\.csv or \.parquet"):
        write_table(records, tmp_path / "t.xlsx")
