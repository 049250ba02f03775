"""Compares every measured record with its limit: the table's, one set by the noise of earlier layers, or one raised for noise."""

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.diff import Limits
from checkpoints.points import LOGITS, OUTPUT_NORM, parse

from .dataflow import Flow, upstream
from .known_tables import after_known_tables, compared_part, joined, known_at, shares
from .limits import ASSUMED_JUMP, EXACT_FLOOR, FUTURE_MASS, JUMP, LARGEST_ROUNDING
from .measure import Measured
from .noise import excused
from .operations import ELEMENTWISE
from .truth import (
    AMPLIFIED,
    BOTH,
    MULTIPLE,
    NO_COARSE_ROUNDING,
    NO_ROUNDING,
    Above,
    Truth,
    raised,
)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# NMSE after ggml's GELU, whose argument and result are rounded to float16: a right engine with a GELU of its own is up to 3e-7 off at the
# operation (parity/diff/truth.py). At the default points of the small gemma3, gemma3n and gemma4 of random weights, six prompts each of 4
# to 14 tokens, right engines stayed below 5e-7 in sixteen of eighteen runs and reached 3.1e-6 in the worst (gemma4): such a run is a
# divergence with a note, since a fault can be as small. Where float64 is asked (--model) it decides instead.
TABLE = 1e-6
# The factor by which lower arithmetic's error may grow over the table's limit: twice what was measured (`_grown`).
GROWN = 25.0


class Held(Struct, frozen=True):
    """For each record, [R]: its NMSE limit, its error in proportion to the limit, and whether that is above 1.

    `excused` records are over the table's limit and pass by an assumption about rounding. `lower_arithmetic`: the limits are the table's
    for an arithmetic below float32.
    """

    limit: Floats
    of_limit: Floats
    failed: Bools
    notes: tuple[str, ...] = ()
    excused: int = 0
    lower_arithmetic: bool = False

    def take(self, chosen: NDArray[np.int64]) -> "Held":
        """The same for some of the records."""
        return replace(self, limit=self.limit[chosen], of_limit=self.of_limit[chosen], failed=self.failed[chosen])

    def with_noise(self, share: Floats) -> "Held":
        """The same, with the errors of records that may be noise multiplied by their share [R], which is below 1 for those."""
        number = int((share < 1).sum())
        if not number:
            return self
        note = (
            f"noise: {number} records are over the usual limit, but no further off than rounding makes sums that all but cancel, and "
            "everything computed from them agrees (an assumption: with --model the model's own rounding decides)"
        )
        limit, of_limit = self.limit / share, self.of_limit * share
        return replace(
            self,
            limit=limit,
            of_limit=of_limit,
            failed=self.failed & (of_limit > 1),
            notes=(*self.notes, note),
            excused=self.excused + number,
        )


def hold(
    measured: Measured,
    allowed: Limits,
    model: Flow,
    *,
    excuse_noise: bool,
    truth: Truth | None = None,
    lower_arithmetic: bool = False,
) -> Held:
    """Compare every record with its limit.

    Args:
        excuse_noise: let records pass at which float32's own rounding is amplified: by `truth` if that is known, else by how
            rare they are.
        lower_arithmetic: whether the limits are the table's for an arithmetic below float32, in exact mode.
    """
    limit = _limit_of_each(measured, allowed, lower_arithmetic=lower_arithmetic)
    after_table = np.zeros(len(limit), dtype=np.bool_)
    if excuse_noise and truth is None and (allowed.assumed or allowed.operations == EXACT_FLOOR.operations):
        after_table = _after_a_table(measured, model, limit)
    usual, limit = limit, np.where(after_table, np.maximum(limit, TABLE), limit)
    of_limit = proportion(measured.measures.nmse, measured.measures.future_mass, limit)
    tabled = (of_limit <= 1) & (measured.measures.nmse > usual)
    notes: tuple[str, ...] = ()
    assumed = tabled
    if excuse_noise and allowed.operations == EXACT_FLOOR.operations:
        higher = None if truth is None else _by_truth(measured, limit, truth, model)
        if higher is not None:
            limit, notes = higher
        else:
            limit, notes = excused(
                model, measured.point, measured.seq, measured.token_idx, measured.measures.nmse, of_limit, limit
            )
            assumed = assumed | (measured.measures.nmse > usual)
        of_limit = proportion(measured.measures.nmse, measured.measures.future_mass, limit)
    elif excuse_noise and lower_arithmetic:
        limit, notes = _grown(measured, limit, of_limit, model)
        of_limit = proportion(measured.measures.nmse, measured.measures.future_mass, limit)
    if excuse_noise and allowed.operations > EXACT_FLOOR.operations:
        limit = _no_worse(measured, limit, of_limit, model)
        of_limit = proportion(measured.measures.nmse, measured.measures.future_mass, limit)
    failed = of_limit > 1
    notes = (*_of_the_table(measured.measures.nmse, tabled, failed, after_table), *notes)
    return Held(limit, of_limit, failed, notes, int((assumed & ~failed).sum()), lower_arithmetic)


