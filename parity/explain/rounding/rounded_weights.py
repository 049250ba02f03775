"""Weights that an engine keeps in a lower type than the file, while it computes in float32. This is tried before any search.

Checkpoints are BF16, and an engine that reads them itself rounds nothing; one that reads a GGUF, whose norms and biases are float32, may.
The first place says which weights: its operations are computed again with some of them rounded.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from msgspec.structs import replace

from checkpoints.printable import first_names
from engine.faults.base import Fault, Parameters, Steps, kind_of
from engine.graph import GIVEN, Step, weight_name
from engine.replay.precision import is_normed
from engine.replay.rounded_weights import with_rounded_weights
from reports.sentences import ARITHMETIC

from ..budget import Budget
from ..case import Case
from ..search.search import Search
from ..search.state import Candidate, SearchState
from .looks_like import looks_like
from .mixed import first_errors, noise_here, own_steps, rounded_here

_KINDS = ("bf16", "f16")
_SMALL = 1e-3  # NMSE up to which errors may be those of rounded weights: BF16's are 1e-6 of a weight, and grow within a layer
_SHOWN = 4  # names of weights that are shown: more are counted
_LAYER = re.compile(r"(^|\.)blk\.\d+\.")
_Wanted = Callable[[Step, str], bool]


def with_weights_rounded(case: Case, search: Search, start: SearchState, budget: Budget) -> SearchState:
    """The state with those weights of all layers rounded to one type that the first places show; the start without such weights.

    The search continues with whatever this does not explain.
    """
    if start.first is None or not float(np.max(case.entries[start.first.point].base)) <= _SMALL:
        return start
    states = [state for kind in _KINDS if (state := _with_type(case, search, start, kind, budget)) is not start]
    state = search.of_candidates(start, states) if states else start
    only_looked_up = _only_looked_up(case, start, state)
    return start if only_looked_up and (looks_like(case, search, start, budget) or _goes_on(case, search, state)) else state


def in_kept_weights(case: Case, seconds: float) -> str:
    """A sentence if weights of all layers that are rounded to one type give every record of a dump; otherwise ""."""
    budget = Budget(seconds)
    search = Search(case.screening(case.entries, budget))
    start = search.screening.start()
    state = with_weights_rounded(case, search, start, budget)
    if state is start or state.first is not None:
        return ""
    parameters = state.faults[0].parameters
    return f"all that differs is what {parameters['said']} make that are kept in {parameters['to']}, which nothing states"


def type_of_rows(state: SearchState) -> str:
    """The type to which a state's only cause rounds the tables that the tokens look up, "" if its causes are others: an engine that
    computes in that type rounds those, too."""
    names = [candidate.parameters.get("weights", ()) for candidate in state.faults if candidate.fault.name == _FAULT.name]
    if len(state.faults) != 1 or not names:
        return ""
    looked_up = {general(name) for step in state.steps if GIVEN.issuperset(step.names) for name in _names(step)}
    return str(state.faults[0].parameters["kind"]) if looked_up.issuperset(names[0]) else ""


def _goes_on(case: Case, search: Search, state: SearchState) -> bool:
    """Whether what a state leaves begins with an operation's own rounding, so that it is not the weights alone that are rounded."""
    beside = first_errors(case, state, search.screening.replay(state, len(case.positions)).on_host)
    return bool(rounded_here(case, *beside) or noise_here(case, *beside))


def _only_looked_up(case: Case, start: SearchState, state: SearchState) -> bool:
    """Whether rounded weights explain only values that are looked up, which whoever computes in a lower type rounds as well."""
    if state is start or start.first is None or state.first is None:
        return False
    explained = (
        entry.point
        for entry, nmse in zip(case.entries[: state.first.point], start.nmse, strict=False)
        if (nmse > entry.limit).any()
    )
    steps = {step.makes: step for step in state.steps}
    return all(_is_looked_up(steps, point) for point in explained)


def _is_looked_up(steps: Mapping[str, Step], name: str) -> bool:
    """Whether a value is a weight's rows, chosen by the tokens, or made from such rows without a further weight."""
    step = steps.get(name)
    return (
        step is None
        or GIVEN.issuperset(step.names)
        or (not step.weights and all(_is_looked_up(steps, read) for read in step.names))
    )


