"""`parity explain`: which known fault of an engine reproduces the numbers of its dump."""

from functools import partial
from pathlib import Path
from time import perf_counter

from msgspec.structs import replace

from checkpoints.answers.explain import Explanation, SuspectRecord, TruthAt
from checkpoints.answers.lint import ERROR
from checkpoints.collector import older_objects_left_out
from checkpoints.points import parse
from checkpoints.record import Dump
from engine.transformer import Transformer

from ..diff.limits import EXACT_FLOOR
from ..diff.tolerances.truth import ALL, AUTO
from ..laws.laws import NOT_RECORDED, OF_TWO, WRONG
from ..lint.lint import lint
from ..lint.model_facts import ModelFacts
from ..run.graphs import not_as_the_file_says
from . import halves
from .as_compared import agrees_as_stated, as_diff_says
from .budget import Budget
from .case import Case, ExplainOptions, Half, open_model
from .findings.answer import answer_of
from .findings.leads import believed, law_at, leads, may_have_cause, placed
from .findings.one_buffer import in_words, shown_instead
from .findings.other_file import OTHER_FILE
from .findings.rows import garbage
from .findings.table import table_of
from .findings.unjudged import is_far, unjudged
from .recorded_otherwise import recorded_otherwise
from .records.records import right_rows
from .rounding.amplified import with_amplified
from .rounding.beyond import NOTHING, Found, before_search, begins_with_noise, beyond
from .rounding.could_hide import could_hide
from .rounding.flipped import CHOSEN_OTHERWISE, chosen_otherwise
from .rounding.gelu import sharpened, without_table
from .rounding.hidden import with_hidden
from .rounding.looks_like import Looks, floor_of, limits_with, looks, looks_like, reproducing
from .rounding.mixed import law_of_noise, law_of_rounding
from .rounding.one_number import law_of_one_number, of_one_number
from .rounding.own_inputs import contradicted
from .rounding.own_rounding import standing_out
from .rounding.precision import UPPER, PrecisionFloor, with_noise
from .rounding.rounded_weights import type_of_rows, with_weights_rounded
from .rounding.single_rows import with_single_rows
from .search.scopes import as_far_as_shown
from .search.search import Search
from .search.state import SearchState

EXACT = EXACT_FLOOR.operations
# Shares of the time: of the budget, for the search itself; of what is left then, for a search without the points of one kind. The
# rest is for the search that continues from there. Before them all, for a fault behind an arithmetic that the first place shows.
_FIRST, _OTHERS, _BEYOND = 0.6, 0.7, 0.5
__all__ = ["Case", "ExplainOptions", "explain"]


def explain(dump: Dump, model: Path, options: ExplainOptions | None = None) -> Explanation:
    """Find the known faults that reproduce a dump's numbers.

    Raises:
        ParityError: as in `open_model` and `Case`.
    """
    with older_objects_left_out():
        return _searched(dump, model, options or ExplainOptions())


def _searched(dump: Dump, model: Path, options: ExplainOptions) -> Explanation:
    began = perf_counter()
    budget = Budget(options.budget)
    transformer = open_model(model, options)
    if transformer.encoder is None:
        case = Case(dump, Half(transformer), options)
        answer = as_diff_says(case, _without_reordered(case, options, budget)[0], options)
    else:
        answer = halves.explained(dump, transformer, options, lambda case: _explained(case, options, budget))
    otherwise = () if answer else not_as_the_file_says(transformer)
    notes = (*otherwise, *answer.notes, *_lint(dump, transformer))
    return replace(answer, notes=notes, seconds=perf_counter() - began)


def _without_reordered(case: Case, options: ExplainOptions, budget: Budget) -> tuple[Explanation, SearchState]:
    """As `_explained`, of what is left without the records whose elements only the recorder put into another order."""
    otherwise = recorded_otherwise(case, options)
    rest = case.without({suspect.checkpoint for suspect in otherwise})
    if not otherwise or not rest.entries:
        return _explained(case, options, budget)
    answer, state = _explained(rest, options, budget)
    return replace(answer, suspects=(*otherwise, *answer.suspects)), state


