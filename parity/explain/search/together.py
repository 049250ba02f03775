"""Several faults before one checkpoint: none gets past it alone, so they are tried together.

Only the steps up to the first difference are computed, for the first differing position, and only in one layer. The effect of each
single fault there is computed once. Faults whose effects, each scaled, add up to most of the error are likely: they
are planted together first.
"""

from collections.abc import Iterator, Sequence
from itertools import permutations, product

import numpy as np
from msgspec import Struct

from engine.backend import Array
from engine.faults import AT, SEEN, Planting
from engine.graph import Step
from engine.inapplicable import NotApplicable
from engine.replay.replay import Replay
from engine.replay.right_values import same_start

from ..records.records import Floats, Ints
from .first_place import AtFirstPlace
from .screening import Screening
from .state import Candidate, Layers, SearchState, shown_points

# How many of the likely combinations are tried. Of 16 seeded pairs the right one had rank 0 to 1,250 among about 19,000 (ten
# of them below 40), but for one at 14,203 (`benchmarks/explain_several.py --ranks`).
MOST = 3000
_MOST_OF_ONE = 100  # the same if one operation is in question: two faults in one operation are rare, and the search must end
_BEYOND = 2  # steps after the first place that a wrong capture may show; further ones are not worth the time for each candidate
_REPLAYS = 64  # replays that are kept, of one interval each
# Added to the diagonal of the unit effects' inner products, so that effects that are equal in float32 stay solvable.
_RIDGE = 1e-9


