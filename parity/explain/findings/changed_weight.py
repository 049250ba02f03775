"""If one operation is wrong: is it the right operation with a changed weight, as from a wrong file or loader?
No pass is needed: the operation is computed again from the values of the run, with the changed weight.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from checkpoints.printable import first_names
from engine import ops
from engine.backend import Array
from engine.faults.edits import ggml
from engine.graph import (
    Altered,
    RowsOf,
    Step,
    WeightPart,
    WeightSource,
    compute,
    inputs_of,
    name_of,
    viewed,
    weight_name,
    weight_of_step,
)
from engine.replay.replay import Replay

from ...laws.beside import LEFT, ROOM, Bools
from ...laws.laws import short
from ..case import Case
from ..records.records import Expected, Floats
from ..search.search import Search
from ..search.state import SearchState, rows_enough
from .column_range import column_range
from .weight_changes import Change, Changed, changes, in_place_of, taps

_ROWS = 2  # rows of the first look
_ENOUGH = 4  # recorded elements that are wrong: fewer follow one of so many changes by chance
_ZERO = 1e-5  # the most that a factor called 0 may differ from it
_EXPERTS = 1 << 28  # elements of all experts' matrices up to which their rows are put in other orders: a copy of 1 GiB


class _Place(Struct, frozen=True, dict=True):
    """A wrong point, the operation that makes it, and the run that it is computed again from, whole and its first rows."""

    case: Case
    entry: Expected
    wrong: Bools
    step: Step
    whole: Replay
    first: Replay

    def value(self, step: Step, replay: Replay) -> Floats:
        """The recorded elements that a changed operation gives: [R, k], of which those beyond the replay's rows are NaN."""
        with np.errstate(all="ignore"):
            made = compute(step, inputs_of(step, replay.values.__getitem__, replay.weights), replay.weights)
        taken = np.full(self.entry.values.shape, np.nan)
        here = self.entry.rows < replay.rows
        part = replace(self.entry, rows=self.entry.rows[here], values=self.entry.values[here], present=self.entry.present[here])
        part = replace(part, index=None if self.entry.index is None else self.entry.index[here])
        taken[here] = part.taken(self.case.transformer.backend.to_host(made), self.case.positions[: replay.rows])
        return taken

    def with_weight(self, at: int, change: Change) -> Step:
        """The operation with one of its weights changed."""
        right, on_host, name = self.step.weights[at], self.case.transformer.backend.to_host, weight_name(self.step.weights[at])

        def make(source: WeightSource, _name: str) -> Array:
            with np.errstate(all="ignore"):
                return source.array(np.ascontiguousarray(change(on_host(weight_of_step(right, source)))))

        weights = (*self.step.weights[:at], Altered(name, make), *self.step.weights[at + 1 :])
        return replace(self.step, weights=weights)

    def holds(self, taken: Floats, elements: Bools | None = None) -> bool:
        """Whether these are the dump's recorded elements, up to rounding and printed digits."""
        return self.left(taken, elements) is not None

    def left(self, taken: Floats, elements: Bools | None = None) -> float | None:
        """The error that these values leave at the dump's recorded elements, as `Beside.left`; None if they are not those."""
        entry = self.entry
        here = ~np.isnan(taken).all(axis=1)
        known = entry.present[here] if elements is None else entry.present[here] & elements
        with np.errstate(invalid="ignore", over="ignore"):
            delta = np.where(known, taken[here] - entry.values[here], 0.0)
            delta[np.abs(delta) <= entry.quantum[here]] = 0.0
            errors = np.einsum("ij,ij->i", delta, delta)
            before = float((np.where(known, self.right[here] - entry.values[here], 0.0) ** 2).sum())
        room = ROOM * (entry.limit * entry.energy)[here]
        # What changes nothing that was recorded explains nothing, though it may stay within a raised limit.
        mended = known.any() and float(errors.sum()) <= LEFT * before
        if not (mended and (errors <= room).all()):
            return None
        return float((errors[room > 0] / room[room > 0]).mean()) if (room > 0).any() else 0.0

    def gives(self, at: int, changed: Changed) -> bool:
        """Whether the operation with this change of a weight gives the recorded rows, but for what comes from outside of the weight."""
        step, elements = self.with_weight(at, changed.change), None
        within = None if changed.inside is None else self.with_weight(at, changed.inside)
        for replay in (self.first, self.whole):
            taken = self.value(step, replay)
            if within is not None:
                here = self.entry.rows < replay.rows
                elements = taken[here] == self.value(within, replay)[here]
                if (elements & self.errors[here]).sum() < _ENOUGH:
                    return False
            if not self.holds(taken, elements):
                return False
        return True

    def shape_of(self, at: int) -> tuple[int, ...]:
        """The shape of a weight as the operation takes it: a part of a tensor has its own."""
        weight = self.step.weights[at]
        if isinstance(weight, WeightPart):
            return tuple(map(int, weight_of_step(weight, self.whole.weights).shape))
        return tuple(self.case.transformer.model.tensors[weight_name(weight)].shape)

    def rows_of(self, at: int) -> int:
        """How many rows a weight has; for a vector, elements."""
        shape = self.shape_of(at)
        return int(shape[max(0, len(shape) - 2)])

    @cached_property
    def right(self) -> Floats:
        """The recorded elements that the right operation gives: [R, k]."""
        return self.value(self.step, self.whole)

    @cached_property
    def errors(self) -> Bools:
        """Which recorded elements are wrong, each by more than its record may be: [R, k]."""
        with np.errstate(over="ignore"):
            error = np.where(self.entry.present, self.entry.values - self.right, 0.0) ** 2
        return np.asarray(error > (self.entry.limit * self.entry.energy)[:, None])


