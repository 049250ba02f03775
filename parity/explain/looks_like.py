"""Which lower arithmetics a dump's differences look like, all of them together."""

from .budget import Budget
from .case import Case
from .flipped import without_flipped
from .laws import WRONG
from .leads import law_at
from .precision import KINDS, PrecisionFloor, best, fits, floor, is_ours, may_be_noise
from .search import Search
from .state import SearchState


def looks_like(case: Case, search: Search, start: SearchState, budget: Budget) -> tuple[str, ...]:
    """The arithmetics that explain the differences as noise, the best first, unless a fault, a fitted number or a law fits better.

    None does where the errors are those of our own rounding.
    """
    kinds = _precision(case, budget) if may_be_noise(case.entries) else ()
    if not kinds or is_ours(floor_of(case, kinds[0]), case.entries):
        return kinds
    sentence = law_at(case, search, start)
    return () if (sentence and not sentence.endswith(WRONG)) or search.simple(start) else kinds


def floor_of(case: Case, kind: str) -> PrecisionFloor:
    """What an arithmetic costs at every record of the case."""
    return floor(kind, case.entries, case.transformer.steps, case.replay, case.make, case.positions, case.rounded)


def _precision(case: Case, budget: Budget) -> tuple[str, ...]:
    """The arithmetics that explain the differences as noise; none if the time is up, since the best of only some may be wrong."""
    fit: dict[str, float] = {}
    for kind in () if budget.over() else KINDS:
        measured = floor_of(case, kind)
        value = fits(measured, case.entries)
        if value is None and (entries := without_flipped(case, measured)) is not case.entries:
            value = fits(measured, entries)
        if value is not None:
            fit[kind] = value
    return best(fit)
