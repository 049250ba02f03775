"""Whether lower arithmetic alone explains the differences: measured by the right engine with rounding."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from checkpoints.points import parse
from engine.backend import Array
from engine.graph import Step
from engine.replay.precision import ROUNDINGS, rounded
from engine.replay.replay import Replay

from ...diff.limits import EXACT_FLOOR
from ...diff.tolerances.few_numbers import share_of_usual
from ..records.records import Expected, Floats, Ints, first_over
from .spared import VISIBLE, spares_records
from .uneven import as_uneven, by_element, in_one_direction, in_two_elements

KINDS = tuple(ROUNDINGS)
# How far a right engine's error may lie from the one that our own rounding makes, which is applied in other places of the
# computation. Measured over a hundred random models and prompts in seven arithmetics (`benchmarks/explain_precision.py floors`):
# a point's mean lay between 0.09 times the floor of rounded products and 3.8 times that of rounded activations (both with sums
# in F16, which our rounding does not copy), its largest single record at 35 times the latter at most.
UPPER, LOWER = 30.0, 1 / 300.0
# The largest factor between the points' ratios: in one arithmetic they were within a factor of three of each other (measured on three
# lifted and three random models); a fault that is diluted in the first layer and has grown by the last spans more.
APART = 20.0
TOGETHER = 6.0  # the mean of all points' ratios: above the largest of single ones, 3.8
SINGLE = 100.0  # a single record against what its own activations cost when rounded
# Arithmetics that fit worse than the best by less than this (a factor of e in NMSE) cannot be distinguished from it: F16 and TF32 both keep
# eleven bits and differ by less than 0.1, and a right engine's sums in F16 lay 0.5 from either; BF16 and 8-bit activations lie 1.1 to 2.8
# apart (`parity.explain.rounding.precision.mismatch`, three lifted and three random models, seven arithmetics).
TOLD_APART, EQUAL = 1.0, 0.1
# Mean cosine of the errors at the first point, above which an engine rounds as ours does: 1.00 with blocks of Q8_0, as in
# llama.cpp. Eight bits cost so much that a fault may hide in it: an engine that rounds in another way is not acquitted.
REPRODUCED = 0.5
# Errors that are those of our own rounding: the cosine is 1.00 in right engines that round before products or activations as ours does.
# Their size is the same, but where what is rounded next to a tie falls to its other side.
OURS, _AS_LARGE = 0.98, 1.5


class PrecisionFloor(Struct, frozen=True):
    """The NMSE that one arithmetic costs at every record: with products rounded, and with every activation rounded; [R] a point.

    `alike`: the mean cosine of the dump's errors to those of our own rounding, at the first point that differs; 0 if none does.
    `concentrated`: points whose error is in two of many recorded elements, while our own rounding's is not.
    `spared`: the rows that the engine computes in float32, of which each has limits of its own cost.
    """

    kind: str
    products: tuple[Floats, ...]
    storage: tuple[Floats, ...]
    alike: float = 0.0
    concentrated: tuple[str, ...] = ()
    spared: tuple[int, ...] = ()

    def cost(self) -> Floats:
        """Mean NMSE of each point with every activation rounded: [P]."""
        return np.array([max(map(mean_cost, costs)) for costs in zip(self.products, self.storage, strict=True)])

    def limits(self, entries: Sequence[Expected], most: float) -> list[Floats]:
        """Of each point, the limits of its records, [R], that `most` times this arithmetic's cost gives (`_limit_of_each`)."""
        both = zip(entries, self.products, self.storage, strict=True)
        shares = [share_of_usual(entry.pair.ref.stats["l2"] ** 2) for entry in entries]  # of the right rows, not the dump's
        return [
            np.fmax(*(self._limits(entry, cost, share, most) for cost in costs))
            for share, (entry, *costs) in zip(shares, both, strict=True)
        ]

    def _limits(self, entry: Expected, cost: Floats, share: Floats, most: float) -> Floats:
        """The limits of a point's records, [R], of those in float32 and of the others by themselves."""
        limit, single = np.zeros(len(cost)), np.isin(entry.rows, self.spared)
        for some in (single, ~single):
            limit[some] = _limit_of_each(cost[some], share[some], most)
        return limit


