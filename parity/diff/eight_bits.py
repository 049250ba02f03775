"""Whether the errors of a side that doesn't say its arithmetic are what 8-bit activations leave: noise, everywhere, of that size.

No proof: a fault can make noise of that size (LayerNorm where RMSNorm belongs does, in some models), so nothing is acquitted by it.
The answer stays a divergence, blames no operation and says what settles it.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from checkpoints.answers.diff import Pattern, Verdict
from checkpoints.points import parse

from .limits import EXACT_FLOOR, LARGEST_ROUNDING
from .operations import MIXING
from .records import Records
from .routing import is_routing
from .slices import prepare

Floats = NDArray[np.float64]

# Share of an error's energy that is along the values themselves (another scale, another epsilon) or the same at every position (a
# constant, a bias). A choice: normal noise in the least that is judged, three positions of ten values, is above the first in 4 of 1,000
# draws and above the second in 2; of seven positions of sixteen values none of 200,000 was.
_ALONG, _COMMON = 0.25, 0.7
_POSITIONS = 3  # fewer do not tell noise from a constant
# Positions of the first computed point may be this far apart in NMSE: twice what right engines measured, 143 of ten values a row
# (benchmarks/right_engines.py), in round numbers. A fault of attention leaves position 0 right: a million times.
_ALIKE = 300.0


def looks_like_eight_bits(records: Records) -> bool:
    """Whether nothing speaks against 8-bit activations: noise from the first products on, at every position."""
    errors = records.measures.nmse
    known = not records.limits.assumed or records.tokens.divergence is not None
    if known or not np.isfinite(errors).all():
        return False
    typical = np.array([np.median(errors[records.point == number]) for number in range(len(records.pairs))])
    wrong = typical > EXACT_FLOOR.operations
    behind = records.flow.whole.behind(lambda _, how: how.op in MIXING)
    multiplied = np.array([name in behind for name in records.names])
    # Ids of experts are right or are others. What is made before the first layer may have rows that are no whole blocks.
    must = multiplied & np.array([parse(pair.point).layer is not None and not is_routing(pair) for pair in records.pairs])
    if not (multiplied & wrong).any() or (must & ~wrong).any() or records.failed[~multiplied[records.point]].any():
        return False
    first = int(np.argmax(multiplied & wrong))
    here = errors[records.point == first]
    if len(here) < _POSITIONS or not 0 < here.min() <= here.max() <= min(_ALIKE * here.min(), LARGEST_ROUNDING):
        return False
    return is_noise(records, first)


def suspicion(verdict: Verdict) -> Verdict:
    """A divergence that may be 8-bit arithmetic: that is said, and no operation is blamed."""
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
    along = float((delta * b).sum()) ** 2 / (energy * max(float((b * b).sum()), 1e-300))
    common = len(delta) * float((delta.mean(axis=0) ** 2).sum()) / energy
    return along <= _ALONG and common <= _COMMON