class Effect(Struct, frozen=True, eq=False):
    """The change of the recorded elements of the first place by one candidate alone, float64 [k], and all candidates with that effect."""

    value: Floats
    alike: list[Candidate]

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of step that its candidates change."""
        first = self.alike[0]
        return frozenset(first.parameters.get(AT, first.fault.kinds))


class Together(AtFirstPlace):
    """Tries several candidates at once at a state's first place: in one layer, or (None) outside the layers.

    Raises:
        ValueError: the state has no place that differs.
    """

    def __init__(self, screening: Screening, state: SearchState, layers: Layers) -> None:
        super().__init__(screening, state, layers)
        self._limit = float(self._entry.limit[self._entry.rows == self._first.row].max())
        self._replays: dict[tuple[tuple[Effect, ...], int], tuple[SearchState, Replay]] = {}
        # Outside the layers nothing before the last agreement is in question; in a layer, the choice of the layer ensures that.
        before = screening.entries[self._first.point - 1].point if layers is None and self._first.point else ""
        self._agreed = state.order.get(before, -1)
        self._length = len(self._until(state.steps))
        self.effects = self._effects()

    def combinations(self, number: int) -> Iterator[list[tuple[Candidate, ...]]]:
        """Combinations that leave no error at the first place, each with those that differ in one fault; the likely ones first."""
        few = self._screening.cone(self._state)
        most = _MOST_OF_ONE if few.sure and len(few.steps) == 1 else MOST
        for chosen in self.likely(number)[:most]:
            effects = [self.effects[index] for index in chosen]
            for order in self._orders(effects):
                if self._screening.budget.over():
                    return
                if self._left(order) <= self._limit:
                    yield [
                        combination
                        for alike in (order, *self._others(order))
                        for combination in product(*(e.alike for e in alike))
                    ]
                    break

    def _orders(self, effects: list[Effect]) -> Iterator[tuple[Effect, ...]]:
        """The orders in which they may be planted, which matters if two change the same step."""
        kinds = [kind for effect in effects for kind in effect.kinds]
        return permutations(effects) if len(set(kinds)) < len(kinds) else iter([tuple(effects)])

    def _others(self, order: tuple[Effect, ...]) -> Iterator[tuple[Effect, ...]]:
        """Combinations with one effect replaced that leave no error either."""
        for place, replaced in enumerate(order):
            for effect in self.effects:
                other = (*order[:place], effect, *order[place + 1 :])
                if effect is not replaced and not self._screening.budget.over() and self._left(other) <= self._limit:
                    yield other

    def likely(self, number: int) -> Ints:
        """Combinations of `number` effects, sorted by the error that they leave if each is scaled freely: indices [M, number]."""
        right = self._recorded(self._replay(self._state.steps, self._rows()).values[self._shown(self._state.steps)])
        wanted = np.where(self._entry.present, self._entry.values, 0.0)[self._entry.rows == self._first.row][0] - right
        known = np.isfinite(wanted)
        values = np.array([effect.value for effect in self.effects]).reshape(-1, len(right))[:, known] - right[known]
        values = np.where(np.isfinite(values), values, 0.0)
        values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        chosen = np.arange(len(values))[:, None]
        for _ in range(number - 1):
            chosen = _by_residual(_one_more(chosen[:MOST], len(values)), values, wanted[known])
        return chosen

    def _left(self, effects: tuple[Effect, ...]) -> float:
        """NMSE that is left with these planted one after the other; infinite if the model or the others do not allow it."""
        *below, last = (effect.alike[0] for effect in effects)
        rows = self._rows(*below, last)
        self._screening.tried.variants += 1
        try:
            state, replay = self._below(effects[:-1], rows)
        except NotApplicable:
            return float("inf")
        value = self._values_of(replay, state, last)
        return float("inf") if value is None else self._screening.left(self._first, value)

    def _below(self, effects: tuple[Effect, ...], rows: int) -> tuple[SearchState, Replay]:
        """The state with these planted, and its replay up to the first place. Raises NotApplicable."""
        if (effects, rows) not in self._replays:
            state = self._state
            for candidate in (effect.alike[0] for effect in effects):
                faults = (*state.faults, candidate)
                state = SearchState(faults, Planting(candidate.planted(state)), self._state.nmse, self._first)
            if len(self._replays) >= _REPLAYS:
                del self._replays[next(iter(self._replays))]
            self._replays[effects, rows] = state, self._replay(state.steps, rows)
        return self._replays[effects, rows]

    def _effects(self) -> list[Effect]:
        """The effects of the candidates that change the first place."""
        replays: dict[int, Replay] = {}
        effects: dict[tuple[bytes, frozenset[str]], Effect] = {}
        for candidate in self._screening.candidates(self._state, None):
            if self._screening.budget.over():
                break
            here = Candidate(candidate.fault, candidate.parameters, self._layers)
            rows = self._rows(here)
            if rows not in replays:
                replays[rows] = self._replay(self._state.steps, rows)
            value = self._values_of(replays[rows], self._state, here)
            if value is not None:
                effect = Effect(self._recorded(value), [here])
                known = effects.setdefault((value.tobytes(), effect.kinds), effect)
                if known is not effect:
                    known.alike.append(here)
        return list(effects.values())

    def _rows(self, *candidates: Candidate) -> int:
        """How many rows show the first place: those up to it, or all where later positions act on earlier ones."""
        whole = any(candidate.fault.whole for candidate in (*self._state.faults, *candidates))
        return self._screening.rows if whole else self._screening.enough(self._first.row + 1)

    def _replay(self, steps: Sequence[Step], rows: int) -> Replay:
        return self._screening.make(self._until(steps), rows, self._screening.replay(self._state, rows))

    def _shown(self, steps: Sequence[Step]) -> str:
        """The name of the value that the dump shows at the first place: another step's if the capture is wrong."""
        name = SEEN + self._entry.point
        return name if self._entry.point in shown_points(steps) else self._entry.point

    def _until(self, steps: Sequence[Step]) -> list[Step]:
        """The steps up to the one whose value the dump shows at the first place."""
        name = self._shown(steps)
        number = {step.makes: number for number, step in enumerate(steps)}
        shown = steps[number[name]]
        if not name.startswith(SEEN):
            return list(steps[: number[name] + 1])
        return [*steps[: max(number.get(read, -1) for read in shown.names) + 1], shown]

    def _values_of(self, replay: Replay, state: SearchState, candidate: Candidate) -> Array | None:
        """What the dump would show at the first place; None if that is unchanged or the model does not allow the candidate."""
        try:
            steps = candidate.planted(state)
            needed = self._until(steps)
            if len(needed) > self._length + _BEYOND:
                return None
            begin = same_start(needed, replay.steps)
            if begin <= self._agreed:
                return None
            changed = replay.run(needed, lambda _name, _value: True, begin)
        except NotApplicable:
            return None
        value = changed.get(self._shown(steps))
        # A late capture may show the state after a pass, which has no rows, or what a decoder is handed, which has the encoder's.
        return None if value is None or value.ndim < 2 or value.shape[-2] != replay.rows else value

    def _recorded(self, value: Array) -> Floats:
        """The recorded elements of a value at the first place: [k]."""
        return self._screening.recorded(self._first, value)


def _one_more(chosen: Ints, count: int) -> Ints:
    """Every set of indices extended by any other index: [M, n] -> [., n + 1]."""
    more = np.tile(np.arange(count), len(chosen))[:, None]
    sets = np.sort(np.concatenate([np.repeat(chosen, count, axis=0), more], axis=1), axis=1)
    sets = sets[(np.diff(sets, axis=1) > 0).all(axis=1)]
    _, first = np.unique(sets @ count ** np.arange(sets.shape[1])[::-1], return_index=True)  # faster with a set as one number
    return sets[first]


def _by_residual(chosen: Ints, values: Floats, wanted: Floats) -> Ints:
    """Sets of unit vectors, sorted by the residual of their least-squares fit to the wanted vector."""
    inner, shares = values @ values.T + _RIDGE * np.eye(len(values)), values @ wanted
    products = shares[chosen]
    factors = np.linalg.solve(inner[chosen[:, :, None], chosen[:, None, :]], products[:, :, None])[:, :, 0]
    return chosen[np.argsort(-np.einsum("ij,ij->i", products, factors), kind="stable")]
