"""Sides that agree as far as lower arithmetic or the reference's table of float16 allows, but show what such noise never makes: a
factor or a summand that all positions share, or values that are all numbers of a lower type.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.diff import Pattern, Verdict
from checkpoints.points import EMBD, parse
from checkpoints.record import Rows
from reports.sentences import ARITHMETIC

from ..limits import EXACT_FLOOR, JUMP, NATIVE
from ..measured.align import Pair
from ..measured.operations import recurrent
from ..measured.records import Bools, Floats, Records
from ..measured.slices import prepare
from ..readings.readings import head_size_of
from ..readings.rounding import type_of
from ..readings.routing import is_routing
from ..tolerances.truth import Truth
from .cut_digits import Cuts
from .judge import judge
from .one_factor import NOTHING, POSITIONS, STEP, Allowed, shared_factor, shared_summand

ONE_FACTOR = "one-factor"  # a pattern's code
_WHOLE = "the whole row is "  # what a sketch shows
_DOMINANT = 0.5  # of a row's length, as one element of it: a quarter of the sum of squares
_TYPED = 16  # values that show a type; any has F16's bits by chance once in 8,192 draws
# A time step's bias that is kept in a lower type is a factor of a whole head after the scan, without noise: of a small step, exp(bias), by
# as much as the bias moves, between 4 and 8 four times as far as at 1 (plamo2 of random weights in BF16: 0.985 to 1.0057).
_OF_TIME_STEPS = 4.0
_FINER = ("f16", "tf32")  # arithmetics beside which a constant in BF16 shows
_STANDARD_ERRORS = 3.0
_TYPES = {"F16": "f16", "BF16": "bf16", "TF32": "tf32"}


class _Found(Struct, frozen=True):
    """What a point shows besides noise: the words for it, a pattern's code, and by how many times it exceeds what is allowed."""

    code: str
    words: str
    beyond: float


def held_to_noise(records: Records, verdict: Verdict, truth: Truth | None = None) -> tuple[Records, Verdict]:
    """The records and their verdict; a divergence if records that agree by limits wider than float32's show more than noise.
    With the `truth`, records that are as near to it as float32 is are not accused: then it is the reference that has a factor.
    """
    precision, exact = verdict.precision, records.limits.operations <= EXACT_FLOOR.operations
    if not verdict or records.mode == NATIVE or not (exact or (precision is not None and precision.arithmetic in STEP)):
        return records, verdict
    chosen, arithmetic, noise = records.trusted, "", "float32, or of the reference's table of float16"
    if exact:
        chosen &= records.measures.nmse > _in_float32(records)
    elif precision is not None:
        arithmetic = "bf16" if precision.source == "assumed" else precision.arithmetic
        noise = f"{ARITHMETIC[precision.arithmetic]} arithmetic"
    head = head_size_of(records.ref, records.ours) or 0
    otherwise = {fault.checkpoint for fault in records.record_faults}
    found, cuts = dict[int, _Found](), Cuts(records.flow)
    after_scans = records.flow.whole.downstream(lambda _, how: recurrent(how.op))
    for number, pair in enumerate(records.pairs):
        here = chosen[records.point == number]
        if not here.any() or is_routing(pair):
            continue
        # A table gives no row an error of its own factor; a number of each row that all but cancels does, in float32.
        tabled = exact and truth is not None and pair.point in truth.coarse
        errors = records.measures.nmse[records.point == number][here]
        fewest = 1 if tabled and errors.min() > JUMP * _of_inputs(records, pair.point) else POSITIONS
        # A table of float16 gives such numbers, and so does a recorder that rounds, as what is made from other records shows.
        typed = exact and pair.point not in otherwise and not _looked_up(records, pair.point)
        allowed = NOTHING
        if arithmetic:
            layers = _layers(records, pair.point)
            usual = Allowed.of(arithmetic, layers)
            if pair.point in after_scans:
                usual = replace(usual, above=_OF_TIME_STEPS * usual.above, spacing=0.0)
            allowed = cuts.narrowed(usual, pair.point, layers)
        constant = _of_constants(records, pair.point) if arithmetic in _FINER else 0.0
        part = _part(pair, here, allowed, head, noise, fewest, constant) or (_typed(pair, here) if typed else None)
        if part is not None and not (exact and truth is not None and _true(truth, pair, here)):
            found[number] = part
        if arithmetic:
            cuts.add(pair.point, allowed, [(errors, right) for which, errors, right in _views(pair, here, 0)])
    if not found:
        return records, verdict
    judged, divergent = failing_at(records, {number: part.beyond for number, part in found.items()})
    first = divergent.first_divergence
    assert first is not None
    part = found[judged.names.index(first.checkpoint)]
    return judged, replace(divergent, pattern=Pattern(part.code, f"{first.checkpoint}: {part.words}"), operation="")


def failing_at(records: Records, beyond: Mapping[int, float]) -> tuple[Records, Verdict]:
    """The records and their verdict if the records of some points fail: number of the point -> how many times what is allowed."""
    of_point: Floats = np.array([beyond.get(number, 0.0) for number in range(len(records.names))])
    failing = (of_point[records.point] > 0) & (records.measures.nmse > 0) & records.trusted
    failed = records.failed | failing
    judged = replace(
        records,
        failed=failed,
        of_limit=np.where(failing, np.fmax(records.of_limit, of_point[records.point]), records.of_limit),
    )
    return judged, judge(judged)


