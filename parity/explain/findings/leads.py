"""What can be said if no known fault reproduces the numbers: the operation, laws of the numbers, partial candidates."""

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.explain import Lead, Named, PossibleOperations
from checkpoints.points import parse
from engine.backend import Array
from engine.graph import Step, weight_name

from ...diff.limits import EXACT_FLOOR, JUMP
from ...diff.verdict.first import UNRELATED
from ...laws.beside import LEFT
from ...laws.heads import heads_of
from ...laws.laws import OF_A_WEIGHT, WRONG, ZERO, law
from ...laws.moved import OTHER_ORDER
from ..case import Case
from ..records.beside import beside, few_positions, of_keys
from ..records.records import Expected, Floats, Ints
from ..search.cone import of_ggml
from ..search.fits import order_of_number
from ..search.one_more import spoils
from ..search.search import Search
from ..search.state import Candidate, SearchState, key
from .changed_weight import changed_weight
from .operands import other_operand
from .other_file import of_other_file
from .other_token import of_other_tokens
from .rest_of_row import with_rest
from .turned import other_positions
from .wrong_positions import which

Values = Mapping[str, Array]

_COUNT = 3  # partial candidates that are shown …
_TRIED = 12  # … of so many that remove most of the error at the first record
# Part of the error that a lead removes at every wrong record of the first point; elsewhere no error may grow by more than _WORSE.
# Wrong leads that were seen removed 96 to 99.6 % at the first record, and little at the next ones.
_WORTH, _WORSE = 0.9, 2.0
_TOGETHER = 0.5
# The most of the error that a cause may leave of the records that it reproduces, and of what is made next from a row seen in part. At the
# first place under wide limits it may leave what an operand may (`LEFT`): a lower arithmetic's limits let similar values pass.
_REMAINS = 0.5
# NMSE that counts as equal in an observation: float32's noise (limits.EXACT_FLOOR), with room for printed digits.
_EQUAL = 1e-9
_F16_MAX = 65504.0  # the largest finite float16


def believed(entries: Sequence[Expected], search: Search, start: SearchState, best: SearchState) -> SearchState:
    """The state with only those of its faults that are causes.

    A cause reproduces the whole point at which the difference began, with numbers that carry information, and nowhere makes more
    records wrong than right. Faults that do so only together must reproduce most of all records: two are enough to give one layer's
    numbers by chance. The last cause does not count if it may be that of the recorded part of a row alone (`_of_a_part`).
    """
    state = accepted = start
    apart = 0
    for candidate in best.faults:
        after = search.screening.reached(state, candidate)
        if after is None or spoils(entries, state, after):
            break
        state, apart = after, apart + 1
        share = mended_share(entries, accepted, after)
        part = candidate is best.faults[-1] and share is not None and share < _TOGETHER and _of_a_part(search, accepted, after)
        if share is not None and not part and (apart == 1 or share >= _TOGETHER):
            accepted, apart = after, 0
    return accepted


def _of_a_part(search: Search, before: SearchState, after: SearchState) -> bool:
    """Whether a cause may be that of the recorded elements alone: what is made of them in the same layer is wrong.

    That is asked of a fitted number and of zeros (the one head that was recorded may be 1.2 times too large, and the others right), and of
    what a step shows of a cache alone if not all of its rows were recorded: the leading values are row 0 at every position. Of other faults
    in a row that was seen in part it is asked whether what is made of it next stays as wrong: of two faults in one layer one takes its part
    of the error away.
    """
    if before.first is None or after.first is None:
        return False
    entries = search.screening.entries
    first = entries[before.first.point]
    zeros = not np.where(first.present, first.values, 0.0).any()
    made = before.planting.right.get(first.point)
    of_cache = made is not None and bool(made.histories) and set(made.names) <= set(made.histories) and not first.whole_rows
    layer, other = (parse(entries[state.first.point].point).layer for state in (before, after) if state.first is not None)
    if layer is None or layer != other or search.screening.cone(after).sure:
        return False
    if zeros or of_cache or order_of_number(after.faults[-1]) is not None:
        return True
    between = range(before.first.point + 1, after.first.point)
    if first.whole_rows or any(bool((before.nmse[at] > entries[at].limit).any()) for at in between):
        return False  # it reproduces a further point as well
    was, now = (state.nmse[after.first.point] for state in (before, after))
    known = np.isfinite(was)
    return not now[known].sum() <= _REMAINS * was[known].sum()


