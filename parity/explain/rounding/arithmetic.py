"""Two dumps compared where nothing says in which arithmetic one of them was computed: the one that fits best is found."""

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.diff import AGREES, Pattern, Precision
from checkpoints.points import ENCODER
from checkpoints.record import Dump, Rows
from engine.replay.precision import is_normed, rounded

from ...diff.compare import Comparison, Options, comparison
from ...diff.limits import EXACT_FLOOR
from ...diff.measured.align import Pair
from ...diff.measured.operations import MIXING
from ...diff.readings.rounding import rounded_to
from ...diff.readings.routing import in_order_of_experts
from ...diff.verdict.beyond_noise import ONE_FACTOR
from ...diff.verdict.scatter import is_scatter, spares_elements
from ...diff.verdict.undecided import in_cache
from ..case import Case
from ..records.records import Expected, Floats
from .amplified import compared_by_cost
from .flipped import has_choices
from .known_model import KnownModel
from .mixed import as_large_as_rounding, in_words, noise_here, noise_in_words, rounded_here
from .of_no_size import nearest, of_their_size
from .own_rounding import beside_own_run, held_to_own_run
from .precision import (
    KINDS,
    LOWER,
    OURS,
    REPRODUCED,
    PrecisionFloor,
    best,
    cosine,
    is_reproduced,
    mean_cost,
    mismatch,
    typical,
)
from .spared import spares_records
from .systematic import SECONDS, systematic


def of_unknown_arithmetic(ours: Dump, ref: Dump, options: Options, known: KnownModel, seconds: float = SECONDS) -> Comparison:
    """The comparison if nothing says what OURS computes in: float32, unless its first computed point differs as in a lower arithmetic.

    After `seconds`, no further number that the errors might follow is tried.
    """
    exact = comparison(ours, ref, replace(options, compute="f32"))
    as_float32 = _with(exact, "f32", "")
    first = exact.verdict.first_divergence
    if exact.verdict or first is None or first.checkpoint not in exact.records.names:
        return as_float32
    if exact.verdict.pattern is not None and exact.verdict.pattern.code == ONE_FACTOR:  # beside noise that float32 is allowed
        return as_float32
    before = _computed_before(exact, first.checkpoint)
    if known.case is None and not before:  # as though the model were not known
        assumed = comparison(ours, ref, replace(options, truth=None))
        return assumed if assumed.verdict.precision is None else _unless_no_rounding(assumed, as_float32, known, seconds)
    if known.case is None:
        return _in_part(as_float32, known.decoder, seconds)
    place = _first_computed(exact, known.case, first.checkpoint)
    if place is None:
        return as_float32
    pair = exact.records.pairs[exact.records.names.index(place)]
    if (beside := _beside(known.case, pair)) is not None:
        entry, errors, recorded = beside
        right = entry.taken(known.case.replay.on_host[pair.point], known.case.positions)
        # Rounding spares what a type holds exactly: many elements of an embedding of few bits, say.
        if spares_elements(errors, right, recorded) and not rounded_to(pair.ours, pair.ref):
            return _in_part(as_float32, known.case, seconds, shown=False)
    kinds = [kind for kind in KINDS if not before or _untouched(known.case, kind, before)]
    plausible = [lower for kind in kinds if (lower := _plausible(exact, ours, ref, options, known, kind, place)) is not None]
    # Whether the errors follow one number takes time to find: only where they are not those of our own rounding.
    elsewhere = any(lower.alike < REPRODUCED for lower in plausible)
    followed = _followed(known.case, pair, seconds) if elsewhere else ""
    fitting = {
        lower.kind: lower
        for lower in plausible
        if (lower.alike >= REPRODUCED or followed == "") and is_reproduced(lower.kind, lower.alike, lower.errors)
    }
    far = {kind: mismatch(lower.errors) for kind, lower in fitting.items()}
    ranked = best({kind: far[kind] for kind, lower in fitting.items() if lower.compared.verdict} or far)
    if ranked:
        found = fitting[ranked[0]]
        compared = _with(found.compared, ranked[0], first.checkpoint, ranked[1:])
        held = held_to_own_run if found.alike >= OURS else beside_own_run
        return held(compared, ours, known, ranked[0])
    if doubtful := {lower.kind: mismatch(lower.errors) for lower in plausible if lower.kind not in fitting}:
        error = float(np.mean(exact.records.measures.nmse[exact.records.point == exact.records.names.index(place)]))
        near = None if followed else nearest(ours, ref, options, known, place, error)
        if near is not None and near.beyond_every:
            return _with(near.compared, near.kind, first.checkpoint)
        return replace(as_float32, verdict=of_their_size(as_float32.verdict, doubtful, followed or ""))
    return _in_part(as_float32, known.case, seconds, shown=bool(before))


