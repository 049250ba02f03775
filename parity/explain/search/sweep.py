"""How far candidates get at a state's first place: those in several single layers together, each in its layer alone, or those of one scope.

What a candidate does to the rows before the first wrong one, and whether it can act on that one, is the same in every layer that has the
same operations: it is seen in the first of these layers, and in the others only those come first that do what the dump shows. In each layer
candidates are computed up to its output only. Those whose change points the way that the error does (`Likely`) are carried
to the first place together, whatever their layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from msgspec import Struct

from engine.backend import Array, module_of
from engine.replay.replay import Edits

from ..records.records import Floats
from .alike import Alike
from .batch import SLACK, BatchScreening, none_of_capture
from .carry import carry_together, distinct
from .first_place import AtFirstPlace
from .likely import Likely
from .screening import Screening
from .state import WEIGHTS, Candidate, Layers, RecordKey, Screened, SearchState

_COMPARED = 64  # versions compared with the dump at once: a bound on the memory, for logits
# Matrices that one candidate rebuilds whose effects are added up: of 311 faults that change up to three steps of layer 12 or 18 of stories
# 297 have the sum's direction, of 178 that rebuild more in nine models 145. All 26 formulas that change four to seven steps, such as
# all norms of a layer, have.
_ADDED = 3
_AT_ONCE = 8  # rows up to which a layer is computed at once: so few cost hardly more than one
Results = dict[Layers, list[tuple[Candidate, Screened]]]


class _Scope(Struct):
    """Candidates of one scope, and those that are computed alone; of the former the changes of each by its number, the numbers of those
    that nothing contradicts, and how far each gets.
    """

    batch: BatchScreening
    candidates: Sequence[Candidate]
    alone: list[Candidate]
    edits: dict[int, Edits]
    waiting: list[int]
    results: dict[int, Screened]
    begun: bool = False


class Sweep(AtFirstPlace):
    """Screens candidates at a state's first place, each in its scope: single layers, or one scope of several layers or all.

    Few positions come first: a row that is right in the dump contradicts most candidates before the first wrong row has to
    be computed, and that one contradicts all but a few before the row after it. Causality makes that enough.

    Raises:
        ValueError: the state has no place that differs.
    """

    def __init__(self, screening: Screening, state: SearchState, scopes: Sequence[Layers]) -> None:
        super().__init__(screening, state, None)
        self._batches = {scope: BatchScreening(screening, state, scope) for scope in scopes}
        single = len(scopes) > 1 and self._first.row < _AT_ONCE
        few = (*(() if single else (1, 2)), self._first.row + 1, self._first.row + 2)
        self._stages = sorted({screening.enough(rows) for rows in few})
        kinds: dict[Layers, object] = (
            {scope: state.operations.get(scope[0]) for scope in scopes if scope} if len(scopes) > 1 else {}
        )
        firsts = {kind: scope for scope, kind in reversed(kinds.items())}
        #: The first of the scopes with the same operations, by scope.
        self._like = {scope: firsts[kind] for scope, kind in kinds.items()}
        #: The scopes of which the rows before the first wrong one say nothing new: a scope before has the same operations.
        self._alike = frozenset(scope for scope, first in self._like.items() if first != scope)
        self._acts: dict[tuple[object, ...], bool] = {}
        self._plain = none_of_capture(screening, state)
        #: The candidates that `likely` did not choose, by scope.
        self.postponed: dict[Layers, list[Candidate]] = {scope: [] for scope in scopes}

    def in_turn(
        self, candidates: Mapping[Layers, Sequence[Candidate]], likely: Likely | Alike | None
    ) -> Iterator[tuple[Layers, list[tuple[Candidate, Screened]]]]:
        """`screened`, scope by scope without `likely`: the versions of all candidates of all layers may not fit in memory. With it those
        up to a scope in which something makes nearly all of the error come first: what explains everything there ends the search.
        """
        if likely is not None:
            yield from self._screened(candidates, likely)
            return
        for layers, some in candidates.items():
            yield layers, self.screened({layers: some})[layers]

    def screened(self, candidates: Mapping[Layers, Sequence[Candidate]], likely: Likely | Alike | None = None) -> Results:
        """The candidates of each scope that change something at the first place, and how far they get (see `Screening.screen`).

        With `likely` only those that may act as the dump shows, and whose change of their layer's output it selects; the others are
        `postponed`.
        """
        return dict(self._screened(candidates, likely))

    def _screened(
        self, candidates: Mapping[Layers, Sequence[Candidate]], likely: Likely | Alike | None
    ) -> Iterator[tuple[Layers, list[tuple[Candidate, Screened]]]]:
        """`screened` in parts, each of which ends with a scope in which something makes nearly all of the error, or with the last one."""
        scopes = {layers: _Scope(self._batches[layers], some, [], {}, [], {}) for layers, some in candidates.items()}
        first = next(rows for rows in self._stages if rows > self._first.row)
        for rows in self._stages[: self._stages.index(first)]:
            now = {at: scope for at, scope in scopes.items() if likely is None or at not in self._alike}
            self._carry_on({at: self._values(at, scope, rows, likely) for at, scope in now.items()}, rows, scopes)
        values: dict[Layers, dict[int, Array]] = {}
        for layers, scope in scopes.items():
            values[layers] = self._values(layers, scope, first, likely)
            if layers != next(reversed(scopes)) and not self._nearly_error(likely, scope.batch.name, values[layers]):
                continue
            self._carry_on(values, first, scopes)
            for rows in self._stages[self._stages.index(first) + 1 :]:
                self._carry_on({at: self._values(at, scopes[at], rows, likely) for at in values}, rows, scopes)
            yield from ((at, [*self._together(scopes[at]), *self._alone(scopes[at])]) for at in values)
            values = {}

    def _nearly_error(self, likely: Likely | Alike | None, name: str, values: Mapping[int, Array]) -> bool:
        """Whether one of these values, whose last row is the first wrong one, makes nearly all of the error at the first place."""
        return isinstance(likely, Likely) and self._first.row < _AT_ONCE and likely.nearly_makes_the_error(name, values)

    def _values(self, layers: Layers, scope: _Scope, rows: int, likely: Likely | Alike | None) -> dict[int, Array]:
        """The first rows of what a scope's candidates change; the scope is taken up."""
        if not scope.begun:
            self._begin(layers, scope, likely)
        return self._outputs(layers, scope, rows, likely)

    def _carry_on(self, values: Mapping[Layers, dict[int, Array]], rows: int, scopes: Mapping[Layers, _Scope]) -> None:
        """Carry values to the first place: `results` of the scopes say how far their candidates get, `waiting` which are right so far."""
        for layers, number, errors in self._errors(values, rows):
            if self._judged(errors, rows, number, scopes[layers].results):
                scopes[layers].waiting.append(number)

    def _begin(self, layers: Layers, scope: _Scope, likely: Likely | Alike | None) -> None:
        """Take up a scope's candidates, which may be those of another layer: without those that do something else in that one, if it has
        the same operations.
        """
        some = scope.candidates if likely is None else self._may_act(layers, scope.candidates)
        here = [each if each.layers == layers else Candidate(each.fault, each.parameters, layers) for each in some]
        scope.candidates = []
        for each in here:  # those that can be computed with others up to their layer's output, and carried on from there
            plain = self._plain and each.fault.shows is None and not scope.batch.changes_later(each)
            (scope.candidates if plain else scope.alone).append(each)
        scope.edits = scope.batch.edits(scope.candidates)
        scope.waiting = list(scope.edits)

    def _may_act(self, layers: Layers, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates that may act as the dump shows, as far as other layers tell; the others are postponed."""
        like, acts = self._like.get(layers), self._acts
        may = [acts.get((like, each.fault.name, id(each.parameters)), True) for each in candidates]
        self.postponed[layers] += [each for each, now in zip(candidates, may, strict=True) if not now]
        return [each for each, now in zip(candidates, may, strict=True) if now]

    def _outputs(self, layers: Layers, scope: _Scope, rows: int, likely: Likely | Alike | None) -> dict[int, Array]:
        """The first rows that each candidate changes; `waiting` keeps those that are right if they change nothing in these rows."""
        batch, waiting = scope.batch, scope.waiting
        if (
            isinstance(likely, Likely) and self._first.row == 0 and rows == 1
        ):  # each row of a value acts on its own row only where there is but one
            waiting = self._after_own_steps(layers, scope, likely)
        values, ended = batch.outputs(scope.candidates, scope.edits, waiting, rows)
        if not scope.begun:
            scope.begun = True
            cut = not self._screening.budget.complete
            tried = [number for number in scope.edits if not cut or number in values or number in ended]
            self._screening.tried.count([scope.candidates[number] for number in tried])
        for number in ended:
            scope.results.pop(number, None)
        unchanged = [number for number in waiting if number not in values and number not in ended]
        scope.waiting = unchanged if rows <= self._first.row else []
        if likely is not None and rows <= self._first.row + 1:
            causal = {number: value for number, value in values.items() if value.shape[-2] == rows}
            chosen = likely.among(batch.name, causal, rows)
            for number in causal.keys() - chosen:
                self.postponed[layers].append(scope.candidates[number])
                del values[number]
                if rows <= self._first.row:  # it changes rows in which the dump is right
                    self._acts.setdefault(self._effect(layers, scope.candidates[number]), False)
            if rows > self._first.row:
                right_before = set(likely.right_before(batch.name, causal))
                for number in waiting:
                    acts = number in values or number in right_before
                    self._acts.setdefault(self._effect(layers, scope.candidates[number]), acts)
        return values

    def _after_own_steps(self, layers: Layers, scope: _Scope, likely: Likely) -> list[int]:
        """The candidates that wait, without those whose changed steps alone tell that they change the first row otherwise than the dump."""
        edits = {number: scope.edits[number] for number in scope.waiting}
        few = {
            number
            for number, edit in edits.items()
            if len(edit) <= _ADDED or scope.candidates[number].fault.group not in WEIGHTS
        }
        edits = {number: edits[number] for number in edits if number in few and scope.batch.separable(edits[number])}
        changing, unknown = set[int](), set[int]()
        effects: dict[int, Floats] = {}  # what several steps change adds up
        for name, values in scope.batch.own_steps(scope.candidates, edits, 1, likely.knows):
            changed = {number: value for number, value in values.items() if value is not None}
            changing |= changed.keys()
            of_step = likely.effects(name, changed)
            unknown |= changed.keys() - of_step.keys()
            effects.update({number: effects.get(number, 0) + effect for number, effect in of_step.items()})
        reaching = unknown | {number for number, effect in effects.items() if effect.any()}
        for number in edits.keys() - reaching:
            if not scope.candidates[number].fault.whole:  # it changes nothing that the first row is made of, in no layer
                self._acts[self._effect(layers, scope.candidates[number])] = False
        chosen = unknown | likely.likely_effects(effects)
        self.postponed[layers] += [scope.candidates[number] for number in sorted(changing - chosen)]
        unlikely = edits.keys() - chosen
        return [number for number in scope.waiting if number not in unlikely]

    def _judged(self, errors: Floats, rows: int, number: int, results: dict[int, Screened]) -> bool:
        """Whether a candidate is right in the first rows; `results` says how far it gets."""
        wrong = errors > SLACK * self._entry.limit
        if rows > self._first.row:
            place = RecordKey(self._first.point, int(self._entry.rows[wrong].min())) if wrong.any() else None
            results[number] = place, float(errors[self._entry.rows == self._first.row].max())
        return not wrong.any()

    def _errors(self, values: Mapping[Layers, dict[int, Array]], rows: int) -> Iterator[tuple[Layers, int, Floats]]:
        """NMSE at the first place's point, by scope and candidate: [records]."""
        for used in {rows, self._screening.rows}:
            versions = {
                layers: distinct({number: value for number, value in of_scope.items() if value.shape[-2] == used})
                for layers, of_scope in values.items()
            }
            here = [layers for layers in versions if self._batches[layers].carried_from is None]
            carried = {layer: layers for layers in versions if (layer := self._batches[layers].carried_from) is not None}
            outputs = {layer: [value for value, _ in versions[layers]] for layer, layers in carried.items()}
            stop, replay = self._screening.budget.over, self._screening.replay(self._state, used)
            yield from self._compared(
                [(layers, numbers) for layers in here for _, numbers in versions[layers]],
                (value for layers in here for value, _ in versions[layers]),
                used,
            )
            yield from self._compared(
                [(carried[layer], numbers) for layer in sorted(carried) for _, numbers in versions[carried[layer]]],
                carry_together(self._state, outputs, self._point, replay, stop),
                used,
            )

    def _compared(
        self, owners: Sequence[tuple[Layers, list[int]]], values: Iterator[Array], rows: int
    ) -> Iterator[tuple[Layers, int, Floats]]:
        """NMSE of values at the first place's point, for the candidates that have them; fewer values come where the time is up."""
        for begin in range(0, len(owners), _COMPARED):
            some = list(islice(values, _COMPARED))
            if not some:
                return
            stack = module_of(some[0]).stack(some)
            errors = self._entry.nmse_of(self._screening.backend.to_host(stack), self._screening.positions[:rows])
            for (layers, numbers), error in zip(owners[begin:], errors, strict=False):
                yield from ((layers, number, error) for number in numbers)

    @staticmethod
    def _together(scope: _Scope) -> Iterator[tuple[Candidate, Screened]]:
        return ((scope.candidates[number], scope.results[number]) for number in sorted(scope.results))

    def _alone(self, scope: _Scope) -> Iterator[tuple[Candidate, Screened]]:
        """The candidates that cannot be computed together with others, and how far they get."""
        for candidate in scope.alone:
            if self._screening.budget.over():
                return
            result = self._screening.screen(self._state, candidate)
            if result is not None:
                yield candidate, result

    def _effect(self, layers: Layers, candidate: Candidate) -> tuple[object, ...]:
        """What is alike for a candidate in all layers with the same operations, whose candidates share their parameters."""
        return self._like.get(layers), candidate.fault.name, id(candidate.parameters)


def screened(
    screening: Screening, state: SearchState, layers: Layers, candidates: Sequence[Candidate]
) -> list[tuple[Candidate, Screened]]:
    """The candidates of one scope that change something at the state's first place, and how far they get."""
    return [] if state.first is None else Sweep(screening, state, [layers]).screened({layers: candidates})[layers]