def _explained(case: Case, options: ExplainOptions, budget: Budget) -> tuple[Explanation, SearchState]:
    """The faults that reproduce one case's numbers, and the state that they lead to.

    Where a record alone is wrong, or shows what a later layer computed, what differs beside it is explained without it.
    """
    answer, best = _of_all_records(case, options, budget)
    instead = shown_instead(case) if answer.remaining is not None and not (answer.causes or budget.late) else {}
    if answer.remaining is not None and answer.remaining.checkpoint in instead:
        further, state = _explained(case.without(instead), options, budget)
        if further.causes:  # else layers that do nothing look the same
            return replace(further, notes=(*further.notes, in_words(instead))), state
    rest = case.without({suspect.checkpoint for suspect in answer.suspects})
    if not answer.suspects or not rest.entries or budget.late:
        return answer, best
    further, state = _explained(rest, options, budget)
    if further:
        return answer, best
    suspects = (*answer.suspects, *further.suspects)
    alone = further.remaining is not None and further.remaining.checkpoint in {suspect.checkpoint for suspect in suspects}
    return (
        (replace(answer, suspects=suspects), best)
        if alone and not further.causes
        else (replace(further, suspects=suspects), state)
    )


def _begun(case: Case, noise: str, most: float, budget: Budget) -> tuple[Case, Search, PrecisionFloor | None]:
    """The case with the limits that apply to it, a search in it, and what its arithmetic costs if that is stated (`noise`)."""

    def search_in(of_case: Case) -> Search:
        screening = of_case.screening(of_case.entries, budget.part(_FIRST))
        screening.costs = (lambda steps: limits_with(of_case, noise, steps)) if noise else None
        search = Search(screening, lambda state: _ends(of_case, search, state))
        return search

    if not noise:
        case, sharper = sharpened(case if case.states_f32 else with_single_rows(case), search_in)
        return case, sharper or search_in(case), None
    stated = floor_of(case, noise)
    case.entries = with_amplified(with_noise(stated, case.entries, most), stated, case.arbiter)
    return case, search_in(case), stated


def _of_all_records(
    case: Case, options: ExplainOptions, budget: Budget, most: float = UPPER
) -> tuple[Explanation, SearchState]:
    """The faults that reproduce the numbers of all of a case's records, and the state that they lead to.

    `most`: times what a stated arithmetic costs a point, up to which a record is noise.
    """
    noise = "" if options.compute in (None, "f32") else str(options.compute)
    case, search, stated = _begun(case, noise, most, budget)
    start = search.screening.start()
    if stated is not None and (points := unjudged(case.entries, start)):
        return replace(
            answer_of(case, search, start, start), unjudged=() if is_far(case.entries, start) else points, next=""
        ), start
    earlier = NOTHING if noise else before_search(case, search, start, budget, partial(_again, options, budget.part(_BEYOND)))
    if earlier[1] is not None:
        return earlier[1]
    if stated is not None and most == UPPER and agrees_as_stated(case, start, options):
        best, found = start, Looks((noise,), is_noise=True)
    else:
        best, found = _best(case, search, start, noise, options.max_faults, budget)
    if not noise and not found.is_noise and not budget.late:
        beside = without_table(case, lambda of_case: Search(of_case.screening(of_case.entries, budget)), search, best)
        case, search, best = beside or (case, search, best)
        start = search.screening.start() if beside is not None else start
    likes, is_noise, excused = found.kinds, found.is_noise, found.excused
    kinds = likes if is_noise and not excused else ()
    answer = answer_of(case, search, start, best)
    if stated is not None and start.first is not None and not answer.causes:
        excused = chosen_otherwise(case, stated)
    if not is_noise and not excused and best.first is not None:
        answer = _left_over(case, search, best, answer, budget)
    truth = _truth(case, start, options.arbiter) if options.arbiter == ALL or not answer.causes else None
    settled = answer.causes or (answer.placed is not None and answer.placed.sure and len(answer.placed.operations) == 1)
    settled_by_cause = answer.causes and not type_of_rows(best)
    said, further = earlier
    if not (said or budget.late or settled_by_cause or answer.remaining is None or noise or is_noise or case.states_f32):
        said, further = beyond(case, best, partial(_again, options, budget))
    if further is not None:
        return further
    if said and type_of_rows(best):
        # An engine that computes in a lower type rounds the rows that it looks up, too: that is no fault.
        best, answer = start, answer_of(case, search, start, start)
    notes = (*case.notes, *(() if settled else case.noise), *((CHOSEN_OTHERWISE,) if excused else ()), *said)
    if answer.causes or kinds:
        likes = ()
    elif case.states_f32 and best is start and start.first is not None:
        likes = looks_like(case, search, start, budget)
    answer = replace(
        answer,
        truth=truth,
        notes=notes,
        precision_only=kinds[0] if kinds else "",
        precision_assumed=bool(kinds) and not case.states_arithmetic,
        precision_alike=kinds[1:] or likes[1:],
        looks_like=likes[0] if likes else "",
        f32_stated=case.stated_by,
        next="" if kinds else answer.next,
    )
    answer = standing_out(case, answer, kinds)
    answer = contradicted(case, answer) if start.first is None and not noise else answer
    answer = with_hidden(case, search, start, answer, budget)
    return replace(answer, hides=could_hide(case, search, start) if answer.precision_assumed else ()), best