def mean_cost(cost: Floats) -> float:
    """The mean cost of an arithmetic over a point's records, without rows of zeros, in which any change is infinitely large."""
    known = cost[np.isfinite(cost)]
    return float(known.mean()) if len(known) else 0.0


def _limit_of_each(cost: Floats, share: Floats, most: float) -> Floats:
    """The limit of each record of a point, [R]: `most` times the mean cost of its usual rows.

    A row that is all but zero (by its `share` of a usual one) costs any multiple of itself: it counts in proportion to the usual row, and
    has a limit of its own, at most what the mean over all rows would give.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        usual = most * mean_cost(cost * share)
        return np.fmax(usual, np.fmin(usual / share, most * mean_cost(cost)))


def is_reproduced(kind: str, alike: float, points: Sequence[tuple[float, float, float]]) -> bool:
    """Whether an arithmetic explains errors: they are those of our own rounding, or of the one size that F16 and TF32 cost at every point.

    Sums in F16 leave other errors than ours of the same size (cosine 0.0 to 0.4). Whoever rounds to BF16 or 8 bits before products has our
    errors (cosine 1.00 in 60 right engines; `alike` as `PrecisionFloor` has it), and those are so large that faults hide in their size.

    Args:
        points: as `mismatch` takes them.
    """
    return alike >= REPRODUCED or (kind in ("f16", "tf32") and _even(points))


def is_proof(measured: PrecisionFloor) -> bool:
    """Whether errors of this arithmetic's size prove it: those of 8 bits only if our own are the same, those of float types by size.

    Unlike `is_reproduced`, which is asked at a first computed point, this is asked of points after attention too: there llama.cpp with
    BF16 weights, whose cache is F16, leaves other errors than our BF16 does.
    """
    return measured.kind != "q8" or measured.alike >= REPRODUCED


def may_be_noise(entries: Sequence[Expected]) -> bool:
    """Whether lower arithmetic can be the reason at all: no layer before the first place agrees to float32's last digits."""
    first = next((number for number, entry in enumerate(entries) if entry.over.any()), None)
    if first is None:
        return True
    layer = parse(entries[first].point).layer
    # As in float32: not where a limit is raised so far that lower arithmetic stays below it (after ggml's table of GELU).
    before = [parse(entry.point).layer for entry in entries[:first] if (entry.base <= EXACT_FLOOR.operations).all()]
    return not any(known is not None and (layer is None or known < layer) for known in before)


def floor(
    kind: str,
    entries: Sequence[Expected],
    steps: Sequence[Step],
    right: Replay,
    make: Callable[..., Replay],
    positions: Ints,
    given: Callable[[str, bool], Mapping[str, Array]] = lambda _kind, _storage: {},
    spared: tuple[int, ...] = (),
) -> PrecisionFloor:
    """Measure what an arithmetic costs at each record of the dump.

    `given` are the values in that arithmetic that the steps read and none of them makes; `spared` the rows that `make` leaves in float32.
    """
    costs: list[tuple[Floats, ...]] = []
    concentrated = {entry.point: two for entry in entries if (two := in_two_elements(entry)) is not None}
    first = first_over(entries)
    alike = 0.0
    for storage in (False, True):
        other = make(rounded(steps, kind, storage=storage), len(positions), None, given(kind, storage))
        if first is not None:
            rows = (first.taken(values.on_host[first.point], positions) for values in (other, right))
            alike = max(alike, alike_at(first, *rows))
        costs.append(
            tuple(entry.between(other.on_host[entry.point], right.on_host[entry.point], positions) for entry in entries)
        )
        for entry in entries:
            if entry.point in concentrated:
                rows = (entry.taken(values.on_host[entry.point], positions) for values in (other, right))
                if as_uneven(entry, concentrated[entry.point], by_element(entry, *rows)):
                    del concentrated[entry.point]
    return PrecisionFloor(kind, costs[0], costs[1], alike, tuple(concentrated), spared)


