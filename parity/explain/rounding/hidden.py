"""A fault whose effect is smaller than a lower arithmetic's noise: the noise hides its size, not its direction.

Every entry of the catalogue is planted in all layers, and the dump's error is measured along what that changes: once the effect where the
fault is there, nothing where it is not.
"""

from collections.abc import Iterator

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from checkpoints.answers.explain import Cause, DivergentPlace, Explanation
from checkpoints.points import parse
from engine.faults import CATALOGUE
from engine.inapplicable import NotApplicable
from engine.replay.replay import Edits
from reports.sentences import ARITHMETIC

from ..budget import Budget
from ..case import Case
from ..findings.causes import in_words
from ..records.records import Expected, Floats
from ..search.search import Search
from ..search.state import Candidate, SearchState
from .directions import Along, Directions, Noise, noise_of, plain_rows

_OF_BUDGET = 0.3  # the share of the time that is left
_TOGETHER, _ROWS = 64, 1024  # candidates, and rows, that are computed at once
# What is asked of the effect at the first layer alone, before it is computed everywhere: far less than of all records.
_FIRST_REMOVED, _FIRST_TIMES = 0.02, (0.4, 2.5)
# Measured by `benchmarks/matched.py` (docs/benchmarks-log.md). In 63 right engines the entry that removes most of the error removes 7.5 %,
# and is there 0.64 times; the next is at 3.6 %. Planted entries that the noise hides are there 0.95 to 1.04 times, and remove 30 to 99 %.
REMOVED, TIMES = 0.15, 0.25
SURE, EACH = 6.0, 0.8  # times its spread; the share of positions, and of points, at which the multiple is near one
# An effect on fewer records or elements is like that of many entries by chance (a chance one of n elements has a multiple of 1/√n).
POINTS, RECORDS, ELEMENTS = 2, 5.0, 60.0
_AS_WELL = 0.9  # of what the best one removes: what removes as much cannot be told from it
# Said where the time ended before every entry was tried.
_UNFINISHED = "the search for faults in this noise was not finished: more time (--budget) may find one"


class _Effect(Struct, frozen=True):
    """What an entry changes of the records, and how much of that the error contains."""

    candidate: Candidate
    along: Along
    change: Floats


def with_hidden(case: Case, search: Search, start: SearchState, answer: Explanation, budget: Budget) -> Explanation:
    """The answer that differences are an arithmetic's noise or, if that hides an entry's effect, the answer with that cause."""
    kind = answer.precision_only
    if not (answer and kind):
        return answer
    if budget.over():
        return replace(answer, notes=(*answer.notes, _UNFINISHED))
    entries = plain_rows(case)
    if not entries:
        return answer
    noise = noise_of(case, kind, entries)
    directions = Directions(case, noise, entries)
    part = budget.part(_OF_BUDGET)
    effects = list(_in_the_error(case, _promising(case, entries, noise, start, part), start, directions, part))
    if not part.complete:
        answer = replace(answer, notes=(*answer.notes, _UNFINISHED))
    named = sorted((effect for effect in effects if not _numbered(effect.candidate)), key=lambda effect: -effect.along.removed)
    enough = _AS_WELL * named[0].along.removed if named else 0.0
    # A number of the right size has the effect of any size: what one explains as well has no name.
    if not named or any(_numbered(effect.candidate) and effect.along.fitted >= enough for effect in effects):
        return answer
    best, *others = named
    alike = [other for other in others if other.along.removed >= enough]
    fault, right = best.candidate.fault, search.screening.right
    cause = Cause(
        named=in_words(best.candidate, start, right),
        explained=best.along.removed,
        records=0,
        nmse=0.0,
        symptom=fault.symptom,
        fix=fault.fix,
        seen=fault.seen,
        equivalent=tuple(in_words(other.candidate, start, right) for other in alike),
        hidden=f"hidden in the noise of {ARITHMETIC[kind]}, in which every record passes: your error contains its effect "
        f"{best.along.times:.2f} ± {best.along.spread:.2f} times, {best.along.removed:.0%} of what our own rounding does not explain",
    )
    place = _place(case, directions, best.change)
    return replace(
        answer,
        causes=(cause,),
        first=place,
        remaining=None,
        precision_only="",
        precision_alike=(),
        precision_assumed=False,
        next="",
    )


