"""One wrong number that reproduces every record: the first difference shows which (`systematic`), and it is planted before any search.

A search fits numbers at the places that its entries list, one after the other, and may run out of time before it comes to them.
"""

from collections.abc import Mapping

import numpy as np

from checkpoints.points import parse
from engine import ops
from engine.backend import Array
from engine.faults.fitted import number_at

from ..budget import Budget
from ..case import Case
from ..search.fits import fitted
from ..search.search import Search
from ..search.state import Layers, SearchState
from .mixed import first_errors
from .systematic import IN_QUESTION, Followed, followed, systematic

_SMALL = 1e-2  # NMSE up to which a number's effect is close enough to its derivative to be recognised by it
_TRIED = 4  # numbers that are fitted, those that the errors follow best
# A parameter of the model that explains as much of the errors, to this share, has an entry of its own, which says more.
_AS_WELL = 1e-3
_SECONDS = 10.0  # for asking it once more where no fault was found
_OF_BUDGET = 0.2  # the share of the time for asking what the errors follow


def of_one_number(case: Case, search: Search, start: SearchState, budget: Budget) -> SearchState | None:
    """The state with one number wrong, in all layers or in one, that explains all records; None if no such number is found.

    Where everything that goes into the first place was seen, the search has few entries to try and its laws say more.
    """
    if start.first is None or search.screening.cone(start).sure:
        return None
    entry = case.entries[start.first.point]
    if float(np.max(entry.base)) > _SMALL:
        return None
    errors, known = entry.errors_beside(case.replay.on_host[entry.point], case.positions)
    numbers, _ = followed(case, entry, errors, known, budget.part(_OF_BUDGET), asked_about(search, start))
    best = max((number.along for number in numbers), default=0.0)
    if any(not number.kind and number.along >= best - _AS_WELL for number in numbers):
        return None
    nearest = sorted((number for number in numbers if number.kind), key=lambda number: -number.along)[:_TRIED]
    if any(_is_of_scores(start, number.kind) for number in nearest if not number.shifted):
        return None
    states = [state for number in nearest for state in _fitted(search, start, number) if state.first is None]
    return search.of_candidates(start, states) if states else None


def asked_about(search: Search, start: SearchState) -> frozenset[str]:
    """The steps in question. If they lie in too many layers for each to be asked about by itself, kinds of results that also occur in
    the agreeing layers before them are left out: a number wrong in all layers would show there, too.
    """
    steps, layers = search.screening.cone(start).steps, search.screening.suspects(start)
    if len(layers) <= IN_QUESTION:
        return steps
    known = [parse(name) for name in start.planting.right]
    before = {each.kind for each in known if each.layer is not None and each.layer < layers[0]}
    return frozenset(name for name in steps if parse(name).kind not in before)


def law_of_one_number(case: Case, state: SearchState, values: Mapping[str, Array]) -> str:
    """What the errors at the first place follow, where no fault was found; "" if nothing, or if they are too large to say."""
    if state.first is None or state.faults:
        return ""
    entry, errors, known, _ = first_errors(case, state, values)
    words = "" if float(entry.base.max()) > _SMALL else systematic(case, entry, errors, known, _SECONDS)
    return f"the errors follow one number, as if {words}" if words else ""


def _is_of_scores(start: SearchState, kind: str) -> bool:
    """Whether a result is rotated or is attention's scores: a factor of it is one of the scores, which have a scale with an entry of its
    own, which says more.
    """
    return any(
        step.op in (ops.rope, ops.causal_soft_max) and kind in {parse(name).kind for name in (step.makes, *step.names)}
        for step in start.planting.right.values()
    )


def _fitted(search: Search, start: SearchState, number: Followed) -> list[SearchState]:
    """The states with this number, in all layers or, where that does not explain everything, in a single one of those in question."""
    fit = number_at(number.kind, number.shifted, number.change if number.shifted else 1 + number.change)
    scopes: list[Layers] = [None]
    layers = search.screening.suspects(start)
    scopes += [(layer,) for layer in layers if f"blk.{layer}.{number.kind}" in start.planting.right]
    for scope in scopes:
        states = fitted(search.screening, start, scope, (fit,))
        if any(state.first is None for state in states):
            return states
    return []
