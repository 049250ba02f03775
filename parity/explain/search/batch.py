"""Screens many candidates together: what they share is computed for all of them at once, in later layers too."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from msgspec.structs import replace

from checkpoints.points import EMBD, in_layer
from engine.backend import Array, all_equal, module_of
from engine.faults.base import layer_near
from engine.graph import GIVEN, Step
from engine.inapplicable import NotApplicable
from engine.replay.replay import Edits

from ...diff.tolerances.truth import NO_COARSE_ROUNDING
from .carry import steps_between
from .first_place import AtFirstPlace
from .screening import Screening
from .state import Candidate, Layers, SearchState

_SOON = 2  # rows of the first recorded point: the first shows what acts on each row, the second what attention does
_ROWS = 1024  # rows at once: a bound of the memory
# Products over a few rows round differently than over all, and a fault may amplify that: an engine without residuals differed by 1.5
# times the limit. Candidates that get this far are checked on all rows, by the limit itself.
SLACK = 10.0
_FEW = 2  # with this few candidates the first rows of every point are not looked at: that costs as much as checking one of them
_TOGETHER = 128  # candidates at once: enough to share Python's overhead, few enough to look at the clock in between


class BatchScreening(AtFirstPlace):
    """Computes candidates up to a state's first place, in one layer, several or all, or up to the output of the one layer.

    Raises:
        ValueError: the state has no place that differs.
    """

    def __init__(self, screening: Screening, state: SearchState, layers: Layers) -> None:
        super().__init__(screening, state, layers)
        since = next(iter(screening.suspects(state)), None)
        after = steps_between(state, layers[0], self._point, since) if layers is not None and len(layers) == 1 else []
        #: The layer whose output is computed, if it can be carried on from there; None: the first place's value itself is.
        self.carried_from = layers[0] if layers and after else None
        self.name = self._point if self.carried_from is None else in_layer(self.carried_from, "l_out")
        self._end = state.order[self.name] + 1
        self._place = state.order[self._point] + 1
        #: Whether steps of no layer lie between that layer and the place: a candidate in the layer may change them, too.
        self._outside = any(layer_near(step) is None for step in state.steps[self._end : self._place])
        self._known = GIVEN | {name for step in state.steps for name in (step.makes, *step.names)}
        self._before = frozenset(entry.point for entry in screening.entries[: self._first.point]) - state.shown
        #: Whether a fault that looks ahead is planted already: not one that only changes what is shown.
        self._ahead = any(planted.fault.whole and planted.fault.shows is None for planted in state.faults)

    def edits(self, candidates: Sequence[Candidate]) -> dict[int, Edits]:
        """The changes of each candidate, by its number, that the first recorded point does not contradict at once."""
        return self._edits(candidates, self._not_soon_wrong(candidates), self._end)

    def changes_later(self, candidate: Candidate) -> bool:
        """Whether a candidate changes steps after the layer whose output is carried on, such as the final norm."""
        if not self._outside:
            return False
        try:
            edits = self._state.planting.edits(candidate.fault, candidate.layers, candidate.parameters, self._place)
        except NotApplicable:
            return False
        return any(number >= self._end for number in edits)

    def outputs(
        self, candidates: Sequence[Candidate], edits: dict[int, Edits], waiting: Sequence[int], rows: int
    ) -> tuple[dict[int, Array], set[int]]:
        """The first rows of value `name`, by candidate that changes it; and the candidates that do not apply, or that an earlier point
        contradicts.
        """
        return self._values(candidates, edits, waiting, rows, self.name, self._before)

    def separable(self, edits: Edits) -> bool:
        """Whether each step that a candidate changes can be computed without the others: none reads a value that is not the model's."""
        for steps in edits.values():
            made = set[str]()
            for step in steps:
                if any(name not in self._known and name not in made for name in step.names):
                    return False
                made.add(step.makes)
        return True

    def own_steps(
        self, candidates: Sequence[Candidate], edits: Mapping[int, Edits], rows: int, known: Callable[[str], bool]
    ) -> Iterator[tuple[str, dict[int, Array | None]]]:
        """The first rows of each step that some candidates change: its name, and its value by candidate, None where it is the right one.

        Each is computed as if the candidate changed this step alone, and up to a value that is `known`, if only one is made of it.
        Steps that faults with a view of later positions change are computed for all rows.
        """
        by_step: dict[tuple[int, bool], dict[int, tuple[Sequence[Step], list[int]]]] = {}
        for number, edit in edits.items():
            whole = self._ahead or candidates[number].fault.whole
            for at, changed in edit.items():  # variants that differ in other steps have the same ones here
                by_step.setdefault((at, whole), {}).setdefault(id(changed), (changed, []))[1].append(number)
        for (at, whole), versions in by_step.items():
            if self._screening.budget.over():
                return
            replay = self._screening.replay(self._state, self._screening.rows if whole else rows)
            name, after = self._until_known(at, known)
            values = [(replay.changed([*changed, *after]).get(name), numbers) for changed, numbers in versions.values()]
            yield name, {number: value for value, numbers in values for number in numbers}

    def _until_known(self, at: int, known: Callable[[str], bool]) -> tuple[str, list[Step]]:
        """The first known value that is made only of a step's value, and the steps that lead there; without one, the step's own value."""
        own = name = self._state.steps[at].makes
        after: list[Step] = []
        while not known(name):
            readers = [step for step in self._state.steps[at + 1 :] if name in step.names]
            if len(readers) != 1:
                return own, []
            after, name = [*after, readers[0]], readers[0].makes
        return name, after

    def _not_soon_wrong(self, candidates: Sequence[Candidate]) -> Sequence[int]:
        """The candidates that the first recorded point after the embedding does not contradict in its first rows.

        A fault in all layers need not be planted in all of them to show in the first.
        """
        soon = next((name for name in self._state.order if name in self._before - {EMBD}), None)
        if self._layers is not None or soon is None:
            return range(len(candidates))
        end = self._state.order[soon] + 1
        edits = self._edits(candidates, range(len(candidates)), end)
        _, ended = self._values(candidates, edits, list(edits), self._screening.enough(_SOON), soon, self._before)
        self._screening.tried.count([candidates[number] for number in ended])
        return [number for number in range(len(candidates)) if number not in ended]

    def agreeing(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates that no record of the first rows contradicts at any point: few of those that get beyond one place."""
        points = [entry.point for entry in self._screening.entries if entry.point not in self._state.shown]
        last = max(points, key=self._state.order.__getitem__)
        edits = self._edits(candidates, range(len(candidates)), self._state.order[last] + 1)
        rows = self._screening.enough(self._first.row + 2)
        _, ended = self._values(candidates, edits, list(edits), rows, last, frozenset(points))
        return [candidate for number, candidate in enumerate(candidates) if number not in ended]

    def _edits(self, candidates: Sequence[Candidate], numbers: Sequence[int], end: int) -> dict[int, Edits]:
        """The changes of each candidate in the steps before number `end`; candidates without any, or that do not apply, are left out."""
        edits_of: dict[int, Edits] = {}
        for number in numbers:
            candidate = candidates[number]
            try:
                edits = self._state.planting.edits(candidate.fault, candidate.layers, candidate.parameters, end)
            except NotApplicable:
                continue
            if edits:
                edits_of[number] = edits
        return edits_of

    def _values(
        self,
        candidates: Sequence[Candidate],
        edits: dict[int, Edits],
        waiting: Sequence[int],
        rows: int,
        name: str,
        watched: frozenset[str],
    ) -> tuple[dict[int, Array], set[int]]:
        """The first rows of value `name`, by candidate that changes it; and the candidates that do not apply, or that a watched
        point contradicts.
        """
        value_of: dict[int, Array] = {}
        ended: set[int] = set()
        for whole in (False, True):
            chosen = [number for number in waiting if (self._ahead or candidates[number].fault.whole) is whole]
            # A fault that looks ahead needs all rows in its own layer; after that causality holds.
            used = self._screening.rows if whole else rows
            right = self._screening.replay(self._state, rows).values
            size = max(1, min(_TOGETHER, _ROWS // used))
            for begin in range(0, len(chosen), size):
                if self._screening.budget.over():
                    return value_of, ended
                batch = chosen[begin : begin + size]
                run = self._run([edits[number] for number in batch], used, rows, self._state.order[name] + 1, watched)
                if not self._screening.budget.complete:
                    return value_of, ended
                for number, values in zip(batch, run, strict=True):
                    if values is None:
                        ended.add(number)
                    elif name in values:
                        cut = used > rows and self._causal(values[name])
                        value = self._first_rows(name, values[name], rows) if cut else values[name]
                        if used == rows or not cut or not all_equal(value, right[name]):
                            value_of[number] = value
        return value_of, ended

    def _first_rows(self, name: str, value: Array, rows: int) -> Array:
        """The first rows of a value: [T, …] or, of attention's scores and weights, [H, T, T]."""
        first: Array = value[:, :rows, :rows] if self._state.steps[self._state.order[name]].axis == 1 else value[:rows]
        return first

    def _run(
        self, edits: Sequence[Edits], used: int, rows: int, end: int, watched: frozenset[str]
    ) -> Sequence[Mapping[str, Array] | None]:
        """`Replay.run_batch` over the rows that the changed steps need; steps after them that work row by row are computed for the
        first rows only."""
        stop = self._screening.budget.over
        replay = self._screening.replay(self._state, used)
        mixing = next((number for number in reversed(self._state.mixing) if number < end), 0)
        pause = 1 + max(mixing, *(number for edit in edits for number in edit))
        if used == rows or pause >= end:
            return replay.run_batch(edits, end, watched, self._agrees, stop)
        mixed = replay.run_batch(edits, end, watched, self._agrees, stop, pause)
        result: list[Mapping[str, Array] | None] = list(mixed)
        handed_on = {
            version: {
                self._state.order[name]: (
                    _given(self._state.steps[self._state.order[name]], self._first_rows(name, value, rows)),
                )
                for name, value in values.items()
            }
            for version, values in enumerate(mixed)
            if values
            and all(name in self._state.order and module_of(value).isfinite(value).all() for name, value in values.items())
        }
        for version, values in enumerate(mixed):
            if values and version not in handed_on:
                [result[version]] = replay.run_batch([edits[version]], end, watched, self._agrees, stop)
        if handed_on:
            short = self._screening.replay(self._state, rows)
            run = short.run_batch(list(handed_on.values()), end, watched, self._agrees, stop)
            for version, values in zip(handed_on, run, strict=True):
                result[version] = values
        return result

    def _agrees(self, name: str, values: Array) -> list[bool]:
        """Whether versions of a point may agree with the dump: [M, R, …] -> M.

        After a table of float16 the rounding of products over a few rows may meet another entry of it.
        """
        entry = self._screening.entries[self._screening.number[name]]
        errors = entry.nmse_of(self._screening.backend.to_host(values), self._screening.positions[: values.shape[-2]])
        rounding = NO_COARSE_ROUNDING if name in self._screening.coarse else 0.0
        return list(~np.any(errors > np.maximum(SLACK * entry.limit, rounding), axis=1))

    def _causal(self, value: Array) -> bool:
        """Whether rows of a layer's output act on later rows only; NaN does not, since 0 · NaN is NaN under a mask, too."""
        return self.carried_from is None or bool(module_of(value).isfinite(value).all())


def _given(step: Step, value: Array) -> Step:
    """A step that makes this value."""
    return replace(step, op=lambda: value, reads=(), weights=(), params={})


def computed_together(screening: Screening, state: SearchState, candidate: Candidate) -> bool:
    """Whether a candidate can be computed together with others: no fault of the capture takes part."""
    return candidate.fault.shows is None and none_of_capture(screening, state)


def none_of_capture(screening: Screening, state: SearchState) -> bool:
    """Whether no fault of the capture takes part in a state, as far as its first place shows."""
    first = state.first
    return first is not None and state.root is None and screening.entries[first.point].point not in state.shown


def agreeing_first(
    screening: Screening, state: SearchState, candidates: Sequence[Candidate]
) -> tuple[list[Candidate], list[Candidate]]:
    """Candidates of one scope: those that the first rows of no point contradict, which may explain everything, and the others."""
    layers = candidates[0].layers if candidates else None
    plain = [candidate for candidate in candidates if computed_together(screening, state, candidate)]
    kept = BatchScreening(screening, state, layers).agreeing(plain) if len(plain) > _FEW else plain
    likely = [candidate for candidate in candidates if not computed_together(screening, state, candidate) or candidate in kept]
    return likely, [candidate for candidate in candidates if candidate not in likely]


def beyond(screening: Screening, state: SearchState, candidates: Sequence[Candidate]) -> list[SearchState]:
    """The states of candidates that get beyond the state's first place, on all rows."""
    states = [screening.check(state, candidate) for candidate in candidates]
    return [
        checked
        for checked in states
        if checked is not None and state.first is not None and (checked.first is None or state.first < checked.first)
    ]
