"""GELU, which ggml reads from a table of float16: engines that compute the function itself, and faults smaller than the table's cost.
Behind the table limits are raised, so that such faults stay below them. A fault that reproduces everything without the raised limits is
found nevertheless.
"""

from collections.abc import Callable, Sequence

import numpy as np
from msgspec.structs import replace

from engine.faults import Planting, as_recorded
from engine.graph import Step
from engine.inapplicable import NotApplicable
from engine.replay.wide import coarse_points, without_tables

from ...diff.tolerances.truth import NO_COARSE_ROUNDING
from ..case import Case
from ..records.records import Expected
from ..search.search import Search
from ..search.state import SearchState, key

# Where a dump has one of the two, our steps with the other one are 1e-7 or so away from it (NMSE), those with the same one some 1e-12, or
# 1e-8 with a few other entries of the table. A fault's own error is in both distances.
_NEARER = 0.5
# One fault, or one number, that leaves nothing over the usual limits at so many records that were over them is no chance.
_LEAST = 3
# Part of the dump's error that a fault must make without any table. ε of 1e-4 for 1e-6 made 0.35 of llama.cpp's error on the small gemma,
# whose other part are other entries of the table; what explains a right engine's few other entries by more of them made 2e-4.
_OWN = 0.05
# A right engine's records are over what rounding does to the choice of entries in one row of some, whichever it is: a fault in most rows.
_MOSTLY, _RARELY = 0.5, 0.25
# Part of the error that a fault removes beside the table: the gate and up of gemma3 exchanged leaves 1e-7 of 1, quick GELU 3e-3.
_NEXT_TO_ALL = 0.99
_MOST = 8
_NOTE = "GELU: compared with the function itself, which your values are nearer to than to ggml's table of float16"


def sharpened(case: Case, search_in: Callable[[Case], Search]) -> tuple[Case, Search | None]:
    """The case beside the GELU that the dump has, and with the usual limits after the table where one fault then reproduces everything.

    What is found with the raised limits, and reproduces everything with the usual ones, is the fault: no other is searched for.

    Args:
        search_in: begins a search.

    Returns:
        The case, and the search in it, if one was begun.
    """
    steps = case.transformer.steps
    coarse = coarse_points(steps)
    with_table = case.beside(steps) if coarse else []
    over = [entry.base[entry.over] for entry in with_table]
    first = next((number for number, errors in enumerate(over) if len(errors)), None)
    if first is None or with_table[first].point not in coarse:
        return case, None
    exact = without_tables(steps)
    without = case.beside(exact)
    if np.median(without[first].base) < _NEARER * np.median(with_table[first].base):
        case = case.with_steps(exact, case.compared(exact), _NOTE)
        return case, None
    if sum(map(len, over)) < _LEAST or over[first].max() > NO_COARSE_ROUNDING:
        return case, None
    plain = search_in(case)
    start = plain.screening.start()
    likely = [] if start.first is None else [state for state in plain.most_likely(start) if state.first is None]
    best = min(likely, key=plain.rank) if likely else None
    if best is not None and _holds(case.with_steps(steps, with_table), search_in, best, rarely=False):
        return case, plain
    sharper = [case.with_steps(steps, _beyond_other_entries(case, with_table)), case.with_steps(exact, without)]
    if best is not None and any(_holds(of_case, search_in, best) for of_case in sharper):
        return case, plain
    found = (_reproduced(of_case, search_in, exact) for of_case in sharper)
    return next((pair for pair in found if pair is not None), (case, plain))


def _holds(case: Case, search_in: Callable[[Case], Search], state: SearchState, rarely: bool = True) -> bool:
    """Whether the fault of a state reproduces everything in another case, as `_reproduced` asks for it."""
    screening = search_in(case).screening
    start = screening.start()
    reached = None if start.first is None else screening.reached(start, state.faults[-1])
    if reached is None or reached.first is None:
        return reached is not None
    eased = _eased(case, reached) if rarely else None
    return eased is not None and _holds(case.with_steps(case.transformer.steps, eased), search_in, state, rarely=False)