def _unless_no_rounding(assumed: Comparison, as_float32: Comparison, known: KnownModel, seconds: float) -> Comparison:
    """The comparison of an encoder–decoder by the table's limits, or as float32 where the errors of the first place are no rounding.

    Errors are no rounding if they spare elements, follow one number, or are the same at every position or along each position's own
    values, unless they are those of our own rounding.
    """
    first = as_float32.verdict.first_divergence
    assert first is not None
    assert assumed.verdict.precision is not None
    pair = as_float32.records.pairs[as_float32.records.names.index(first.checkpoint)]
    case = known.encoder if pair.point.startswith(ENCODER) else known.decoder
    pair = _plain(pair)
    if case is None or not assumed.verdict or (beside := _beside(case, pair)) is None:
        return assumed
    entry, errors, recorded = beside
    right = np.where(recorded, entry.taken(case.replay.on_host[pair.point], case.positions), 0.0)
    if spares_elements(errors, right, recorded) and not rounded_to(pair.ours, pair.ref):
        return as_float32
    if max(_alike(case, kind, pair) for kind in KINDS) >= REPRODUCED:
        return assumed
    followed = systematic(case, *beside, seconds)
    rows = recorded.any(axis=1)
    if not followed and is_scatter(right[rows] + errors[rows], right[rows]):
        return assumed
    kinds = {assumed.verdict.precision.arithmetic: 0.0}
    return replace(as_float32, verdict=of_their_size(as_float32.verdict, kinds, followed or ""))


def _plain(pair: Pair) -> Pair:
    """The records of an encoder's point, under the name that it has in the encoder's own case."""
    ours, ref = (replace(rows, point=rows.point.removeprefix(ENCODER)) for rows in (pair.ours, pair.ref))
    return replace(pair, point=ref.point, ours=ours, ref=ref)


def _in_part(as_float32: Comparison, case: Case | None, seconds: float, *, shown: bool = True) -> Comparison:
    """The comparison as float32, which blames no operation if only the first one that differs is rounded as in a lower arithmetic, or is
    off by noise of that size, or, where a product that agrees has `shown` float32, if what lies unrecorded before it may be."""
    first, records = as_float32.verdict.first_divergence, as_float32.records
    if case is None or first is None or (place := _first_computed(as_float32, case, first.checkpoint)) is None:
        return as_float32
    number = records.names.index(place)
    beside = _beside(case, records.pairs[number])
    if beside is None:
        return as_float32
    entry, errors, known = beside
    recorded = set(records.names[:number])
    if kinds := rounded_here(case, entry, errors, known, recorded):
        sentence = f"{place} is the right one {in_words(kinds)}"
    elif (
        shown
        and (among := as_large_as_rounding(case, entry, errors, known, recorded))
        and systematic(case, *beside, seconds) == ""
    ):
        sentence = (
            f"{place} differs by what F16 costs in the operations that make it and were not recorded ({among}), and what they read agrees "
            "as in float32: a fault in one of them, or a flash attention that keeps keys, values or sums in F16 (--compute f16 allows for "
            "it everywhere)"
        )
    elif (kind := noise_here(case, entry, errors, known, recorded)) or (kept := in_cache(records, place)):
        sentence = f"{place}: {noise_in_words(kind) if kind else kept}"
    else:
        return as_float32
    pattern = Pattern("undecided", sentence)
    return replace(as_float32, verdict=replace(as_float32.verdict, pattern=pattern, operation=""))


