"""GELU, which ggml takes from a table of float16: engines with the function itself, and faults smaller than what the table costs.

After the table a record's limit is raised, so that no such fault differs. One that then reproduces everything is found all the same.
"""

from collections.abc import Callable, Sequence

import numpy as np

from engine.faults import Planting, as_recorded
from engine.graph import Step
from engine.inapplicable import NotApplicable
from engine.replay.wide import coarse_points, without_tables

from ..diff.truth import NO_COARSE_ROUNDING
from .case import Case
from .search import Search
from .state import SearchState

# Where a dump has one of the two, our steps with the other one are 1e-7 or so away from it (NMSE), those with the same one some 1e-12, or
# 1e-8 with a few other entries of the table. A fault's own error is in both distances.
_NEARER = 0.5
# One fault, or one number, that leaves nothing over the usual limits at so many records that were over them is no chance.
_LEAST = 3
# Part of the dump's error that a fault must make without any table. ε of 1e-4 for 1e-6 made 0.35 of llama.cpp's error on the small gemma,
# whose other part are other entries of the table; what explains a right engine's few other entries by more of them made 2e-4.
_OWN = 0.05
_NOTE = "GELU: compared with the function itself, which your values are nearer to than to ggml's table of float16"


def sharpened(case: Case, search_in: Callable[[Case], Search]) -> tuple[Case, Search | None]:
    """The case beside the GELU that the dump has, and with the usual limits after the table where one fault then reproduces everything.

    Args:
        search_in: begins a search.

    Returns:
        The case, and the search that found such a fault.
    """
    steps = case.transformer.steps
    coarse = coarse_points(steps)
    with_table = case.beside(steps) if coarse else []
    over = [entry.base[entry.base > entry.limit] for entry in with_table]
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
    for own, entries in ((steps, with_table), (exact, without)):
        as_assumed = case.with_steps(own, entries)
        search = search_in(as_assumed)
        start = search.screening.start()
        states = [] if start.first is None else search.simple(start)
        if states and _acts_by_itself(as_assumed, min(states, key=search.rank), exact):
            return as_assumed, search
    return case, None


def _acts_by_itself(case: Case, state: SearchState, exact: Sequence[Step]) -> bool:
    """Whether a fault makes errors of the dump's size without any table.

    Another entry of the table may be met by any small change: what is no fault at all would be explained by such a one.
    """
    steps = list(exact)
    try:
        for candidate in state.faults:
            steps = Planting(steps).of(candidate.fault, candidate.layers, candidate.parameters)
    except NotApplicable:
        return False
    rows = len(case.positions)
    faulty, right = (case.make(as_recorded(some), rows).on_host for some in (steps, exact))
    first = next(entry for entry in case.entries if (entry.base > entry.limit).any())  # after it other entries add up
    over = first.base > first.limit
    moved = first.between(faulty[first.point], right[first.point], case.positions)[over]
    return len(moved) >= _LEAST and bool(np.median(moved / first.base[over]) >= _OWN)
