"""The search for known faults that reproduce a dump.

A state is a list of steps: the right one, or one with the faults found so far. A candidate plants one more. It is
screened at the first place that the state does not explain, on as few positions as causality allows, and, if it gets
beyond that place, checked on all of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, takewhile
from time import perf_counter
from typing import Any

import numpy as np

from checkpoints.points import parse
from engine.backend import Array, Backend
from engine.faults import CATALOGUE, SEEN, Fault, Planting
from engine.graph import POSITIONS, Step
from engine.replay import Replay

from .explain_layers import batch_size, can_carry, carry
from .explain_records import Expected, Floats, Ints

Layers = tuple[int, ...] | None
MakeReplay = Callable[[Sequence[Step], int], Replay]
# What a change raises that this model's shapes (or its lack of a weight) do not allow.
# TypeError: of two faults at once the second one changed the operation that the first one had given other inputs.
NOT_ALLOWED = (ValueError, KeyError, IndexError, TypeError)
_REPLAYS = 8  # replays that are kept; each holds every value of a run
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

    def planted(self, state: "State") -> list[Step]:
        """The state's steps with this fault. Raises ValueError or KeyError where it has no place."""
        return state.planting.of(self.fault, self.layers, self.parameters)


@dataclass(frozen=True)
class Place:
    """A record: number of the point in the dump, and the replay's row."""

    point: int
    row: int

    def __lt__(self, other: "Place") -> bool:
        return (self.point, self.row) < (other.point, other.row)


Screened = tuple[Place | None, float]  # the first place that still differs, and the NMSE that is left at the old one


