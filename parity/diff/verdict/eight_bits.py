"""Whether the errors of a side that doesn't state its arithmetic look like 8-bit activations: noise, everywhere, of that size.

This is no proof, because a fault can make noise of that size (LayerNorm instead of RMSNorm does, in some models). So nothing is
acquitted: the answer remains a divergence, but blames no operation and says what settles the question.
"""

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.diff import Pattern, Verdict
from checkpoints.points import parse

from ..limits import EXACT_FLOOR, LARGEST_ROUNDING
from ..measured.operations import MIXING
from ..measured.records import Records
from ..measured.slices import prepare, without_infinities
from ..readings.routing import is_routing
from .scatter import is_scatter

_POSITIONS = 3  # fewer do not distinguish noise from a constant
# The largest ratio of NMSE between positions of the first computed point: twice that of right engines, 143 with ten values per row
# (benchmarks/right_engines.py), in round numbers. A fault of attention leaves position 0 right: a ratio of a million.
_ALIKE = 300.0


# How many times as large as anywhere before it the usual error may be at the first point over its limit: rounding is there from the first
# product on. Right engines that round to 8 bits had at most 7 times (35 dumps of 20 architectures); in an F16 engine a fault of one
# operation had 100,000 times, and was called 8-bit arithmetic.
_GROWN = 100.0


def looks_like_eight_bits(records: Records) -> bool:
    """Whether the errors may be those of 8-bit activations: noise from the first products on, at every position."""
    errors = records.measures.nmse
    known = not records.limits.assumed or records.tokens.divergence is not None
    if known or not np.isfinite(errors).all():
        return False
    typical = np.array([np.median(errors[records.point == number]) for number in range(len(records.pairs))])
    wrong = typical > EXACT_FLOOR.operations
    after_products = records.flow.whole.downstream(lambda _, how: how.op in MIXING)
    multiplied = np.array([name in after_products for name in records.names])
    # Ids of experts are either right or different. Values before the first layer may have rows that are not whole blocks.
    must = multiplied & np.array([parse(pair.point).layer is not None and not is_routing(pair) for pair in records.pairs])
    if not (multiplied & wrong).any() or (must & ~wrong).any() or records.failed[~multiplied[records.point]].any():
        return False
    first = int(np.argmax(multiplied & wrong))
    here = errors[records.point == first]
    if len(here) < _POSITIONS or not 0 < here.min() <= here.max() <= min(_ALIKE * here.min(), LARGEST_ROUNDING):
        return False
    return is_noise(records, first) and not _jumps(records, np.where(multiplied, typical, 0.0), first)


def _jumps(records: Records, typical: NDArray[np.float64], first: int) -> bool:
    """Whether the error at the first point over its limit, [P] `typical` of each point, is none that grew from the errors before it.

    Only what is made by products counts, of which `typical` is not 0: embeddings may be kept in F16, a thousandth of what 8 bits make. Of
    the points made from no such product, the `first` shows what rounding makes.
    """
    if not records.failed.any():
        return False
    number = int(records.point[records.failed].min())
    above = records.flow.ancestors(records.names[number])
    before = [typical[at] for at in range(number) if records.names[at] in above and typical[at] > EXACT_FLOOR.operations]
    return bool(typical[number] > _GROWN * max(before, default=typical[first]))


def suspicion(verdict: Verdict) -> Verdict:
    """The verdict of a divergence that may be 8-bit arithmetic: it says so, and blames no operation."""
    note = (
        "noise from the first product on, at every position and of the size that 8-bit activations make: undeclared 8-bit "
        "arithmetic? --compute q8 allows for it, --model M.gguf measures it"
    )
    return replace(verdict, pattern=Pattern("eight-bits", note), operation="")


def is_noise(records: Records, number: int) -> bool:
    """Whether the errors of a point, of its whole rows if their sketches are known, are neither along its values nor the same everywhere.

    A few values of a row may be along its errors by chance: a handful of large elements makes most of both.
    """
    pair = records.pairs[number]
    values, ours, ref = prepare(pair), pair.ours.sketch, pair.ref.sketch
    a, b = without_infinities(values.a, values.b)
    if ours is not None and ref is not None and np.isfinite([ours, ref]).all() and not pair.ours.full().all():
        a, b = ours, ref
    return values.index is None and is_scatter(a.astype(np.float64), b.astype(np.float64))
