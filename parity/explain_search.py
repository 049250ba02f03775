"""The search for known faults that reproduce a dump.

A state is a list of steps: the right one, or one with the faults found so far. A candidate plants one more. It is
screened at the first place that the state does not explain, on as few positions as causality allows, and, if it gets
beyond that place, checked on all of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from time import perf_counter
from typing import Any

import numpy as np

from checkpoints.points import parse
from engine.backend import Array, Backend
from engine.faults import CATALOGUE, SEEN, Fault, plant
from engine.graph import Step
from engine.replay import Replay

from .explain_records import Expected, Floats, Ints

Layers = tuple[int, ...] | None
MakeReplay = Callable[[Sequence[Step], int], Replay]
# What a change raises that this model's shapes (or its lack of a weight) do not allow.
NOT_ALLOWED = (ValueError, KeyError, IndexError)
_BEAM = 4  # partial explanations that are followed
# Two candidates reproduce the same numbers if their errors are of one size: float32's own noise over 24 layers is 7e-13
# (tolerance.EXACT_FLOOR), so what lies below 1e-12, or within a factor of ten, is no difference.
_SAME_NOISE, _SAME_FACTOR = 1e-12, 10.0


@dataclass(frozen=True)
class Candidate:
    """A fault with its parameters in some layers (None: all)."""

    fault: Fault
    parameters: Mapping[str, Any]
    layers: Layers = None

    def planted(self, steps: Sequence[Step]) -> list[Step]:
        """The steps with this fault. Raises ValueError or KeyError where it has no place."""
        return plant(steps, self.fault, self.layers, **self.parameters)


@dataclass(frozen=True)
class Place:
    """A record: number of the point in the dump, and the replay's row."""

    point: int
    row: int

    def __lt__(self, other: "Place") -> bool:
        return (self.point, self.row) < (other.point, other.row)


@dataclass(frozen=True)
class State:
    """A list of steps and how far it reproduces the dump.

    `nmse` holds an array a point; `first` is the first place that differs, None where none does.
    """

    faults: tuple[Candidate, ...]
    steps: tuple[Step, ...]
    nmse: tuple[Floats, ...]
    first: Place | None


@dataclass
class Tried:
    """What the search has tried: counts, and the best partial candidates at the first place."""

    faults: set[str] = field(default_factory=set)
    variants: int = 0
    removed: list[tuple[float, Candidate]] = field(default_factory=list)
    nearest: float = np.inf