def _again(options: ExplainOptions, budget: Budget, case: Case, kind: str | None, most: float) -> Found:
    return _of_all_records(case, replace(options, compute=kind), budget, most)


def _best(
    case: Case, search: Search, start: SearchState, noise: str, max_faults: int, budget: Budget
) -> tuple[SearchState, Looks]:
    """The state that explains most, and the arithmetics that the differences look like; the start where they explain everything."""
    if start.first is None:
        within = bool(noise) and any((entry.base > EXACT).any() for entry in case.entries)
        return start, Looks((noise,), is_noise=True) if within else Looks()
    found = reproducing(case, budget)
    if found.is_noise:
        return start, found
    begin = with_weights_rounded(case, search, start, budget)
    if begin is start:
        if (number := of_one_number(case, search, start, budget)) is not None:
            return number, found
        found = looks(case, search, start, budget)
    if begin.first is None or found.is_noise or not may_have_cause(case.entries, start):
        return begin, found
    if not noise and begins_with_noise(case, begin):  # the rest of the time is for what is behind it
        budget = search.screening.budget = budget.part(_BEYOND)
    best = _needed(search, _around(case, search, search.explain(begin, max_faults), max_faults, budget))
    best = believed(case.entries, search, start, best)
    return best if law_at(case, search, best) else as_far_as_shown(search.screening, best), found


def _known(case: Case, search: Search, state: SearchState) -> bool:
    """Whether the error at a state's first place is known without a cause: of its records alone, or of one operation, by a law.

    A law of two numbers leaves open which two things are wrong.
    """
    if search.screening.agreeing_after(state) or (not case.states_f32 and law_of_rounding(case, state)):
        return True
    if len(search.screening.cone(state).steps) != 1:
        return False
    sentence = law_at(case, search, state)
    return bool(sentence) and not sentence.endswith((*OF_TWO, OTHER_FILE))


def _ends(case: Case, search: Search, state: SearchState) -> bool:
    """Whether several faults at once need not be tried at a state's first place: the error is known, or is another model's file.

    The latter may be a value that the engine computes later, which `_around` asks.
    """
    return _known(case, search, state) or bool(table_of(case, state) and law_at(case, search, state).endswith(OTHER_FILE))


