"""Values that mask: float32's largest, as the logits of ids that a model never chooses.

Where both sides have them, they say nothing of the other values, next to which they are the whole energy of a row. A lower type
makes them infinite.
"""

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.record import Rows
from checkpoints.summary import summarise

from ..limits import TABLE
from .align import Pair
from .whole_rows import column

# From here on a float32 rounds to infinity in BF16, and in F16 all the more. Infinities of smaller values are an overflow of F16.
_BEYOND_BF16 = (2 - 2.0**-8) * 2.0**127


def masked_alike(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where both have a finite value that masks, of the same sign; of any one shape."""
    masks = (np.abs(a) >= _BEYOND_BF16) & (np.abs(b) >= _BEYOND_BF16) & np.isfinite(a) & np.isfinite(b)
    return np.asarray(masks & (np.signbit(a) == np.signbit(b)))


def may_mask(values: NDArray[np.float32]) -> bool:
    """Whether any of the values masks; NaN does not."""
    return bool(
        np.fmax.reduce(values, axis=None, initial=0) >= _BEYOND_BF16
        or np.fmin.reduce(values, axis=None, initial=0) <= -_BEYOND_BF16
    )


def both_mask(pairs: Sequence[Pair]) -> NDArray[np.bool_]:
    """Whether the whole rows of both sides hold values that mask, by their statistics: bool [R], False where one side has none."""
    ours, ref = (
        (column(pairs, side, "min") <= -_BEYOND_BF16) | (column(pairs, side, "max") >= _BEYOND_BF16) for side in ("ours", "ref")
    )
    return np.asarray(ours & ref)


def masked_as_ours(pairs: tuple[Pair, ...]) -> tuple[Pair, ...]:
    """The pairs; in rows where ours has infinities in place of all that mask, the reference has them, too."""
    return tuple(_as_ours(pair) for pair in pairs)


def without_masks(
    right: NDArray[np.float32], values: NDArray[np.float32], limit: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Both with 0 where both mask alike; under a lower arithmetic's limit also where the other has the infinity of the mask's sign."""
    if right.size != values.size:
        return right, values
    other = values.reshape(right.shape)
    masks = masked_alike(right, other)
    if limit > TABLE:
        masks |= np.isinf(other) & (np.abs(right) >= _BEYOND_BF16) & (np.signbit(right) == np.signbit(other))
    if not masks.any():
        return right, values
    return np.where(masks, np.float32(0), right), np.where(masks, np.float32(0), other).reshape(values.shape)


def _as_ours(pair: Pair) -> Pair:
    ours, ref = pair.ours, pair.ref
    counted = ours.stats.get("nonfinite", np.isinf(ours.values).sum(axis=1))
    chosen = np.flatnonzero(counted > 0)
    if not len(chosen) or ours.indices is not None or ref.indices is not None:
        return pair
    masked = np.abs(ref.values[chosen]) >= _BEYOND_BF16
    infinite = np.where(masked, np.copysign(np.float32(np.inf), ref.values[chosen]), ref.values[chosen])
    width = min(ours.values.shape[1], ref.values.shape[1])
    given = ours.values[chosen, :width]
    alike = np.where(masked[:, :width], given == infinite[:, :width], np.isfinite(given))
    alike |= np.arange(width) >= ours.counts[chosen, None]
    known = ref.full()[chosen] & ("nonfinite" in ours.stats)
    same = masked.any(axis=1) & alike.all(axis=1) & (~known | (counted[chosen] == masked.sum(axis=1)))
    if not same.any():
        return pair
    values = ref.values.copy()
    values[chosen[same]] = infinite[same]
    return replace(pair, ref=_with_values(ref, values))


def _with_values(rows: Rows, values: NDArray[np.float32]) -> Rows:
    """The rows with other values and the statistics of those; without any if not all of them were recorded."""
    if rows.indices is not None or not rows.full().all() or len(set(rows.counts.tolist())) > 1:
        return replace(rows, values=values, stats={}, sketch=None)
    made = summarise(rows.point, values, np.arange(len(rows)), slice_size=None)
    return replace(rows, values=values, stats=made.stats, sketch=made.sketch)
