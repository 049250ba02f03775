"""Which lower arithmetics explain a dump's differences, taken together."""

from collections.abc import Sequence

from msgspec import Struct

from engine.faults import as_recorded
from engine.graph import Step

from ...laws.laws import WRONG
from ..budget import Budget
from ..case import Case
from ..findings.leads import law_at
from ..records.records import Floats
from ..search.search import Search
from ..search.state import SearchState
from .flipped import without_flipped
from .precision import KINDS, UPPER, PrecisionFloor, best, fits, floor, is_ours, is_proof, may_be_noise
from .reproduced import is_reproduced
from .scattered import scattered


class Looks(Struct, frozen=True):
    """The arithmetics that the differences look like, the best first, and whether they explain everything.

    `is_noise`: nothing else is looked for. `excused`: they explain everything only without records behind experts chosen otherwise.
    """

    kinds: tuple[str, ...] = ()
    is_noise: bool = False
    excused: bool = False


def looks(case: Case, search: Search, start: SearchState, budget: Budget) -> Looks:
    """What lower arithmetic explains of the differences; nothing where float32 is stated."""
    if case.states_f32:
        return Looks()
    kinds = looks_like(case, search, start, budget)
    # A fault that there was no time to try may fit better.
    if not kinds or not search.screening.budget.complete or not is_proof(measured := floor_of(case, kinds[0])):
        return Looks(kinds)
    if not scattered(case, measured):
        return Looks()
    return Looks(kinds, is_noise=True, excused=fits(measured, case.entries) is None)


def looks_like(case: Case, search: Search, start: SearchState, budget: Budget) -> tuple[str, ...]:
    """The arithmetics that explain the differences as noise, the best first, unless a fault, a fitted number or a law fits better.

    None does where the errors are those of our own rounding.
    """
    kinds = _precision(case, budget) if may_be_noise(case.entries) else ()
    if not kinds or is_ours(floor_of(case, kinds[0]), case.entries):
        return kinds
    sentence = law_at(case, search, start)
    return () if (sentence and not sentence.endswith(WRONG)) or search.simple(start) else kinds


def reproducing(case: Case, budget: Budget) -> Looks:
    """The arithmetic in which our own run has the dump's every record, asked before anything else; nothing where float32 is stated."""
    kinds = KINDS if not case.states_f32 and may_be_noise(case.entries) else ()
    kind = next((kind for kind in kinds if is_reproduced(case, kind, budget)), None)
    return Looks() if kind is None else Looks((kind,), is_noise=True)


def floor_of(case: Case, kind: str) -> PrecisionFloor:
    """The cost of an arithmetic at every record of the case."""
    steps, right = case.transformer.steps, case.replay
    return floor(kind, case.entries, steps, right, case.make, case.positions, case.rounded, case.spared)


def limits_with(case: Case, kind: str, steps: Sequence[Step]) -> list[Floats]:
    """The limits of the case's records, [R] a point, by what an arithmetic costs a run of changed steps (`PrecisionFloor.limits`)."""
    plain = as_recorded(steps)
    right = case.make(plain, len(case.positions))
    return floor(kind, case.entries, plain, right, case.make, case.positions, case.rounded).limits(case.entries, UPPER)


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
