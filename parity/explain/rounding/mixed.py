"""Mixed precision: an engine in which one operation is rounded as a lower arithmetic rounds it, while those before it are as in
float32.

Our own rounding of that operation's steps, from its right inputs, then gives the engine's errors, element by element, as no fault does.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from checkpoints.points import parse
from engine import ops
from engine.backend import Array
from engine.graph import Step
from engine.inapplicable import NotApplicable
from engine.replay.kept import KEPT, kept
from engine.replay.precision import rounded, stored
from reports.sentences import ARITHMETIC, kept_in

from ...diff.limits import EXACT_FLOOR, limits
from ...diff.verdict.one_factor import beside_cut_digits
from ...diff.verdict.scatter import SIMILAR, is_scatter, recurs, spares_elements
from ..case import Case
from ..records.records import Expected, Floats
from ..search.state import SearchState
from .precision import KINDS, LOWER, UPPER, cosine, mean_cost
from .spared import VISIBLE

# Errors are those of a rounding if their mean cosine to it is at least this, and their size the same within this factor. Rounding of 16
# bits before products, or of 8 bits, was 1.00 in 60 right engines (`precision.is_reproduced`); ten elements of a chance direction reach
# 0.9 in one row of 10,000, and no rows have one.
_SAME, _AS_LARGE = 0.9, 1.5
# The NMSE of right engines that round, or sum, in other places than our rounding does: 0.09 times what rounded products cost to 3.8 times
# what rounded activations cost (measured, `precision.UPPER`).
_SMALLEST, _LARGEST = 0.09, 3.8
_LOWEST = limits(None, None, compute="bf16")
# Operations whose results alone an engine may keep in a lower type.
_SINGLE: tuple[tuple[object, ...], ...] = (
    (ops.attention_scores,),
    (ops.causal_soft_max,),  # not that of experts' scores
    (ops.causal_soft_max, "SOFT_MAX"),
    (ops.attention_scores, ops.causal_soft_max, ops.weighted_values),
    (ops.attention_scores, ops.causal_soft_max, "SOFT_MAX", ops.weighted_values),
    (ops.rms_norm, ops.layer_norm, "RMS_NORM", "NORM"),
    (ops.rope, "ROPE"),
    (ops.add, "ADD"),
)
Rounding = tuple[str, Floats, Floats]  # an arithmetic, errors where it gives numbers, and its own errors: [R, k]
_SEVERAL = 3  # operations that are not recorded: a single one shows its own rounding


def rounded_here(
    case: Case,
    entry: Expected,
    errors: Floats,
    known: NDArray[np.bool_],
    recorded: Collection[str],
    over: Callable[[], bool] = lambda: False,
) -> tuple[str, ...]:
    """All arithmetics in which a point's own operations make these errors, the nearest first.

    Args:
        errors: of the dump's records against the right engine, [R, k], in the entry's shape; `known` where they are.
        recorded: the points that agree before it, at which its own operations begin.
    """
    for some in (_roundings, _roundings_of_one_kind):
        near: dict[str, float] = {}
        for kind, found, rounding in some(case, entry, errors, known, recorded):
            if over():
                return ()
            if alike := likeness(found, rounding):
                near[kind] = max(alike, near.get(kind, 0.0))
        if near:
            return tuple(sorted(near, key=lambda kind: -near[kind]))
    return ()


def likeness(errors: Floats, rounding: Floats) -> float:
    """The mean cosine of errors [R, k] to those of a rounding, if they are that rounding by direction and size; else 0."""
    size, own = np.linalg.norm(errors), np.linalg.norm(rounding)
    alike = cosine(errors, rounding)
    return alike if alike >= _SAME and own <= _AS_LARGE * size and size <= _AS_LARGE * own else 0.0


def noise_here(case: Case, entry: Expected, errors: Floats, known: NDArray[np.bool_], recorded: Collection[str]) -> str:
    """The arithmetic that would make errors of about this size in a point's own operations, if they are noise in all elements and rows.

    "" if none does. Arguments as in `rounded_here`; sums in F16 are not those of our own rounding.
    """
    right = np.where(known, entry.taken(case.replay.on_host[entry.point], case.positions), 0.0)
    rows = known.any(axis=1)
    if spares_elements(errors, right, known) or recurs(errors[rows], right[rows]):
        return ""
    if not is_scatter(right[rows] + errors[rows], right[rows]):
        # Digits that are cut off make all values smaller, beside noise.
        left = beside_cut_digits(errors[rows], right[rows], "bf16")
        if left is None or not is_scatter(right[rows] + left, right[rows]):
            return ""
    off = np.linalg.norm(errors[rows], axis=1) / np.maximum(np.linalg.norm(right[rows], axis=1), np.finfo(np.float64).tiny)
    # Where experts may be chosen otherwise our own rounding "costs" half of a row: that much is no noise.
    if off.max() > np.sqrt(SIMILAR) * off.min() or off.max() ** 2 > _LOWEST.operations:
        return ""
    far = {
        kind: round(abs(float(np.log((found**2).sum() / own))))
        for kind, found, rounding in _roundings(case, entry, errors, known, recorded)
        if kind != "q8" and (own := float((rounding**2).sum())) > 0 and LOWER * own <= (found**2).sum() <= UPPER * own
    }
    return min(far, key=lambda kind: far[kind], default="")


def _roundings(
    case: Case, entry: Expected, errors: Floats, known: NDArray[np.bool_], recorded: Collection[str]
) -> Iterator[Rounding]:
    """Each arithmetic in which a point's own operations may have been computed, the errors where it gives numbers, and its own: [R, k]."""
    places = own_steps(case.transformer.steps, entry.point, recorded)
    ways = ((kind, places, lower) for kind in (*KINDS, *KEPT) for lower in _ways(kind))
    return _made_by(case, entry, errors, known, ways)