@dataclass(frozen=True)
class State:
    """A list of steps and how far it reproduces the dump.

    `nmse` holds an array a point; `first` is the first place that differs, None where none does. `root` is the state that
    this one is replayed against, where it is not worth a replay of its own.
    """

    faults: tuple[Candidate, ...]
    planting: Planting
    nmse: tuple[Floats, ...]
    first: Place | None
    root: "State | None" = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """The engine's steps."""
        return self.planting.steps

    @property
    def order(self) -> Mapping[str, int]:
        """The number of each step."""
        return self.planting.order


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
        self,
        entries: Sequence[Expected],
        steps: Sequence[Step],
        make: MakeReplay,
        positions: Ints,
        backend: Backend,
        seconds: float,
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
        self._replays: dict[tuple[str, ...], Replay] = {}
        self._found: dict[tuple[str, ...], list[State]] = {}
        self._stages: dict[tuple[str, ...], list[State]] = {}
        self.n_layers = sum(step.makes.endswith(".l_out") for step in steps)

    # -- states -------------------------------------------------------------------------------------------------------

    def start(self) -> State:
        """The right engine itself."""
        nmse = tuple(entry.base for entry in self.entries)
        return State((), Planting(self.right), nmse, self._first(nmse))

    def _first(self, nmse: Sequence[Floats]) -> Place | None:
        for number, (entry, errors) in enumerate(zip(self.entries, nmse, strict=False)):  # nmse may end early
            wrong = errors > entry.limit
            if wrong.any():
                return Place(number, int(entry.rows[wrong].min()))
        return None

    def _replay(self, state: State, rows: int) -> Replay:
        """The state's replay over the first rows; made once for each number of rows."""
        key = (*_key(state.faults), str(rows))
        if key not in self._replays:
            if len(self._replays) >= _REPLAYS:
                del self._replays[next(iter(self._replays))]
            self._replays[key] = self._make(state.steps, rows)
        return self._replays[key]

    def _errors(self, root: State, steps: Sequence[Step], rows: int, until: int) -> dict[int, Floats] | None:
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

        try:
            self._replay(root, rows).run(steps, visit, _begin(steps, root))
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

    def _everything(self, root: State, steps: Sequence[Step]) -> tuple[Floats, ...] | None:
        """NMSE at every point, all rows; None where the model's shapes do not allow this list."""
        shown, rows = _shown(steps), len(self._positions)
        found: dict[int, Floats] = {}

        def visit(name: str, made: Array) -> bool:
            self._compare(name, made, shown, rows, found)
            return True

        try:
            self._replay(root, rows).run(steps, visit, _begin(steps, root))
        except NOT_ALLOWED:
            return None
        return tuple(found.get(number, errors) for number, errors in enumerate(root.nmse))

    # -- candidates ---------------------------------------------------------------------------------------------------

    def candidates(self, state: State, layers: Layers) -> Iterator[Candidate]:
        """Every variant of every fault in these layers (None: all)."""
        right = state.planting.right
        for fault in CATALOGUE.values():
            if layers is not None and (fault.once or not any(f"blk.0.{kind}" in right for kind in fault.kinds)):
                continue
            for parameters in fault.variants(right):
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

    def screen(self, state: State, candidate: Candidate) -> Screened | None:
        """How far a candidate gets by its first rows: the first place that still differs (None: none), and the NMSE that
        is left at the state's first place. None where it changes nothing there or the model does not allow it.
        """
        first = state.first
        if first is None:
            return None
        try:
            steps = candidate.planted(state)
        except NOT_ALLOWED:
            return None
        entry = self.entries[first.point]
        shown = _shown(steps)
        root = state.root or state
        if _begin(steps, root) > root.order[entry.point] and entry.point not in shown:
            return None
        rows = self._rows(state, candidate)
        found = self._errors(root, steps, rows, first.point)
        self.tried.faults.add(candidate.fault.name)
        self.tried.variants += 1
        if not found:
            return None
        here = entry.rows < rows
        left = found.get(first.point)
        errors = [
            found.get(number, np.where(self.entries[number].rows < rows, root.nmse[number], np.nan))
            for number in range(first.point + 1)
        ]
        place = self._first(errors)
        at_first = (entry.rows == first.row) & here
        error = float(left[at_first].max()) if left is not None and at_first.any() else float("nan")
        return place, error

    def _rows(self, state: State, candidate: Candidate) -> int:
        """How many rows show whether a candidate gets beyond the first place: that row and the next, if causality holds."""
        every = len(self._positions)
        if state.first is None or any(one.fault.whole for one in (*state.faults, candidate)):
            return every
        return min(state.first.row + 2, every)

    def check(self, state: State, candidate: Candidate) -> State | None:
        """The state with the candidate planted, on all rows and points."""
        steps = candidate.planted(state)
        nmse = self._everything(state.root or state, steps)
        return None if nmse is None else State((*state.faults, candidate), Planting(steps), nmse, self._first(nmse))

    # -- the search ---------------------------------------------------------------------------------------------------

    def out_of_time(self) -> bool:
        """Whether the budget is spent."""
        if perf_counter() > self._until:
            self.complete = False
        return not self.complete

    def extend(self, seconds: float) -> None:
        """Search on for so many seconds."""
        self._until = perf_counter() + seconds
        self.complete = True

    def further(self, state: State, single: bool) -> list[State]:
        """States that get beyond the state's first place by one more fault, the best first.

        In single layers the search ends with the layer in which something is found: what is alike there is found too.
        """
        better: list[State] = []
        stages = ([(layer,) for layer in self._suspects(state)]) if single else [None]
        for layers in stages:
            for candidate, (place, error) in self._screened(state, layers):
                if state.first is None:
                    break
                if not state.faults:
                    self._note(state, candidate, error)
                if place is not None and not state.first < place:
                    continue
                checked = self.check(state, candidate)
                if checked is not None and (checked.first is None or state.first < checked.first):
                    better.append(checked)
            if better or self.out_of_time():
                break
        return sorted(better, key=self.rank)

    def _screened(self, state: State, layers: Layers) -> Iterator[tuple[Candidate, Screened]]:
        """Every candidate of a scope that changes something at the state's first place, and how far it gets."""
        later = self._carried(state, layers)
        waiting: dict[int, dict[bytes, tuple[Array, list[Candidate]]]] = {}
        for candidate in self.candidates(state, layers):
            if self.out_of_time():
                return
            if later and layers is not None and candidate.fault.shows is None:
                rows = self._rows(state, candidate)
                made = self._layer_output(state, candidate, layers[0], rows)
                if made is not None:
                    waiting.setdefault(rows, {}).setdefault(made.tobytes(), (made, []))[1].append(candidate)
                continue
            result = self.screen(state, candidate)
            if result is not None:
                yield candidate, result
        for rows, distinct in waiting.items():
            yield from self._carry(state, f"blk.{layers[0] if layers else 0}.l_out", later, rows, list(distinct.values()))

    def _carried(self, state: State, layers: Layers) -> list[Step]:
        """The steps between a layer's output and the state's first place, if they can be computed for many at once."""
        if layers is None or state.first is None:
            return []
        point = self.entries[state.first.point].point
        known = parse(point).known
        names = [step.makes for step in state.steps]
        start, end = names.index(f"blk.{layers[0]}.l_out"), names.index(point)
        steps = list(state.steps[start + 1 : end + 1])
        return steps if known is not None and "t+1" not in known.row and steps and can_carry(steps) else []

    def _layer_output(self, state: State, candidate: Candidate, layer: int, rows: int) -> Array | None:
        """What a candidate makes of a layer's output; None where it makes no difference or breaks what agrees before."""
        self.tried.faults.add(candidate.fault.name)
        self.tried.variants += 1
        output: list[Array] = []
        found: dict[int, Floats] = {}

        def visit(name: str, made: Array) -> bool:
            number = self._compare(name, made, frozenset(), rows, found)
            if number is not None and (found[number] > self.entries[number].limit).any():
                return False
            if name == f"blk.{layer}.l_out":
                output.append(made)
                return False
            return True

        try:
            steps = candidate.planted(state)
            self._replay(state, rows).run(steps, visit, _begin(steps, state))
        except NOT_ALLOWED:
            return None
        return output[0] if output else None

    def _carry(
        self, state: State, start: str, steps: Sequence[Step], rows: int, distinct: Sequence[tuple[Array, list[Candidate]]]
    ) -> Iterator[tuple[Candidate, Screened]]:
        """Screen many versions of a layer's output together."""
        first = state.first
        size = batch_size(rows)
        replay = self._replay(state, rows)
        for begin in range(0, len(distinct), size):
            if self.out_of_time() or first is None:
                return
            batch = distinct[begin : begin + size]
            made = carry(steps, start, [output for output, _ in batch], replay.values[POSITIONS], replay.weights)
            for value, (_, candidates) in zip(made, batch, strict=True):
                entry = self.entries[first.point]
                errors = entry.nmse(self._backend.to_host(value), self._positions[:rows])
                wrong = errors > entry.limit
                place = Place(first.point, int(entry.rows[wrong].min())) if wrong.any() else None
                error = float(errors[entry.rows == first.row].max())
                for candidate in candidates:
                    yield candidate, (place, error)

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
        everywhere = self._once(state, single=False)
        if len(self._suspects(state)) > 1 and not (everywhere and everywhere[0].first is None):
            # Many layers are a long search: what was found in all layers is followed before.
            best = self._follow(state, everywhere, depth)
            if best.first is None:
                return best
        found = everywhere
        if not (found and found[0].first is None):
            found = sorted([*found, *self._once(state, single=True)], key=self.rank)
        if not found and depth > 1 and not self.out_of_time():
            found = self._pairs(state)
        self._found[_key(state.faults)] = found
        return self._follow(state, found, depth)

    def _follow(self, state: State, found: Sequence[State], depth: int) -> State:
        """The best state that the first few of these lead to; of those with the same errors one is followed."""
        self._found[_key(state.faults)] = list(found)
        best = state
        seen: set[tuple[float, ...]] = set()
        for one in found:
            errors = tuple(float(f"{errors.max():.3g}") for errors in one.nmse)
            if errors in seen:
                continue
            seen.add(errors)
            best = min(best, self.explain(one, depth - (len(one.faults) - len(state.faults))), key=self.rank)
            if best.first is None or len(seen) >= _BEAM:
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
            for candidate in self.candidates(state, None)
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
            middle = State((*state.faults, one), Planting(one.planted(state)), state.nmse, first, state)
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
    last = takewhile(lambda step: step.makes.startswith(SEEN), reversed(steps))  # they stand at the end
    return frozenset(step.makes.removeprefix(SEEN) for step in last)


def _begin(steps: Sequence[Step], root: State) -> int:
    """How many steps at the start are the root's."""
    pairs = enumerate(zip(steps, root.steps, strict=False))
    return next((number for number, (new, old) in pairs if new is not old), min(len(steps), len(root.steps)))


def _key(faults: Sequence[Candidate]) -> tuple[str, ...]:
    return tuple(f"{one.fault.name} {one.parameters} {one.layers}" for one in faults)
