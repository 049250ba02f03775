"""The Python interface: the few names that `from parity import …` offers. They stay stable.

from parity import compare, read, table

verdict = compare("ours.jsonl", "ref.jsonl")
assert verdict, verdict.first_divergence
frame = table("ours.jsonl", "ref.jsonl")  # a pandas DataFrame, one row per compared record
"""

import os
from typing import TYPE_CHECKING

from checkpoints.answers.diff import Verdict
from checkpoints.errors import ParityError
from checkpoints.formats import load
from checkpoints.record import Dump

from .diff.compare import Comparison, Options, comparison
from .lint.lint import refuse_unusable

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


def compare(
    ours: Source,
    ref: Source,
    *,
    tolerance: float | None = None,
    compute: str | None = None,
    strict: bool = False,
    despite_lint: bool = False,
) -> Verdict:
    """Compare two dumps as `parity diff` does. The verdict is true for parity; `first_divergence` says where it is not.

    Args:
        tolerance: one NMSE limit for everything, instead of the limits by point.
        compute: f32, tf32, f16, bf16 or q8, our side's arithmetic if its dump does not say it.
        strict: a record that only one side has is a divergence.
        despite_lint: compare even a dump that lint finds unusable.

    Raises:
        ParityError: nothing in common, two prompts or models, an unusable option or dump.
    """
    return _compared(ours, ref, Options(tolerance, compute, strict), despite_lint=despite_lint).verdict


def table(
    ours: Source,
    ref: Source,
    *,
    tolerance: float | None = None,
    compute: str | None = None,
    strict: bool = False,
    despite_lint: bool = False,
) -> "DataFrame":
    """Every compared record's figures, one row each: checkpoint, layer, token_idx, nmse, max_abs, cosine, limit, verdict, …

    Arguments and errors are those of `compare`.
    """
    from .diff.verdict.table import table as as_frame

    return as_frame(_compared(ours, ref, Options(tolerance, compute, strict), despite_lint=despite_lint).records)


def _compared(ours: Source, ref: Source, options: Options, *, despite_lint: bool) -> Comparison:
    left, right = (source if isinstance(source, Dump) else load(source) for source in (ours, ref))
    if not despite_lint:
        refuse_unusable(left, "ours")
        refuse_unusable(right, "the reference")
    return comparison(left, right, options)