def _roundings_of_one_kind(
    case: Case, entry: Expected, errors: Floats, known: NDArray[np.bool_], recorded: Collection[str]
) -> Iterator[Rounding]:
    """As `_roundings`, where one kind of operation alone keeps its results in a lower type (scores, soft max, norms, RoPE, sums), and the
    others of the layer do not.
    """
    steps = case.transformer.steps
    places = own_steps(steps, entry.point, recorded)
    if len({layer for number in places if (layer := parse(steps[number].makes).layer) is not None}) > 1:
        return iter(())
    of_kind = [[number for number in places if _is_of(steps[number], kinds)] for kinds in _SINGLE]
    ways = ((kind, some, partial(stored, kind=kind)) for some in of_kind if some for kind in ("f16", "bf16"))
    return _made_by(case, entry, errors, known, ways)


def _made_by(
    case: Case,
    entry: Expected,
    errors: Floats,
    known: NDArray[np.bool_],
    ways: Iterable[tuple[str, list[int], Callable[[Sequence[Step]], list[Step]]]],
) -> Iterator[Rounding]:
    """A point's value if the steps of these numbers are computed in each of these ways."""
    right = entry.taken(case.replay.on_host[entry.point], case.positions)
    for kind, places, lower in ways:
        values = rounded_value(case, places, lower, entry.point)
        if values is None:
            continue
        computed = entry.taken(values, case.positions)
        usable = known & np.isfinite(computed)
        yield kind, np.where(usable, errors, 0.0), np.where(usable, computed - right, 0.0)


def _is_of(step: Step, kinds: Collection[object]) -> bool:
    """Whether a step's operation is one of these: ours, or ggml's by its name."""
    return step.op in kinds or getattr(step.op, "name", None) in kinds


def as_large_as_rounding(
    case: Case, entry: Expected, errors: Floats, known: NDArray[np.bool_], recorded: Collection[str]
) -> str:
    """The first and the last of several operations that may be in float16 by the size of the errors; "" if they are not of that size.

    Between the points that agree and this one nothing was recorded: a flash attention whose keys, values and sums are float16 leaves
    other errors than our rounding, of the same size.
    """
    places = own_steps(case.transformer.steps, entry.point, recorded)
    sizes = []
    for lower in _ways("f16"):
        values = rounded_value(case, places, lower, entry.point)
        if values is None or len(places) < _SEVERAL:
            return ""
        moved = entry.taken(values, case.positions) - entry.taken(case.replay.on_host[entry.point], case.positions)
        sizes.append(float(np.sum(np.where(known & np.isfinite(moved), moved, 0.0) ** 2)))
    found = float(np.sum(np.where(known, errors, 0.0) ** 2))
    if not _SMALLEST * sizes[0] <= found <= _LARGEST * sizes[1]:
        return ""
    return " to ".join(case.transformer.steps[number].makes for number in (places[0], places[-1]))


def law_of_rounding(case: Case, state: SearchState, over: Callable[[], bool] = lambda: False) -> str:
    """A sentence if the first place's own operations are rounded as a lower arithmetic rounds them, from inputs that agree; otherwise
    "". Where float32 is stated, an operation is not called rounded, but what it reads may be kept in a lower type."""
    kinds = kinds_of_rounding(case, state, over)
    if not kinds or (case.states_f32 and kinds[0] not in KEPT):
        return ""
    mixed = kinds[0] in KEPT or _spared_before(case, state, kinds[0])
    return f"every element is the right one {in_words(kinds, mixed=mixed)}"