def _of_the_table(nmse: Floats, passed: Bools, failed: Bools, after_table: Bools) -> list[str]:
    """Notes on records that pass because of llama.cpp's GELU table, and on failures that it may explain if nothing else does."""
    table = "after llama.cpp's GELU (a table of float16)"
    notes: list[str] = []
    if passed.any():
        notes.append(
            f"noise: {int(passed.sum())} records {table} are up to {nmse[passed].max():.1e} off; "
            f"their limit is {TABLE:.0e} (--model lets float64 decide)"
        )
    if failed.any() and bool((after_table & (nmse <= NO_COARSE_ROUNDING))[failed].all()):
        notes.append(
            f"all {int(failed.sum())} records over the limit are {table} and at most {nmse[failed].max():.1e} off: a fault, or the "
            "table's rounding, amplified by this model (--model M.gguf lets float64 decide)"
        )
    return notes


def _after_a_table(measured: Measured, model: Flow, limit: Floats) -> Bools:
    """Which records, bool [R], may be off because of llama.cpp's table of GELU in float16.

    These are the records of points with such an operation between them and the compared points before, and records that inherit their
    error.
    """
    makers = model.whole.computations
    # Values made from such elements one by one are off like them; an operation that divides by small weights makes it a larger part.
    tables = set[str]()
    for name, how in makers.items():  # a point comes after what it reads
        if how.looked_up(name) or (how.op in ELEMENTWISE and not tables.isdisjoint(how.reads)):
            tables.add(name)
    after_table = model.whole.downstream(lambda name, _: name in tables)
    stretches = [model.between(name) for name in measured.names]
    # Elements of such a row that were not recorded may be off, too.
    part = measured.names_of(np.isnan(measured.measures.nmse_row))
    at = np.array(
        [
            stretch is not None
            and not (tables.isdisjoint(stretch.nodes) and after_table.isdisjoint(part & set(stretch.inputs)))
            for stretch in stretches
        ],
        dtype=np.bool_,
    )
    after = np.array([name in after_table for name in measured.names], dtype=np.bool_)
    if not after.any():
        return after[measured.point]
    nmse = measured.measures.nmse
    above = upstream(model, measured.point, measured.seq, measured.token_idx, nmse, nmse > limit)
    return np.asarray(at[measured.point] | (after[measured.point] & (nmse <= JUMP * above.worst)))


def _grown(measured: Measured, limit: Floats, of_limit: Floats, model: Flow) -> tuple[Floats, tuple[str, ...]]:
    """Every record's limit, raised where a lower arithmetic's error grew over the table's from layer to layer, and the note on it.

    The table is the same for all models: right engines with rounded products and activations were up to 3.1 times over it at inner points
    of six layers of random weights, and up to 11.4 times where ten values of a row were recorded (benchmarks/right_engines.py), though
    nothing jumped.
    """
    nmse = measured.measures.nmse
    above = upstream(model, measured.point, measured.seq, measured.token_idx, nmse, of_limit > 1)
    with np.errstate(invalid="ignore"):
        grown = (of_limit > 1) & (of_limit <= GROWN) & (nmse <= JUMP * above.worst)
    if not grown.any():
        return limit, ()
    return np.where(grown, GROWN * limit, limit), (
        f"precision: {int(grown.sum())} records are up to {of_limit[grown].max():.1f} × over the table's limit, and nothing jumps: "
        "taken as the cost of lower arithmetic in this model (an assumption: --model measures it)",
    )


