"""How far a candidate gets: it is replayed on as few positions as causality allows, up to the first record that contradicts it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from checkpoints.points import OUTPUT_NORM, of_scores, parse
from engine.backend import Array, Backend
from engine.faults import AT, CATALOGUE, SEEN, Fault, Planting
from engine.graph import Step, sees_later
from engine.inapplicable import NotApplicable
from engine.replay.replay import Replay

from ...diff.tolerances.truth import Truth
from ..budget import Budget
from ..records.noise import EXPLAINED, no_rounding, without_cost, without_own_noise
from ..records.records import Expected, Floats, Ints
from .cone import Cone, behind, cone, mixes
from .record_alone import agreeing_after
from .state import Candidate, Layers, RecordKey, Screened, SearchState, Tried, key, shown_points, unchanged_steps

MakeReplay = Callable[[Sequence[Step], int, Replay | None], Replay]
_REPLAYS = 8  # replays that are kept, each of which holds every value of a run


class Screening:
    """Compares candidates with the records of a dump.

    Args:
        right: the replay of `steps` over all rows. make: makes the replay of a list of steps over the first so many rows,
            which may take values from a longer one.
        budget: ends the screening. truth_of: gives the float64 values of a list of steps.
    """

    def __init__(
        self,
        entries: Sequence[Expected],
        steps: Sequence[Step],
        right: Replay,
        make: MakeReplay,
        positions: Ints,
        backend: Backend,
        budget: Budget,
        truth_of: Callable[[Sequence[Step]], Truth],
    ) -> None:
        self.entries = list(entries)
        self.right = tuple(steps)
        self._sees_later = sees_later(steps)
        self.tried = Tried()
        self.make = make
        self.positions = positions
        self.backend = backend
        self.budget = budget
        self._truth_of = truth_of
        # Limits of the records, [R] a point, by what a stated arithmetic costs a run of changed steps; None if none is stated.
        self.costs: Callable[[Sequence[Step]], Sequence[Floats]] | None = None
        self.number = {entry.point: number for number, entry in enumerate(self.entries)}
        self._whole = right
        self._replays: dict[tuple[str, ...], Replay] = {}
        self._checked: dict[tuple[str, ...], SearchState | None] = {}
        self._cones: dict[tuple[str, ...], Cone] = {}
        self._alone: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._acting: tuple[tuple[str, ...], list[tuple[Fault, Mapping[str, Any]]]] = (), []
        self._variants: tuple[tuple[str, ...] | None, dict[str, list[dict[str, Any]]]] = None, {}
        self.coarse = truth_of(steps).coarse  # points after a table of float16, which amplifies rounding
        self.n_layers = 1 + max((layer for step in steps if (layer := parse(step.makes).layer) is not None), default=-1)

    def start(self) -> SearchState:
        """The right engine itself."""
        nmse = tuple(entry.base for entry in self.entries)
        return SearchState((), Planting(self.right, self.number), nmse, self._first(nmse))

    def _first(self, nmse: Sequence[Floats]) -> RecordKey | None:
        for number, (entry, errors) in enumerate(zip(self.entries, nmse, strict=False)):  # nmse may end early
            wrong = errors > entry.limit
            if wrong.any():
                return RecordKey(number, int(entry.rows[wrong].min()))
        return None

    def replay(self, state: SearchState, rows: int) -> Replay:
        """The state's replay over the first rows, made once for each number of rows."""
        if rows == self.rows and not state.faults:
            return self._whole
        name = (*key(state.faults), str(rows))
        if name not in self._replays:
            if len(self._replays) >= _REPLAYS:
                del self._replays[next(iter(self._replays))]
            self._replays[name] = self.make(state.steps, rows, self._whole)
        return self._replays[name]

    def _errors(self, root: SearchState, steps: Sequence[Step], rows: int, until: int) -> dict[int, Floats] | None:
        """NMSE at the points that a list of steps changes, up to point `until` or the first that differs before it.

        None if the model's shapes do not allow this list.
        """
        shown = shown_points(steps)
        errors: dict[int, Floats] = {}

        def visit(name: str, value: Array) -> bool:
            number = self._compare(name, value, shown, rows, errors)
            if number is None or shown:  # what a dump shows instead is only known at the end of the list
                return True
            return number < until and not (errors[number] > self.entries[number].limit).any()

        try:
            needed = self._needed(steps, shown, until) if shown else steps
            self.replay(root, rows).run(needed, visit, unchanged_steps(needed, root))
        except NotApplicable:
            return None
        return errors

    def _needed(self, steps: Sequence[Step], shown: frozenset[str], until: int) -> list[Step]:
        """The steps that are needed for what the dump shows up to a point, if it shows other steps' values than it names."""
        number = {step.makes: number for number, step in enumerate(steps)}
        points = [entry.point for entry in self.entries[: until + 1]]
        seen = [steps[number[SEEN + point]] for point in points if point in shown]
        last = max(
            [number[point] for point in points if point not in shown] + [number.get(read, -1) for s in seen for read in s.names]
        )
        return [*steps[: last + 1], *seen]

    def _compare(self, name: str, value: Array, shown: frozenset[str], rows: int, errors: dict[int, Floats]) -> int | None:
        """Compare a value with the dump, if it is what the dump shows, and return its point's number."""
        point = name.removeprefix(SEEN)
        number = self.number.get(point)
        if number is None or (point in shown and name == point):
            return None
        if point in shown and not of_scores(point) and value.shape[0] != rows:
            raise NotApplicable(f"{point} cannot show a value of shape {list(value.shape)}, which has no row for each position")
        errors[number] = self.entries[number].nmse(self.backend.to_host(value), self.positions[:rows])
        return number

    def _everything(self, root: SearchState, steps: Sequence[Step]) -> tuple[Floats, ...] | None:
        """NMSE at every point, over all rows; None if the model's shapes do not allow this list."""
        shown, rows = shown_points(steps), len(self.positions)
        errors_of: dict[int, Floats] = {}

        def visit(name: str, value: Array) -> bool:
            self._compare(name, value, shown, rows, errors_of)
            return True

        try:
            self.replay(root, rows).run(steps, visit, unchanged_steps(steps, root))
        except NotApplicable:
            return None
        return tuple(errors_of.get(number, errors) for number, errors in enumerate(root.nmse))

    def cone(self, state: SearchState) -> Cone:
        """The steps in question at the state's first place."""
        name = key(state.faults)
        if name not in self._cones:
            self._cones[name] = cone(self.entries, state, alone=self._behind(state))
        return self._cones[name]

    def _behind(self, state: SearchState) -> bool:
        """Whether the first place is a product that is wrong only behind its recorded elements."""
        if state.first is None:
            return False
        entry = self.entries[state.first.point]
        step = state.planting.right.get(entry.point)
        replay = self.replay(state, len(self.positions))
        if step is None or entry.point in state.shown or not mixes(step, replay.weights):
            return False
        return behind(entry, state.nmse[state.first.point], replay.on_host, self.positions)

    def agreeing_after(self, state: SearchState) -> tuple[str, ...]:
        """The points that show that the records of the state's first place alone are wrong; empty if the operation may be."""
        name = key(state.faults)
        if name not in self._alone:
            replay = self.replay(state, self.rows)
            self._alone[name] = agreeing_after(self.entries, state, replay, self.positions, self.backend)
        return self._alone[name]

    def candidates(self, state: SearchState, layers: Layers) -> Iterator[Candidate]:
        """Every variant of every fault in these layers (None: all) that can act at the state's first place.

        If every input of the place was seen whole and agrees, only faults that change a step in between, or what is shown, can act; if
        its records alone are wrong, only what is shown.
        """
        name = (*key(state.faults), str(layers is None))
        if self._acting[0] != name:
            self._acting = name, list(self._acting_in(state, every=layers is None))
        for fault, parameters in self._acting[1]:
            yield Candidate(fault, parameters, layers)

    def _acting_in(self, state: SearchState, *, every: bool) -> Iterator[tuple[Fault, Mapping[str, Any]]]:
        """Faults and parameters of `candidates`: in every layer, or in a single one, whichever."""
        alone = bool(self.agreeing_after(state))
        kinds = self.cone(state).kinds if state.first is not None and self.cone(state).sure else None
        layers_begin = state.layers_begin if not every and state.first is not None and state.first.point > 0 else -1
        for fault in CATALOGUE.values():
            if alone and fault.shows is None:
                continue
            if not every and (fault.once or not state.planting.has_layers(fault)):
                continue
            for parameters in self._variants_of(fault, state):
                if fault.shows is None and not every and state.planting.begin(fault, (), parameters) < layers_begin:
                    continue  # it changes the embedding, too, whatever the layer: such a variant is tried in all layers
                if kinds is None or fault.shows is not None or not kinds.isdisjoint(parameters.get(AT, fault.kinds)):
                    yield fault, parameters

    def _variants_of(self, fault: Fault, state: SearchState) -> list[dict[str, Any]]:
        """The fault's variants in a state's steps: the same for every layer."""
        name = key(state.faults)
        if self._variants[0] != name:
            self._variants = name, {}
        known = self._variants[1]
        if fault.name not in known:
            known[fault.name] = fault.variants(state.planting.right)
        return known[fault.name]

    def suspects(self, state: SearchState) -> range:
        """The layers between the last fully right point before the first place, and that place."""
        if state.first is None:
            return range(0)
        if self.cone(state).sure:
            return self.cone(state).layers
        point = parse(self.entries[state.first.point].point)
        last = point.layer if point.layer is not None else (-1 if point.kind == "embd" else self.n_layers - 1)
        low = 0
        for entry in self.entries[: state.first.point]:
            before = parse(entry.point)
            if before.layer is not None:
                low = max(low, before.layer + (before.kind == "l_out"))
            elif before.kind == OUTPUT_NORM:
                low = self.n_layers
        return range(low, last + 1)

    def screen(self, state: SearchState, candidate: Candidate) -> Screened | None:
        """How far a candidate gets in its first rows: the first place that still differs (None: none does), and the NMSE that
        is left at the state's first place. None if it changes nothing there or does not apply to the model.
        """
        first = state.first
        if first is None:
            return None
        entry = self.entries[first.point]
        root = state.root or state
        try:
            steps = candidate.planted(state)
        except NotApplicable:
            return None
        shown = shown_points(steps)
        if unchanged_steps(steps, root) > root.order[entry.point] and entry.point not in shown:
            return None
        rows = self.rows_of(state, candidate)
        errors_of = self._errors(root, steps, rows, first.point)
        self.tried.count([candidate])
        if not errors_of:
            return None
        errors = [
            errors_of.get(number, np.where(self.entries[number].rows < rows, root.nmse[number], np.nan))
            for number in range(first.point + 1)
        ]
        at_first = (entry.rows == first.row) & (entry.rows < rows)
        left = errors_of.get(first.point)
        error = float(left[at_first].max()) if left is not None and at_first.any() else float("nan")
        return self._first(errors), error

    def rows_of(self, state: SearchState, candidate: Candidate) -> int:
        """How many rows show whether a candidate gets beyond the first place: up to that row and the next, if causality holds."""
        if state.first is None or any(planted.fault.whole for planted in (*state.faults, candidate)):
            return self.rows
        return self.enough(state.first.row + 2)

    def enough(self, rows: int) -> int:
        """How many first rows tell what so many rows are: all where later positions act on earlier ones, as in an encoder."""
        return self.rows if self._sees_later else min(rows, self.rows)

    @property
    def rows(self) -> int:
        """The number of positions of the dump's tokens."""
        return len(self.positions)

    def left(self, place: RecordKey, value: Array) -> float:
        """NMSE of a value of the first rows at a place."""
        entry = self.entries[place.point]
        errors = entry.nmse(self.backend.to_host(value), self.positions[: value.shape[-2]])
        return float(errors[entry.rows == place.row].max())

    def recorded(self, place: RecordKey, value: Array) -> Floats:
        """The recorded elements of a value of the first rows at a place: [k]."""
        entry = self.entries[place.point]
        return entry.at(self.backend.to_host(value), self.positions[: value.shape[-2]], place.row)

    def has_numbers(self, place: RecordKey) -> bool:
        """Whether a recorded element of a place is a number: not all of them are NaN or infinite."""
        entry = self.entries[place.point]
        here = entry.rows == place.row
        return bool(np.isfinite(entry.values[here][entry.present[here]]).any())

    def check(self, state: SearchState, candidate: Candidate) -> SearchState | None:
        """The state with the candidate planted, on all rows and points; None if the model or the faults there do not allow it,
        or the time is up.
        """
        name = key((*state.faults, candidate))
        return None if name not in self._checked and self.budget.over() else self.reached(state, candidate)

    def reached(self, state: SearchState, candidate: Candidate) -> SearchState | None:
        """`check`, even if the time is up."""
        name = key((*state.faults, candidate))
        if name not in self._checked:
            self._checked[name] = self._check(state, candidate)
        return self._checked[name]

    def _check(self, state: SearchState, candidate: Candidate) -> SearchState | None:
        try:
            steps = candidate.planted(state)
        except NotApplicable:
            return None
        nmse = self._everything(state.root or state, steps)
        if nmse is None:
            return None
        first = self._first(nmse)
        if first is not None and (
            state.first is None or state.first < first or self.all_but_noise(state, nmse[state.first.point])
        ):
            nmse = without_own_noise(self.entries, state.nmse, nmse, steps, self.make_anew, self.positions, self._truth_of)
            first = self._first(nmse)
        if (costs := self.costs) is not None and first is not None and state.first is not None and state.first < first:
            nmse = without_cost(self.entries, state.nmse, nmse, lambda: costs(steps))
            first = self._first(nmse)
        return SearchState((*state.faults, candidate), Planting(steps, self.number), nmse, first)

    def all_but_noise(self, state: SearchState, errors: Floats | float) -> bool:
        """Whether the error left at a state's first place is so small that it may be the noise of the changed steps themselves."""
        if state.first is None:
            return False
        entry = self.entries[state.first.point]
        here = entry.rows == state.first.row
        before = float(state.nmse[state.first.point][here].max())
        left = float(errors) if isinstance(errors, float) else float(errors[here].max())
        return left * EXPLAINED <= before and left <= float(no_rounding(entry, self.coarse)[here].max())

    def make_anew(self, steps: Sequence[Step], rows: int) -> Replay:
        """A replay of these steps by themselves: of the right run it takes only what is before their first change, over as many rows."""
        return self.make(steps, rows, self._whole if rows == self.rows else None)
