"""Records at which float32's own rounding exceeds the table's limit: the arbiter decides or, without it, a rule of thumb."""

from collections.abc import Callable, Collection, Sequence

import numpy as np

from engine.faults import as_recorded
from engine.graph import Step
from engine.replay.replay import Replay
from reports.numbers import count

from ...diff.measured.dataflow import flow
from ...diff.tolerances.few_numbers import share_of_few, shares, worst_of_few
from ...diff.tolerances.noise import excused
from ...diff.tolerances.truth import AUTO, NO_COARSE_ROUNDING, NO_ROUNDING, OFF, Truth, raised
from .records import Expected, Floats, Ints, columns, right_rows, with_limits

EXPLAINED = 1e3  # a record's error must fall by this factor for a fault whose remaining error is its own noise


def allowed(
    entries: Sequence[Expected], right: Replay, positions: Ints, truth: Truth, arbiter: str
) -> tuple[list[Expected], tuple[str, ...]]:
    """The records with the limits that apply to them, and notes on what passes because of these.

    The reference whose distance from the truth counts is our right engine in float32.
    """
    over = [bool(entry.over.any()) for entry in entries]
    near = any(bool((entry.over & (entry.base <= no_rounding(entry, truth.coarse))).any()) for entry in entries)
    if not any(over) or (arbiter == AUTO and not near):
        return list(entries), ()
    if arbiter == OFF:
        return _excused(entries)
    return _by_truth(entries, right, positions, truth)


def no_rounding(entry: Expected, coarse: Collection[str]) -> Floats:
    """NMSE above which a point's records cannot be rounding: [R]; `coarse` are the points after a table of float16."""
    return (NO_COARSE_ROUNDING if entry.point in coarse else NO_ROUNDING) / share_of_few(entry.pair.ref)


def own_distance(entries: Sequence[Expected], values: Replay, positions: Ints, truth: Truth) -> Floats:
    """How far our own float32 values are from the truth at the recorded elements: NMSE [R], one point after the other."""
    rows = right_rows(values, positions, {entry.point: entry.pair.ours for entry in entries})
    index = {entry.point: entry.rows for entry in entries}
    taken = {name: recorded.take(index[name]) for name, recorded in rows.items()}
    distances = truth.distances(taken)
    return np.concatenate([worst_of_few(distances[entry.point], taken[entry.point]) for entry in entries])


def _by_truth(
    entries: Sequence[Expected], right: Replay, positions: Ints, truth: Truth
) -> tuple[list[Expected], tuple[str, ...]]:
    point, seq, token_idx = columns(entries)
    nmse, limit = (np.concatenate([getattr(entry, name) for entry in entries]) for name in ("base", "limit"))
    distance = own_distance(entries, right, positions, truth)
    coarse = np.array([entry.point in truth.coarse for entry in entries])[point]
    share = shares(entry.pair.ref for entry in entries)
    higher = raised(nmse, limit, distance, point, seq, token_idx, coarse, share=share)
    passed = (nmse > limit) & (nmse <= higher)
    notes: tuple[str, ...] = ()
    if passed.any():
        worst = int(np.argmax(np.where(passed, nmse, 0)))
        where = f"{entries[point[worst]].point}, position {token_idx[worst]}"
        table = bool(coarse[worst])
        what = "after ggml's GELU, a table with float16's precision" if table else "where float32's own rounding is amplified"
        unseen = ". A smaller fault shows only before the table, and in `parity isolate`" if table else ""
        notes = (
            f"noise: {count(int(passed.sum()), 'record')} over the usual limit {what}: at {where} yours are"
            f" {nmse[worst]:.1e} from our engine, which itself is {distance[worst]:.1e} from float64{unseen}",
        )
    return with_limits(entries, higher), notes


def without_own_noise(
    entries: Sequence[Expected],
    base: Sequence[Floats],
    nmse: tuple[Floats, ...],
    steps: Sequence[Step],
    make: Callable[[Sequence[Step], int], Replay],
    positions: Ints,
    truth_of: Callable[[Sequence[Step]], Truth],
) -> tuple[Floats, ...]:
    """The error that a changed list of steps leaves at each record, [R] a point, with what may be its own rounding set to no error.

    A fault may amplify float32's rounding over the limit: the remaining error is then a multiple of the list's own distance from
    float64, and was far larger before.

    Args:
        base: the error before the change.
    """
    old, new, limit = (np.concatenate(list(part)) for part in (base, nmse, [entry.limit for entry in entries]))
    plain = as_recorded(steps)
    truth = truth_of(plain)
    beyond = np.concatenate([no_rounding(entry, truth.coarse) for entry in entries])
    almost_right = (new > limit) & (new <= beyond) & (new * EXPLAINED <= old)
    if not almost_right.any():
        return nmse
    distance = own_distance(entries, make(plain, len(positions)), positions, truth)
    point, seq, token_idx = columns(entries)
    coarse = np.array([entry.point in truth.coarse for entry in entries])[point]
    share = shares(entry.pair.ref for entry in entries)
    own = almost_right & (new <= raised(new, limit, distance, point, seq, token_idx, coarse, NO_ROUNDING, share))
    ends = np.cumsum([len(entry.rows) for entry in entries])[:-1]
    return tuple(np.split(np.where(own, np.minimum(new, limit), new), ends))


def without_cost(
    entries: Sequence[Expected], base: Sequence[Floats], nmse: tuple[Floats, ...], costs: Callable[[], Sequence[Floats]]
) -> tuple[Floats, ...]:
    """As `without_own_noise`, where a lower arithmetic is stated: the remaining error is within what that costs the changed steps.

    Args:
        costs: measures the limits of the records, [R] a point, by that cost.
    """
    almost_right = [(new > entry.limit) & (new * EXPLAINED <= old) for entry, old, new in zip(entries, base, nmse, strict=True)]
    if not any(some.any() for some in almost_right):
        return nmse
    return tuple(
        np.where(some & (new <= limit), np.minimum(new, entry.limit), new)
        for entry, some, new, limit in zip(entries, almost_right, nmse, costs(), strict=True)
    )


def _excused(entries: Sequence[Expected]) -> tuple[list[Expected], tuple[str, ...]]:
    """The limits without the arbiter: errors that are rare and do not jump count as noise (`parity.diff.tolerances.noise`)."""
    point, seq, token_idx = columns(entries)
    nmse, limit = (np.concatenate([getattr(entry, name) for entry in entries]) for name in ("base", "limit"))
    limit, notes = excused(flow([entry.point for entry in entries]), point, seq, token_idx, nmse, nmse / limit, limit)
    return with_limits(entries, limit), notes
