"""Limits by float64 for records behind the reference's tables of float16."""

import numpy as np
from numpy.typing import NDArray

from ..limits import JUMP
from ..measured.dataflow import Flow, upstream
from ..measured.measure import Measured
from .few_numbers import shares
from .truth import Above, Truth, of_table, raised
from .truth_columns import compared_part, joined, known_at

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_SEVERAL = 4  # records of a point, of which most cannot have a row's rarest entry by chance


def after_known_tables(measured: Measured, limit: Floats, distance: Floats, near: Bools, truth: Truth, model: Flow) -> Floats:
    """Limits [R] for points where the reference looked GELU up in a table of float16: a record that agrees neither with the same table
    nor with the exact function is wrong.

    An exact engine is as far from the reference as the reference is from the truth, and itself only float32's rounding away from the
    truth.

    Args:
        distance: NMSE of the reference's records from the truth. near: the records that are asked about.
    """
    keys, share = (measured.point, measured.seq, measured.token_idx), shares(pair.ref for pair in measured.pairs)
    nmse, above = measured.measures.nmse, Above.of(model.names, model.parents)
    concerned = measured.names_of(near)
    ours = {pair.point: pair.ours for pair in measured.pairs if pair.point in concerned}
    far = joined(measured, truth.distances(ours))
    ref = {pair.point: compared_part(pair) for pair in measured.pairs if pair.point in truth.coarse}
    exact = near & (far <= limit)
    higher = limit
    if (near & ~exact).any():
        own = joined(measured, truth.own_rounding(ref))
        exact |= near & (far <= raised(far, limit, own, *keys, np.zeros(len(near), dtype=np.bool_), share=share, above=above))
    if (near & ~exact).any():
        apart = joined(measured, truth.from_table(ref))
        sampled = of_table(limit, apart, *keys, above)
        higher = _one_entry(measured, sampled, truth)
        still_over = near & ~exact & (nmse > higher)
        if still_over.any():  # `apart` is one sample of which entries rounding chooses
            apart = np.fmax(apart, known_at(measured, still_over, truth.table_spread))
            further = known_at(measured, np.ones(len(still_over), dtype=np.bool_), truth.largest_entry)
            sampled = np.fmax(sampled, of_table(limit, apart, *keys, above))
            higher = np.fmax(higher, of_table(limit, np.fmax(apart, further), *keys, above))
        higher = np.where(_mostly_over(measured, near & ~exact & (nmse > sampled), model), sampled, higher)
    # The distance between the two, which may be on opposite sides of the truth.
    between = np.fmax(nmse, np.square(np.sqrt(np.fmax(distance, 0)) + np.sqrt(np.fmax(far, 0))))
    return np.where(exact, np.fmax(higher, between), higher)


def _mostly_over(measured: Measured, over: Bools, model: Flow) -> Bools:
    """Which records, bool [R], belong to a point at which most records are over their limits without inheriting that.

    Rounding changes the entry of a table that single elements use, one in thousands: as often as in the samples that are known. Which row
    is concerned differs from run to run, but not how many are.
    """
    nmse = measured.measures.nmse
    worst = upstream(model, measured.point, measured.seq, measured.token_idx, nmse, over).worst
    fresh = np.bincount(measured.point, weights=over & (nmse > JUMP * worst), minlength=len(measured.pairs))
    records = np.bincount(measured.point, minlength=len(measured.pairs))
    return np.asarray((2 * fresh > records)[measured.point] & (records >= _SEVERAL)[measured.point])


def _one_entry(measured: Measured, limit: Floats, truth: Truth) -> Floats:
    """Limits, [R], raised where a few elements may come from the neighbouring entry of a table; only for errors of the recorded values.

    Two right engines whose arguments lie on the two sides of a rounding step look up different entries, and one of sixteen values then
    dominates them all. In a whole row few elements do so: its estimate keeps its limit.
    """
    measures = measured.measures
    of_few = (measures.nmse > limit) & (measures.nmse_slice > limit) & (measures.nmse_row <= limit)
    if not of_few.any():
        return limit
    return np.where(of_few, np.fmax(limit, known_at(measured, of_few, truth.one_entry)), limit)