def _layers(records: Records, name: str) -> int:
    """The number of layers up to a point, its own included; 1 for points before the layers."""
    layer = parse(name).layer
    if layer is None and name != EMBD:
        layer = max((known for other in records.names if (known := parse(other).layer) is not None), default=0)
    return 1 + (layer or 0)


def _of_inputs(records: Records, name: str) -> float:
    """The worst error of the points that a point is directly made from, NMSE."""
    numbers = [records.names.index(other) for other in records.flow.parents[name]]
    return float(records.measures.nmse[np.isin(records.point, numbers)].max(initial=0.0))


def _true(truth: Truth, pair: Pair, chosen: Bools) -> bool:
    """Whether the chosen rows of ours are as near to the truth as float32 is."""
    distance = truth.distances({pair.point: pair.ours}).get(pair.point)
    return distance is not None and bool((distance[chosen] <= EXACT_FLOOR.at(pair.point)).all())


def _looked_up(records: Records, name: str) -> bool:
    """Whether a table lies between a point and the points that it is made from, or that is not known."""
    stretch, computations = records.flow.between(name), records.flow.whole.computations
    return stretch is None or any(computations[node].looked_up(node) for node in stretch.nodes)


def _in_float32(records: Records) -> Floats:
    """The limit of each record in float32, NMSE [R], if nothing raises it."""
    return np.array([EXACT_FLOOR.at(name) for name in records.names])[records.point]


def _of_constants(records: Records, name: str) -> float:
    """How far off a constant may be that is kept in BF16 and by which values are multiplied between a point and those it is made from."""
    stretch = records.flow.between(name)
    return STEP["bf16"] if stretch is not None and "SCALE" in records.flow.operations(stretch.nodes) else 0.0


def _part(
    pair: Pair, chosen: Bools, allowed: Allowed, head: int, noise: str, fewest: int, constant: float = 0.0
) -> _Found | None:
    """The part that a point's errors share in the chosen rows, of all elements or of one head's; None if there is none.

    Nothing tells a factor as near to 1 as `constant` from a constant that is rounded to BF16.
    """
    for which, errors, right in _views(pair, chosen, head):
        part = shared_factor(errors, right, allowed, fewest=fewest)
        if part is None and which != _WHOLE:
            part = shared_summand(errors, right, allowed)
        if part is not None:
            if part.factor and abs(part.factor - 1) <= constant + _STANDARD_ERRORS * part.error:
                words = f"{which}{part.words} beside the noise of {noise}: a factor, or a constant that is kept in BF16"
                return _Found("undecided", words, part.beyond)
            sentence = f"{which}{part.words} beside the noise of {noise}, and rounding, which is scattered, has no such part"
            return _Found(ONE_FACTOR, sentence, part.beyond)
    return None


def _views(pair: Pair, chosen: Bools, head: int) -> Iterator[tuple[str, Floats, Floats]]:
    """The errors and right values of the chosen rows, [R, k] both, in several views, each with the words for it: all leading values,
    each head's, and a sketch's projections of whole rows, in which a factor is the same.
    """
    values = prepare(pair)
    if values.counts is not None:
        width = int(values.counts[chosen].min())
        errors, right = _apart(values.a[chosen, :width], values.b[chosen, :width])
        yield "", errors, right
        whole = bool(pair.ref.full().all()) and width == pair.ref.values.shape[1]
        heads = width // head if head and whole and width % head == 0 else 0
        for number in range(heads if heads > 1 else 0):
            inside = slice(number * head, (number + 1) * head)
            yield f"head {number} alone is ", errors[:, inside], right[:, inside]
    if pair.ours.sketch is not None and pair.ref.sketch is not None:
        several = chosen & ~_dominated(pair.ref)
        yield _WHOLE, *_apart(pair.ours.sketch[several], pair.ref.sketch[several])


def _dominated(rows: Rows) -> Bools:
    """Whether one element dominates the projections of a whole row, [R]; its rounding is then theirs."""
    if not {"min", "max", "l2"} <= rows.stats.keys():
        return np.zeros(len(rows), dtype=bool)
    largest = np.fmax(np.abs(rows.stats["min"]), np.abs(rows.stats["max"]))
    return np.asarray(largest > _DOMINANT * rows.stats["l2"])


def _apart(ours: NDArray[np.float32], ref: NDArray[np.float32]) -> tuple[Floats, Floats]:
    """The differences of two sides' values, and those of the reference: 0 where either is not finite."""
    finite = np.isfinite(ours) & np.isfinite(ref)
    a, b = (np.where(finite, side, 0).astype(np.float64) for side in (ours, ref))
    return a - b, b


def _typed(pair: Pair, chosen: Bools) -> _Found | None:
    """A finding if all values of the chosen rows are numbers of a lower type and the reference's are not; otherwise None."""
    values = prepare(pair)
    if values.counts is None or int(values.counts[chosen].sum()) < _TYPED:
        return None
    inside = np.arange(values.a.shape[1]) < values.counts[chosen, None]
    ours, ref = (np.where(inside, side[chosen], np.float32(0)) for side in (values.a, values.b))
    name = type_of(ours)
    if not name or type_of(ref):
        return None
    sentence = (
        f"every value is one of {name}, and what it is computed from agrees as in float32: mixed precision, which nothing states "
        f"(--compute {_TYPES[name]} allows for it everywhere), though the reference's own table of float16 leaves as large an error"
    )
    return _Found("undecided", sentence, np.nextafter(1.0, 2.0))
