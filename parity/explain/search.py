"""The search for known faults that reproduce a dump.

A state is a list of steps: the right one, or one with the faults found so far. A candidate plants one more. It is
screened at the first place that the state does not explain, on as few positions as causality allows, and, if it gets
beyond that place, checked on all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product, zip_longest

import numpy as np

from engine.faults import Planting
from engine.inapplicable import NotApplicable

from .batch import beyond, in_two, screened
from .fits import fitted, order_of_number
from .likely import Likely
from .scopes import STAGES, ranges, rescoped, stages
from .screening import Screening
from .state import Candidate, Layers, Screened, State, key, worst
from .together import Together

_BEAM = 4  # partial explanations that are followed
# Groups of faults that rebuild a matrix, which costs more than its product with one row.
_WEIGHTS = ("weights", "dequantisation")
_AT_ONCE = 3  # most faults that are tried together
_FITTED_LAYERS = 6  # single layers in which numbers are fitted: a fit is some ten passes for each of fifty of them
_SAME = 12  # combinations with the same numbers at the first place that are checked everywhere
# Two candidates reproduce the same numbers if their errors are of one size: float32's own noise over 24 layers is 7e-13
# (tolerance.EXACT_FLOOR), so what lies below 1e-12, or within a factor of ten, is no difference.
_SAME_NOISE, _SAME_FACTOR = 1e-12, 10.0
_DIGITS_LEAVE = 1e-8  # NMSE that a number with the fewest digits within the usual limits (1e-9 at the logits) stays below


def _whole(states: Sequence[State]) -> bool:
    """Whether one of these states explains everything."""
    return any(state.first is None for state in states)


class Search:
    """Searches the catalogue for faults that explain the records of a dump, with one screening.

    `ends` is asked about a state from which no single fault gets further: whether the search may end there, since the error is known.
    """

    def __init__(self, screening: Screening, ends: Callable[[State], bool] = lambda _state: False) -> None:
        self.screening = screening
        self._stop = ends
        self.tried = screening.tried
        self.right = {step.makes: step for step in screening.right}
        self._found: dict[tuple[str, ...], list[State]] = {}
        self._stages: dict[tuple[str, ...], list[State]] = {}
        self._ends: dict[tuple[str, ...], State] = {}

    def further(self, state: State, single: bool) -> list[State]:
        """States that get beyond the state's first place by one more fault, the best first.

        In single layers the search ends with the layer in which something is found; similar faults there are found, too. In all
        layers it ends with the stage (`stages`) in which something explains everything.
        """
        if single:
            better = self._in_single_layers(state)
        else:
            better = []
            for number in range(STAGES):
                better += self._of_stage(state, number)
                if _whole(better):
                    break
        return sorted(better, key=self.rank)

    def _of_stage(self, state: State, number: int) -> list[State]:
        """States that get further by one fault in all layers, from the candidates of one stage; cached."""
        name = (*key(state.faults), f"stage {number}")
        if name not in self._stages:
            candidates = list(stages(self.screening, state, None))[number]
            results = screened(self.screening, state, None, candidates)
            self._stages[name] = list(self._beyond(state, results))
        return self._stages[name]

    def _in_single_layers(self, state: State) -> list[State]:
        """States that get further by one fault in one layer; if several layers are in question, likely and cheap candidates come first.

        Similar faults in the layer in which something is found are found, too.
        """
        layers = self.screening.suspects(state)
        likely = Likely(self.screening, state) if len(layers) > 1 else None
        choose = likely.among if likely is not None and likely.able else None
        postponed: dict[int, list[Iterator[tuple[Candidate, Screened]]]] = {layer: [] for layer in layers}

        def of(layer: int, candidates: Sequence[Candidate]) -> list[State]:
            now, later = in_two(self.screening, state, (layer,), candidates, choose)
            postponed[layer].append(later)
            return list(self._beyond(state, now))

        waiting = {layer: self._by_cost(state, layer) for layer in layers}
        better: list[State] = []
        explaining: int | None = None
        for turn in range(max((len(lists) for lists in waiting.values()), default=0)):
            for layer, lists in waiting.items():
                if explaining in (None, layer) and turn < len(lists) and not self.screening.budget.over():
                    better += of(layer, lists[turn])
                    explaining = layer if better else None
        for layer in layers if explaining is None else [explaining]:
            for later in postponed[layer]:
                better += self._beyond(state, later)
            if better or self.screening.budget.over():
                break
        return better + self._in_all_layers(state, better)

    def _by_cost(self, state: State, layer: int) -> list[list[Candidate]]:
        """The candidates in a layer by cost: faults of the capture, formulas, those that need every row, those that rebuild weights."""
        *shown, others = stages(self.screening, state, (layer,))
        costly = [2 if candidate.fault.group in _WEIGHTS else int(candidate.fault.whole) for candidate in others]
        return [
            *shown,
            *([candidate for candidate, cost in zip(others, costly, strict=True) if cost == turn] for turn in range(3)),
        ]

    def _in_all_layers(self, state: State, better: Sequence[State]) -> list[State]:
        """The faults that explain everything in one layer, planted in all layers, if that explains everything as well."""
        faults = [state.faults[-1] for state in better if state.first is None]
        everywhere = [replace(fault, layers=None) for fault in faults if fault.fault.shows is None]
        return list(self._beyond(state, screened(self.screening, state, None, everywhere))) if everywhere else []

    def _beyond(self, state: State, results: Iterator[tuple[Candidate, Screened]]) -> Iterator[State]:
        """The states of screened candidates that get beyond the state's first place."""
        passed: list[Candidate] = []
        for candidate, (place, error) in results:
            self._note(state, candidate, error)
            if place is None or (state.first is not None and state.first < place) or self.screening.all_but_noise(state, error):
                passed.append(candidate)
        return beyond(self.screening, state, passed)

    def _note(self, state: State, candidate: Candidate, error: float) -> None:
        """Note the error that a candidate leaves at the first place, as a possible lead."""
        first = state.first
        if first is None or not np.isfinite(error):
            return
        entry = self.screening.entries[first.point]
        before = float(state.nmse[first.point][entry.rows == first.row].max())
        removed = 1 - error / before if np.isfinite(before) and before > 0 else 0.0
        self.tried.removed.setdefault(key(state.faults), []).append((removed, candidate))
        if not state.faults and error > float(entry.limit[entry.rows == first.row].max()):
            self.tried.nearest = min(self.tried.nearest, error)

    def rank(self, state: State) -> tuple[float, ...]:
        """A sort key, best first: everything explained, with the least error beyond noise; then the furthest first place. Among equals,
        the fewest faults, those in all layers, and those that change the fewest steps, so that nothing is blamed without need.
        """
        single = sum(candidate.layers is not None for candidate in state.faults)
        size = (len(state.faults), single, sum(self.right.get(step.makes) is not step for step in state.steps))
        if state.first is None:
            error = worst(state, len(state.nmse))
            # A number's error comes from the digits that it was fitted with: among numbers the order of the list decides, unless
            # one leaves far more than digits do, where a coarse reference (a table of float16) lets that pass.
            order = order_of_number(state.faults[-1]) if state.faults else None
            if order is not None:
                return (0.0, round(float(np.log10(max(error, _DIGITS_LEAVE) / _DIGITS_LEAVE))), 0.0, *size, 1.0 + order)
            # Equal to the bit is the best; of errors that are noise none is better than another, and the order of the list decides.
            last = error if error == 0 else max(error, _SAME_NOISE)
            return (0.0, round(float(np.log10(max(error, _SAME_NOISE) / _SAME_NOISE))), 0.0, *size, last)
        return (1.0, -state.first.point, -state.first.row, *size, worst(state, state.first.point - 1))

    def simple(self, state: State) -> list[State]:
        """States of one more fault that explain everything: in all layers or, if only one is in question, in that one."""
        states = list(self._once(state, single=False))
        if not _whole(states) and len(self.screening.suspects(state)) == 1:
            states += self._once(state, single=True)
        if not _whole(states):
            states += self._numbers(state)
        return [state for state in states if state.first is None]

    def _numbers(self, state: State) -> list[State]:
        """States that get further by a fitted number: in all layers, or in one of the few in question."""
        name = (*key(state.faults), "numbers")
        if name not in self._stages:
            states: list[State] = []
            layers = self.screening.suspects(state)
            begins = not layers or layers[0] == 0
            scopes: list[Layers] = [None]
            scopes += [(layer,) for layer in layers] if len(layers) <= _FITTED_LAYERS else []
            scopes += [tuple(range(layers[-1], self.screening.n_layers))] if len(layers) == 1 and not begins else []
            for scope in scopes:
                mine = fitted(self.screening, state, scope)
                # The same number in fewer layers: it may not hold in layers that no recorded point shows.
                states += [
                    *mine,
                    *(
                        other
                        for partial in sorted(mine, key=self.rank)[:_BEAM]
                        for other in rescoped(self.screening, state, partial)
                    ),
                ]
                if _whole(states) or self.screening.budget.over():
                    break
            self._stages[name] = sorted(states, key=self.rank)
        return self._stages[name]

    def _once(self, state: State, single: bool) -> list[State]:
        """`further`, cached."""
        name = (*key(state.faults), str(single))
        if name not in self._stages:
            further = self.further(state, single)
            partial = further[:_BEAM] if further and further[0].first is not None else []
            more = [rescoped_state for start in partial for rescoped_state in rescoped(self.screening, state, start)]
            self._stages[name] = sorted([*further, *more], key=self.rank)
        return self._stages[name]

    def explain(self, state: State, depth: int) -> State:
        """The best state that up to `depth` further faults lead to: everything explained, or the first place moved furthest.

        Faults are tried one by one; where that gets no further, several at once in the best states so far.
        """
        best = self._one_by_one(state, depth)
        tried: set[tuple[str, ...]] = set()
        while best.first is not None and not self.screening.budget.over():
            ends = sorted((end for name, end in self._ends.items() if name not in tried), key=self.rank)
            if not ends:
                break
            tried.add(key(ends[0].faults))
            left = depth - (len(ends[0].faults) - len(state.faults))
            best = min(best, self._follow(ends[0], self._several(ends[0], left), left), key=self.rank)
        return best

    def _one_by_one(self, state: State, depth: int) -> State:
        """The best state that up to `depth` further faults lead to, each of which gets further by itself."""
        if state.first is None or depth == 0:
            return state
        suspects = self.screening.suspects(state)
        if len(suspects) == 1 and suspects[0] > 0:  # the layers before agree: most likely only one layer is wrong
            states = self._once(state, single=True)
            if states and states[0].first is None:
                return self._follow(state, states, depth)
        if len(suspects) > 1 and suspects[0] > 0 and not _whole([*self._of_stage(state, 0), *self._of_stage(state, 1)]):
            # A fault in all layers would most likely show in those that agree.
            states = self._once(state, single=True)
            if _whole(states):
                return self._follow(state, states, depth)
        everywhere = self._once(state, single=False)
        if len(suspects) > 1 and not (everywhere and everywhere[0].first is None):
            # Searching many layers takes long: faults found in all layers are followed first.
            best = self._follow(state, everywhere, depth)
            if best.first is None:
                return best
        states = everywhere
        if not (states and states[0].first is None):
            states = sorted([*states, *self._once(state, single=True)], key=self.rank)
        if not _whole(states):
            states = sorted([*states, *self._numbers(state)], key=self.rank)
        if not states and self._stop(state):
            return state
        if not states and len(suspects) > 1:
            states = sorted(ranges(self.screening, state), key=self.rank)
        if not states:
            self._ends.setdefault(key(state.faults), state)
        return self._follow(state, states, depth)

    def _follow(self, state: State, states: Sequence[State], depth: int) -> State:
        """The best state that the first few of these lead to; of those with the same errors one is followed."""
        self._found[key(state.faults)] = list(states)
        best = state
        seen: set[tuple[float, ...]] = set()
        for follower in states:
            errors = tuple(float(f"{errors.max():.3g}") for errors in follower.nmse)
            if errors in seen:
                continue
            seen.add(errors)
            best = min(best, self._one_by_one(follower, depth - (len(follower.faults) - len(state.faults))), key=self.rank)
            if best.first is None or len(seen) >= _BEAM:
                break
        return best

    def alike(self, state: State, number: int) -> list[Candidate]:
        """Other candidates that get as far in place of the state's fault of that number, with errors of the same size."""
        mine = next(
            (earlier for earlier in self._stage(state, number) if earlier.faults == state.faults[: len(earlier.faults)]), None
        )
        if mine is None:
            return []
        until = len(self.screening.entries) - 1 if mine.first is None else mine.first.point - 1
        most = max(worst(mine, until) * _SAME_FACTOR, _SAME_NOISE)
        return [
            other.faults[number]
            for other in self._stage(state, number)
            if other.first == mine.first
            and [at for at, pair in enumerate(zip_longest(other.faults, mine.faults)) if pair[0] != pair[1]] == [number]
            and worst(other, until) <= most
        ]

    def equal(self, state: State, number: int) -> list[Candidate]:
        """`alike`, without those that do not get as far as the state together with its other faults."""
        alike = self.alike(state, number)
        if len(state.faults) == 1:
            return alike
        equal = []
        for candidate in alike:
            checked = self._planted((*state.faults[:number], candidate, *state.faults[number + 1 :]))
            if checked is not None and checked.first == state.first:
                equal.append(candidate)
        return equal

    def _planted(self, faults: Sequence[Candidate]) -> State | None:
        """The right engine with these faults, on all rows and points; None if the model or the other faults do not allow it."""
        *below, last = faults
        start = middle = self.screening.start()
        try:
            for candidate in below:
                middle = State((*middle.faults, candidate), Planting(candidate.planted(middle)), start.nmse, start.first, start)
        except NotApplicable:
            return None
        return self.screening.check(middle, last)

    def _stage(self, state: State, number: int) -> list[State]:
        """The states found at the stage at which the state's fault of that number was added, alone or together with others."""
        for before in range(number, -1, -1):
            states = self._found.get(key(state.faults[:before]), [])
            if any(len(longer.faults) > number and longer.faults == state.faults[: len(longer.faults)] for longer in states):
                return states
        return []

    def _several(self, state: State, depth: int) -> list[State]:
        """States with two or three more faults at once, layer by layer, for a state from which no single one gets further."""
        scopes: list[Layers] = [(layer,) for layer in self.screening.suspects(state)]
        for layers in scopes or [None]:
            together = Together(self.screening, state, layers)
            for number in range(2, min(depth, _AT_ONCE) + 1):
                better: list[State] = []
                for alike in together.combinations(number):
                    better += [combined for chosen in alike[:_SAME] for combined in self._all_of(state, chosen)]
                    if better:
                        break
                if better or self.screening.budget.over():
                    return sorted(better, key=self.rank)
        return []

    def _all_of(self, state: State, chosen: Sequence[Candidate]) -> Iterator[State]:
        """The states with all of these faults that get beyond the first place, each fault in all layers or in its one."""
        scopes = (
            [replace(candidate, layers=None), candidate] if candidate.layers is not None else [candidate]
            for candidate in chosen
        )
        for *below, last in product(*scopes):
            middle = state
            try:
                for candidate in below:
                    middle = State(
                        (*middle.faults, candidate),
                        Planting(candidate.planted(middle)),
                        state.nmse,
                        state.first,
                        state.root or state,
                    )
            except NotApplicable:
                continue
            checked = self.screening.check(middle, last)
            if checked is not None and (checked.first is None or (state.first is not None and state.first < checked.first)):
                yield checked
                if checked.first is None:
                    return
