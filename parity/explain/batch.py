"""Screens many candidates together: what they share is computed for all of them at once, in later layers too."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np

from checkpoints.points import EMBD
from engine.backend import Array, module_of
from engine.graph import POSITIONS
from engine.inapplicable import NotApplicable
from engine.replay.replay import Edits

from ..diff.truth import NO_COARSE_ROUNDING
from .carry import carry, distinct, steps_between
from .first_place import AtFirstPlace
from .records import Floats
from .screening import Screening
from .state import Candidate, Layers, RecordKey, Screened, SearchState

# (layer, versions of its output's first rows by number, rows) -> the numbers of the likely ones
Choose = Callable[[str, Mapping[int, Array], int], set[int]]
_SOON = 2  # rows of the first recorded point: the first shows what acts on each row, the second what attention does
_ROWS = 1024  # rows at once: a bound of the memory
# Products over a few rows round differently than over all, and a fault may amplify that: an engine without residuals differed by 1.5
# times the limit. Candidates that get this far are checked on all rows, by the limit itself.
_SLACK = 10.0
_COMPARED = 64  # versions compared with the dump at once: a bound on the memory, for logits
_FEW = 2  # with this few candidates the first rows of every point are not looked at: that costs as much as checking one of them
_TOGETHER = 128  # candidates at once: enough to share Python's overhead, few enough to look at the clock in between


class BatchScreening(AtFirstPlace):
    """Screens candidates at a state's first place, in one layer, several or all.

    Few positions come first: a row that is right in the dump contradicts most candidates before the first wrong row has to
    be computed, and that one contradicts all but a few before the row after it. Causality makes that enough.

    Raises:
        ValueError: the state has no place that differs.
    """

    def __init__(self, screening: Screening, state: SearchState, layers: Layers) -> None:
        super().__init__(screening, state, layers)
        self._after = steps_between(state, layers[0], self._point) if layers is not None and len(layers) == 1 else []
        # Computing candidate by candidate ends with the layer, if its output can be carried on from there.
        self._name = f"blk.{layers[0]}.l_out" if layers and self._after else self._point
        self._end = state.order[self._name] + 1
        self._before = frozenset(entry.point for entry in screening.entries[: self._first.point]) - state.shown
        self._candidates: Sequence[Candidate] = ()
        self._edits_of: dict[int, Edits] = {}
        self._stages: list[int] = []
        self._unlikely: list[tuple[int, dict[int, Array]]] = []

    def screened(self, candidates: Sequence[Candidate], likely: Choose | None = None) -> Iterator[tuple[Candidate, Screened]]:
        """The candidates that change something at the first place, and how far they get (see `Screening.screen`).

        With `likely` only those that it selects, before they are carried there; `postponed` then gives the others.
        """
        self._candidates = candidates
        self._edits_of = self._edits(candidates, self._not_soon_wrong(candidates), self._end)
        few = (1, 2, self._first.row + 1, self._first.row + 2)
        self._stages = sorted({self._screening.enough(rows) for rows in few})
        yield from self._go_on(list(self._edits_of), 0, {}, likely if self._after else None)

    def postponed(self) -> Iterator[tuple[Candidate, Screened]]:
        """The candidates that were not likely, and how far they get."""
        while self._unlikely:
            stage, value_of = self._unlikely.pop(0)
            results: dict[int, Screened] = {}
            passed = self._judged(value_of, self._stages[stage], results)
            yield from self._go_on(sorted(passed), stage + 1, results, None)

    def _go_on(
        self, waiting: Sequence[int], stage: int, results: dict[int, Screened], likely: Choose | None
    ) -> Iterator[tuple[Candidate, Screened]]:
        """Screen the candidates that wait for this stage and the later ones."""
        candidates, edits = self._candidates, self._edits_of
        for number_of_stage, rows in list(enumerate(self._stages))[stage:]:
            value_of, ended = self._values(candidates, edits, waiting, rows, self._name, self._before)
            if number_of_stage == 0:
                cut = not self._screening.budget.complete
                self._screening.tried.count(
                    [candidates[edit] for edit in edits if not cut or edit in value_of or edit in ended]
                )
            for number in ended:
                results.pop(number, None)
            # Before the first wrong row, a candidate that shows nothing is right.
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
        """The candidates that are right in the first rows; `results` is filled with how far each gets."""
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
        ahead = any(
            planted.fault.whole and planted.fault.shows is None for planted in self._state.faults
        )  # not those that only change what is shown
        for whole in (False, True):
            chosen = [number for number in waiting if (ahead or candidates[number].fault.whole) is whole]
            # A fault that looks ahead needs all rows in its own layer; after that causality holds.
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
        """Whether versions of a point may agree with the dump: [M, R, …] -> M.

        After a table of float16 the rounding of products over a few rows may meet another entry of it.
        """
        entry = self._screening.entries[self._screening.number[name]]
        errors = entry.nmse_of(self._screening.backend.to_host(values), self._screening.positions[: values.shape[-2]])
        rounding = NO_COARSE_ROUNDING if name in self._screening.coarse else 0.0
        return list(~np.any(errors > np.maximum(_SLACK * entry.limit, rounding), axis=1))

    def _errors(self, values: dict[int, Array], rows: int) -> Iterator[tuple[int, Floats]]:
        """NMSE at the first place's point, by candidate: [records]."""
        for used in {rows, self._screening.rows}:
            some = {number: value for number, value in values.items() if value.shape[-2] == used}
            if some:
                yield from self._errors_of(some, used)

    def _errors_of(self, values_of: dict[int, Array], rows: int) -> Iterator[tuple[int, Floats]]:
        versions = distinct(values_of)
        values: Iterator[Array] = iter([value for value, _ in versions])
        if self._after:
            replay = self._screening.replay(self._state, rows)
            stop = self._screening.budget.over
            values = carry(self._after, self._name, list(values), replay.values[POSITIONS], replay.weights, stop)
        for begin in range(0, len(versions), _COMPARED):
            portion = versions[begin : begin + _COMPARED]
            carried = list(islice(values, len(portion)))
            if len(carried) < len(portion):
                return  # the time is up
            stack = module_of(carried[0]).stack(carried)
            errors = self._entry.nmse_of(self._screening.backend.to_host(stack), self._screening.positions[:rows])
            for (_, numbers), error in zip(portion, errors, strict=True):
                yield from ((number, error) for number in numbers)

    def _causal(self, value: Array) -> bool:
        """Whether rows of a layer's output act on later rows only; NaN does not, since 0 · NaN is NaN under a mask, too."""
        return not self._after or bool(module_of(value).isfinite(value).all())