def _with_type(case: Case, search: Search, start: SearchState, kind: str, budget: Budget) -> SearchState:
    state, names, apart = start, frozenset[str](), frozenset[str]()
    while state.first is not None and not budget.late:
        further = _names_here(case, search, state, kind, names)
        following = None if not further else search.screening.check(start, _candidate(start, kind, names | further, apart))
        if following is not None and (again := _reads_again(case, following, names | further)) - apart:
            # An engine may round the rows that it looks up, and not the same table where it multiplies by it.
            without = search.screening.check(start, _candidate(start, kind, names | further, apart | again))
            if without is not None and _further(following, without):
                following, apart = without, apart | again
        if following is None or not _further(state, following):
            break
        state, names = following, names | further
    return state


def _further(state: SearchState, following: SearchState) -> bool:
    """Whether another state explains more places than a state that does not explain all."""
    return following.first is None or (state.first is not None and state.first < following.first)


def _reads_again(case: Case, state: SearchState, names: Collection[str]) -> frozenset[str]:
    """The kind of the step at a state's first place, if it reads one of these weights that an earlier step of another kind reads."""
    if state.first is None:
        return frozenset()
    at = next((n for n, step in enumerate(state.steps) if step.makes == case.entries[state.first.point].point), 0)
    again = {general(name) for name in _names(state.steps[at])}.intersection(names)
    kind = kind_of(state.steps[at])
    before = {general(name) for step in state.steps[:at] if kind_of(step) != kind for name in _names(step)}
    return frozenset({kind}) if again & before else frozenset()


def _names_here(case: Case, search: Search, state: SearchState, kind: str, known: Collection[str]) -> frozenset[str]:
    """The fewest further weights of the first place's own operations that give its records if they are rounded; empty if none do."""
    assert state.first is not None
    entry = case.entries[state.first.point]
    replay = search.screening.replay(state, len(case.positions))
    numbers = own_steps(state.steps, entry.point, {other.point for other in case.entries[: state.first.point]})
    steps = [state.steps[number] for number in numbers]
    begins = {general(name): number for number, step in reversed([*enumerate(state.steps)]) for name in _names(step)}
    names = {general(name): step for step in steps for name in _names(step)}
    # A weight of all layers shows in the first of them.
    names = {name: step for name, step in names.items() if begins[name] >= numbers[0] and name not in known}
    norms = {name for name, step in names.items() if is_normed(step)}
    second = {name for name, step in names.items() if name not in norms and name != general(weight_name(step.weights[0]))}
    biases = {name for name in names if name.endswith(".bias")}  # those of norms too, and those that are added by themselves
    for some in dict.fromkeys(
        map(frozenset, (*({name} for name in names), norms, biases, second, norms | second | biases, names))
    ):
        if not some:
            continue
        changed = list(state.steps)
        for number, step in zip(numbers, _rounded(steps, kind, some), strict=True):
            changed[number] = step
        # Weights that already are of that type change no value, and those are not computed again.
        value = replay.run(changed, lambda name, _: name != entry.point, numbers[0]).get(entry.point)
        if value is not None and bool(
            (entry.nmse(case.transformer.backend.to_host(value), case.positions) <= entry.limit).all()
        ):
            return some
    return frozenset()


def general(name: str) -> str:
    """A weight's name for all layers: blk.*.attn_norm.weight."""
    return _LAYER.sub(r"\1blk.*.", name)


def _names(step: Step) -> list[str]:
    return [name for weight in step.weights if (name := weight_name(weight))]


def _rounded(steps: Sequence[Step], kind: str, names: Collection[str]) -> list[Step]:
    return with_rounded_weights(steps, kind, lambda _step, name: general(name) in names)


def _candidate(state: SearchState, kind: str, names: frozenset[str], apart: frozenset[str]) -> Candidate:
    """Weights of these names rounded wherever they are read, but at steps of the kinds `apart`."""
    reading = dict.fromkeys(kind_of(step) for step in state.steps if not names.isdisjoint(map(general, _names(step))))
    kinds = tuple(kind for kind in reading if kind not in apart)
    every = names.issuperset(general(name) for step in state.steps for name in _names(step))
    said = "all weights" if every else first_names(sorted(names), _SHOWN)
    if apart:
        said = f"{said} (not for {' and '.join(sorted(apart))})"
    parameters = {"weights": tuple(sorted(names)), "said": said, "to": ARITHMETIC[kind], "kind": kind}
    return Candidate(replace(_FAULT, kinds=kinds), parameters)


def _change(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return _rounded([step], parameters["kind"], parameters["weights"])[0]


_FAULT = Fault(
    name="weights-rounded",
    kinds=(),
    change=_change,
    what="{said} rounded to {to}",
    symptom="small differences at every position, of the size of that type's digits; the text is hardly ever another one",
    fix="keep these weights in the type that the file has, or accept the difference: it is the type's, not an operation's",
    seen="engines that cast the whole model when they load it, norms and biases included",
    group="weights",
)
