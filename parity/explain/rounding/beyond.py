"""If an arithmetic, or a part kept in a lower type, explains the first place but not everything after it: the search for the rest."""

from collections.abc import Callable

import numpy as np
from msgspec.structs import replace

from checkpoints.answers.explain import Explanation
from engine.replay.kept import KEPT, kept
from reports.sentences import ARITHMETIC, kept_in

from ..case import Case
from ..search.state import SearchState
from .flipped import has_choices
from .looks_like import floor_of
from .mixed import kinds_of_rounding
from .precision import TOGETHER, UPPER, is_beyond
from .rounded_weights import type_of_rows

# Explains a case whose arithmetic is given (None: as the dump says), up to so many times what that costs a point.
Found = tuple[Explanation, SearchState]
Again = Callable[[Case, str | None, float], Found]
Beyond = tuple[tuple[str, ...], Found | None]
NOTHING: Beyond = ((), None)


def beyond(case: Case, state: SearchState, again: Again) -> Beyond:
    """Look for what differs by more than is explained by the arithmetic or kept part at a state's first place.

    Returns:
        A sentence on it, if there is anything, and what `again` finds: beyond an arithmetic only faults that reproduce everything,
        beside a kept part anything that is not an arithmetic.
    """
    kinds = (kind,) if (kind := type_of_rows(state)) else kinds_of_rounding(case, state)
    if kinds and kinds[0] in KEPT:
        return _beside_kept(case, kinds[0], again)
    kind = next((kind for kind in kinds if kind not in KEPT), "")
    point = _further_off(case, kind) if kind else ""
    if not point:
        return NOTHING
    said = (
        f"{point} is off by more than {ARITHMETIC[kind]} arithmetic costs there: a fault"
        f"{', or experts that it chooses otherwise' if has_choices(case) else ''} (--compute {kind} looks for a fault beyond it)"
    )
    answer, found = again(case.with_steps(case.transformer.steps, case.entries), kind, TOGETHER)
    if answer.causes and not answer.suspects and _is_noise(case, kind, found):
        answer = replace(answer, remaining=None, law="", rounds=False, placed=None, leads=(), next="")
    if not answer.causes or answer.remaining is not None:
        return (said,), None
    note = f"arithmetic: {said}; the cause is looked for beyond that"
    return (said,), (replace(answer, notes=(*answer.notes, note)), found)


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