def changed_weight(case: Case, search: Search, state: SearchState, entry: Expected, errors: Floats) -> str:
    """The sentence "WEIGHT: what is wrong with it" for a point that is wrong by these errors [R]; "" if no change gives its values."""
    step = state.planting.right.get(entry.point)
    wrong = errors > entry.limit
    if step is None or entry.present[wrong].sum() < _ENOUGH or not np.isfinite(entry.values[entry.present]).all():
        return ""
    rows = rows_enough(case.transformer.steps, int(entry.rows[wrong].min()) + _ROWS, len(case.positions))
    screening = search.screening
    place = _Place(case, entry, wrong, step, screening.replay(state, screening.rows), screening.replay(state, rows))
    if place.holds(place.right):
        return ""  # a change that moves no recorded element would hold as well
    for at, weight in enumerate(step.weights):
        name = weight_name(weight)
        if name not in case.transformer.model.tensors or isinstance(weight, RowsOf | Altered):
            continue
        sentence = next(_sentences(place, at), "")
        if sentence:
            return f"{name}: {sentence}"
    return ""


def _sentences(place: _Place, at: int) -> Iterator[str]:
    """What is wrong with one weight of the operation."""
    name = weight_name(place.step.weights[at])
    shape = place.shape_of(at)
    if at == 0 and place.step.op is ops.linear:
        yield from _of_columns(place)
    for tap in taps(shape):
        yield from _scaled(place, at, f"tap {tap} is", np.s_[..., tap])
    if len(shape) == 3 and ggml(place.step, "MUL_MAT_ID"):
        some = _experts(place, shape[0])
        for expert in some:
            yield from _scaled(place, at, f"expert {expert}'s matrix is", np.s_[expert])
        yield from _given(place, at, in_place_of(shape[0], some))
        if np.prod(shape) > _EXPERTS:
            return
    kind = place.case.replay.weights.raw(name)[1]
    yield from _given(place, at, changes(shape, kind))


def _given(place: _Place, at: int, some: Iterator[Changed]) -> Iterator[str]:
    """The sentences on those changes that give the recorded rows."""
    recorded, size = place.entry.values.shape[1], place.rows_of(at)
    seen = f" ({recorded} of {size} elements recorded)" if recorded < size else ""
    return (changed.sentence + (seen if changed.rows else "") for changed in some if place.gives(at, changed))