class _Plausible(Struct, frozen=True):
    """An arithmetic in which the first difference would agree: the comparison by its limits, each point's mean error and cost, and
    how much the errors of the first difference are those of our own rounding.
    """

    kind: str
    compared: Comparison
    errors: list[tuple[float, float, float]]
    alike: float


def _plausible(
    exact: Comparison, ours: Dump, ref: Dump, options: Options, known: KnownModel, kind: str, first: str
) -> _Plausible | None:
    """None if the error at `first` is not of the size that this arithmetic costs, or if it spares a point that it must have moved."""
    cost = known.floor(kind)
    allowed = known.limits(ours, kind, cost)
    if known.case is None or cost is None or allowed is None:
        return None
    place = exact.records.names.index(first)
    error = float(np.mean(exact.records.measures.nmse[exact.records.point == place]))
    products = next(products for entry, products in zip(known.case.entries, cost.products, strict=True) if entry.point == first)
    if not mean_cost(products) * LOWER <= error <= allowed.points[first] or _spared(exact, known.case, cost):
        return None
    compared = compared_by_cost(ours, ref, replace(options, compute=kind, limits=allowed), known, kind)
    if not any(point.checkpoint == first and point.status == AGREES for point in compared.verdict.points):
        return None
    alike = _alike(known.case, kind, exact.records.pairs[place])
    return _Plausible(kind, compared, _errors(exact, known.case, cost), alike)


def _followed(case: Case, pair: Pair, seconds: float) -> str | None:
    """The one number that the errors of a point follow; empty if there is none, None if the time did not suffice (`systematic`)."""
    return "" if (beside := _beside(case, pair)) is None else systematic(case, *beside, seconds)


def _first_computed(exact: Comparison, case: Case, first: str) -> str | None:
    """The first point from `first` on that differs and that our engine has: a product whose bias is added apart is none of its steps."""
    places = [point.checkpoint for point in exact.verdict.points if point.status != AGREES]
    return next((place for place in places[places.index(first) :] if _entry(case, place) is not None), None)


def _entry(case: Case, point: str) -> Expected | None:
    return next((entry for entry in case.entries if entry.point == point), None)


def _untouched(case: Case, kind: str, point: str) -> bool:
    """Whether products in an arithmetic leave a point as float32 does: for example, blocks of 8 bits hold an IQ4_NL embedding exactly."""
    entry = _entry(case, point)
    if entry is None:
        return False
    values = case.make(rounded(case.transformer.steps, kind, storage=False), len(case.positions))
    return mean_cost(entry.between(values.on_host[point], case.replay.on_host[point], case.positions)) <= EXACT_FLOOR.operations


def _beside(case: Case, pair: Pair) -> tuple[Expected, Floats, NDArray[np.bool_]] | None:
    """A point's entry, the errors of our records in its shape [R, k] against the right engine, and which of them are known.

    None where elements are listed by index, which are not matched here.
    """
    entry = _entry(case, pair.point)
    if entry is None or pair.ours.indices is not None or pair.ref.indices is not None:
        return None
    rows = {place: number for number, place in enumerate(_places(entry.pair.ours))}
    numbers = [rows.get(place, -1) for place in _places(pair.ref)]
    index = np.array(numbers, dtype=np.int64)
    recorded = np.flatnonzero(index >= 0)
    width = min(pair.ours.values.shape[1], entry.values.shape[1])
    right = entry.taken(case.replay.on_host[pair.point], case.positions)
    dumped, known = np.zeros(right.shape), np.zeros(right.shape, dtype=np.bool_)
    dumped[index[recorded], :width] = pair.ours.values[recorded, :width]
    known[index[recorded], :width] = np.arange(width)[None, :] < pair.ours.counts[recorded, None]
    known &= np.isfinite(dumped) & np.isfinite(right)
    return entry, np.where(known, dumped, 0.0) - np.where(known, right, 0.0), known


