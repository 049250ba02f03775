"""The Python interface: what `from parity import …` gives. Few names, which stay.

from parity import compare, read, table

verdict = compare("ours.jsonl", "ref.jsonl")
assert verdict, verdict.first_divergence
frame = table("ours.jsonl", "ref.jsonl")  # a pandas DataFrame, one row a compared record
"""

import os
from typing import TYPE_CHECKING, Any

from checkpoints.answers.diff import Verdict
from checkpoints.errors import ParityError
from checkpoints.formats import load
from checkpoints.record import Dump

from .diff.compare import Comparison, Options, comparison

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Dump", "ParityError", "Verdict", "compare", "read", "table"]

Source = str | os.PathLike[str] | Dump


def read(path: str | os.PathLike[str]) -> Dump:
    """A dump of any format that `parity diff` takes; `dump.points["blk.5.l_out"].values` are float32 [records, values].

    Raises:
        ParityError: it cannot be read, or holds no record.
    """
    return load(path)


def compare(ours: Source, ref: Source, **options: Any) -> Verdict:
    """Compare two dumps as `parity diff` does. The verdict is true for parity; `first_divergence` says where it is not.

    Args:
        options: `tolerance` (one NMSE limit for everything), `compute` (f32, tf32, f16, bf16: our side's arithmetic, where its
            dump does not say it), `strict` (what one side lacks is a divergence).

    Raises:
        ParityError: nothing in common, two prompts or models, or an unusable option.
    """
    return _compared(ours, ref, options).verdict


def table(ours: Source, ref: Source, **options: Any) -> "DataFrame":
    """Every compared record's figures, one row each: checkpoint, layer, token_idx, nmse, max_abs, cosine, limit, verdict, …

    Raises:
        ParityError: as `compare`.
    """
    from .diff.table import table as as_frame

    return as_frame(_compared(ours, ref, options).records)


def _compared(ours: Source, ref: Source, options: dict[str, Any]) -> Comparison:
    left, right = (source if isinstance(source, Dump) else load(source) for source in (ours, ref))
    return comparison(left, right, Options(**options))