class Search:
    """Searches the catalogue over the records of a dump.

    Args:
        make: gives the replay of a list of steps over the first so many rows.
        seconds: after which the search ends with what it has.
    """

    def __init__(
        self, entries: Sequence[Expected], steps: Sequence[Step], make: MakeReplay, positions: Ints, backend: Backend, seconds: float
    ) -> None:
        self.entries = list(entries)
        self.right = tuple(steps)
        self.tried = Tried()
        self.complete = True
        self._make = make
        self._positions = positions
        self._backend = backend
        self._until = perf_counter() + seconds
        self._number = {entry.point: number for number, entry in enumerate(self.entries)}
        self._replays: dict[int, Replay] = {}
        self._found: dict[tuple[str, ...], list[State]] = {}
        self._stages: dict[tuple[str, ...], list[State]] = {}
        self.n_layers = sum(step.makes.endswith(".l_out") for step in steps)
        self._order = {step.makes: index for index, step in enumerate(steps)}

    # -- states -------------------------------------------------------------------------------------------------------

    def start(self) -> State:
        """The right engine itself."""
        nmse = tuple(entry.base for entry in self.entries)
        return State((), self.right, nmse, self._first(nmse))

    def _first(self, nmse: Sequence[Floats]) -> Place | None:
        for number, (entry, errors) in enumerate(zip(self.entries, nmse, strict=False)):  # nmse may end early
            wrong = errors > entry.limit
            if wrong.any():
                return Place(number, int(entry.rows[wrong].min()))
        return None

    def _replay(self, rows: int) -> Replay:
        """The right engine's replay over the first rows; made once for each number of rows."""
        if rows not in self._replays:
            self._replays[rows] = self._make(self.right, rows)
        return self._replays[rows]

    def _errors(self, steps: Sequence[Step], rows: int, until: int) -> dict[int, Floats] | None:
        """NMSE at the points that a list of steps changes, up to point `until` or the first that differs in front of it.

        None: the model's shapes do not allow this list.
        """
        shown = _shown(steps)
        found: dict[int, Floats] = {}

        def visit(name: str, made: Array) -> bool:
            number = self._compare(name, made, shown, rows, found)
            if number is None or shown:  # what a dump shows instead is known at the end of the list
                return True
            return number < until and not (found[number] > self.entries[number].limit).any()

        begin = next((i for i, (new, old) in enumerate(zip(steps, self.right, strict=False)) if new is not old), len(self.right))
        try:
            self._replay(rows).run(steps, visit, begin)
        except NOT_ALLOWED:
            return None
        return found

    def _compare(self, name: str, made: Array, shown: frozenset[str], rows: int, found: dict[int, Floats]) -> int | None:
        """Hold a value against the dump, if it is what the dump shows; its point's number."""
        point = name.removeprefix(SEEN)
        number = self._number.get(point)
        if number is None or (point in shown and name == point):
            return None
        found[number] = self.entries[number].nmse(self._backend.to_host(made), self._positions[:rows])
        return number

    def _everything(self, steps: Sequence[Step]) -> tuple[Floats, ...] | None:
        """NMSE at every point, all rows; None where the model's shapes do not allow this list."""
        shown, rows = _shown(steps), len(self._positions)
        found: dict[int, Floats] = {}

        def visit(name: str, made: Array) -> bool:
            self._compare(name, made, shown, rows, found)
            return True

        try:
            self._replay(rows).run(steps, visit)
        except NOT_ALLOWED:
            return None
        return tuple(found.get(number, entry.base) for number, entry in enumerate(self.entries))

    # -- candidates ---------------------------------------------------------------------------------------------------

    def candidates(self, state: State, single: bool) -> Iterator[Candidate]:
        """Every variant of every fault in all layers, or in single layers in front of the state's first place."""
        right = {step.makes: step for step in state.steps}
        scopes: list[Layers] = [(layer,) for layer in self._suspects(state)] if single else [None]
        for fault in CATALOGUE.values():
            layered = not fault.once and any(f"blk.0.{kind}" in right for kind in fault.kinds)
            if single and not layered:
                continue
            for parameters in fault.variants(right):
                for layers in scopes:
                    yield Candidate(fault, parameters, layers)

    def _suspects(self, state: State) -> range:
        """The layers between the last point in front of the first place at which all is right, and that place."""
        if state.first is None:
            return range(0)
        point = parse(self.entries[state.first.point].point)
        last = point.layer if point.layer is not None else (-1 if point.kind == "embd" else self.n_layers - 1)
        low = 0
        for entry in self.entries[: state.first.point]:
            before = parse(entry.point)
            if before.layer is not None:
                low = max(low, before.layer + (before.kind == "l_out"))
        return range(low, last + 1)

    def screen(self, state: State, candidate: Candidate) -> tuple[Place | None, float] | None:
        """How far a candidate gets by its first rows: the first place that still differs (None: none), and the NMSE that
        is left at the state's first place. None where it changes nothing there or the model does not allow it.
        """
        first = state.first
        if first is None:
            return None
        try:
            steps = candidate.planted(state.steps)
        except NOT_ALLOWED:
            return None
        entry = self.entries[first.point]
        shown = _shown(steps)
        before = next((i for i, (new, old) in enumerate(zip(steps, state.steps, strict=False)) if new is not old), len(steps))
        if before > self._order[entry.point] and entry.point not in shown:
            return None
        rows = len(self._positions) if candidate.fault.whole or self._whole(state) else min(first.row + 2, len(self._positions))
        found = self._errors(steps, rows, first.point)
        self.tried.faults.add(candidate.fault.name)
        self.tried.variants += 1
        if not found:
            return None
        here = entry.rows < rows
        left = found.get(first.point)
        errors = []
        for number in range(first.point + 1):
            errors.append(found.get(number, np.where(self.entries[number].rows < rows, self.entries[number].base, np.nan)))
        place = self._first(errors)
        at_first = (entry.rows == first.row) & here
        error = float(left[at_first].max()) if left is not None and at_first.any() else float("nan")
        return place, error

    def _whole(self, state: State) -> bool:
        return any(candidate.fault.whole for candidate in state.faults)

    def check(self, state: State, candidate: Candidate) -> State | None:
        """The state with the candidate planted, on all rows and points."""
        steps = tuple(candidate.planted(state.steps))
        nmse = self._everything(steps)
        return None if nmse is None else State((*state.faults, candidate), steps, nmse, self._first(nmse))

    # -- the search ---------------------------------------------------------------------------------------------------

    def out_of_time(self) -> bool:
        """Whether the budget is spent."""
        if perf_counter() > self._until:
            self.complete = False
        return not self.complete

    def further(self, state: State, single: bool) -> list[State]:
        """States that get beyond the state's first place by one more fault, the best first."""
        better: list[State] = []
        for candidate in self.candidates(state, single):
            if self.out_of_time():
                break
            result = self.screen(state, candidate)
            if result is None or state.first is None:
                continue
            place, error = result
            if not state.faults:
                self._note(state, candidate, error)
            if place is not None and not state.first < place:
                continue
            checked = self.check(state, candidate)
            if checked is not None and (checked.first is None or state.first < checked.first):
                better.append(checked)
        return sorted(better, key=self.rank)

    def _note(self, state: State, candidate: Candidate, error: float) -> None:
        """Keep what a candidate leaves of the error at the first place, as a lead."""
        first = state.first
        if first is None or not np.isfinite(error):
            return
        entry = self.entries[first.point]
        before = float(state.nmse[first.point][entry.rows == first.row].max())
        removed = 1 - error / before if np.isfinite(before) and before > 0 else 0.0
        self.tried.removed.append((removed, candidate))
        if error > float(entry.limit[entry.rows == first.row].max()):
            self.tried.nearest = min(self.tried.nearest, error)

    def rank(self, state: State) -> tuple[float, ...]:
        """Best first: everything explained with the least error, then the furthest first place."""
        if state.first is None:
            return (0.0, 0.0, 0.0, float(max(errors.max() for errors in state.nmse)))
        return (1.0, -state.first.point, -state.first.row, 0.0)

    def everywhere(self, state: State) -> list[State]:
        """States of one more fault in all layers that explain everything."""
        found = self._once(state, single=False)
        return [one for one in found if one.first is None]

    def _once(self, state: State, single: bool) -> list[State]:
        """`further`, remembered."""
        key = (*_key(state.faults), str(single))
        if key not in self._stages:
            self._stages[key] = self.further(state, single)
        return self._stages[key]

    def explain(self, state: State, depth: int) -> State:
        """The best state that up to `depth` further faults lead to: everything explained, or the first place moved furthest."""
        if state.first is None or depth == 0:
            return state
        found = self._once(state, single=False)
        if not (found and found[0].first is None):
            found = sorted([*found, *self._once(state, single=True)], key=self.rank)
        if not found and depth > 1 and not self.out_of_time():
            found = self._pairs(state)
        self._found[_key(state.faults)] = found
        best = state
        for one in found[:_BEAM]:
            best = min(best, self.explain(one, depth - (len(one.faults) - len(state.faults))), key=self.rank)
            if best.first is None:
                break
        return best

    def alike(self, state: State, number: int) -> list[Candidate]:
        """Other candidates that get as far in the place of the state's fault of that number, with errors of one size."""
        chosen = state.faults[number]
        rivals = self._found.get(_key(state.faults[:number]), [])
        mine = next((one for one in rivals if one.faults[number:] == (chosen,)), None)
        if mine is None:
            return []
        until = len(self.entries) - 1 if mine.first is None else mine.first.point - 1
        worst = max(_worst(mine, until) * _SAME_FACTOR, _SAME_NOISE)
        return [
            one.faults[number]
            for one in rivals
            if one is not mine and len(one.faults) == number + 1 and one.first == mine.first and _worst(one, until) <= worst
        ]

    def _pairs(self, state: State) -> list[State]:
        """Two faults at once, where none alone gets any further: those that take most of the error away first."""
        first = state.first
        if first is None:
            return []
        active = [
            (result[1], candidate)
            for candidate in self.candidates(state, single=False)
            if not self.out_of_time() and (result := self.screen(state, candidate)) is not None and not np.isnan(result[1])
        ]
        active.sort(key=lambda pair: pair[0])
        order = sorted(combinations(range(len(active)), 2), key=sum)
        better: list[State] = []
        for i, j in order:
            if self.out_of_time():
                break
            one, two = active[i][1], active[j][1]
            if one.fault.name == two.fault.name:
                continue
            middle = State((*state.faults, one), tuple(one.planted(state.steps)), state.nmse, first)
            result = self.screen(middle, two)
            if result is None or (result[0] is not None and not first < result[0]):
                continue
            checked = self.check(middle, two)
            if checked is not None and (checked.first is None or first < checked.first):
                better.append(checked)
                if checked.first is None:
                    break
        return sorted(better, key=self.rank)


def _worst(state: State, until: int) -> float:
    """The largest NMSE up to a point."""
    return float(max((errors.max() for errors in state.nmse[: until + 1]), default=0.0))


def _shown(steps: Sequence[Step]) -> frozenset[str]:
    """Points of which the dump shows something else than the engine computed."""
    return frozenset(step.makes.removeprefix(SEEN) for step in steps if step.makes.startswith(SEEN))


def _key(faults: Sequence[Candidate]) -> tuple[str, ...]:
    return tuple(f"{one.fault.name} {one.parameters} {one.layers}" for one in faults)
