"""The digits that engines print, looked at for many records at once."""

import numpy as np
from numpy.typing import NDArray

from . import fields

_SAMPLES = 8  # lines whose digits are looked at one by one; one printf writes all lines of a file

Floats = NDArray[np.float64]


def quanta(lines: list[bytes], values: Floats) -> Floats | None:
    """`quantum` of many records at once: lines [R] and their values [R, k] -> [R, k], or None where all are exact.

    A few lines tell how the file is printed; the values themselves show which others are printed so. Where they don't fit,
    the line's own text decides.
    """
    rows, width = values.shape
    if not rows or not width:
        return None
    picked = sorted({i * (rows - 1) // max(_SAMPLES - 1, 1) for i in range(_SAMPLES)})
    if all(fields.surely_exact(lines[i]) for i in picked):
        return None
    samples = [fields.quantum(lines[i], width) for i in picked]
    if all(sample is None for sample in samples):
        return None
    found = np.zeros((rows, width))
    unsure = np.ones(rows, dtype=np.bool_)
    steps = {float(step) for sample in samples if sample is not None for step in sample}
    if len(steps) == 1 and None not in [None if sample is None else 0 for sample in samples]:
        step = steps.pop()
        if step > 0:
            scaled = values / step
            # float64 holds a printed decimal to 1e-16 of itself.
            unsure = ~np.all(np.abs(scaled - np.rint(scaled)) <= 1e-9 + 4e-16 * np.abs(scaled), axis=1)
            found[~unsure] = step
    for r in np.flatnonzero(unsure).tolist():
        own = fields.quantum(lines[r], width)
        if own is not None:
            found[r] = own
    return found if found.any() else None