def _scaled(place: _Place, at: int, what: str, part: object) -> Iterator[str]:
    """A part of the weight that is zero, or off by one factor; the operation is linear in it."""

    def times(factor: float) -> Change:
        def change(weight: Array) -> Array:
            weight = weight.copy()
            weight[part] *= np.float32(factor)
            return weight

        return change

    right, without = place.right, place.value(place.with_weight(at, times(0.0)), place.whole)
    here = place.entry.present & place.wrong[:, None]
    effect, error = (right - without)[here], (place.entry.values - right)[here]
    energy = float(effect @ effect)
    if energy == 0:
        return
    factor = 1 + float(error @ effect) / energy
    number = short(factor, lambda c: place.left(right + (c - 1) * (right - without)))
    if place.gives(at, Changed("", times(float(number)))):
        yield f"{what} {'all zeros' if abs(factor) < _ZERO else f'{number} times the right one'}"


def _experts(place: _Place, count: int) -> list[int]:
    """The experts that are chosen at a wrong position; first those that are chosen at every one."""
    step, replay = place.step, place.whole
    read = step.reads[1]
    ids = viewed(read, inputs_of(replace(step, reads=(read,)), replay.values.__getitem__, replay.weights)[0])
    ids = place.case.transformer.backend.to_host(ids).astype(np.int64)
    chosen = ids.reshape(len(place.case.positions), -1)[np.unique(place.entry.rows[place.wrong])]
    each = [int(expert) for expert in np.unique(chosen) if 0 <= expert < count]
    return sorted(each, key=lambda expert: -int((chosen == expert).any(axis=1).sum()))


def _of_columns(place: _Place) -> Iterator[str]:
    """Elements of rows of a matrix [out, in] that are zeros, or off by one factor."""
    entry, step, replay, right = place.entry, place.step, place.whole, place.right
    (x,) = inputs_of(replace(step, reads=step.reads[:1]), replay.values.__getitem__, replay.weights)
    error, wrong = np.where(entry.present, entry.values - right, 0.0), np.asarray(place.errors.any(axis=0))
    if entry.index is not None or not wrong.any():
        return
    on_host = place.case.transformer.backend.to_host
    inputs = on_host(viewed(step.reads[0], x))[entry.rows].astype(np.float64)
    matrix = on_host(weight_of_step(step.weights[0], replay.weights))
    found = column_range(inputs, matrix[np.flatnonzero(wrong)].astype(np.float64), error[:, wrong])
    if found is None:
        return
    first, end, factor, effect = found
    number = short(factor, lambda c: place.left(_plus(right, wrong, (c - 1) * effect)))
    if not place.holds(_plus(right, wrong, (float(number) - 1) * effect)):
        return
    elements = f"elements {first} to {end - 1}" if end - first > 1 else f"element {first}"
    be = "are" if end - first > 1 else "is"
    how = (
        ("zeros" if end - first > 1 else "0")
        if abs(factor) < _ZERO
        else f"{number} times the right one{'s' if end - first > 1 else ''}"
    )
    every = place.holds(right + (float(number) - 1) * (inputs[:, first:end] @ matrix[: len(wrong), first:end].T))
    rows = _rows(list(range(len(wrong))) if every else np.flatnonzero(wrong).tolist(), len(wrong), len(matrix))
    # The same elements of every row are those of what they are multiplied with: its values would be wrong alike.
    yield f"{elements} of {rows} {be} {how}{f' (or those of {name_of(step.reads[0])} as it is read here)' if every else ''}"


def _plus(values: Floats, columns: Bools, more: Floats) -> Floats:
    values = values.copy()
    values[:, columns] += more
    return values


def _rows(wrong: Sequence[int], recorded: int, count: int) -> str:
    if len(wrong) == recorded:
        return "every row" if recorded == count else f"each of the {recorded} rows that were recorded"
    return f"row {wrong[0]}" if len(wrong) == 1 else f"rows {first_names([str(row) for row in wrong])}"