def without_table(
    case: Case, search_in: Callable[[Case], Search], search: Search, best: SearchState
) -> tuple[Case, Search, SearchState] | None:
    """The case beside GELU without its table, where one fault more, which leaves next to nothing beside the table, leaves nothing then.

    A gross fault hides which of the two functions the dump has; where it changes what the table is read at, it changes the table's cost.

    Returns:
        The case, its search, and the state that explains everything; None if there is none.
    """
    steps = case.transformer.steps
    tried = search.tried.removed.get(key(best.faults), [])
    near = [candidate for removed, candidate in tried if removed > _NEXT_TO_ALL and candidate.fault.shows is None][:_MOST]
    if best.first is None or not near or not coarse_points(steps):
        return None
    exact = without_tables(steps)
    case = case.with_steps(exact, case.compared(exact), _NOTE)
    other = search_in(case)
    other.tried = other.screening.tried = search.tried
    state: SearchState | None = other.screening.start()
    for candidate in best.faults:
        state = None if state is None else other.screening.reached(state, candidate)
    if state is None:
        return None
    whole = [
        after for candidate in near if (after := other.screening.reached(state, candidate)) is not None and after.first is None
    ]
    return (case, other, other.of_candidates(state, whole)) if whole else None


def _reproduced(
    case: Case, search_in: Callable[[Case], Search], exact: Sequence[Step], rarely: bool = True
) -> tuple[Case, Search] | None:
    """The case with the search in which one fault reproduces everything, if one does that without any table, too.

    `rarely`: whether a few records may be left over their limit, as where rounding chose another entry of the table.
    """
    search = search_in(case)
    start = search.screening.start()
    states = [] if start.first is None else search.of_one_more(start)
    whole = [state for state in states if state.first is None]
    if whole:
        return (case, search) if _acts_by_itself(case, min(whole, key=search.rank), exact) else None
    if rarely and states and (eased := _eased(case, min(states, key=search.rank))) is not None:
        return _reproduced(case.with_steps(case.transformer.steps, eased), search_in, exact, rarely=False)
    return None


def _eased(case: Case, state: SearchState) -> list[Expected] | None:
    """The case's records, with room for what a fault leaves at few records of each point that one entry of the table can make.

    Returns:
        None if it leaves more, or if most records of the first point agree without it.
    """
    left = case.beside(state.steps)
    most = case.arbiter.largest_entry({entry.point: entry.pair.ref for entry in case.entries})
    over = [entry.over for entry in case.entries]
    if not np.mean(next((some for some in over if some.any()), np.zeros(1))) > _MOSTLY:
        return None
    eased = []
    for entry, rest in zip(case.entries, left, strict=True):
        still, highest = rest.base > entry.limit, np.fmax(entry.limit, most.get(entry.point, 0.0))
        if still.mean() > _RARELY or (rest.base > highest).any():
            return None
        eased.append(replace(entry, limit=np.where(still, highest, entry.limit)))
    return eased


def _beyond_other_entries(case: Case, entries: Sequence[Expected]) -> list[Expected]:
    """The records beside steps with the table, with limits that hold what rounding does to the choice of its entries in a right engine.

    Which rows are concerned differs from run to run: the worst of a point is the limit of all.
    """
    spread = case.arbiter.table_spread({entry.point: entry.pair.ref for entry in entries})
    worst = {name: moved.max(initial=0.0) for name, moved in spread.items()}
    return [replace(entry, limit=np.fmax(entry.limit, worst.get(entry.point, 0.0))) for entry in entries]


def _acts_by_itself(case: Case, state: SearchState, exact: Sequence[Step]) -> bool:
    """Whether a fault makes errors of the dump's size without any table.

    Any small change may lead to another entry of the table, and so would seem to explain what is no fault at all.
    """
    steps = list(exact)
    try:
        for candidate in state.faults:
            steps = Planting(steps).of(candidate.fault, candidate.layers, candidate.parameters)
    except NotApplicable:
        return False
    rows = len(case.positions)
    faulty, right = (case.make(as_recorded(some), rows).on_host for some in (steps, exact))
    first = next(entry for entry in case.entries if entry.over.any())  # after it other entries add up
    over = first.base > first.limit
    moved = first.between(faulty[first.point], right[first.point], case.positions)[over]
    return len(moved) >= _LEAST and bool(np.median(moved / first.base[over]) >= _OWN)
