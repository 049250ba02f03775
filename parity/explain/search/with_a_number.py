"""A known fault and a wrong number in one operation: neither gets past it alone, so that numbers are fitted on top of each fault."""

from collections.abc import Iterator, Sequence

from msgspec.structs import replace

from engine.faults import Planting
from engine.inapplicable import NotApplicable

from .fits import fitted
from .screening import Screening
from .state import Candidate, Layers, SearchState

_MOST = 100  # faults with numbers of their own that are tried: one operation is in question, and the search must end


def with_a_number(
    screening: Screening, state: SearchState, layers: Layers, candidates: Sequence[Candidate]
) -> Iterator[tuple[Candidate, Candidate]]:
    """Each fault and number that together get beyond a state's first place, of these faults, which change it.

    Only where a single operation is in question, whose inputs were seen as whole rows.
    """
    cone = screening.cone(state)
    if not cone.sure or len(cone.steps) != 1:
        return
    for candidate in candidates[:_MOST]:
        if screening.budget.over():
            return
        if candidate.fault.shows is not None:
            continue
        try:
            steps = candidate.planted(state)
        except NotApplicable:
            continue
        middle = SearchState((*state.faults, candidate), Planting(steps, screening.number), state.nmse, state.first)
        for found in fitted(screening, middle, layers):
            yield candidate, replace(found.faults[-1], layers=layers)
