"""Whether differences are those of lower arithmetic only: the right engine, rounded, is the measure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from checkpoints.points import LOGITS, of_scores, parse
from engine.graph import Step
from engine.replay.precision import ROUNDINGS, rounded
from engine.replay.replay import Replay

from ..diff.limits import EXACT_FLOOR
from .records import Expected, Floats, Ints

KINDS = tuple(ROUNDINGS)
# How far a right engine's error may lie from the one that our own rounding makes, which sits at other places of the
# computation. Measured over a hundred random models and prompts in seven arithmetics (`benchmarks/explain_precision.py floors`):
# a point's mean lay between 0.09 times the floor of rounded products and 3.8 times that of rounded activations (both with sums
# in F16, which our rounding does not copy), its largest single record at 35 times the latter at most.
UPPER, LOWER = 30.0, 1 / 300.0
# Between the points' ratios at most: those of one arithmetic lie within a factor of three of each other where that was measured (three
# lifted and three random models); a fault that is diluted in the first layer and grows by the last has more.
APART = 20.0
TOGETHER = 6.0  # the mean of all points' ratios: above the largest of single ones, 3.8
SINGLE = 100.0  # a single record against what its own activations cost when rounded
# Of the records that rounding must have changed by at least this many times their limit, this part may be exactly right or so:
# a single value can come out right by luck, a position or a point cannot.
VISIBLE, SPARED = 30.0, 0.01
# Arithmetics that fit worse than the best by less than this (a factor of e of NMSE) cannot be told from it: F16 and TF32 keep eleven
# bits alike and differ by less than 0.1, and a right engine's sums in F16 lay 0.5 from either; BF16 and 8-bit activations lie 1.1 to 2.8
# apart (`parity.explain.precision.mismatch`, three lifted and three random models, seven arithmetics).
TOLD_APART, EQUAL = 1.0, 0.1
# Part of the errors that points in no common direction where one element of a layer is wrong by itself: what it adds to a layer's output is
# one column of a matrix at every position, 3e-11 by float32's rounding. Rounding of all elements leaves 0.1 and more.
_PARALLEL, _PARALLEL_ROWS = 1e-6, 3
_OWN_DIRECTIONS = 1e-2  # and the right rows themselves have at least this part in others: those of one repeated token have none
# Mean cosine of the errors at the first point, above which an engine rounds as ours does: 1.00 with blocks of Q8_0, as llama.cpp has
# them. What 8 bits cost is so much that a fault may hide in it: an engine that rounds in another way is not acquitted.
_REPRODUCED = 0.5
_MANY = 10  # recorded elements of a row, from which on it can be seen that two of them hold all of the error


@dataclass(frozen=True)
class PrecisionFloor:
    """NMSE of every record that one arithmetic costs: with products rounded, and with every activation rounded; [R] a point.

    `alike`: the mean cosine of the dump's errors to those of our own rounding, at the first point that differs; 0 where none does.
    """

    kind: str
    products: tuple[Floats, ...]
    storage: tuple[Floats, ...]
    alike: float = 0.0

    def cost(self) -> Floats:
        """Mean NMSE of each point with every activation rounded: [P]."""
        return np.array([max(mean_cost(one), mean_cost(two)) for one, two in zip(self.products, self.storage, strict=True)])


def mean_cost(cost: Floats) -> float:
    """The mean of what an arithmetic costs at a point's records; left out are rows of zeros, of which any change is infinitely large."""
    known = cost[np.isfinite(cost)]
    return float(known.mean()) if len(known) else 0.0


def is_reproduced(kind: str, alike: float, points: Sequence[tuple[float, float, float]]) -> bool:
    """Whether an arithmetic explains errors: they are those of our own rounding, or of the one size that F16 and TF32 cost at every point.

    Sums in F16 leave other errors than ours of the same size (cosine 0.0 to 0.4). Whoever rounds to BF16 or 8 bits before products has our
    errors (cosine 1.00 in 60 right engines; `alike` as `PrecisionFloor` has it), and those are so large that faults hide in their size.

    Args:
        points: as `mismatch` takes them.
    """
    return alike >= _REPRODUCED or (kind in ("f16", "tf32") and _even(points))


def is_proof(measured: PrecisionFloor) -> bool:
    """Whether errors of the size of this arithmetic's are its own: those of float types are, 8-bit ones only where ours are the same."""
    return measured.kind != "q8" or measured.alike >= _REPRODUCED