def kinds_of_rounding(case: Case, state: SearchState, over: Callable[[], bool] = lambda: False) -> tuple[str, ...]:
    """The arithmetics as which the first place's own operations are rounded, from inputs that agree, the nearest first.

    None if the time is `over` before all were tried.
    """
    if state.first is None or state.faults or case.entries[state.first.point].lost.any() or over():
        return ()
    return rounded_here(case, *first_errors(case, state, case.replay.on_host), over)


def _spared_before(case: Case, state: SearchState, kind: str) -> bool:
    """Whether a record before the first place is right that this arithmetic's products would have moved: then it is not everywhere."""
    assert state.first is not None
    steps, place = case.transformer.steps, case.entries[state.first.point].point
    end = next(number for number, step in enumerate(steps) if step.makes == place)
    lower = case.make(rounded(steps[:end], kind, storage=False), len(case.positions), None, case.rounded(kind, False))
    return any(
        mean_cost(entry.between(lower.on_host[entry.point], case.replay.on_host[entry.point], case.positions))
        > VISIBLE * EXACT_FLOOR.operations
        and bool((entry.base <= EXACT_FLOOR.operations).all())
        for entry in case.entries[: state.first.point]
        if entry.point in lower.on_host
    )


def law_of_noise(case: Case, state: SearchState, values: Mapping[str, Array]) -> str:
    """A sentence if errors that no fault explains may be a lower arithmetic's; otherwise "".

    `values` are those of the state's steps, on the host.
    """
    kind = kind_of_noise(case, state, values)
    return noise_in_words(kind) if kind else ""


def kind_of_noise(case: Case, state: SearchState, values: Mapping[str, Array]) -> str:
    """The arithmetic that would make errors of a state's first place's size, if they are noise (`noise_here`); otherwise ""."""
    if state.first is None or case.entries[state.first.point].lost.any():
        return ""
    return noise_here(case, *first_errors(case, state, values))


def first_errors(
    case: Case, state: SearchState, values: Mapping[str, Array]
) -> tuple[Expected, Floats, NDArray[np.bool_], set[str]]:
    """A state's first place, its errors against these values, [R, k], where they are known, and the points that agree before it."""
    assert state.first is not None
    entry = case.entries[state.first.point]
    errors, known = entry.errors_beside(values[entry.point], case.positions)
    return entry, errors, known, {other.point for other in case.entries[: state.first.point]}


def in_words(kinds: Sequence[str], *, mixed: bool = True) -> str:
    """How an operation in one of these arithmetics differs from what lies before it, which is in float32 if the engine is `mixed`."""
    if (part := KEPT.get(kinds[0])) is not None:
        return f"where {kept_in(part.part, part.type)}"
    kinds = [kind for kind in kinds if kind not in KEPT]
    named = " or ".join(ARITHMETIC[kind] for kind in kinds)
    before = ", while what it is computed from is in float32: mixed precision" if mixed else ""
    return f"as {named} arithmetic rounds it{before} (--compute {kinds[0]} allows for it everywhere)"


def noise_in_words(kind: str) -> str:
    """A sentence on an operation whose errors are noise of the size that an arithmetic, or a cache's type, makes."""
    kind = KEPT[kind].type if kind in KEPT else kind
    return (
        f"noise in all elements, of the size that {ARITHMETIC[kind]} arithmetic makes there, while what it is computed from is in float32: "
        f"sums in lower arithmetic, or a small fault (--compute {kind} allows for it everywhere)"
    )


def own_steps(steps: Sequence[Step], point: str, recorded: Collection[str]) -> list[int]:
    """The numbers of the steps that make a point from the recorded ones before it."""
    wanted, numbers = {point}, list[int]()
    for number in range(len(steps) - 1, -1, -1):
        step = steps[number]
        if step.makes in wanted:
            numbers.append(number)
            wanted.update(name for name in step.names if name not in recorded)
    return numbers[::-1]


def _ways(kind: str) -> list[Callable[[Sequence[Step]], list[Step]]]:
    """The ways in which right engines use a lower type: for factors of products, for every value, for a part that they keep."""
    if kind in KEPT:
        return [partial(kept, kind=kind)]
    return [partial(rounded, kind=kind, storage=storage) for storage in (False, True)]


def rounded_value(case: Case, places: Sequence[int], lower: Callable[[Sequence[Step]], list[Step]], point: str) -> Array | None:
    """A point's value with these steps in a lower arithmetic; None where that changes nothing or cannot be computed."""
    steps = list(case.transformer.steps)
    for number, step in zip(places, lower([steps[number] for number in places]), strict=True):
        steps[number] = step
    try:
        lowered = case.lowered(steps, len(case.positions))
        value = case.replay.run(lowered, lambda name, _: name != point, places[0] if places else 0).get(point)
    except NotApplicable:
        return None
    return None if value is None else case.transformer.backend.to_host(value)