def mended_share(entries: Sequence[Expected], before: SearchState, after: SearchState) -> float | None:
    """The part of the wrong records that a further fault reproduces; None if it is not a cause of them."""
    if before.first is None or (after.first is not None and after.first.point <= before.first.point):
        return None
    spoiled = mended = shown = wrong = 0
    error = left = 0.0
    removed = True
    for number, (entry, old, new) in enumerate(zip(entries, before.nmse, after.nmse, strict=True)):
        was, now = old > entry.limit, new > entry.limit
        wrong += int(was.sum())
        spoiled += int((now & ~was).sum())
        mended += int((was & ~now).sum())
        finite_before = was & ~now & np.isfinite(old)
        here, remains = float(old[finite_before].sum()), float(new[finite_before].sum())
        error, left = error + here, left + remains
        if number == before.first.point and entry.limit.max() > EXACT_FLOOR.logits:
            removed = remains <= LEFT * here
        shown += int((was & ~now & _proves(entry, new)).sum())
    removed = removed and left <= _REMAINS * error  # and not only brought from just over their limits to just under
    return (mended - spoiled) / wrong if shown and spoiled < mended and removed else None


def _proves(entry: Expected, left: Floats) -> NDArray[np.bool_]:
    """Which records of a point a cause reproduces that leaves these errors, [R]: non-finite values prove nothing, unless the fault makes
    finite ones beside them, nor do numbers so small, but not 0, that whatever makes all but nothing is within the limit of them, unless
    what is left is within the limit of their own size.
    """
    size = _size(entry)
    with np.errstate(over="ignore", invalid="ignore"):
        tiny = (size > 0) & (size <= entry.limit * entry.energy) & (left * entry.energy > entry.limit * size)
    return np.asarray(_finite(entry) & ~tiny)


def _size(entry: Expected) -> Floats:
    """The squared length of the dump's rows, [R]."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.square(np.where(entry.present, entry.values, 0.0)).sum(axis=1))


def _finite(entry: Expected) -> NDArray[np.bool_]:
    finite = np.isfinite(np.where(entry.present, entry.values, 0.0)).all(axis=1)
    return np.asarray(finite | (finite.any() & ~finite.all()))


def may_have_cause(entries: Sequence[Expected], start: SearchState) -> bool:
    """Whether a fault that reproduces all that differs may be `believed`: not if everything is NaN, which many faults make."""
    return any(bool(((nmse > entry.limit) & _finite(entry)).any()) for entry, nmse in zip(entries, start.nmse, strict=True))


def law_at(case: Case, search: Search, state: SearchState) -> str:
    """The law that the numbers follow at a state's first place; "" if no law holds for all of them."""
    name = key(state.faults)
    if name not in search.laws:
        search.laws[name] = _law_at(case, search, state)
    return search.laws[name]


def _law_at(case: Case, search: Search, state: SearchState) -> str:
    if state.first is None:
        return ""
    entry, sentence = case.entries[state.first.point], _law_of_all(case, search, state, state.first.point)
    step = state.planting.right.get(entry.point)
    weights = () if step is None else tuple(weight_name(weight) for weight in step.weights if weight is not None)
    if not sentence or "position" in sentence or sentence.startswith(weights):  # a weight acts at every position
        return sentence
    return f"{few_positions(entry, state.nmse[state.first.point], case.positions)}{sentence}"