def _left_over(case: Case, search: Search, best: SearchState, answer: Explanation, budget: Budget) -> Explanation:
    """The answer, with what the numbers say about the place that is left: a cause, if they name one by themselves, a law, or leads."""
    values = search.screening.replay(best, len(case.positions)).on_host
    sentence, where = law_at(case, search, best), placed(case, search, best)
    agreeing = search.screening.agreeing_after(best)
    if agreeing and answer.remaining is not None:
        return replace(answer, law=sentence, suspects=(SuspectRecord(answer.remaining.checkpoint, agreeing),), next="")
    lawless = not sentence or sentence.endswith(WRONG)
    rounding = law_of_rounding(case, best, budget.over) if lawless or not case.states_f32 else ""
    if not (rounding or case.states_f32) and lawless:
        rounding = law_of_noise(case, best, values)
    if rounding:
        return replace(answer, law=rounding, rounds=True, next="" if answer.complete else answer.next)
    rows = garbage(case.entries, best, values, case.positions, answer.differing) if lawless else None
    if rows is not None:
        return replace(answer, causes=(*answer.causes, rows), remaining=None, next="")
    if sentence.endswith(NOT_RECORDED) and best.first is not None:
        place = case.entries[best.first.point]
        answer = replace(answer, next=place.point, next_slice=place.width or None)
    single = where is not None and where.sure and len(where.operations) == 1
    if not (sentence or single or budget.late):
        sentence = law_of_one_number(case, best, values)
    hints = [] if sentence else leads(case.entries, best, search, case.positions, single=single)
    return replace(answer, law=sentence, placed=where, leads=tuple(hints))


def _truth(case: Case, start: SearchState, arbiter: str) -> TruthAt | None:
    """How far the dump and our right engine are from float64 at the first place, where the arbiter was asked."""
    if start.first is None or not (arbiter == ALL or (arbiter == AUTO and case.arbiter.started)):
        return None
    entry = case.entries[start.first.point]
    dump_distance = case.arbiter.distances({entry.point: entry.pair.ours})[entry.point]
    right = right_rows(case.replay, case.positions, {entry.point: entry.pair.ours})[entry.point].take(entry.rows)
    ours = case.arbiter.distances({entry.point: right})[entry.point]
    here = entry.rows == start.first.row
    return TruthAt(float(dump_distance[here].max()), float(ours[here].max()))


def _lint(dump: Dump, transformer: Transformer) -> list[str]:
    """Lint's findings as notes: here a fault of the capture is a cause like any other."""
    return [
        f"lint: {finding.rule}{f' at {finding.checkpoint}' if finding.checkpoint else ''}: {finding.evidence}"
        for finding in lint(dump, ModelFacts(transformer.model)).findings
        if finding.severity == ERROR
    ]


def _around(case: Case, search: Search, best: SearchState, max_faults: int, budget: Budget) -> SearchState:
    """If the place that is left shows a value that the engine computes later (a fault of the capture), explain the rest first.

    The points of that kind are left out, and the explanation of the others is kept.
    """
    depth = max_faults - len(best.faults)
    if best.first is None or depth < 2 or budget.late or search.screening.cone(best).sure or _known(case, search, best):
        return best
    kind = parse(case.entries[best.first.point].point).kind
    others = [entry for entry in case.entries if parse(entry.point).kind != kind]
    inner = Search(case.screening(others, budget.part(_OTHERS)))
    rest = inner.screening.start()
    for candidate in best.faults:
        rest = inner.screening.check(rest, candidate) or rest
    if rest.first is None:
        return best
    # Several faults before one place are not looked for here: they and one of the capture would be three, and the search takes long.
    inner_causes = inner.one_by_one(rest, depth - 1)
    if inner_causes.first is not None:
        return best
    search.screening.budget = budget
    state = search.screening.start()
    for candidate in inner_causes.faults:
        state = search.screening.check(state, candidate) or state
    return min(best, search.explain(state, max_faults - len(state.faults)), key=search.rank)


def _needed(search: Search, best: SearchState) -> SearchState:
    """The best state without superfluous faults."""
    for left_out in best.faults if len(best.faults) > 1 else ():
        state: SearchState | None = search.screening.start()
        for candidate in best.faults:
            if candidate is not left_out and state is not None:
                state = search.screening.reached(state, candidate)
        if state is not None and search.rank(state) < search.rank(best):
            best = state
    return best
