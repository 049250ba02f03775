"""Every compared record as a pandas table, to be filtered and plotted. pandas is imported only here."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from checkpoints.errors import InputError
from checkpoints.points import parse
from checkpoints.record import DECODE, PREFILL
from checkpoints.whole_file import put

from ..measured.records import Records

if TYPE_CHECKING:
    import pandas as pd


def table(records: Records) -> "pd.DataFrame":
    """One row per record, in dataflow order, then by sequence and position.

    Columns: checkpoint, layer (absent for points of the whole model), seq, token_idx, token (its text), step, phase, nmse,
    nmse_slice, nmse_row, max_abs, cosine, rel, ulp, limit, of_limit, verdict ("agrees" or "differs"), fresh.
    """
    import pandas as pd

    m, names = records.measures, records.names
    layers = np.array([-1 if (layer := parse(name).layer) is None else layer for name in names], dtype=np.int64)
    texts = [
        records.text.get(position) if seq == 0 else None
        for seq, position in zip(records.seq.tolist(), records.token_idx.tolist(), strict=True)
    ]
    each = layers[records.point]
    return pd.DataFrame(
        {
            "checkpoint": pd.Categorical(
                np.array(names, dtype=object)[records.point], categories=pd.Index(names), ordered=True
            ),
            "layer": pd.Series(each, dtype="Int64").mask(each < 0),
            "seq": records.seq,
            "token_idx": records.token_idx,
            "token": pd.array(texts, dtype="string"),
            "step": records.step,
            "phase": np.where(records.decode, DECODE, PREFILL),
            "nmse": m.nmse,
            "nmse_slice": m.nmse_slice,
            "nmse_row": m.nmse_row,
            "max_abs": m.max_abs,
            "cosine": m.cosine,
            "rel": m.relative,
            "ulp": m.ulp,
            "limit": records.limit,
            "of_limit": records.of_limit,
            "verdict": np.where(records.failed, "differs", "agrees"),
            "fresh": records.fresh(),
        }
    )


def write_table(records: Records, path: Path) -> None:
    """Write the table as .csv or .parquet, which the name's ending chooses.

    Raises:
        InputError: another ending, Parquet without pyarrow, or the file cannot be written.
    """
    write_frame(table(records), path)


def write_frame(frame: "pd.DataFrame", path: Path) -> None:
    """Write any data frame; raises as `write_table`."""
    check_ending(path)
    put(path, frame.to_csv(index=False).encode() if path.suffix == ".csv" else frame.to_parquet(index=False))


def check_ending(path: Path) -> None:
    """Raise InputError for a name that ends in neither .csv nor .parquet, or in .parquet without pyarrow."""
    if path.suffix not in (".csv", ".parquet"):
        raise InputError(f"cannot write a table as {path.name!r}.", "End its name in .csv or .parquet.", code="output")
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise InputError("Parquet needs pyarrow, which is not installed.", "Write .csv, or install pyarrow.", code="output")