def _no_worse(measured: Measured, limit: Floats, of_limit: Floats, model: Flow) -> Floats:
    """Every record's limit [R], no lower than the worst error among its inputs, if nothing that it depends on fails.

    Limits are set by point, but a cached row, for instance, is as far off at the point that reads it as where it was made.
    """
    nmse = measured.measures.nmse
    above = upstream(model, measured.point, measured.seq, measured.token_idx, nmse, of_limit > 1)
    return np.where(above.failed, limit, np.fmax(limit, above.worst))


def _by_truth(measured: Measured, limit: Floats, truth: Truth, model: Flow) -> tuple[Floats, tuple[str, ...]] | None:
    """Every record's limit, raised where the reference itself is far from float64, and the note on it; None if that is not known.

    Nothing is computed if no error is small enough to be rounding.
    """
    nmse = measured.measures.nmse
    if not (nmse > limit).any():
        return limit, ()
    share = shares(measured)
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
        f"noise: {int(passed.sum())} records are over the usual limit where {_reason(bool(coarse[worst]))}: at {where} the sides are "
        f"{nmse[worst]:.1e} apart, and the reference is {distance[worst]:.1e} from float64",
    )


def _spread(measured: Measured, limit: Floats, truth: Truth) -> Floats:
    """Limits, [R], raised where rounding is amplified more than the reference's own distance shows, which may be small by luck.

    That happens where the terms of a sum cancel at one position, as in a scan. It is computed only if an error may be rounding.
    """
    nmse, share = measured.measures.nmse, shares(measured)
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


def proportion(nmse: Floats, future_mass: Floats, limit: Floats) -> Floats:
    """Error in proportion to the limit, [R]; if equality is required (limit 0) any error is infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(nmse == 0, 0.0, nmse / limit)
    return np.fmax(ratio, np.where(future_mass > FUTURE_MASS, future_mass / FUTURE_MASS, 0.0))


def _limit_of_each(measured: Measured, allowed: Limits, *, lower_arithmetic: bool) -> Floats:
    """The limit of each record, float64 [R]. If the arithmetic is not known, the noise of earlier layers sets the limit.

    A whole layer that agrees shows the engine's own noise; an error that jumps far above it later is not noise, however small it is
    compared with the loosest arithmetic. The loosest arithmetic's limit holds before the first whole layer, and is never exceeded.
    A lower arithmetic that is stated allows for its own noise, but not behind whole layers that show float32's.
    """
    chosen = np.array(
        [
            allowed.points.get(pair.point, allowed.logits if pair.point == LOGITS else allowed.operations)
            for pair in measured.pairs
        ]
    )
    if (allowed.assumed or lower_arithmetic) and len(measured.measures):
        noise = 0.0
        starts = np.searchsorted(measured.point, np.arange(len(measured.pairs)))
        worst = np.maximum.reduceat(measured.measures.nmse, starts)
        for number, pair in enumerate(measured.pairs):
            if noise:
                floor = EXACT_FLOOR.logits if pair.point == LOGITS else EXACT_FLOOR.operations
                chosen[number] = min(chosen[number], max(floor, ASSUMED_JUMP * noise))
            if (parse(pair.point).kind == "l_out" or pair.point == OUTPUT_NORM) and worst[number] <= chosen[number]:
                noise = max(noise, float(worst[number]))
                if not allowed.assumed and noise > EXACT_FLOOR.operations:
                    break
    return chosen[measured.point] if len(measured.point) else np.zeros(0)
