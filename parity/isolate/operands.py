"""Whether an error holds the rounding of operands: which elements it moves, and by how much, follows from the operands alone."""

import numpy as np
from numpy.typing import NDArray

from ..diff.verdict.one_factor import shared_factor

# Rounding of operands is in the error of an engine that rounds them once, beside roundings that have nothing to do with it; in that of any
# other engine it is not. Standard errors: flash attention in F16 or BF16 of right bidirectional engines (twelve models, 128 or more
# elements a row, five to nine positions; benchmarks/kinds_of_kernel.py) held it 0.9 to 1.3 times, at most 3.2 from once and 9 or more from
# not at all; 0.6 to 1.5 times, and 2.4 or more from not at all, where sums are kept in that type as well. Chance alone reaches 3.5 in one
# of 4,000.
_ONCE, _AT_ALL = 4.0, 3.5


def holds_rounding(
    dumped: NDArray[np.float32], rounded: NDArray[np.float32], right: NDArray[np.float32], heads: int | None = None
) -> bool:
    """Whether the error of a value holds once, within its standard error, what rounding of the operands changes, and no factor besides.

    Args:
        dumped: the recorded value, [R, n].
        rounded, right: what follows from rounded operands, and from them as they are.
        heads: into how many a row divides, if it does: none may have a factor of its own.
    """
    wide = right.astype(np.float64).reshape(dumped.shape)
    change, error = rounded.reshape(dumped.shape) - wide, dumped - wide
    energy = float((change * change).sum())
    if dumped.ndim != 2 or not energy or not np.isfinite(error).all():
        return False
    times = float((change * error).sum()) / energy
    # Rows that mix the same operands share their rounding: an element of all rows counts once.
    spread = float(np.linalg.norm((change * (error - times * change)).sum(axis=0))) / energy
    held = abs(times - 1) <= _ONCE * spread and times >= _AT_ALL * spread
    if not held or shared_factor(error - change, wide) is not None:
        return False
    parts = heads if heads and dumped.shape[-1] % heads == 0 else 1
    of_heads = zip(np.split(error - change, parts, axis=1), np.split(wide, parts, axis=1), strict=True)
    return all(shared_factor(left, values) is None for left, values in of_heads)
