"""Limits by the truth: raised where the reference itself is far from float64, or where rounding alone carries a record that far."""

import numpy as np
from numpy.typing import NDArray

from reports.numbers import count

from ..limits import LARGEST_ROUNDING
from ..measured.dataflow import Flow
from ..measured.measure import Measured
from .few_numbers import shares
from .known_tables import after_known_tables
from .truth import AMPLIFIED, BOTH, MULTIPLE, NO_ROUNDING, Above, Truth, raised
from .truth_columns import compared_part, joined, known_at

Floats = NDArray[np.float64]


def limits_by_truth(measured: Measured, limit: Floats, truth: Truth, model: Flow) -> tuple[Floats, tuple[str, ...]] | None:
    """Every record's limit, raised where the reference itself is far from float64, and the note on it; None if that is not known.

    Nothing is computed if no error is small enough to be rounding.
    """
    nmse = measured.measures.nmse
    if not (nmse > limit).any():
        return limit, ()
    share = shares(pair.ref for pair in measured.pairs)
    if not ((nmse > limit) & (nmse * share <= LARGEST_ROUNDING)).any():  # the larger of the two bounds
        return limit, ()
    coarse = np.array([pair.point in truth.coarse for pair in measured.pairs])[measured.point]
    near = (nmse > limit) & (nmse * share <= np.where(coarse, LARGEST_ROUNDING, AMPLIFIED))
    if not near.any():
        return limit, ()
    distances = truth.distances({pair.point: pair.ref for pair in measured.pairs})
    if not distances:
        return None
    distance = joined(measured, distances)
    keys, above = (measured.point, measured.seq, measured.token_idx), Above.of(model.names, model.parents)
    higher = raised(nmse, limit, distance, *keys, np.zeros(len(nmse), dtype=np.bool_), share=share, above=above)
    if (near & coarse).any():
        higher = np.where(coarse, after_known_tables(measured, limit, distance, near & coarse, truth, model), higher)
    higher = _spread(measured, higher, truth)
    passed = near & (nmse <= higher)
    if not passed.any():
        return higher, ()
    worst = int(np.argmax(np.where(passed, nmse, 0)))
    where = f"{measured.names[measured.point[worst]]}, position {measured.token_idx[worst]}"
    return higher, (
        f"noise: {count(int(passed.sum()), 'record')} over the usual limit where {_reason(bool(coarse[worst]))}: at {where} the sides are "
        f"{nmse[worst]:.1e} apart, and the reference is {distance[worst]:.1e} from float64",
    )


def _spread(measured: Measured, limit: Floats, truth: Truth) -> Floats:
    """Limits, [R], raised where rounding is amplified more than the reference's own distance shows, which may be small by luck.

    That happens where the terms of a sum cancel at one position, as in a scan. It is computed only if an error may be rounding.
    """
    nmse, share = measured.measures.nmse, shares(pair.ref for pair in measured.pairs)
    may_be_rounding = (nmse > limit) & (nmse * share <= AMPLIFIED)
    if not may_be_rounding.any():
        return limit
    # Of the values that are compared, which may be those of one head of many.
    by_noise = BOTH * known_at(measured, may_be_rounding, truth.spread, compared_part)
    limit = np.where(may_be_rounding, np.fmax(limit, np.minimum(by_noise, NO_ROUNDING / share)), limit)
    may_be_rounding &= nmse > limit
    if not may_be_rounding.any():
        return limit
    # Float32 itself is as far from the truth where two nearly equal scores follow another such pair: noise rarely hits both.
    own = known_at(measured, may_be_rounding, truth.own_rounding, compared_part)
    limit = np.where(may_be_rounding, np.fmax(limit, np.minimum(BOTH * own, NO_ROUNDING / share)), limit)
    amplified = np.minimum(np.minimum(by_noise, MULTIPLE * own), AMPLIFIED / share)
    return np.where(may_be_rounding & (nmse <= by_noise), np.fmax(limit, amplified), limit)


def _reason(coarse: bool) -> str:
    """Why the reference itself is far from float64."""
    return "llama.cpp's GELU is a table of float16" if coarse else "float32's own rounding is amplified"
