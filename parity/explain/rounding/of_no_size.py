"""Errors that begin as large as a lower arithmetic makes them, and are not those of our own rounding: a fault, an arithmetic that rounds in
another way, or both, where a later record is further off than any arithmetic makes it.
"""

from collections.abc import Mapping

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from checkpoints.answers.diff import Pattern, Verdict
from checkpoints.record import Dump
from reports.sentences import ARITHMETIC

from ...diff.compare import Comparison, Options
from ...diff.limits import LARGEST_ROUNDING
from .amplified import compared_by_cost
from .flipped import has_choices
from .known_model import KnownModel
from .precision import KINDS, mean_cost

ONE_NUMBER = "one-number"  # a pattern's code
_OPEN = ("undecided", "drift", "precision", "rounded", "eight-bits")  # patterns that do not say that there is a fault


class Nearest(Struct, frozen=True):
    """The arithmetic that costs about what the first difference is, the comparison by its limits, and whether there is a fault whatever the
    arithmetic.
    """

    kind: str
    compared: Comparison
    beyond_every: bool


def nearest(ours: Dump, ref: Dump, options: Options, known: KnownModel, first: str, error: float) -> Nearest | None:
    """The arithmetic whose cost at the `first` difference is nearest to its mean error; None if the costs are not known.

    There is a fault whatever the arithmetic if by what each costs this model, 8 bits too, a record is wrong that is further off than any
    rounding is. A model that chooses experts may have chosen others: that is left open.
    """
    case, sizes, compared = known.case, dict[str, float](), dict[str, Comparison]()
    for kind in KINDS:
        cost = known.floor(kind)
        allowed = None if cost is None else known.limits(ours, kind, cost)
        if case is None or cost is None or allowed is None:
            return None
        by_point = zip(case.entries, cost.products, cost.storage, strict=True)
        size = next(max(map(mean_cost, costs)) for entry, *costs in by_point if entry.point == first)
        if size > 0:
            sizes[kind] = abs(float(np.log(error / size)))
        compared[kind] = compared_by_cost(ours, ref, replace(options, compute=kind, limits=allowed), known, kind)
    if case is None or not sizes:
        return None
    kind = min(sizes, key=sizes.__getitem__)
    return Nearest(kind, compared[kind], not has_choices(case) and all(map(_is_beyond_rounding, compared.values())))


def _is_beyond_rounding(compared: Comparison) -> bool:
    """Whether a comparison by measured limits ends in a fault, and a wrong record is further off than any rounding."""
    verdict, records = compared.verdict, compared.records
    open_pattern = verdict.pattern is not None and verdict.pattern.code in _OPEN
    return not verdict and not open_pattern and bool((records.measures.nmse[records.failed] > LARGEST_ROUNDING).any())


def of_their_size(verdict: Verdict, kinds: Mapping[str, float], followed: str) -> Verdict:
    """A divergence as large as lower arithmetics would make it, by their `mismatch`, whose errors are not those of our own rounding."""
    named = " or ".join(ARITHMETIC[kind] for kind in kinds)
    if followed:
        sentence = (
            f"as large as {named} arithmetic makes it, but no rounding, which is scattered: it follows one number as if {followed}: "
            "a fault (`parity explain` and more points tell which)"
        )
        return replace(verdict, pattern=Pattern(ONE_NUMBER, sentence), operation="")
    sentence = (
        f"as large as {named} arithmetic makes it, but not where our own rounding puts it: a fault, or an arithmetic that rounds in "
        f"another way (--compute {min(kinds, key=kinds.__getitem__)} allows for it; more points and values tell)"
    )
    return replace(verdict, pattern=Pattern("undecided", sentence), operation="")
