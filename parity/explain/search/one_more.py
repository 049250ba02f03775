"""States with one more fault than a state: in all layers, in single ones, or with a fitted number, the best first."""

from collections.abc import Iterable, Sequence
from math import isclose

import numpy as np
from msgspec.structs import replace

from engine.faults import AT, FITTED_PARTS
from engine.graph import Step

from ..records.records import Expected
from .alike import Alike
from .batch import agreeing_first, beyond
from .fits import fitted, order_of_number
from .likely import Likely
from .scopes import STAGES, acts_after, acts_between, last_agreed, long, rescoped, stages, where_it_holds, widest
from .screening import Screening
from .state import WEIGHTS, Candidate, Layers, Screened, SearchState, key, worst
from .sweep import Sweep, screened

_FEW_LEFT = 4  # candidates up to which all are checked on all rows: to choose among them costs as much
_IN_TURN = 120  # variants of one fault that are tried in one turn: offsets of layers have 552 in 24 layers, the next ones first
_LONG = 5  # turns of candidates in a layer before those of faults with many variants
BEAM = 4  # partial explanations that are followed
_FITTED_LAYERS = 6  # single layers in which numbers are fitted: a fit is some ten passes for each of fifty of them
# Errors below this are float32's own noise over 24 layers, which is 7e-13 (`diff.limits.EXACT_FLOOR`): none is better than another.
SAME_NOISE = 1e-12
_SPOILT = 100.0  # limits that a record is far over: a fitted number may leave one that was below its limit a little above it
_FITTED = 1e-2  # within which a number that was fitted to a record of rounding's size is the right one
_DIGITS_LEAVE = 1e-8  # NMSE that a number with the fewest digits within the usual limits (1e-9 at the logits) stays below


def all_explained(states: Sequence[SearchState]) -> bool:
    """Whether one of these states explains everything."""
    return any(state.first is None for state in states)


def spoils(entries: Sequence[Expected], before: SearchState, after: SearchState) -> bool:
    """Whether a further fault makes records wrong, by far, that agreed: the engine does not have it, unless another one undoes it there.

    Two faults, the second of which undoes what the first spoils, are no better than none: the points in between were recorded
    otherwise.
    """
    return any(
        bool(((old <= entry.limit) & (new > _SPOILT * entry.limit)).any())
        for entry, old, new in zip(entries, before.nmse, after.nmse, strict=True)
    )


def _same(step: Step, right: Step) -> bool:
    """Whether two steps compute the same, up to the digits of a number that was fitted."""

    def alike(name: str) -> bool:
        mine, other = step.params[name], right.params[name]
        numbers = isinstance(mine, float) and isinstance(other, float)
        return isclose(mine, other, rel_tol=_FITTED) if numbers else bool(mine == other)

    same = (step.op, step.reads, step.weights) == (right.op, right.reads, right.weights)
    return same and step.params.keys() == right.params.keys() and all(map(alike, right.params))


