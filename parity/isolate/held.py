"""An operation's recorded value beside the one that follows from its inputs, and which of several definitions is meant by it."""

from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

# Of two definitions by which a value is wrong the later one is meant only if it is so many times nearer.
_NEARER = 10.0


def without_numbers(inputs: Sequence[NDArray[np.float32]], rows: int) -> NDArray[np.bool_]:
    """Which rows of a result nothing can be said of, bool [rows]: an input has NaN there, or somewhere that any row may read."""
    unknown = np.zeros(rows, dtype=np.bool_)
    for given in inputs:
        undefined = np.isnan(given) if given.dtype.kind == "f" else np.zeros(given.shape, dtype=np.bool_)
        if undefined.ndim == 2 and len(undefined) == rows:
            unknown |= undefined.any(axis=1)
        elif undefined.ndim == 3 and undefined.shape[1] == rows:
            unknown |= undefined.any(axis=(0, 2))
        elif undefined.any():
            unknown[:] = True
    return unknown


def nearer(errors: NDArray[np.float64], others: NDArray[np.float64], limit: float) -> bool:
    """Whether a definition with these errors of rows is nearer than an earlier one; of two that are as far off the first is meant."""
    wrong, before = int((errors > limit).sum()), int((others > limit).sum())
    return wrong < before or (wrong == before and bool(errors.max() * _NEARER < others.max()))


class Held(Struct, frozen=True):
    """An operation's recorded value and the one that follows from its inputs, at the positions [R] that all of them have."""

    inputs: Sequence[NDArray[np.float32]]
    dumped: NDArray[np.float32]
    ours: NDArray[np.float32]
    positions: NDArray[np.int64]
    errors: NDArray[np.float64]
    reason: str
    rounds: bool = False  # only a definition that rounds activations, unlike the first one, is as near
    unrounded: float = 0.0  # the worst error by the first definition
    unknown: bool = False  # of some rows nothing can be said: an input has NaN there
    lower: str = ""  # the type to which the right value was rounded, if nothing else is wrong

    def agrees(self, limit: float) -> bool:
        """Whether the recorded value is the right one, as it is or rounded to a lower type."""
        return bool(self.errors.max() <= limit) or bool(self.lower)
