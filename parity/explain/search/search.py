"""The search for known faults that reproduce a dump.

A state is a list of steps: the right one, or one with the faults found so far. A candidate plants one more. It is
screened at the first place that the state does not explain, on as few positions as causality allows, and, if it gets
beyond that place, checked on all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product, zip_longest

from msgspec.structs import replace

from engine.faults import Planting
from engine.inapplicable import NotApplicable

from .one_more import BEAM, SAME_NOISE, OneMore, all_explained, spoils
from .scopes import ranges
from .screening import Screening
from .state import Candidate, Layers, SearchState, key, worst
from .together import Together
from .with_a_number import with_a_number

_AT_ONCE = 3  # most faults that are tried together
_SAME = 12  # combinations with the same numbers at the first place that are checked everywhere
_SAME_FACTOR = 10.0  # two candidates reproduce the same numbers if their errors are noise, or within this factor


class Search:
    """Searches the catalogue for faults that explain the records of a dump, with one screening.

    `ends` is asked about a state from which no single fault gets further: whether the search may end there, since the error is known.
    """

    def __init__(self, screening: Screening, ends: Callable[[SearchState], bool] = lambda _state: False) -> None:
        self.screening = screening
        self._stop = ends
        self.tried = screening.tried
        #: The law at the first place of each state that was asked for one, by its faults.
        self.laws: dict[tuple[str, ...], str] = {}
        self._one_more = OneMore(screening)
        self.rank = self._one_more.rank
        self._states: dict[tuple[str, ...], list[SearchState]] = {}
        self._ends: dict[tuple[str, ...], SearchState] = {}

    def simple(self, state: SearchState) -> list[SearchState]:
        """States of one more fault that explain everything."""
        return [further for further in self.of_one_more(state) if further.first is None]

    def of_one_more(self, state: SearchState) -> list[SearchState]:
        """States of one more fault that get further: in all layers or, if only one is in question, in that one."""
        states = list(self._one_more.once(state, single=False))
        if not all_explained(states) and len(self.screening.suspects(state)) == 1:
            states += self._one_more.once(state, single=True)
        if not all_explained(states):
            states += self._one_more.numbers(state)
        return states

    def most_likely(self, state: SearchState) -> list[SearchState]:
        """States of one more fault that get further: in a single layer where the layers before agree, since a fault in all layers would
        show in them; else in all layers.
        """
        suspects = self.screening.suspects(state)
        before = bool(suspects) and suspects[0] > 0
        single = before and (len(suspects) == 1 or not all_explained(self._one_more.first_stages(state)))
        return self._one_more.once(state, single=single)

    def explain(self, state: SearchState, depth: int) -> SearchState:
        """The best state that up to `depth` further faults lead to: everything explained, or the first place moved furthest.

        Faults are tried one by one; where that gets no further, several at once in the best states so far.
        """
        best = self.one_by_one(state, depth)
        tried: set[tuple[str, ...]] = set()
        while best.first is not None and not self.screening.budget.over():
            ends = sorted((end for name, end in self._ends.items() if name not in tried), key=self.rank)
            if not ends:
                break
            tried.add(key(ends[0].faults))
            left = depth - (len(ends[0].faults) - len(state.faults))
            best = min(best, self._follow(ends[0], self._several(ends[0], left), left), key=self.rank)
        return best

    def one_by_one(self, state: SearchState, depth: int) -> SearchState:
        """The best state that up to `depth` further faults lead to, each of which gets further by itself."""
        if state.first is None or depth == 0:
            return state
        states = self.most_likely(state)
        if all_explained(states):
            return self._follow(state, states, depth)
        suspects = self.screening.suspects(state)
        everywhere = self._one_more.once(state, single=False)
        if len(suspects) > 1 and not all_explained(everywhere):
            # Searching many layers takes long: faults found in all layers are followed first.
            best = self._follow(state, everywhere, depth)
            if best.first is None:
                return best
        states = everywhere
        if not all_explained(states):
            states = sorted([*states, *self._one_more.once(state, single=True)], key=self.rank)
        if not all_explained(states):
            states = sorted([*states, *self._one_more.numbers(state)], key=self.rank)
        if not states and self._stop(state):
            return state
        if not states and len(suspects) > 1:
            states = sorted(ranges(self.screening, state), key=self.rank)
        if not states:
            self._ends.setdefault(key(state.faults), state)
        return self._follow(state, states, depth)

    def _follow(self, state: SearchState, states: Sequence[SearchState], depth: int) -> SearchState:
        """The best state that the first few of these lead to; of those with the same errors one is followed."""
        self._states[key(state.faults)] = list(states)
        best = state
        seen: set[tuple[float, ...]] = set()
        for follower in states:
            errors = tuple(float(f"{errors.max():.3g}") for errors in follower.nmse)
            spoilt = spoils(self.screening.entries, state, follower) or self._one_more.undoes(state, follower)
            if errors in seen or spoilt:
                continue
            seen.add(errors)
            best = min(best, self.one_by_one(follower, depth - (len(follower.faults) - len(state.faults))), key=self.rank)
            if best.first is None or len(seen) >= BEAM:
                break
        return best

    def of_candidates(self, state: SearchState, further: Sequence[SearchState]) -> SearchState:
        """The best of these states of one more fault that explain everything; the others are said to give the same numbers."""
        self._states[key(state.faults)] = sorted(further, key=self.rank)
        return self._states[key(state.faults)][0]

    def alike(self, state: SearchState, number: int) -> list[Candidate]:
        """Other candidates that get as far in place of the state's fault of that number, with errors of the same size."""
        reached = next(
            (earlier for earlier in self._stage(state, number) if earlier.faults == state.faults[: len(earlier.faults)]), None
        )
        if reached is None:
            return []
        until = len(self.screening.entries) - 1 if reached.first is None else reached.first.point - 1
        most = max(worst(reached, until) * _SAME_FACTOR, SAME_NOISE)
        return [
            other.faults[number]
            for other in self._stage(state, number)
            if other.first == reached.first
            and [at for at, pair in enumerate(zip_longest(other.faults, reached.faults)) if pair[0] != pair[1]] == [number]
            and worst(other, until) <= most
        ]

    def equal(self, state: SearchState, number: int) -> list[Candidate]:
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

    def _planted(self, faults: Sequence[Candidate]) -> SearchState | None:
        """The right engine with these faults, on all rows and points; None if the model or the other faults do not allow it."""
        *below, last = faults
        start = middle = self.screening.start()
        try:
            for candidate in below:
                middle = SearchState(
                    (*middle.faults, candidate), Planting(candidate.planted(middle)), start.nmse, start.first, start
                )
        except NotApplicable:
            return None
        return self.screening.check(middle, last)

    def _stage(self, state: SearchState, number: int) -> list[SearchState]:
        """The states found at the stage at which the state's fault of that number was added, alone or together with others."""
        for before in range(number, -1, -1):
            states = self._states.get(key(state.faults[:before]), [])
            if any(len(longer.faults) > number and longer.faults == state.faults[: len(longer.faults)] for longer in states):
                return states
        return []

    def _several(self, state: SearchState, depth: int) -> list[SearchState]:
        """States with two or three more faults at once, layer by layer, for a state from which no single one gets further.

        None of them where the first place holds no number at all: one fault alone makes that, whatever the others do before it.
        """
        if state.first is not None and not self.screening.has_numbers(state.first):
            return []
        scopes: list[Layers] = [(layer,) for layer in self.screening.suspects(state)]
        for layers in scopes or [None]:
            together = Together(self.screening, state, layers)
            better: list[SearchState] = []
            for number in range(2, min(depth, _AT_ONCE) + 1):
                for alike in together.combinations(number):
                    better += [combined for chosen in alike[:_SAME] for combined in self._all_of(state, chosen)]
                    if better:
                        break
                if better or self.screening.budget.over():
                    return sorted(better, key=self.rank)
            each = [effect.alike[0] for effect in together.effects]
            for chosen in with_a_number(self.screening, state, layers, each) if depth > 1 else ():
                better += self._all_of(state, chosen)
                if all_explained(better):
                    break
            if better:
                return sorted(better, key=self.rank)
        return []

    def _all_of(self, state: SearchState, chosen: Sequence[Candidate]) -> Iterator[SearchState]:
        """The states with all of these faults that get beyond the first place, each fault in all layers or in its one."""
        scopes = (
            [replace(candidate, layers=None), candidate] if candidate.layers is not None else [candidate]
            for candidate in chosen
        )
        for *below, last in product(*scopes):
            middle = state
            try:
                for candidate in below:
                    middle = SearchState(
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