def _law_of_all(case: Case, search: Search, state: SearchState, place: int) -> str:
    """The law of all wrong records of a place."""
    entry = case.entries[place]
    values = search.screening.replay(state, len(case.positions)).on_host
    step = state.planting.right.get(entry.point)
    if step is None:
        return ""
    name = step.weights[1] if len(step.weights) > 1 else None
    bias = case.transformer.backend.to_host(case.replay.weights.get(name)) if isinstance(name, str) else None
    bias = bias.astype(np.float64) if bias is not None and bias.ndim == 1 else None
    errors = state.nmse[place]
    compared = beside(entry, errors, values, case.positions, bias, heads_of(state.planting.right, entry.point))
    sentence = of_keys(entry, errors, values, case.positions) or ("" if compared is None else law(compared))
    sentence = with_rest(entry, np.flatnonzero(errors > entry.limit), compared, sentence, case.positions)
    if sentence == ZERO and "eps" in step.params:
        sentence += ": a norm of a row with an unrecorded infinity, or a kernel that did not run"
    if sentence and not sentence.endswith((*OF_A_WEIGHT, WRONG)) and not sentence.startswith(OTHER_ORDER):
        return sentence
    # What is wrong with a weight, or which is read instead, says more than which elements are wrong.
    other = "" if sentence.endswith(WRONG) else other_operand(case, state, entry, errors)
    return (
        other
        or of_other_tokens(case, state, entry, errors)
        or other_positions(case, state, entry, errors)
        or changed_weight(case, search, state, entry, errors)
        or next(_other_point(entry, values, case.positions, errors > entry.limit), "")
        or of_other_file(case, state)
        or sentence
    )


def placed(case: Case, search: Search, state: SearchState) -> PossibleOperations | None:
    """Which operations are in question at a state's first place; None if errors below the limit before it have only grown there."""
    if state.first is None:
        return None
    cone = search.screening.cone(state)
    before = [errors.max() for entry, errors in zip(case.entries, state.nmse, strict=True) if entry.point in cone.agreeing]
    in_float32 = case.entries[state.first.point].limit.max() <= EXACT_FLOOR.logits  # wider limits are far above what is before
    if in_float32 and state.nmse[state.first.point].max() <= JUMP * max(before, default=0.0):
        return None
    if not in_float32 and _inherited(case, state, cone.agreeing):
        return None
    order = state.order
    place = case.entries[state.first.point].point
    names = tuple(
        name for name in sorted(cone.steps, key=lambda name: order.get(name, 0)) if name == place or not of_ggml(name)
    )
    seen: tuple[int, int] | None = None
    number = {entry.point: entry for entry in case.entries}
    for name in cone.agreeing:
        entry = number[name]
        width = entry.width
        if not entry.whole_rows and width and (seen is None or entry.values.shape[1] * seen[1] < seen[0] * width):
            seen = int(entry.present.sum(axis=1).min()), width
    return PossibleOperations(names, cone.agreeing, cone.sure, seen, cone.behind)


def _inherited(case: Case, state: SearchState, agreeing: Collection[str]) -> bool:
    """Whether at each position that is wrong at a state's first place, more than half of the error is that of what the place is made from,
    just below its own limit: errors that do not depend on each other add up.
    """
    assert state.first is not None
    entry, errors = case.entries[state.first.point], state.nmse[state.first.point]
    before: dict[int, float] = {}
    for other, passed in zip(case.entries, state.nmse, strict=True):
        if other.point in agreeing:
            for row, error in zip(other.rows.tolist(), passed.tolist(), strict=True):
                before[row] = max(before.get(row, 0.0), error)
    wrong = np.flatnonzero(errors > entry.limit)
    return all(errors[record] < 2 * before.get(int(entry.rows[record]), 0.0) for record in wrong)


def leads(entries: Sequence[Expected], state: SearchState, search: Search, positions: Ints, *, single: bool) -> list[Lead]:
    """What can be said about a state's first place: observations, then the candidates that remove most of the error.

    `single`: only one operation is in question, so that the observations need not say which ones are.
    """
    if state.first is None:
        return []
    entry = replace(entries[state.first.point], base=state.nmse[state.first.point])
    values = search.screening.replay(state, len(positions)).on_host
    right = state.planting.right
    acting = [] if single else [right[name] for name in search.screening.cone(state).steps]
    seen = [Lead(sentence) for sentence in _observations(entry, values, positions, acting)]
    best: dict[str, Lead] = {}
    tried: set[str] = set()
    for removed, candidate in sorted(search.tried.removed.get(key(state.faults), []), key=lambda pair: -pair[0]):
        if removed < _WORTH or len(best) >= _COUNT or len(tried) >= _TRIED:
            break
        if candidate.fault.name in best or str(key([candidate])) in tried:
            continue
        tried.add(str(key([candidate])))
        least = _removed(entries, search, state, candidate)
        if least is None:
            continue
        named = Named(
            candidate.fault.name, dict(candidate.parameters), candidate.layers, candidate.fault.sentence(candidate.parameters)
        )
        best[named.fault] = Lead(named.sentence, least, named)
    return [*seen, *best.values()]