def is_hidden(along: Along) -> bool:
    """Whether an error has an effect in it."""
    return (
        along.removed >= REMOVED
        and abs(along.times - 1) <= TIMES
        and along.times >= SURE * along.spread
        and along.by_position >= EACH
        and along.by_point >= EACH
        and along.points >= POINTS
        and along.records >= RECORDS
        and along.elements >= ELEMENTS
    )


def _in_the_error(
    case: Case, candidates: Iterator[Candidate], start: SearchState, directions: Directions, budget: Budget
) -> Iterator[_Effect]:
    """The effects that the error contains, and those of every entry that has a number of its own."""
    host = case.transformer.backend.to_host
    for candidate in candidates:
        if budget.over():
            return
        try:
            values = case.replay.changed(candidate.planted(start))
        except NotApplicable:
            continue
        change = directions.effect({name: host(value) for name, value in values.items() if name in directions.points})
        if change is not None and (is_hidden(along := directions.along(change)) or _numbered(candidate)):
            yield _Effect(candidate, along, change)


def _promising(case: Case, entries: list[Expected], noise: Noise, start: SearchState, budget: Budget) -> Iterator[Candidate]:
    """The entries in all layers that the error at the end of the first recorded layer does not contradict, or that do not act there."""
    first = _of_first_layer(entries)
    here = Directions(case, noise, [first])
    end = start.order[first.point] + 1
    waiting: list[tuple[Candidate, Edits]] = []
    most = max(1, min(_TOGETHER, _ROWS // len(case.positions)))
    for candidate in _candidates(start):
        if budget.over():
            return
        try:
            edits = start.planting.edits(candidate.fault, None, candidate.parameters, end)
        except NotApplicable:
            continue
        if not edits:
            yield candidate
            continue
        waiting.append((candidate, edits))
        if len(waiting) >= most:
            yield from _not_contradicted(case, here, first.point, waiting, end, budget)
            waiting = []
    if waiting:
        yield from _not_contradicted(case, here, first.point, waiting, end, budget)


def _not_contradicted(
    case: Case, here: Directions, point: str, waiting: list[tuple[Candidate, Edits]], end: int, budget: Budget
) -> Iterator[Candidate]:
    runs = case.replay.run_batch(
        [edits for _, edits in waiting], end, frozenset(), lambda _, values: [True] * len(values), budget.over
    )
    for (candidate, _), values in zip(waiting, runs, strict=True):
        if values is None:
            continue
        if point not in values:
            yield candidate
            continue
        effect = here.effect({point: case.transformer.backend.to_host(values[point])})
        if effect is None:
            continue
        along = here.along(effect)
        near = along.removed >= _FIRST_REMOVED and _FIRST_TIMES[0] < along.times < _FIRST_TIMES[1]
        if near or (_numbered(candidate) and along.fitted >= _FIRST_REMOVED):
            yield candidate


def _candidates(start: SearchState) -> Iterator[Candidate]:
    """Every variant of the catalogue that noise may hide and does not imitate."""
    for fault in CATALOGUE.values():
        if fault.shows is None and not fault.near_one:
            for parameters in fault.variants(start.planting.right):
                yield Candidate(fault, parameters)


def _numbered(candidate: Candidate) -> bool:
    """Whether it has a number of its own."""
    return any(isinstance(value, float) for value in candidate.parameters.values())


def _of_first_layer(entries: list[Expected]) -> Expected:
    """The last point of the first recorded layer; the last point if there is none."""
    layers = [layer for entry in entries if (layer := parse(entry.point).layer) is not None]
    return [entry for entry in entries if not layers or parse(entry.point).layer == min(layers)][-1]


def _place(case: Case, directions: Directions, effect: Floats) -> DivergentPlace:
    """The record with the largest effect, in units of the noise there."""
    point, position = directions.largest(effect)
    entry = next(entry for entry in case.entries if entry.point == point)
    here = entry.rows == position
    return DivergentPlace(
        point, int(case.positions[position]), float(np.max(entry.base[here])), float(np.max(entry.limit[here]))
    )
