"""Screens many candidates together: what they share is computed for all of them at once, also of the layers behind their own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np

from checkpoints.points import EMBD
from engine.backend import Array, module_of
from engine.graph import POSITIONS
from engine.inapplicable import NotApplicable
from engine.replay.replay import Edits

from .carry import carry, distinct, steps_between
from .records import Floats
from .screening import Screening
from .state import Candidate, Layers, RecordKey, Screened, State

Choose = Callable[[str, Mapping[int, Array], int], set[int]]  # the likely ones of some versions' first rows of a layer's output
_SOON = 2  # rows of the first recorded point: one shows what acts on each row, the other what the attention does
_ROWS = 1024  # rows at once: a bound of the memory
# Products over a few rows round otherwise than over all, and a fault may amplify that: an engine without residuals differed by 1.5
# times the limit. What gets this far is checked on all rows, by the limit itself.
_SLACK = 10.0
_COMPARED = 64  # versions held against the dump at once: a bound of the memory, where they are logits
_FEW = 2  # candidates for which the first rows of every point are not worth a look: it costs as much as a check of one of them
_TOGETHER = 128  # candidates at once: enough to share Python's time, few enough to look at the clock between


class BatchScreening:
    """Screens candidates at a state's first place, in one layer, several or all.

    On few positions first: a row that is right in the dump contradicts most candidates before the first wrong row need
    be computed, and that one all but a few before the row after it. Causality makes that enough.

    Raises:
        ValueError: the state has no place that differs.
    """

    def __init__(self, screening: Screening, state: State, layers: Layers) -> None:
        if state.first is None:
            raise ValueError("nothing is left to explain")
        self._screening = screening
        self._state = state
        self._layers = layers
        self._first = state.first
        self._entry = screening.entries[state.first.point]
        self._point = self._entry.point
        self._after = steps_between(state, layers[0], self._point) if layers is not None and len(layers) == 1 else []
        # What is computed candidate by candidate ends with the layer, if its output can be carried on from there.
        self._name = f"blk.{layers[0]}.l_out" if layers and self._after else self._point
        self._end = state.order[self._name] + 1
        self._before = frozenset(entry.point for entry in screening.entries[: state.first.point]) - state.shown
        self._candidates: Sequence[Candidate] = ()
        self._edits_of: dict[int, Edits] = {}
        self._stages: list[int] = []
        self._unlikely: list[tuple[int, dict[int, Array]]] = []

    def screened(self, candidates: Sequence[Candidate], likely: Choose | None = None) -> Iterator[tuple[Candidate, Screened]]:
        """Those that change something at the first place, and how far they get: as `Screening.screen` says it.

        `likely`: only those that it calls so, which is known before they are carried there; `postponed` has the others afterwards.
        """
        self._candidates = candidates
        self._edits_of = self._edits(candidates, self._not_soon_wrong(candidates), self._end)
        few = (1, 2, self._first.row + 1, self._first.row + 2)
        self._stages = sorted({self._screening.enough(rows) for rows in few})
        yield from self._go_on(list(self._edits_of), 0, {}, likely if self._after else None)

    def postponed(self) -> Iterator[tuple[Candidate, Screened]]:
        """Those that were not likely, and how far they get."""
        while self._unlikely:
            stage, value_of = self._unlikely.pop(0)
            results: dict[int, Screened] = {}
            passed = self._judged(value_of, self._stages[stage], results)
            yield from self._go_on(sorted(passed), stage + 1, results, None)

    def _go_on(
        self, waiting: Sequence[int], stage: int, results: dict[int, Screened], likely: Choose | None
    ) -> Iterator[tuple[Candidate, Screened]]:
        """The candidates that wait for a stage and those behind it."""
        candidates, edits = self._candidates, self._edits_of
        for number_of_stage, rows in list(enumerate(self._stages))[stage:]:
            value_of, ended = self._values(candidates, edits, waiting, rows, self._name, self._before)
            if number_of_stage == 0:
                cut = not self._screening.budget.complete
                self._screening.tried.count([candidates[one] for one in edits if not cut or one in value_of or one in ended])
            for number in ended:
                results.pop(number, None)
            # Before the first wrong row, nothing to see is nothing wrong.
            passed = set(waiting) - value_of.keys() - ended if rows <= self._first.row else set()
            if likely is not None and rows <= self._first.row + 1:
                causal = {number: value for number, value in value_of.items() if value.shape[-2] == rows}
                unlikely = causal.keys() - likely(self._name, causal, rows)
                self._unlikely.append((number_of_stage, {number: value_of.pop(number) for number in sorted(unlikely)}))
            passed |= self._judged(value_of, rows, results)
            waiting = [number for number in waiting if number in passed]
        for number in sorted(results):
            yield candidates[number], results[number]

    def _judged(self, value_of: dict[int, Array], rows: int, results: dict[int, Screened]) -> set[int]:
        """Which candidates are right in the first rows; how far they get is put to the results."""
        passed: set[int] = set()
        for number, errors in self._errors(value_of, rows):
            wrong = errors > _SLACK * self._entry.limit
            if not wrong.any():
                passed.add(number)
            if rows > self._first.row:
                place = RecordKey(self._first.point, int(self._entry.rows[wrong].min())) if wrong.any() else None
                results[number] = place, float(errors[self._entry.rows == self._first.row].max())
        return passed

    def _not_soon_wrong(self, candidates: Sequence[Candidate]) -> Sequence[int]:
        """The candidates that the first recorded point behind the embedding does not contradict in its first rows.

        A fault in all layers need not be planted in all of them to be seen in the first.
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
        """Those that no record of the first rows contradicts, at any point: of many that get beyond one place few do."""
        points = [entry.point for entry in self._screening.entries if entry.point not in self._state.shown]
        last = max(points, key=self._state.order.__getitem__)
        edits = self._edits(candidates, range(len(candidates)), self._state.order[last] + 1)
        rows = self._screening.enough(self._first.row + 2)
        _, ended = self._values(candidates, edits, list(edits), rows, last, frozenset(points))
        return [candidate for number, candidate in enumerate(candidates) if number not in ended]

    def _edits(self, candidates: Sequence[Candidate], numbers: Sequence[int], end: int) -> dict[int, Edits]:
        """What candidates change in the steps in front of number `end`, if that is something and the model allows it."""
        edits_of: dict[int, Edits] = {}
        for number in numbers:
            one = candidates[number]
            try:
                edits = self._state.planting.edits(one.fault, one.layers, one.parameters, end)
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
        """The first rows of value `name`, by candidate that changes it; and those that are not allowed, or that a watched
        point contradicts.
        """
        value_of: dict[int, Array] = {}
        ended: set[int] = set()
        ahead = any(one.fault.whole and one.fault.shows is None for one in self._state.faults)  # not what is shown only
        for whole in (False, True):
            chosen = [number for number in waiting if (ahead or candidates[number].fault.whole) is whole]
            # What looks ahead needs all rows in its own layer; from there on causality holds.
            used = self._screening.rows if whole else rows
            size = max(1, min(_TOGETHER, _ROWS // used))
            for begin in range(0, len(chosen), size):
                if self._screening.budget.over():
                    return value_of, ended
                batch = chosen[begin : begin + size]
                replay = self._screening.replay(self._state, used)
                chosen_edits = [edits[number] for number in batch]
                run = replay.run_batch(
                    chosen_edits, self._state.order[name] + 1, watched, self._agrees, self._screening.budget.over
                )
                if not self._screening.budget.complete:
                    return value_of, ended
                for number, values in zip(batch, run, strict=True):
                    if values is None:
                        ended.add(number)
                    elif name in values:
                        value_of[number] = values[name][: rows if self._causal(values[name]) else None]
        return value_of, ended

    def _agrees(self, name: str, values: Array) -> list[bool]:
        """Which of some versions of a point in front of the first place agree with the dump: [M, R, …] -> M."""
        entry = self._screening.entries[self._screening.number[name]]
        errors = entry.nmse_of(self._screening.backend.to_host(values), self._screening.positions[: values.shape[-2]])
        return list(~np.any(errors > _SLACK * entry.limit, axis=1))

    def _errors(self, values: dict[int, Array], rows: int) -> Iterator[tuple[int, Floats]]:
        """NMSE at the first place's point, by candidate: [records]."""
        for used in {rows, self._screening.rows}:
            some = {number: value for number, value in values.items() if value.shape[-2] == used}
            if some:
                yield from self._errors_of(some, used)

    def _errors_of(self, made: dict[int, Array], rows: int) -> Iterator[tuple[int, Floats]]:
        versions = distinct(made)
        values: Iterator[Array] = iter([value for value, _ in versions])
        if self._after:
            replay = self._screening.replay(self._state, rows)
            stop = self._screening.budget.over
            values = carry(self._after, self._name, list(values), replay.values[POSITIONS], replay.weights, stop)
        for begin in range(0, len(versions), _COMPARED):
            some = versions[begin : begin + _COMPARED]
            carried = list(islice(values, len(some)))
            if len(carried) < len(some):
                return  # no time was left
            stack = module_of(carried[0]).stack(carried)
            errors = self._entry.nmse_of(self._screening.backend.to_host(stack), self._screening.positions[:rows])
            for (_, numbers), mine in zip(some, errors, strict=True):
                yield from ((number, mine) for number in numbers)

    def _causal(self, value: Array) -> bool:
        """Whether rows of a layer's output act on later ones only: 0 · NaN is NaN, under a mask as well."""
        return not self._after or bool(module_of(value).isfinite(value).all())


def screened(
    screening: Screening, state: State, layers: Layers, candidates: Sequence[Candidate]
) -> Iterator[tuple[Candidate, Screened]]:
    """The candidates of a scope that change something at the state's first place, and how far they get."""
    for part in in_two(screening, state, layers, candidates, None):
        yield from part


def in_two(
    screening: Screening, state: State, layers: Layers, candidates: Sequence[Candidate], likely: Choose | None
) -> tuple[Iterator[tuple[Candidate, Screened]], Iterator[tuple[Candidate, Screened]]]:
    """`screened`: the likely ones, and those that were postponed, which come when the likely ones have come."""
    if state.first is None:
        return iter(()), iter(())
    batch = BatchScreening(screening, state, layers)
    plain = [_plain(screening, state, one) for one in candidates]

    def first() -> Iterator[tuple[Candidate, Screened]]:
        yield from batch.screened([one for one, together in zip(candidates, plain, strict=True) if together], likely)
        for candidate in (one for one, together in zip(candidates, plain, strict=True) if not together):
            if screening.budget.over():
                return
            result = screening.screen(state, candidate)
            if result is not None:
                yield candidate, result

    return first(), batch.postponed()


def _plain(screening: Screening, state: State, candidate: Candidate) -> bool:
    """Whether a candidate can be computed together with others: nothing that the dump shows instead takes part."""
    first = state.first
    return (
        first is not None
        and state.root is None
        and candidate.fault.shows is None
        and screening.entries[first.point].point not in state.shown
    )


def beyond(screening: Screening, state: State, candidates: Sequence[Candidate]) -> Iterator[State]:
    """The states of candidates that get beyond the state's first place, on all rows.

    If one of them explains everything, those that the first rows already contradict somewhere are left out.
    """
    first = state.first
    if first is None:
        return
    layers = candidates[0].layers if candidates else None
    plain = [one for one in candidates if _plain(screening, state, one)]
    kept = BatchScreening(screening, state, layers).agreeing(plain) if len(plain) > _FEW else plain
    likely = [one for one in candidates if not _plain(screening, state, one) or one in kept]
    rest = [one for one in candidates if one not in likely]
    for some in (likely, rest):
        whole = False
        for candidate in some:
            checked = screening.check(state, candidate)
            if checked is not None and (checked.first is None or first < checked.first):
                whole = whole or checked.first is None
                yield checked
        if whole:
            return
