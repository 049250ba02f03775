"""Whether the errors of a side that doesn't state its arithmetic look like 8-bit activations: noise, everywhere, of that size.

This is no proof: a fault can make noise of that size (LayerNorm instead of RMSNorm does, in some models), so it acquits nothing.
The answer stays a divergence, blames no operation and says what settles the question.
"""

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.diff import Pattern, Verdict
from checkpoints.points import parse

from .limits import EXACT_FLOOR, LARGEST_ROUNDING
from .operations import MIXING
from .records import Records
from .routing import is_routing
from .slices import prepare

Floats = NDArray[np.float64]

# Share of an error's energy that is along the values themselves (another scale, another epsilon), on average over the positions, whatever
# their size, or the same at every position (a constant, a bias). A choice: normal noise in the smallest sample that is judged, three
# positions of ten values, exceeds the first in 1 of 1,000 draws and the second in 2; with seven positions of sixteen values none of
# 200,000 did.
_ALONG, _COMMON = 0.4, 0.7
# A single position is along its values, as by a wrong scale of that position, if noise would be so in one of 10^6 draws of as many
# elements of equal weight, and if that is this many times as much as at the usual position: truncation is along all of them.
_CHANCE, _UNUSUAL = 1e-6, 4.0
_FEWEST = 8.0  # elements of equal weight: of fewer, one decides
_POSITIONS = 3  # fewer do not distinguish noise from a constant
# The largest ratio of NMSE between positions of the first computed point: twice that of right engines, 143 with ten values a row
# (benchmarks/right_engines.py), in round numbers. A fault of attention leaves position 0 right: a ratio of a million.
_ALIKE = 300.0


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
    return is_noise(records, first)


def suspicion(verdict: Verdict) -> Verdict:
    """The verdict of a divergence that may be 8-bit arithmetic: it says so, and blames no operation."""
    note = (
        "noise from the first product on, at every position and of the size that 8-bit activations make: undeclared 8-bit "
        "arithmetic? --compute q8 allows for it, --model M.gguf measures it"
    )
    return replace(verdict, pattern=Pattern("eight-bits", note), operation="")


def is_noise(records: Records, number: int) -> bool:
    """Whether the recorded errors of a point are neither along its values nor the same at every position."""
    values = prepare(records.pairs[number])
    a, b = values.a.astype(np.float64), values.b.astype(np.float64)
    if values.index is not None or not a.size or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return False
    delta = a - b
    energy = float((delta * delta).sum())
    if energy == 0:
        return False
    common = len(delta) * float((delta.mean(axis=0) ** 2).sum()) / energy
    if one_is_scaled(delta, b):
        return False
    return share_along(delta, b) <= _ALONG and (common <= _COMMON or len(delta) == 1)


def share_along(delta: Floats, values: Floats) -> float:
    """The share of the energy of errors [R, k] that is along the values [R, k], on average over the rows that have an error."""
    shares = _shares(delta, values)[0]
    return float(shares.mean()) if len(shares) else 0.0


def one_is_scaled(delta: Floats, values: Floats) -> bool:
    """Whether errors [R, k] of any row are along its values [R, k] as those of no noise and of no usual other row: its scale is wrong."""
    shares, sizes = _shares(delta, values)
    if len(shares) < _POSITIONS:
        return False
    # Of n normal numbers the share along any direction exceeds s by the chance (1 − s)^((n − 1) / 2), to within a factor of about 1.
    by_chance = 1 - _CHANCE ** (2 / (np.maximum(sizes, _FEWEST) - 1))
    return bool(((sizes >= _FEWEST) & (shares > by_chance) & (shares > _UNUSUAL * np.median(shares))).any())


def _shares(delta: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Of each row that has an error: the share of its energy along the values, and as how many elements of equal weight these count."""
    energies = (delta * delta).sum(axis=1) * (values * values).sum(axis=1)
    known = energies > 0
    delta, values = delta[known], values[known]
    shares = (delta * values).sum(axis=1) ** 2 / energies[known]
    sizes = [(rows * rows).sum(axis=1) ** 2 / (rows**4).sum(axis=1) for rows in (delta, values)]
    return shares, np.minimum(*sizes)