def _removed(entries: Sequence[Expected], search: Search, state: SearchState, candidate: Candidate) -> float | None:
    """The part of the error that a candidate removes at every wrong record of the first point; None if it is not a lead: it
    removes too little somewhere, or makes something else worse.
    """
    after = search.screening.reached(state, candidate)
    if after is None or state.first is None:
        return None
    entry = entries[state.first.point]
    old, new = state.nmse[state.first.point], after.nmse[state.first.point]
    wrong = old > entry.limit
    with np.errstate(invalid="ignore"):
        least = float((1 - new[wrong] / old[wrong]).min())
    size = _size(entry)
    own = np.where(size > 0, np.fmin(size, entry.energy), entry.energy)
    if not np.isfinite(least) or least < _WORTH or bool((new * entry.energy >= UNRELATED * own)[wrong].any()):
        return None  # what is left beside garbage, huge or tiny, is as far off as unrelated values, which is no nearer to it
    for other, before, now in zip(entries, state.nmse, after.nmse, strict=True):
        if (now > _WORSE * np.maximum(before, other.limit)).any():
            return None
    return least


def _observations(entry: Expected, values: Values, positions: Ints, acting: Sequence[Step]) -> Iterator[str]:
    wrong = entry.over
    dumped = np.where(entry.present, entry.values, 0.0)[wrong]
    if not np.isfinite(dumped).all():
        share = 1 - np.isfinite(dumped).mean()
        yield f"{share:.0%} of the values are NaN or infinite: an overflow, an empty softmax row, or memory never written"
        return
    if not dumped.any():
        yield "all values are 0: memory never written, or a kernel that did not run"
        return
    if np.abs(dumped).max() >= _F16_MAX:
        yield "values reach float16's maximum (65504): saturation"
    yield from _other_point(entry, values, positions, wrong)
    right = entry.taken(values[entry.point], positions)[wrong]
    if not any(_steps(np.where(entry.present[wrong], right, 0.0))):  # rows of a table of F16 are exact in F16 in any engine
        yield from _steps(dumped)
    yield which(entry, wrong, acting)


def _close(a: Floats, b: Floats) -> bool:
    energy = float((b * b).sum())
    return energy > 0 and float(((a - b) ** 2).sum()) <= _EQUAL * energy


def _other_point(entry: Expected, values: Values, positions: Ints, wrong: NDArray[np.bool_]) -> Iterator[str]:
    """Equality with another point of the right engine: of whole rows where records have a sketch or statistics, else of their values."""
    dumped = np.where(entry.present, entry.values, 0.0)[wrong]
    part = ""
    for name, tensor in values.items():
        if name == entry.point or getattr(tensor, "ndim", 0) != 2 or tensor.shape[0] != len(positions):
            continue
        candidates = tensor[entry.rows[wrong], : dumped.shape[1]].astype(np.float64)
        if candidates.shape != dumped.shape or not _close(dumped, candidates):
            continue
        if not entry.whole or (entry.nmse(tensor, positions)[wrong] <= np.maximum(entry.limit[wrong], _EQUAL)).all():
            yield f"the values are those of {name} in a right engine"
            return
        part = (
            part or f"the {dumped.shape[1]} recorded values are those of {name} in a right engine, the rest of the row is not"
        )
    if part:
        yield part


def _steps(dumped: Floats) -> Iterator[str]:
    """Whether the values are exact in a lower type."""
    flat = dumped[dumped != 0].astype(np.float32)
    if len(flat) < 8 or (flat == np.rint(flat)).all():  # whole numbers are ids of experts, exact in any type
        return
    bits = flat.view(np.uint32)
    if not (bits & np.uint32(0xFFFF)).any():
        yield "every value is a bfloat16: the engine keeps activations in BF16"
    elif not (bits & np.uint32(0x1FFF)).any():
        yield "every value has 10 bits of mantissa: the engine keeps activations in F16 (or TF32)"
