"""If one operation is wrong: is it the right operation on another value or with another weight?"""

from collections.abc import Iterator

import numpy as np
from msgspec.structs import replace

from engine.graph import Step, compute, inputs_of
from engine.replay.replay import Replay

from ...laws.beside import LEFT, ROOM
from ..case import Case
from ..records.records import Expected, Floats
from ..search.state import SearchState, rows_enough

_ROWS = 2  # rows of the first look


def other_operand(case: Case, state: SearchState, entry: Expected, errors: Floats) -> str:
    """The sentence "the value is what … makes of …" for a point that is wrong by these errors [R]; "" if no other operand gives its values.

    Each operand is replaced by every earlier value of the right run with its shape, and each weight by every weight of the model
    with its shape.
    """
    step = state.planting.right.get(entry.point)
    wrong = errors > entry.limit
    known = {own.makes for own in case.transformer.steps}
    if step is None or not wrong.any() or any(name in state.order and name not in known for name in step.names):
        return ""  # it reads what a fault alone makes, which the right run does not have
    rows = rows_enough(case.transformer.steps, int(entry.rows[wrong].min()) + _ROWS, len(case.positions))
    first = case.make(case.transformer.steps, rows, case.replay)
    for other, sentence in _changed(case, state, step):
        if _gives(case, entry, errors, other, first) and _gives(case, entry, errors, other, case.replay):
            return sentence
    return ""


def _changed(case: Case, state: SearchState, step: Step) -> Iterator[tuple[Step, str]]:
    """The step with one operand or weight replaced, and the sentence on it."""
    values = case.replay.values
    before = [name for name, number in state.order.items() if number < state.order[step.makes] and name in values]
    for at, read in enumerate(step.reads):
        if not isinstance(read, str) or read not in state.order:
            continue
        shape = values[read].shape
        for name in reversed(before):
            if name != read and values[name].shape == shape:
                reads = (*step.reads[:at], name, *step.reads[at + 1 :])
                yield replace(step, reads=reads), f"the value is what this operation makes of {name} instead of {read}"
    tensors = case.transformer.model.tensors
    for at, weight in enumerate(step.weights):
        if not isinstance(weight, str) or weight not in tensors:
            continue
        for name, info in tensors.items():
            if name != weight and info.shape == tensors[weight].shape:
                weights = (*step.weights[:at], name, *step.weights[at + 1 :])
                yield replace(step, weights=weights), f"the value is what this operation makes with {name} instead of {weight}"


def _gives(case: Case, entry: Expected, before: Floats, step: Step, replay: Replay) -> bool:
    """Whether a changed step, computed from the values of a right run, gives the recorded rows, and leaves next to nothing of the errors
    `before`, [R]: under a lower arithmetic's limits any similar value would pass.
    """
    with np.errstate(all="ignore"):
        value = compute(step, inputs_of(step, replay.values.__getitem__, replay.weights), replay.weights)
    positions = case.positions[: replay.rows]
    errors = entry.nmse(case.transformer.backend.to_host(value), positions)
    here = entry.rows < replay.rows
    wrong = here & (before > entry.limit)
    return bool((errors[here] <= ROOM * entry.limit[here]).all() and errors[wrong].sum() <= LEFT * before[wrong].sum())
