"""If an arithmetic, or a part kept in a lower type, explains the first place but not everything after it: the search for the rest."""

from collections.abc import Callable, Sequence

import numpy as np
from msgspec.structs import replace

from checkpoints.answers.explain import Explanation
from engine.replay.kept import KEPT, kept
from reports.sentences import ARITHMETIC, kept_in

from ...laws.laws import NOT_RECORDED, WRONG
from ..budget import Budget
from ..case import Case
from ..search.search import Search
from ..search.state import SearchState
from .flipped import has_choices, may_lead_to
from .looks_like import floor_of
from .mixed import kind_of_noise, kinds_of_rounding
from .precision import TOGETHER, UPPER, is_beyond
from .rounded_weights import type_of_rows, with_weights_rounded

# Explains a case whose arithmetic is given (None: as the dump says), up to so many times what that costs a point.
Found = tuple[Explanation, SearchState]
Again = Callable[[Case, str | None, float], Found]
Beyond = tuple[tuple[str, ...], Found | None]
NOTHING: Beyond = ((), None)
# Cut off, digits cost four times what they do rounded: the mean square of an error that is even between 0 and a spacing, against that of
# one between minus half of it and half. (An olmoe that cuts off to BF16 was 1.15 times over BF16's limit.)
_CUT_OFF = 4.0


def before_search(case: Case, search: Search, start: SearchState, budget: Budget, again: Again) -> Beyond:
    """As `beyond`, asked before any search, where the first place shows its own rounding to a lower type: no fault is there to be found.

    Where weights of that type explain it, the operations may be in float32.
    """
    if case.states_f32 or start.first is None or budget.late:
        return NOTHING
    kinds = kinds_of_rounding(case, start)
    if not kinds or kinds[0] in KEPT or with_weights_rounded(case, search, start, budget) is not start:
        return NOTHING
    return _beyond_arithmetic(case, start, kinds, again)


def begins_with_noise(case: Case, state: SearchState) -> str:
    """The arithmetic of whose size the noise at the first place is, if a later place is off by more than it costs; otherwise ""."""
    kind = "" if case.states_f32 or state.faults else kind_of_noise(case, state, case.replay.on_host)
    point = _further_off(case, kind) if kind and kind not in KEPT else ""
    return kind if point and state.first is not None and point != case.entries[state.first.point].point else ""


def beyond(case: Case, state: SearchState, again: Again) -> Beyond:
    """Look for what differs by more than is explained by the arithmetic or kept part at a state's first place.

    Returns:
        A sentence on it, if there is anything, and what `again` finds: beside a kept part anything that is not an arithmetic.
    """
    kinds = (kind,) if (kind := type_of_rows(state)) else kinds_of_rounding(case, state)
    if kinds and kinds[0] in KEPT:
        return _beside_kept(case, kinds[0], again)
    if not kinds and (noise := begins_with_noise(case, state)):
        kinds = (noise,)
    return _beyond_arithmetic(case, state, kinds, again)


def _beyond_arithmetic(case: Case, state: SearchState, kinds: Sequence[str], again: Again) -> Beyond:
    """As `beyond`, where an operation at the first place is rounded as these arithmetics round it (none: nothing is found).

    A fault that reproduces everything beyond the arithmetic's usual cost, or else what is found where that arithmetic is stated.
    """
    kinds = [kind for kind in kinds if kind not in KEPT]
    point = _further_off(case, kinds[0]) if kinds else ""
    if not point or state.first is None:
        return NOTHING
    kind, named = kinds[0], " or ".join(ARITHMETIC[each] for each in kinds)
    said = (
        f"{point} is off by more than {ARITHMETIC[kind]} arithmetic costs there: a fault, or a lower arithmetic"
        f"{', or experts that it chooses otherwise' if has_choices(case) else ''} (--compute {kind} looks for a fault beyond it)"
    )
    judged_as = (
        f"{named} arithmetic, which nothing states: {case.entries[state.first.point].point} is as it makes it, and {point} is off by more "
        "than it costs there"
    )
    answer, found = again(case.with_steps(case.transformer.steps, case.entries), kind, TOGETHER)
    if answer.causes and not answer.suspects and _is_noise(case, kind, found):
        answer = replace(answer, remaining=None, law="", rounds=False, placed=None, leads=(), next="")
    if not (answer.causes and answer.remaining is None and _says_more(case, kind, answer)):
        answer, found = again(case.with_steps(case.transformer.steps, case.entries), kind, UPPER)
        if not _says_more(case, kind, answer) or _is_of_choices(case, kind, answer):
            return (said,), None
    return (said,), (replace(answer, judged_as=judged_as), found)


def _says_more(case: Case, kind: str, answer: Explanation) -> bool:
    """Whether an answer by what an arithmetic costs leads to a fault, and not to another arithmetic, or to what cannot be judged.

    Without a cause, the place is further off than where that arithmetic is stated, even if digits are cut off. Without a law, too, further
    than where BF16 is stated, the coarsest float type: a right engine may have two arithmetics.
    """
    if answer or answer.unjudged or answer.rounds or answer.left_open or answer.first is None:
        return False
    if answer.causes:
        return True
    limits = [floor_of(case, kind).limits(case.entries, _CUT_OFF * UPPER)]
    if not answer.law or answer.law.endswith((WRONG, NOT_RECORDED)):
        limits.append(floor_of(case, "bf16").limits(case.entries, UPPER))
    return any(
        bool((entry.base > np.maximum.reduce(most)).any())
        for entry, *most in zip(case.entries, *limits, strict=True)
        if entry.point == answer.first.checkpoint
    )


def _is_of_choices(case: Case, kind: str, answer: Explanation) -> bool:
    """Whether what is first over an arithmetic's limits may come of experts that it, or 8 bits beside it, chooses otherwise."""
    if answer.first is None or not has_choices(case):
        return False
    limits = floor_of(case, kind).limits(case.entries, UPPER)
    return any(
        may_lead_to(case, each, entry, np.maximum(entry.limit, limit))
        for entry, limit in zip(case.entries, limits, strict=True)
        if entry.point == answer.first.checkpoint
        for each in dict.fromkeys((kind, "bf16", "q8"))
    )


def _beside_kept(case: Case, kind: str, again: Again) -> Beyond:
    steps, part = kept(case.transformer.steps, kind), KEPT[kind]
    keeping = case.with_steps(steps, case.compared(steps))
    if not any(entry.over.any() for entry in keeping.entries):
        return NOTHING
    answer, found = again(keeping, None, UPPER)
    note = f"{kept_in(part.part, part.type)}: what differs beside that is looked for"
    return (), None if answer else (replace(answer, notes=(*answer.notes, note)), found)


def _is_noise(case: Case, kind: str, state: SearchState) -> bool:
    """Whether what a state leaves is within the limits of this arithmetic where it is stated: single records lie that far off in right
    engines.
    """
    limits = floor_of(case, kind).limits(case.entries, UPPER)
    return all(
        bool((errors <= np.maximum(entry.limit, limit)).all())
        for entry, errors, limit in zip(case.entries, state.nmse, limits, strict=True)
    )


def _further_off(case: Case, kind: str) -> str:
    """The first point that is further off than an arithmetic costs there; "" if none is."""
    cost = floor_of(case, kind)
    return next(
        (
            entry.point
            for entry, products, storage in zip(case.entries, cost.products, cost.storage, strict=True)
            if is_beyond(entry, products, storage)
        ),
        "",
    )