def alike_at(entry: Expected, rounded_rows: Floats, right: Floats) -> float:
    """The mean cosine of a point's errors to those of rounded rows [R, k]."""
    return cosine(*(np.where(entry.present & np.isfinite(rows), rows - right, 0.0) for rows in (entry.values, rounded_rows)))


def cosine(rows: Floats, other_rows: Floats) -> float:
    """The mean cosine of rows, [R, k] both, that are not zero; 0 where none is."""
    sizes = np.linalg.norm(rows, axis=1) * np.linalg.norm(other_rows, axis=1)
    if not sizes.any() or not np.isfinite(sizes).all():
        return 0.0
    return float((np.einsum("ij,ij->i", rows, other_rows)[sizes > 0] / sizes[sizes > 0]).mean())


def fits(measured: PrecisionFloor, entries: Sequence[Expected]) -> float | None:
    """How badly a dump's differences fit this arithmetic (`mismatch`), None if it does not explain them.

    At every record the error must have the size of this arithmetic's cost there, within the factors above; values that it must have
    changed may not be exactly right, and values that it does not change must be.
    """
    numbers = [number for number, entry in enumerate(entries) if not of_ids(entry)]
    entries = [entries[number] for number in numbers]
    costs = [(measured.products[number], measured.storage[number]) for number in numbers]
    if not entries:
        return None
    base = np.concatenate([entry.base for entry in entries])
    # The table's limits: this arithmetic shows even where limits are raised (amplified rounding, a table of F16).
    limit = np.concatenate([np.full(len(entry.rows), EXACT_FLOOR.at(entry.point)) for entry in entries])
    products = np.concatenate([multiplied for multiplied, _ in costs])
    storage = np.maximum(products, np.concatenate([stored for _, stored in costs]))
    if not np.isfinite(base).all() or (base > SINGLE * np.maximum(storage, limit)).any():
        return None
    first = first_over(entries)
    if measured.concentrated or (first is not None and in_one_direction(first)):
        return None
    if measured.alike >= OURS and any(is_beyond(entry, *cost) for entry, cost in zip(entries, costs, strict=True)):
        return None
    if not (products > VISIBLE * limit).any() or spares_records(base, products, limit):
        return None
    for entry, (multiplied, stored) in zip(entries, costs, strict=True):
        noise, mean = float(entry.limit.max()), float(entry.base.mean())
        if mean > UPPER * max(float(multiplied.mean()), float(stored.mean()), noise / UPPER):
            return None
        if float(multiplied.mean()) > noise and mean < LOWER * float(multiplied.mean()):
            return None
    points = [typical(entry.base, multiplied, stored) for entry, (multiplied, stored) in zip(entries, costs, strict=True)]
    return mismatch(points) if _even(points) or (measured.alike >= OURS and _as_ours(points)) else None


def typical(errors: Floats, multiplied: Floats, stored: Floats) -> tuple[float, float, float]:
    """A point's error, and both costs of an arithmetic, of its records, [R] each: their means or, where one record has most of a cost (a
    scan whose terms cancel there), in which a mean is that record's luck, their geometric means.
    """
    if len(errors) == len(multiplied):
        columns = np.stack([errors, multiplied, stored])
        uneven = (2 * columns[1:].max(axis=1) > columns[1:].sum(axis=1)).any()
        if uneven and np.isfinite(columns).all() and (columns > 0).all():
            error, of_products, of_storage = np.exp(np.log(columns).mean(axis=1)).tolist()
            return error, of_products, of_storage
    return float(errors.mean()), mean_cost(multiplied), mean_cost(stored)


