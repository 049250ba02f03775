"""The causes of an answer: the faults of the best state in the order in which the model computes what they change, each with its equals."""

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from checkpoints.answers.explain import Cause, Named
from engine.faults.base import kind_of, layer_near
from engine.faults.index import StepsByName
from engine.graph import Step
from engine.inapplicable import NotApplicable

from ..case import Case
from ..records.records import Expected
from ..search.fits import remarks as remarks_on_number
from ..search.search import Search
from ..search.state import Candidate, SearchState
from .apart import apart
from .known_to import known_to

# An ε so many times as large is tried, to see whether the fitted one is only the largest of those that fit.
_SMALLER = 1e-3


def causes_of(case: Case, search: Search, start: SearchState, best: SearchState) -> list[Cause]:
    """What the faults of the best state explain of the differences of the start, each together with those before it."""
    causes: list[Cause] = []
    state, differing = start, count_over(case.entries, start)
    for candidate, after in _in_order(search, start, best):
        fixed = differing - count_over(case.entries, after)
        reproduced = [
            float(now[entry.over & (now <= entry.limit)].max(initial=0.0))
            for entry, now in zip(case.entries, after.nmse, strict=True)
        ]
        others = _that_differ(state, candidate, search.equal(best, best.faults.index(candidate)))
        named = in_words(candidate, state, search.screening.right)
        if _smaller_fits(search, state, candidate, after):
            others = [other for other in others if other.fault.name != candidate.fault.name]
            named = replace(named, sentence=f"{named.sentence}; smaller ones give the same numbers")
        if precision := known_to(candidate, state, after, case.entries):
            named = replace(named, sentence=f"{named.sentence}; {precision}")
        causes.append(
            Cause(
                named=named,
                explained=fixed / differing if differing else 0.0,
                records=fixed,
                nmse=max(reproduced, default=0.0),
                symptom=candidate.fault.symptom,
                fix=candidate.fault.fix,
                seen=candidate.fault.seen,
                equivalent=tuple(in_words(other, state, search.screening.right) for other in others),
                apart=apart(case, state, candidate, others, search.screening.budget),
            )
        )
        state = after
    return causes


def count_over(entries: Sequence[Expected], state: SearchState) -> int:
    """How many records a state leaves over their limits."""
    return sum(int((errors > entry.limit).sum()) for entry, errors in zip(entries, state.nmse, strict=True))


def _in_order(search: Search, start: SearchState, best: SearchState) -> list[tuple[Candidate, SearchState]]:
    """The best state's faults and the states that they lead to, those first that change what is computed first; in the order in which
    they were found where one depends on another."""
    found = _reached(search, start, best.faults)
    if len(best.faults) < 2 or any(candidate.fault.shows is not None for candidate in best.faults):
        return found
    begins = [_first_change(start, candidate) for candidate in best.faults]
    order = sorted(range(len(begins)), key=begins.__getitem__)
    if order == list(range(len(begins))):
        return found
    sorted_ = _reached(search, start, [best.faults[number] for number in order])
    same = len(sorted_) == len(found) and sorted_[-1][1].first == found[-1][1].first
    return sorted_ if same else found


def _reached(search: Search, state: SearchState, faults: Sequence[Candidate]) -> list[tuple[Candidate, SearchState]]:
    """The states that faults lead to, one after the other, as far as they can be planted."""
    reached: list[tuple[Candidate, SearchState]] = []
    for candidate in faults:
        after = search.screening.reached(state, candidate)
        if after is None:
            break
        reached.append((candidate, after))
        state = after
    return reached


def _first_change(start: SearchState, candidate: Candidate) -> int:
    """The number of the first step that a fault changes in the right engine."""
    order = start.planting.order
    return min((order[step.makes] for step in _changed(start, candidate) if step.makes in order), default=0)


def _changed(state: SearchState, candidate: Candidate) -> list[Step]:
    """The steps that a fault puts in the place of a state's; none if it does not apply."""
    try:
        return [step for step in candidate.planted(state) if state.planting.right.get(step.makes) is not step]
    except NotApplicable:
        return []


def _that_differ(state: SearchState, candidate: Candidate, others: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that change the engine in other ways than this one and than each other."""
    known = {_identity(state, candidate)}
    differing = []
    for other in others:
        identity = _identity(state, other)
        if not identity or identity not in known:
            differing.append(other)
        known.add(identity)
    return differing


def _identity(state: SearchState, candidate: Candidate) -> frozenset[int]:
    """Which steps a fault plants: variants of it that plant the same ones give the same objects."""
    return frozenset(map(id, _changed(state, candidate))) if candidate.fault.shows is None else frozenset()


def _smaller_fits(search: Search, state: SearchState, candidate: Candidate, after: SearchState) -> bool:
    """Whether an ε is only the largest of those that give the recorded numbers."""
    eps = candidate.parameters.get("eps")
    if not isinstance(eps, float) or eps <= 0:
        return False
    smaller = replace(candidate, parameters={**candidate.parameters, "eps": eps * _SMALLER})
    reached = search.screening.reached(state, smaller)
    return reached is not None and reached.first == after.first


def in_words(candidate: Candidate, state: SearchState, right: Sequence[Step]) -> Named:
    """A candidate in words; `right` are the model's own steps, which the state's faults may have changed."""
    changed = {step.makes for step in _changed(state, candidate)} if candidate.fault.shows is None else set()
    # What this model wants is what the changed steps have: layers may differ in it.
    own = {step.makes: step for step in right}
    first = {name: own.get(name, step) for name, step in state.planting.right.items() if name in changed}
    number = remarks_on_number(candidate, StepsByName({**first, **own}))
    number += _where_wrong(state, first) if number and candidate.layers is None else ""
    sentence = candidate.fault.sentence(candidate.parameters)
    return Named(
        candidate.fault.name,
        dict(candidate.parameters),
        candidate.layers,
        f"{sentence}; {number}" if number else sentence,
    )


def _where_wrong(state: SearchState, changed: Mapping[str, Step]) -> str:
    """The layers in which a number is wrong, if it is right in others that have the same steps."""
    layers = sorted({layer for step in changed.values() if (layer := layer_near(step)) is not None})
    kinds = {kind_of(step) for step in changed.values()}
    others = {layer for step in state.steps if kind_of(step) in kinds and (layer := layer_near(step)) is not None}
    only = bool(layers) and len(layers) < len(others)
    return (
        f"; wrong in {'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))}, right in the others"
        if only
        else ""
    )