class OneMore:
    """Plants one more fault in a state: every candidate of the catalogue that its place allows, with one screening. Answers are cached."""

    def __init__(self, screening: Screening) -> None:
        self.screening = screening
        self._right = {step.makes: step for step in screening.right}
        self._cached: dict[tuple[str, ...], list[SearchState]] = {}
        self._stages: dict[tuple[str, ...], list[list[Candidate]]] = {}

    def undoes(self, before: SearchState, after: SearchState) -> bool:
        """Whether a further fault makes a step right again that an earlier one changed: that one is in fewer places, or is none."""
        return any(
            step is not (old := before.planting.right.get(step.makes))
            and old is not None
            and (right := self._right.get(step.makes)) is not None
            and old is not right
            and _same(step, right)
            for step in after.steps
        )

    def _further(self, state: SearchState, single: bool) -> list[SearchState]:
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
                if all_explained(better):
                    break
        return sorted(better, key=self.rank)

    def first_stages(self, state: SearchState) -> list[SearchState]:
        """States that get further by one fault in all layers, of the first two stages (`stages`)."""
        return [*self._of_stage(state, 0), *self._of_stage(state, 1)]

    def _of_stage(self, state: SearchState, number: int) -> list[SearchState]:
        """States that get further by one fault in all layers, from the candidates of one stage; cached."""
        name = (*key(state.faults), f"stage {number}")
        if name not in self._cached:
            if key(state.faults) not in self._stages:
                self._stages[key(state.faults)] = list(stages(self.screening, state, None))
            candidates = self._stages[key(state.faults)][number]
            agreed = last_agreed(self.screening, state)
            if number == 0 and agreed is not None:
                candidates = [one for one in candidates if acts_between(self.screening, state, one, agreed)]
            results = screened(self.screening, state, None, candidates)
            self._cached[name] = list(self._beyond(state, results))
        return self._cached[name]

    def _late(self, state: SearchState) -> list[SearchState]:
        """States that get further by one fault with many variants in all layers that changes nothing before the last point that agrees,
        such as weights of the twelfth layer before, which the first twelve do not have. Those that concern whole layers come first.
        """
        agreed = last_agreed(self.screening, state)
        self._of_stage(state, 0)
        others = self._stages[key(state.faults)][-1]
        whole = widest(others, long(others))
        late = [] if agreed is None else [one for one in others if one.fault.name in whole and acts_after(state, one, agreed)]
        for turn in (True, False):
            some = [one for one in late if (one.parameters.get(AT) == whole[one.fault.name]) is turn]
            some = [one for one in some if agreed is not None and acts_between(self.screening, state, one, agreed)]
            found = list(self._beyond(state, screened(self.screening, state, None, some))) if some else []
            if all_explained(found):
                return found
        return []

    def _in_single_layers(self, state: SearchState) -> list[SearchState]:
        """States that get further by one fault in one layer; if several layers are in question, likely and cheap candidates come first.

        Similar faults in the layer in which something is found are found, too, but for those that take long where something else explains
        everything.
        """
        layers = self.screening.suspects(state)
        sweep = Sweep(self.screening, state, [(layer,) for layer in layers])
        waiting = self._by_cost(state, layers)
        likely = Likely(self.screening, state) if len(layers) > 1 else None
        able = likely if likely is not None and likely.able else None
        choose: Likely | Alike | None = able
        better: list[SearchState] = []
        for turn in range(max((len(lists) for lists in waiting.values()), default=0)):
            if turn >= _LONG and all_explained(better):
                break  # those with many variants would only be said to give the same numbers
            if turn == _LONG and not better and all_explained(everywhere := self._late(state)):
                return everywhere
            of_turn = {scope: lists[turn] for scope, lists in waiting.items() if turn < len(lists)}
            found, scope = self._in_first_layer(state, sweep.in_turn(of_turn, choose), able)
            better += found
            if found:
                waiting = {scope: waiting[scope]}
                choose = self._alike(state, able, better, scope) if choose is able else choose
            if self.screening.budget.over():
                break
        # Where something explains everything, a formula that was not likely may still give the same numbers.
        for rebuilding in (False, True) if able is not None else ():
            if rebuilding and all_explained(better):
                break
            left = {scope: [c for c in sweep.postponed[scope] if (c.fault.group in WEIGHTS) is rebuilding] for scope in waiting}
            same = choose if isinstance(choose, Alike) else None
            better += self._in_first_layer(state, sweep.in_turn(left, same), able)[0]
        return better + self._in_all_layers(state, better)

    def _alike(
        self, state: SearchState, likely: Likely | None, found: Sequence[SearchState], scope: Layers
    ) -> Likely | Alike | None:
        """What chooses the further candidates in a layer: where something explains everything there and other layers follow, those that
        may give the same numbers.
        """
        whole = [after for after in found if after.first is None]
        if likely is None or not whole or scope is None or scope[0] == self.screening.n_layers - 1:
            return likely
        return Alike(self.screening, state, min(whole, key=self.rank), likely)

    def _checked(
        self,
        state: SearchState,
        scope: Layers,
        candidates: Sequence[Candidate],
        errors: Sequence[tuple[Candidate, float]],
        likely: Likely | None,
    ) -> list[SearchState]:
        """The states of candidates of one scope that get further, in their order: the one that leaves least of the first place is checked
        first, and after one that explains everything only what may give the same numbers.

        Where limits are high, most candidates in a layer remain below them at the first place.
        """
        left = {id(candidate): error if np.isfinite(error) else np.inf for candidate, error in errors}
        order = sorted(candidates, key=lambda candidate: left[id(candidate)])
        places = {id(candidate): number for number, candidate in enumerate(candidates)}
        found: dict[int, list[SearchState]] = {}
        waiting = list(order)
        chosen = False
        while waiting:
            candidate = waiting.pop(0)
            states = found[places[id(candidate)]] = beyond(self.screening, state, [candidate])
            if all_explained(states) and len(waiting) > _FEW_LEFT and not chosen:
                alike, chosen = self._alike(state, likely, states, scope), True
                if isinstance(alike, Alike):
                    same = Sweep(self.screening, state, [scope]).screened({scope: waiting}, alike)[scope]
                    waiting = [other for other, _ in same]
        return [after for number in sorted(found) for after in found[number]]

    def _in_first_layer(
        self,
        state: SearchState,
        results: Iterable[tuple[Layers, Sequence[tuple[Candidate, Screened]]]],
        likely: Likely | None,
    ) -> tuple[list[SearchState], Layers]:
        """The states in the first layer that explains everything or, if none does, in the first that gets further; and that layer."""
        found_in: dict[Layers, list[SearchState]] = {}
        others: dict[Layers, list[Candidate]] = {}
        for scope, of_scope in results:
            errors = self._passed(state, of_scope)
            agreeing, others[scope] = agreeing_first(self.screening, state, [candidate for candidate, _ in errors])
            found_in[scope] = self._checked(state, scope, agreeing, errors, likely)
            if all_explained(found_in[scope]):
                return found_in[scope], scope
        # Nothing explains everything, as far as the first rows show: what gets further in some layer is checked on all rows.
        for scope, candidates in others.items():
            found_in[scope] += beyond(self.screening, state, candidates)
            if all_explained(found_in[scope]):
                return found_in[scope], scope
        return next(((found, scope) for scope, found in found_in.items() if found), ([], None))

    def _by_cost(self, state: SearchState, layers: Sequence[int]) -> dict[Layers, list[list[Candidate]]]:
        """The candidates in each of some layers by cost: faults of the capture, formulas, those that need every row, those that rebuild
        weights, and those of a fault with many variants. They are the same in all layers: the first one's stand for the others'.
        """
        *shown, others = stages(self.screening, state, (layers[0],)) if layers else ([],)
        many = long(others)
        cheap: list[list[Candidate]] = [[], [], []]
        each: dict[str, list[Candidate]] = {name: [] for name in sorted(many)}
        for candidate in others:
            fault = candidate.fault
            in_turn = each[fault.name] if fault.name in many else cheap[2 if fault.group in WEIGHTS else int(fault.whole)]
            in_turn.append(candidate)
        turns = sorted(each.values(), key=len)
        first, rest = [turn[:_IN_TURN] for turn in turns], [turn[_IN_TURN:] for turn in turns if turn[_IN_TURN:]]
        lists = [*shown, *cheap, *first, *rest]
        return {(layer,): lists for layer in layers}

    def _in_all_layers(self, state: SearchState, better: Sequence[SearchState]) -> list[SearchState]:
        """The faults that explain everything in one layer, planted in all layers, if that explains everything as well."""
        faults = [state.faults[-1] for state in better if state.first is None]
        everywhere = [replace(fault, layers=None) for fault in faults if fault.fault.shows is None]
        return list(self._beyond(state, screened(self.screening, state, None, everywhere))) if everywhere else []

    def _beyond(self, state: SearchState, results: Iterable[tuple[Candidate, Screened]]) -> list[SearchState]:
        """The states of screened candidates of one scope that get beyond the state's first place; where one explains everything, those
        that the first rows contradict somewhere are left out.
        """
        passed = [candidate for candidate, _ in self._passed(state, results)]
        likely, others = agreeing_first(self.screening, state, passed)
        found = beyond(self.screening, state, likely)
        return found if all_explained(found) else [*found, *beyond(self.screening, state, others)]

    def _passed(self, state: SearchState, results: Iterable[tuple[Candidate, Screened]]) -> list[tuple[Candidate, float]]:
        """The screened candidates that get beyond the state's first place in its first rows, and the error that each leaves there."""
        passed: list[tuple[Candidate, float]] = []
        for candidate, (place, error) in results:
            self._note(state, candidate, error)
            if place is None or (state.first is not None and state.first < place) or self.screening.all_but_noise(state, error):
                passed.append((candidate, error))
        return passed

    def _note(self, state: SearchState, candidate: Candidate, error: float) -> None:
        """Note the error that a candidate leaves at the first place, as a possible lead."""
        first = state.first
        if first is None or not np.isfinite(error):
            return
        entry = self.screening.entries[first.point]
        before = float(state.nmse[first.point][entry.rows == first.row].max())
        removed = 1 - error / before if np.isfinite(before) and before > 0 else 0.0
        self.screening.tried.removed.setdefault(key(state.faults), []).append((removed, candidate))
        if not state.faults and error > float(entry.limit[entry.rows == first.row].max()):
            self.screening.tried.nearest = min(self.screening.tried.nearest, error)

    def rank(self, state: SearchState) -> tuple[float, ...]:
        """A sort key, best first: everything explained, with the least error beyond noise; then the furthest first place. Among equals,
        the fewest faults, those in all layers, and those that change the fewest steps, so that nothing is blamed without need.
        """
        single = sum(candidate.layers is not None for candidate in state.faults)
        size = (len(state.faults), single, sum(self._right.get(step.makes) is not step for step in state.steps))
        if state.first is None:
            error = worst(state, len(state.nmse))
            # A number's error comes from the digits that it was fitted with: among numbers the order of the list decides, unless
            # one leaves far more than digits do, where a coarse reference (a table of float16) lets that pass.
            order = order_of_number(state.faults[-1]) if state.faults else None
            if order is not None:
                return (0.0, round(float(np.log10(max(error, _DIGITS_LEAVE) / _DIGITS_LEAVE))), 0.0, *size, 1.0 + order)
            # Equal to the bit is the best; of errors that are noise none is better than another, and the order of the list decides.
            last = error if error == 0 else max(error, SAME_NOISE)
            return (0.0, round(float(np.log10(max(error, SAME_NOISE) / SAME_NOISE))), 0.0, *size, last)
        return (1.0, -state.first.point, -state.first.row, *size, worst(state, state.first.point - 1))

    def numbers(self, state: SearchState) -> list[SearchState]:
        """States that get further by a fitted number: in all layers, or in one of the few in question."""
        name = (*key(state.faults), "numbers")
        if self.screening.agreeing_after(state):
            return []
        if name not in self._cached:
            states: list[SearchState] = []
            layers = self.screening.suspects(state)
            begins = not layers or layers[0] == 0
            scopes: list[Layers] = [None]
            scopes += [(layer,) for layer in layers] if len(layers) <= _FITTED_LAYERS else []
            scopes += [tuple(range(layers[-1], self.screening.n_layers))] if len(layers) == 1 and not begins else []
            for scope in scopes:
                fits = fitted(self.screening, state, scope)
                # The same number in fewer layers: it may not hold in layers that no recorded point shows.
                states += [
                    *fits,
                    *(
                        other
                        for partial in sorted(fits, key=self.rank)[:BEAM]
                        for other in rescoped(self.screening, state, partial)
                    ),
                ]
                if all_explained(states) or self.screening.budget.over():
                    break
            for scope in () if all_explained(states) else scopes:
                of_parts = [other for other in fitted(self.screening, state, scope, FITTED_PARTS) if other.first is None]
                states += of_parts
                if of_parts or self.screening.budget.over():
                    break
            self._cached[name] = sorted(states, key=self.rank)
        return self._cached[name]

    def once(self, state: SearchState, single: bool) -> list[SearchState]:
        """States that get beyond the state's first place by one more fault, also in fewer or more layers, the best first; cached."""
        name = (*key(state.faults), str(single))
        if name not in self._cached:
            further = self._further(state, single)
            partial = further[:BEAM] if further and further[0].first is not None else []
            further[: len(partial)] = partial = [where_it_holds(self.screening, state, start) for start in partial]
            more = [rescoped_state for start in partial for rescoped_state in rescoped(self.screening, state, start)]
            self._cached[name] = sorted([*further, *more], key=self.rank)
        return self._cached[name]