def may_be_noise(entries: Sequence[Expected]) -> bool:
    """Whether lower arithmetic can be the reason at all: no layer in front of the first place agrees to the end of float32."""
    first = next((number for number, entry in enumerate(entries) if (entry.base > entry.limit).any()), None)
    if first is None:
        return True
    layer = parse(entries[first].point).layer
    before = [parse(entry.point).layer for entry in entries[:first]]
    return not any(known is not None and (layer is None or known < layer) for known in before)


def floor(
    kind: str,
    entries: Sequence[Expected],
    steps: Sequence[Step],
    right: Replay,
    make: Callable[[Sequence[Step], int], Replay],
    positions: Ints,
) -> PrecisionFloor:
    """Measure what an arithmetic costs at each record of the dump."""
    costs: list[tuple[Floats, ...]] = []
    first = next((entry for entry in entries if (entry.base > entry.limit).any()), None)
    alike = 0.0
    for storage in (False, True):
        other = make(rounded(steps, kind, storage=storage), len(positions))
        if first is not None:
            rows = (first.taken(values.on_host[first.point], positions) for values in (other, right))
            alike = max(alike, _alike(first, *rows))
        costs.append(
            tuple(entry.between(other.on_host[entry.point], right.on_host[entry.point], positions) for entry in entries)
        )
    return PrecisionFloor(kind, costs[0], costs[1], alike)


def _alike(entry: Expected, rounded_rows: Floats, right: Floats) -> float:
    """The mean cosine of a point's errors to those of rounded rows [R, k]."""
    return cosine(*(np.where(entry.present & np.isfinite(rows), rows - right, 0.0) for rows in (entry.values, rounded_rows)))


def cosine(theirs: Floats, ours: Floats) -> float:
    """The mean cosine of rows, [R, k] both, that are not zero; 0 where none is."""
    sizes = np.linalg.norm(theirs, axis=1) * np.linalg.norm(ours, axis=1)
    if not sizes.any() or not np.isfinite(sizes).all():
        return 0.0
    return float((np.einsum("ij,ij->i", theirs, ours)[sizes > 0] / sizes[sizes > 0]).mean())


def fits(measured: PrecisionFloor, entries: Sequence[Expected]) -> float | None:
    """How badly a dump's differences fit this arithmetic (`mismatch`), None if they are not its own.

    At every record the error must have the size of what this arithmetic costs there, give or take the factors above; what it
    must have changed may not be exactly right, and what it does not change must be.
    """
    numbers = [number for number, entry in enumerate(entries) if not of_ids(entry)]
    entries = [entries[number] for number in numbers]
    costs = [(measured.products[number], measured.storage[number]) for number in numbers]
    if not entries:
        return None
    base = np.concatenate([entry.base for entry in entries])
    # The table's limits: where they are raised (rounding that is amplified, a table of F16) this arithmetic still shows.
    each = [
        np.full(len(entry.rows), EXACT_FLOOR.logits if entry.point == LOGITS else EXACT_FLOOR.operations) for entry in entries
    ]
    limit = np.concatenate(each)
    products = np.concatenate([one for one, _ in costs])
    storage = np.maximum(products, np.concatenate([two for _, two in costs]))
    if not np.isfinite(base).all() or (base > SINGLE * np.maximum(storage, limit)).any():
        return None
    first = next((entry for entry in entries if (entry.base > entry.limit).any()), None)
    if any(_concentrated(entry) for entry in entries) or (first is not None and _parallel(first)):
        return None
    visible = products > VISIBLE * limit
    if not visible.any() or (visible & (base <= limit)).sum() > SPARED * visible.sum():
        return None
    for entry, (one, two) in zip(entries, costs, strict=True):
        noise, mean = float(entry.limit.max()), float(entry.base.mean())
        if mean > UPPER * max(float(one.mean()), float(two.mean()), noise / UPPER):
            return None
        if float(one.mean()) > noise and mean < LOWER * float(one.mean()):
            return None
    points = [
        (float(entry.base.mean()), float(one.mean()), float(two.mean()))
        for entry, (one, two) in zip(entries, costs, strict=True)
    ]
    return mismatch(points) if _even(points) else None


def _even(points: Sequence[tuple[float, float, float]]) -> bool:
    """Whether the points' errors, by what the arithmetic costs there, are of one size, and not far above it together."""
    above = [
        np.log(error / max(one, two)) for error, one, two in points if error > 0 and one > VISIBLE * EXACT_FLOOR.operations
    ]
    return not above or (float(np.mean(above)) <= np.log(TOGETHER) and max(above) - min(above) <= np.log(APART))


