"""Compares every measured record with its limit: the table's, one set by the noise of earlier layers, or one raised for noise."""

from collections.abc import Collection

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.diff import Limits
from checkpoints.points import OUTPUT_NORM, parse
from reports.numbers import count

from ..limits import ASSUMED_JUMP, EXACT_FLOOR, FUTURE_MASS, GROWTH, JUMP, TABLE
from ..measured.dataflow import Flow, upstream
from ..measured.measure import Measured, energies
from ..measured.operations import ELEMENTWISE
from .by_truth import limits_by_truth
from .few_numbers import share_of_usual
from .noise import excused
from .truth import COARSE_MULTIPLE, NO_COARSE_ROUNDING, Truth

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


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
            f"noise: {count(number, 'record')} over the usual limit, but no further off than rounding makes sums that all but cancel, and "
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
        higher = None if truth is None else limits_by_truth(measured, limit, truth, model)
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


def limit_at_last(held: Held, measured: Measured, wrong: NDArray[np.int64], made_from: Collection[str]) -> float:
    """How far off a record of the last position may be by what it is made from, whose points these are; 0 if that fails there, or if one of
    the wrong records is of that position. A product leaves another part of its input's error in each row (2.5 times as much in a right
    gemma3's logits, behind GELU's table): the multiple is that of a record behind such a table.
    """
    last = int(measured.token_idx.max())
    above = np.isin(measured.point, [measured.names.index(name) for name in made_from]) & (measured.token_idx == last)
    known = not held.failed[above].any() and last not in measured.token_idx[wrong]
    return COARSE_MULTIPLE * float(held.limit[above].max(initial=0.0)) if known else 0.0


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

    The table is the same for all models (`limits.GROWTH`).
    """
    nmse = measured.measures.nmse
    above = upstream(model, measured.point, measured.seq, measured.token_idx, nmse, of_limit > 1)
    with np.errstate(invalid="ignore"):
        grown = (of_limit > 1) & (of_limit <= GROWTH) & (nmse <= JUMP * above.worst)
    if not grown.any():
        return limit, ()
    return np.where(grown, GROWTH * limit, limit), (
        f"precision: {int(grown.sum())} records are up to {of_limit[grown].max():.1f} × over the table's limit, and nothing jumps: "
        "taken as the cost of lower arithmetic in this model (an assumption: --model measures it)",
    )


def _no_worse(measured: Measured, limit: Floats, of_limit: Floats, model: Flow) -> Floats:
    """Every record's limit [R], no lower than the worst error among its inputs, if nothing that it depends on fails.

    Limits are set by point, but a cached row, for instance, is as far off at the point that reads it as where it was made. A row that is
    all but zero may be off by any multiple of itself, which is nothing beside the others.
    """
    starts = np.searchsorted(measured.point, np.arange(1, len(measured.pairs)))
    share = np.concatenate([share_of_usual(rows) for rows in np.split(energies(measured), starts)])
    nmse = np.where(share > 0, measured.measures.nmse * share, measured.measures.nmse)
    above = upstream(model, measured.point, measured.seq, measured.token_idx, nmse, of_limit > 1)
    return np.where(above.failed, limit, np.fmax(limit, above.worst))


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
    chosen = np.array([allowed.at(pair.point) for pair in measured.pairs])
    if (allowed.assumed or lower_arithmetic) and len(measured.measures):
        noise = 0.0
        starts = np.searchsorted(measured.point, np.arange(len(measured.pairs)))
        worst = np.maximum.reduceat(measured.measures.nmse, starts)
        for number, pair in enumerate(measured.pairs):
            if noise:
                chosen[number] = min(chosen[number], max(EXACT_FLOOR.at(pair.point), ASSUMED_JUMP * noise))
            if (parse(pair.point).kind == "l_out" or pair.point == OUTPUT_NORM) and worst[number] <= chosen[number]:
                noise = max(noise, float(worst[number]))
                if not allowed.assumed and noise > EXACT_FLOOR.operations:
                    break
    limit = chosen[measured.point] if len(measured.point) else np.zeros(0)
    for row in allowed.rows:
        here = (measured.seq == row.seq) & (measured.token_idx == row.token_idx)
        if row.checkpoint in measured.names:
            limit[here & (measured.point == measured.names.index(row.checkpoint))] = row.limit
    return limit