def _alike(case: Case, kind: str, pair: Pair) -> float:
    """The mean cosine of a point's errors to those of our own rounding, of products or of all activations, whichever is nearer; 0 where
    that is not known."""
    beside, nearest = _beside(case, pair), 0.0
    if beside is None:
        return nearest
    entry, errors, known = beside
    right = entry.taken(case.replay.on_host[pair.point], case.positions)
    twice = any(step.makes == pair.point and is_normed(step) for step in case.transformer.steps)
    for storage, normed in ((False, False), (True, False), *(((True, True),) if twice else ())):
        values = case.make(rounded(case.transformer.steps, kind, storage=storage, normed=normed), len(case.positions))
        computed = entry.taken(values.on_host[pair.point], case.positions)
        usable = known & np.isfinite(computed)
        rounding = np.where(usable, computed, 0.0) - np.where(usable, right, 0.0)
        nearest = max(nearest, cosine(np.where(usable, errors, 0.0), rounding))
    return nearest


def _with(compared: Comparison, arithmetic: str, in_float32: str, alike: tuple[str, ...] = ()) -> Comparison:
    precision = Precision(arithmetic, False, "measured", in_float32, alike)
    return replace(compared, verdict=replace(compared.verdict, precision=precision))


def _errors(exact: Comparison, case: Case, cost: PrecisionFloor) -> list[tuple[float, float, float]]:
    """Each point's error, and the cost of the arithmetic there: with products rounded, and with activations rounded."""
    records = exact.records
    numbers = {name: number for number, name in enumerate(records.names)}
    return [
        typical(records.measures.nmse[records.point == numbers[entry.point]], multiplied, stored)
        for entry, multiplied, stored in zip(case.entries, cost.products, cost.storage, strict=True)
        if entry.point in numbers
    ]


def _computed_before(compared: Comparison, first: str) -> str:
    """A product with weights before the first difference that agrees as float32 does; "" if there is none.

    Then the arithmetic is float32, or one in which this product is exact (`_untouched`).
    """
    model = compared.records.flow
    for point in compared.verdict.points:
        if point.checkpoint == first:
            break
        upstream = (
            {point.checkpoint, *_above(compared, point.checkpoint)}
            if point.checkpoint in model.whole.computations
            else set[str]()
        )
        if point.status == AGREES and MIXING & model.operations(upstream):
            return point.checkpoint
    return ""


def _spared(exact: Comparison, case: Case, cost: PrecisionFloor) -> bool:
    """Whether all records of a point that this arithmetic must have moved are as right as in float32, or some records of any points."""
    records = exact.records
    # Rounding flips choices of experts, which costs far more than it does: here and there, or in most rows of what follows.
    of_rounding = np.min if has_choices(case) else np.median
    every: list[tuple[Floats, Floats, Floats]] = []
    ordered = in_order_of_experts(records.flow, records.pairs)  # two experts in turn cost more than any rounding
    for entry, products in zip(case.entries, cost.products, strict=True):
        if entry.point not in records.names or entry.point in ordered:
            continue
        here = records.point == records.names.index(entry.point)
        errors, limits = records.measures.nmse[here], records.limit[here]
        typical = float(of_rounding(products))
        if not np.isfinite(typical):
            continue  # rows of zeros, masks
        if typical > float(limits.max()) and float(errors.mean()) < LOWER * typical:
            return True
        places = {place: number for number, place in enumerate(_places(entry.pair.ours))}
        numbers = [places.get(place, -1) for place in _places(records.pairs[records.names.index(entry.point)].ref)]
        costs = np.where(np.array(numbers) >= 0, products[numbers], 0.0)
        every.append((errors, np.nan_to_num(costs, posinf=0.0), limits))
    return bool(every) and spares_records(*(np.concatenate(column) for column in zip(*every, strict=True)))


def _places(rows: Rows) -> list[tuple[int, int]]:
    """The sequence and position of each record."""
    return list(zip(rows.seq.tolist(), rows.token_idx.tolist(), strict=True))


def _above(compared: Comparison, name: str) -> set[str]:
    """All nodes that a point is made from."""
    makers = compared.records.flow.whole.computations
    every, waiting = set[str](), [name]
    while waiting:
        for other in makers[waiting.pop()].reads:
            if other not in every:
                every.add(other)
                waiting.append(other)
    return every