def _even(points: Sequence[tuple[float, float, float]]) -> bool:
    """Whether the points' errors, in proportion to the arithmetic's cost there, are of one size, and not far above it together."""
    above = [
        np.log(error / max(multiplied, stored))
        for error, multiplied, stored in points
        if error > 0 and multiplied > VISIBLE * EXACT_FLOOR.operations
    ]
    return not above or (float(np.mean(above)) <= np.log(TOGETHER) and max(above) - min(above) <= np.log(APART))


def is_ours(measured: PrecisionFloor, entries: Sequence[Expected]) -> bool:
    """Whether the errors are those of our own rounding, at every point that it changes: no fault leaves the same."""
    points = [
        (float(entry.base.mean()), mean_cost(products), mean_cost(storage))
        for entry, products, storage in zip(entries, measured.products, measured.storage, strict=True)
        if not of_ids(entry)
    ]
    for way in (1, 2):
        shares = [point[0] / point[way] for point in points if point[way] > VISIBLE * EXACT_FLOOR.operations]
        if measured.alike >= OURS and shares and max(shares) <= _AS_LARGE and min(shares) >= 1 / _AS_LARGE:
            return True
    return False


def _as_ours(points: Sequence[tuple[float, float, float]]) -> bool:
    """Whether the points' errors have, in proportion to the cost of one way of rounding, one size. The larger of both ways' costs, which
    `_even` takes, may lie far above a right engine's own at a point that hangs on a hair (weights of experts that all but tie).
    """
    return any(_even([(point[0], point[way], point[way]) for point in points]) for way in (1, 2))


def mismatch(points: Sequence[tuple[float, float, float]]) -> float:
    """How far errors are from an arithmetic's cost: the mean over the points of |log(error / cost)|, for rounded products or rounded
    activations, whichever is closer; `points` has each point's mean error and both costs. Infinite if neither cost is known.
    """
    values = np.array(points, dtype=np.float64).reshape(-1, 3)
    nearest = np.inf
    for cost in (values[:, 1], values[:, 2]):
        shows = (cost > VISIBLE * EXACT_FLOOR.operations) & np.isfinite(cost) & (values[:, 0] > 0) & np.isfinite(values[:, 0])
        if shows.any():
            nearest = min(nearest, float(np.abs(np.log(values[shows, 0] / cost[shows])).mean()))
    return nearest


def best(mismatches: Mapping[str, float]) -> tuple[str, ...]:
    """The arithmetics that fit best, the best first: several if they cannot be distinguished; empty if there are none."""
    if not mismatches:
        return ()
    least = min(mismatches.values())
    beyond = {kind: value - least for kind, value in mismatches.items() if value - least < TOLD_APART}
    return tuple(sorted(beyond, key=lambda kind: beyond[kind] if beyond[kind] > EQUAL else 0.0))


def of_ids(entry: Expected) -> bool:
    """Whether a point holds ids (of chosen experts): distances between them mean nothing, and a near tie may flip."""
    values = entry.pair.ref.values
    return bool((values == np.rint(values)).all()) and bool((values > 1).any())


def ratios(measured: PrecisionFloor, entries: Sequence[Expected]) -> list[tuple[float, float, float]]:
    """How far each point is from the floor: its mean error divided by that of rounded products, the same for rounded
    activations, and its largest single error divided by that record's cost. NaN where the floor is below float32's own noise.
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


def is_beyond(entry: Expected, products: Floats, storage: Floats) -> bool:
    """Whether a point, or one record of it, is further off than any right engine was that begins with our own rounding."""
    mean = TOGETHER * max(mean_cost(products), mean_cost(storage), float(entry.limit.max()))
    far = entry.base > SINGLE * np.fmax(np.fmax(products, storage), entry.limit)
    return bool(far.any()) or (not of_ids(entry) and typical(entry.base, products, storage)[0] > mean)


def with_noise(measured: PrecisionFloor, entries: Sequence[Expected], most: float = UPPER) -> list[Expected]:
    """The records with limits that this arithmetic does not exceed: `most` times what it costs a point on average."""
    limits = zip(entries, measured.limits(entries, most), strict=True)
    return [replace(entry, limit=np.maximum(entry.limit, limit)) for entry, limit in limits]