def _concentrated(entry: Expected) -> bool:
    """Whether all but a tenth of a point's error lies in two of many recorded elements: rounding spreads it over all."""
    right = entry.pair.ref.values.astype(np.float64)
    if right.shape != entry.values.shape or right.shape[1] < _MANY or of_scores(entry.point):
        return False
    delta = np.where(entry.present & np.isfinite(entry.values), entry.values - right, 0.0)
    columns = np.sort((delta**2 / entry.energy[:, None]).sum(axis=0))[::-1]
    over = bool((entry.base > entry.limit).any())
    return over and bool(columns[:2].sum() > 0.9 * columns.sum())


def _parallel(entry: Expected) -> bool:
    """Whether a point's errors are one vector at every position, each times a number, and the right rows are not: no rounding does that."""
    right = entry.pair.ref.values.astype(np.float64)
    over = entry.base > entry.limit
    if right.shape != entry.values.shape or over.sum() < _PARALLEL_ROWS or right.shape[1] < _PARALLEL_ROWS:
        return False
    errors = np.where(entry.present & np.isfinite(entry.values), entry.values - right, 0.0)[over]
    return _in_no_direction(errors) <= _PARALLEL and _in_no_direction(right[over]) >= _OWN_DIRECTIONS


def _in_no_direction(rows: Floats) -> float:
    """The part of some rows, each taken as a unit vector, that lies outside of the direction that most of them have."""
    sizes = np.linalg.norm(rows, axis=1)
    units = rows[sizes > 0] / sizes[sizes > 0, None]
    if len(units) < _PARALLEL_ROWS or not np.isfinite(units).all():
        return 1.0
    return float(1 - np.linalg.svd(units, compute_uv=False)[0] ** 2 / len(units))


def mismatch(points: Sequence[tuple[float, float, float]]) -> float:
    """How far errors lie from what an arithmetic costs: the mean over the points of |log(error / cost)|, for rounded products or rounded
    activations, whichever is nearer; of each point its mean error and what both cost. Infinite where neither shows.
    """
    values = np.array(points, dtype=np.float64).reshape(-1, 3)
    nearest = np.inf
    for cost in (values[:, 1], values[:, 2]):
        shows = (cost > VISIBLE * EXACT_FLOOR.operations) & np.isfinite(cost) & (values[:, 0] > 0) & np.isfinite(values[:, 0])
        if shows.any():
            nearest = min(nearest, float(np.abs(np.log(values[shows, 0] / cost[shows])).mean()))
    return nearest


def best(mismatches: Mapping[str, float]) -> tuple[str, ...]:
    """The arithmetics that fit best, the best first: more than one where they cannot be told apart; none of none."""
    if not mismatches:
        return ()
    least = min(mismatches.values())
    beyond = {kind: value - least for kind, value in mismatches.items() if value - least < TOLD_APART}
    return tuple(sorted(beyond, key=lambda kind: beyond[kind] if beyond[kind] > EQUAL else 0.0))


def of_ids(entry: Expected) -> bool:
    """Whether a point holds ids (of chosen experts): how far one is from another says nothing, and a near tie flips."""
    values = entry.pair.ref.values
    return bool((values == np.rint(values)).all()) and bool((values > 1).any())


def ratios(measured: PrecisionFloor, entries: Sequence[Expected]) -> list[tuple[float, float, float]]:
    """How far each point lies from the floor: its mean error by that of rounded products, the same by that of rounded
    activations, its largest single error by its record's cost. NaN where that floor is below float32's own noise.
    """
    of_entry = []
    for entry, products, storage in zip(entries, measured.products, measured.storage, strict=True):
        noise, mean = float(entry.limit.max()), float(entry.base.mean())
        upper = np.maximum(products, storage)
        lower = mean / float(products.mean()) if products.mean() > noise else float("nan")
        seen = upper > noise
        worst = float((entry.base[seen] / upper[seen]).max()) if seen.any() else float("nan")
        of_entry.append((lower, mean / float(upper.mean()) if upper.mean() > noise else float("nan"), worst))
    return of_entry


def with_noise(measured: PrecisionFloor, entries: Sequence[Expected]) -> list[Expected]:
    """The records with limits that this arithmetic does not exceed."""
    return [
        replace(entry, limit=np.maximum(entry.limit, UPPER * cost))
        for entry, cost in zip(entries, measured.cost(), strict=True)
    ]
