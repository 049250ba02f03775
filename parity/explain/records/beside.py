"""The wrong records of a place beside the right values, element by element, and at which positions they are."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from checkpoints.points import of_scores
from checkpoints.summary import sketch
from engine.backend import Array
from engine.faults import SEEN

from ...diff.limits import EXACT_FLOOR
from ...diff.measured.whole_rows import sizes
from ...laws.beside import Beside, room, room_of_others
from ...laws.keys import law_of_keys
from .records import Expected, Floats, Ints

Values = Mapping[str, Array]

# The least part of a row's length that its sketch, which is stored as float32 (6e-8), shows well enough to see a factor of 1.001 there.
_TOLD = 1e-3
_FEW = 2  # positions that a sentence names


def beside(
    entry: Expected, errors: Floats, values: Values, positions: Ints, bias: Floats | None = None, heads: int | None = None
) -> Beside | None:
    """The records of a point that are wrong, by these errors [R], with the right values; None if there is nothing to compare."""
    wrong = errors > entry.limit
    name = SEEN + entry.point if SEEN + entry.point in values else entry.point
    present = entry.present[wrong]
    if not wrong.any() or not present.any():
        return None
    count = int(present.sum(axis=1).min())
    if count == 0:
        return None
    right = entry.taken(values[name], positions)[wrong][:, :count]
    if entry.index is None:
        index = np.arange(count)
    else:
        index = entry.index[wrong][0, :count]
        if not (entry.index[wrong][:, :count] == index).all():
            return None
    whole = entry.whole_values(values[name], positions)
    fits = bias is not None and whole is not None and len(bias) == whole.shape[1]
    printed = (entry.quantum[wrong][:, :count] ** 2).sum(axis=1)
    dumped = entry.values[wrong][:, :count]
    noise = room(entry.limit[wrong], entry.energy[wrong], dumped, right)
    return Beside(
        dumped=dumped,
        right=right,
        index=index,
        room=noise + printed,
        others=room_of_others(noise, right) + printed,
        printed=printed,
        rows=entry.rows[wrong],
        whole=whole,
        bias=bias[index] if fits and bias is not None else None,
        heads=heads if whole is not None and heads and whole.shape[1] % heads == 0 else None,
        sketches=_sketches(entry, wrong, whole, dumped, index) if count < entry.width else None,
    )


def _sketches(
    entry: Expected, wrong: NDArray[np.bool_], whole: Floats | None, dumped: Floats, index: Ints
) -> tuple[Floats, Floats] | None:
    """Both sides' sketches of what was not recorded of a point's wrong records, if the dump has sketches that tell it: less the recorded
    elements, which may outweigh all others.
    """
    stored = entry.pair.ours.sketch
    if stored is None or whole is None or not (np.isfinite(whole).all() and np.isfinite(dumped).all()):
        return None
    ours, recorded, rest = stored[wrong].astype(np.float64), np.zeros((len(dumped), whole.shape[1])), whole[entry.rows[wrong]]
    recorded[:, index], rest[:, index] = dumped, 0.0
    left, right = ours - sketch(recorded), sketch(rest)
    told = np.linalg.norm(right, axis=1) > _TOLD * np.linalg.norm(ours, axis=1)
    return (left[told], right[told]) if told.any() else None


def of_keys(entry: Expected, errors: Floats, values: Values, positions: Ints) -> str:
    """The law of attention's weights that a point's wrong records follow, by these errors [R]; "" if it has no such, or none holds."""
    wrong, of_all = errors > entry.limit, sizes(entry.pair.ref)
    if not of_scores(entry.point) or not wrong.any() or entry.index is not None or np.isnan(of_all).any():
        return ""
    dumped, right = entry.values[wrong], entry.taken(values[entry.point], positions)[wrong]
    known = entry.present[wrong]
    printed = np.where(known, entry.quantum[wrong] ** 2, 0.0).sum(axis=1)
    compared = Beside(
        dumped=dumped,
        right=right,
        index=np.arange(dumped.shape[1]),
        room=room(entry.limit[wrong], entry.energy[wrong], np.where(known, dumped, 0.0), np.where(known, right, 0.0)) + printed,
        printed=printed,
        rows=entry.rows[wrong],
    )
    return law_of_keys(compared, of_all[wrong].astype(np.int64), known.sum(axis=1), of_all.astype(np.int64))


def few_positions(entry: Expected, errors: Floats, positions: Ints) -> str:
    """The positions at which alone a point is wrong, by these errors [R], as the beginning of a sentence; "" if they are many, or all.

    Within a lower arithmetic's limits others may be wrong as well: it is said that these are over them.
    """
    wrong = np.unique(entry.rows[errors > entry.limit])
    if len(wrong) > _FEW or len(wrong) >= len(np.unique(entry.rows)):
        return ""
    named = f"at position{'s' * (len(wrong) > 1)} {' and '.join(str(positions[row]) for row in wrong)}"
    wide = bool((entry.limit > EXACT_FLOOR.logits).any())
    return (
        f"{named}, the only {'one over its limit' if len(wrong) == 1 else 'ones over their limits'}, "
        if wide
        else f"{named} alone "
    )