def screened(
    screening: Screening, state: SearchState, layers: Layers, candidates: Sequence[Candidate]
) -> Iterator[tuple[Candidate, Screened]]:
    """The candidates of a scope that change something at the state's first place, and how far they get."""
    for part in in_two(screening, state, layers, candidates, None):
        yield from part


def in_two(
    screening: Screening, state: SearchState, layers: Layers, candidates: Sequence[Candidate], likely: Choose | None
) -> tuple[Iterator[tuple[Candidate, Screened]], Iterator[tuple[Candidate, Screened]]]:
    """`screened` in two parts: the likely candidates, and the postponed ones, which can be read after the likely ones."""
    if state.first is None:
        return iter(()), iter(())
    batch = BatchScreening(screening, state, layers)
    plain = [_plain(screening, state, candidate) for candidate in candidates]

    def first() -> Iterator[tuple[Candidate, Screened]]:
        yield from batch.screened(
            [candidate for candidate, together in zip(candidates, plain, strict=True) if together], likely
        )
        for candidate in (screened for screened, together in zip(candidates, plain, strict=True) if not together):
            if screening.budget.over():
                return
            result = screening.screen(state, candidate)
            if result is not None:
                yield candidate, result

    return first(), batch.postponed()


def _plain(screening: Screening, state: SearchState, candidate: Candidate) -> bool:
    """Whether a candidate can be computed together with others: no fault of the capture takes part."""
    first = state.first
    return (
        first is not None
        and state.root is None
        and candidate.fault.shows is None
        and screening.entries[first.point].point not in state.shown
    )


def beyond(screening: Screening, state: SearchState, candidates: Sequence[Candidate]) -> Iterator[SearchState]:
    """The states of candidates that get beyond the state's first place, on all rows.

    If one of them explains everything, those that the first rows already contradict somewhere are left out.
    """
    first = state.first
    if first is None:
        return
    layers = candidates[0].layers if candidates else None
    plain = [candidate for candidate in candidates if _plain(screening, state, candidate)]
    kept = BatchScreening(screening, state, layers).agreeing(plain) if len(plain) > _FEW else plain
    likely = [candidate for candidate in candidates if not _plain(screening, state, candidate) or candidate in kept]
    rest = [candidate for candidate in candidates if candidate not in likely]
    for some in (likely, rest):
        whole = False
        for candidate in some:
            checked = screening.check(state, candidate)
            if checked is not None and (checked.first is None or first < checked.first):
                whole = whole or checked.first is None
                yield checked
        if whole:
            return
