"""Holds every measured record against its limit: the table's, the one that earlier layers' noise sets, and what noise excuses."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from checkpoints.answers.diff import Limits
from checkpoints.points import LOGITS, OUTPUT_NORM, parse

from .dataflow import Flow
from .limits import ASSUMED_JUMP, EXACT_FLOOR, FUTURE_MASS
from .measure import Measured
from .noise import excused

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Held:
    """Of each record, [R]: its NMSE limit, its error in proportion to it, and whether that is above 1."""

    limit: Floats
    of_limit: Floats
    failed: NDArray[np.bool_]
    notes: tuple[str, ...] = ()


def hold(found: Measured, allowed: Limits, model: Flow, *, excuse_noise: bool) -> Held:
    """Hold every record against its limit; `excuse_noise`: single positions where float32's own noise grows are let pass."""
    limit = _limit_of_each(found, allowed)
    of_limit = proportion(found.measures.nmse, found.measures.future_mass, limit)
    notes: tuple[str, ...] = ()
    if excuse_noise and allowed.operations == EXACT_FLOOR.operations:
        limit, notes = excused(model, found.point, found.seq, found.token_idx, found.measures.nmse, of_limit, limit)
        of_limit = proportion(found.measures.nmse, found.measures.future_mass, limit)
    return Held(limit, of_limit, of_limit > 1, notes)


def proportion(nmse: Floats, future_mass: Floats, limit: Floats) -> Floats:
    """Error in proportion to the limit, [R]; where equality is asked (limit 0) any error is infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(nmse == 0, 0.0, nmse / limit)
    return np.fmax(ratio, np.where(future_mass > FUTURE_MASS, future_mass / FUTURE_MASS, 0.0))


def _limit_of_each(found: Measured, allowed: Limits) -> Floats:
    """float64 [R]. Where the arithmetic is not known, the noise of the layers before sets the limit.

    A whole layer that agrees shows the engine's own noise; what jumps far above it later is no noise, however small it is
    against the loosest arithmetic. Before the first whole layer, and never above it, the loosest limit holds.
    """
    chosen = np.array(
        [allowed.points.get(pair.point, allowed.logits if pair.point == LOGITS else allowed.operations) for pair in found.pairs]
    )
    if allowed.assumed and len(found.measures):
        noise = 0.0
        starts = np.searchsorted(found.point, np.arange(len(found.pairs)))
        worst = np.maximum.reduceat(found.measures.nmse, starts)
        for number, pair in enumerate(found.pairs):
            if noise:
                floor = EXACT_FLOOR.logits if pair.point == LOGITS else EXACT_FLOOR.operations
                chosen[number] = min(chosen[number], max(floor, ASSUMED_JUMP * noise))
            if (parse(pair.point).kind == "l_out" or pair.point == OUTPUT_NORM) and worst[number] <= chosen[number]:
                noise = max(noise, float(worst[number]))
    return chosen[found.point] if len(found.point) else np.zeros(0)
