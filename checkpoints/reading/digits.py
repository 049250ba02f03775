"""The digits that engines print, looked at for many records at once."""

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from . import fields

_SAMPLES = 8  # lines whose digits are looked at one by one; one printf writes all lines of a file …
_LEADING = 32  # … and all values of a line: whether the rest fits is seen from the values themselves

Floats = NDArray[np.float64]
Text = msgspec.Raw | memoryview | bytes


def quanta(texts: Sequence[Text], values: Floats) -> Floats | None:
    """`quantum` of many records at once: the texts [R] of their values and these [R, k] -> [R, k], or None where all are exact.

    A few lines tell how the file is printed; the values themselves show which others are printed so. Where they don't fit,
    the line's own text decides.
    """
    rows, width = values.shape
    if not rows or not width:
        return None
    picked = [bytes(texts[i]) for i in sorted({i * (rows - 1) // max(_SAMPLES - 1, 1) for i in range(_SAMPLES)})]
    if all(fields.surely_exact(text) for text in picked):
        return None
    unsure = np.ones(rows, dtype=np.bool_)
    found = np.zeros((rows, width))
    step = _step(picked, width)
    if step is None:
        if all(fields.quantum(text, width) is None for text in picked):
            return None
    else:
        scaled = values / step
        # float64 holds a printed decimal to 1e-16 of itself.
        unsure = ~np.all(np.abs(scaled - np.rint(scaled)) <= 1e-9 + 4e-16 * np.abs(scaled), axis=1)
        found[~unsure] = step
    for r in np.flatnonzero(unsure).tolist():
        own = fields.quantum(bytes(texts[r]), width)
        if own is not None:
            found[r] = own
    return found if found.any() else None


def _step(texts: list[bytes], width: int) -> float | None:
    """The one step of the leading values of all these texts; None where they differ, or are exact."""
    count = min(width, _LEADING)
    steps: set[float] = set()
    for text in texts:
        sample = fields.quantum(b",".join(text.split(b",", count)[:count]), count)
        steps |= {-1.0} if sample is None else set(sample.tolist())
    step = steps.pop() if len(steps) == 1 else 0.0
    return step if step > 0 else None
