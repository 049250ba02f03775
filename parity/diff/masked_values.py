"""Values that mask (float32's largest, as of ids that a model never chooses), where one side's lower type made them infinite."""

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.record import Rows
from checkpoints.summary import summarise

from .align import Pair
from .limits import TABLE

# From here on a float32 rounds to infinity in BF16, and in F16 all the more. Infinities of smaller values are an overflow of F16.
_BEYOND_BF16 = (2 - 2.0**-8) * 2.0**127


def masked_as_ours(pairs: tuple[Pair, ...]) -> tuple[Pair, ...]:
    """The pairs; in rows where ours has infinities in place of all that mask, the reference has them, too."""
    return tuple(_as_ours(pair) for pair in pairs)


def without_infinite_masks(
    right: NDArray[np.float32], values: NDArray[np.float32], limit: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Both with 0 where the right one masks and the other has the infinity of its sign, if the limit is one of a lower arithmetic."""
    if limit <= TABLE or right.size != values.size:
        return right, values
    other = values.reshape(right.shape)
    masks = np.isinf(other) & (np.abs(right) >= _BEYOND_BF16) & (np.signbit(right) == np.signbit(other))
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
