"""Is the operation wrong, or the record alone? If the engine had computed what a record holds, what is made from it would differ, too."""

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from engine.backend import Array, Backend
from engine.inapplicable import NotApplicable
from engine.replay.replay import Replay

from ..records.records import Expected, Floats, Ints
from .state import SearchState

# A consumer that agrees refutes a record whose values would have moved it by at least this many limits: the factor of `diff.consumers`.
_TELLS = 100.0
_COUNTED = 1 << 24  # elements that float32 can number
_MOST = 0.5  # of the wrong records, which must be refuted: the others may be invisible, as queries at position 0 are


def agreeing_after(
    entries: Sequence[Expected], state: SearchState, replay: Replay, positions: Ints, backend: Backend
) -> tuple[str, ...]:
    """The nearest recorded points computed from a state's first place, if they show that its records alone are wrong; else ().

    All of them agree, and would not if the engine had gone on with what was recorded.

    Args:
        replay: of the state, over all positions.
    """
    if state.first is None:
        return ()
    entry = entries[state.first.point]
    if entry.point in state.shown or entry.point not in state.order or replay.on_host[entry.point].size > _COUNTED:
        return ()
    number = {other.point: at for at, other in enumerate(entries)}
    if of_source := _beside_a_copy(state, entry.point, number):
        show = all(_would_show(state, entry, entries[number[name]], state.nmse[number[name]]) for name in of_source)
        return of_source if show else ()
    consumers = {name: entries[number[name]] for name in _consumers(state, entry.point, number)}
    if not consumers or any((state.nmse[number[name]] > other.limit).any() for name, other in consumers.items()):
        return ()
    wrong = state.nmse[state.first.point] > entry.limit
    # What was not recorded may be right, or off by the same factor, which a norm would remove: both must be refuted.
    beside = _if_it_were_so(state, entry, wrong, consumers, replay, positions, backend)
    scaled = _if_it_were_so(state, entry, wrong, consumers, replay, positions, backend, scaled=True)
    errors = {name: np.minimum(far, scaled[name]) for name, far in beside.items() if name in scaled}
    refuted = {name: consumers[name].rows[far > _TELLS * consumers[name].limit] for name, far in errors.items()}
    telling = tuple(name for name, rows in refuted.items() if len(rows))
    rows = np.concatenate([refuted[name] for name in telling]) if telling else np.zeros(0)
    return telling if np.isin(entry.rows[wrong], rows).mean() >= _MOST else ()


def _beside_a_copy(state: SearchState, point: str, recorded: Mapping[str, int]) -> tuple[str, ...]:
    """The recorded points made from what a point is a copy of, if nothing is made from the copy itself: of a half of a product, say,
    which llama.cpp reads where it is. () where something is made from the point, or a point made from its source was not recorded.
    """
    read = {name for step in state.steps for name in step.names}
    source = set(state.steps[state.order[point]].names)
    if point in read:
        return ()
    made = [step.makes for step in state.steps if step.makes in read and not source.isdisjoint(step.names)]
    return tuple(made) if all(name in recorded for name in made) else ()


def _would_show(state: SearchState, entry: Expected, other: Expected, errors: Floats) -> bool:
    """Whether a point agrees, by these errors, that would not if it were made from an entry's wrong rows, at most of those."""
    assert state.first is not None
    base = state.nmse[state.first.point]
    limits = np.full(int(max(entry.rows.max(), other.rows.max())) + 1, np.inf)
    limits[other.rows] = other.limit
    wrong = base > entry.limit
    telling = base[wrong] > _TELLS * limits[entry.rows[wrong]]
    return bool((errors <= other.limit).all() and telling.mean() >= _MOST)


def _consumers(state: SearchState, point: str, recorded: Mapping[str, int]) -> list[str]:
    """The recorded points that are made from a point with no other one between, in the order of computation."""
    reached, consumers = {point}, []
    for step in state.steps[state.order[point] + 1 :]:
        if not reached.isdisjoint(step.names):
            if step.makes in recorded:
                consumers.append(step.makes)
            else:
                reached.add(step.makes)
    return consumers


def _if_it_were_so(
    state: SearchState,
    entry: Expected,
    wrong: NDArray[np.bool_],
    consumers: Mapping[str, Expected],
    replay: Replay,
    positions: Ints,
    backend: Backend,
    *,
    scaled: bool = False,
) -> dict[str, Floats]:
    """How far the dump's consumers are from those of an engine that goes on with the wrong recorded values: NMSE [R] by point.

    `scaled`: the elements that were not recorded are off by the factor of those that were.
    """
    value = replay.on_host[entry.point].copy()
    if scaled:
        right = entry.taken(value, positions)
        _, known = entry.errors_beside(value, positions)
        products, squares = (np.where(known, right * other, 0.0).sum(axis=1) for other in (entry.values, right))
        for record in np.flatnonzero(wrong & (squares > 0)):
            value[..., entry.rows[record], :] *= value.dtype.type(products[record] / squares[record])
    # Which elements of the value are recorded: a tensor of their numbers, seen as a record sees it.
    numbers = entry.taken(np.arange(value.size, dtype=np.float32).reshape(value.shape), positions)
    changed = entry.present & wrong[:, None] & np.isfinite(numbers)
    value.reshape(-1)[numbers[changed].astype(np.int64)] = entry.values[changed]
    recorded = backend.array(value)
    number = state.order[entry.point]
    steps = list(state.steps)
    steps[number] = replace(steps[number], op=lambda *_inputs, **_params: recorded)
    errors: dict[str, Floats] = {}

    def visit(name: str, tensor: Array) -> bool:
        if name in consumers:
            errors[name] = consumers[name].nmse(backend.to_host(tensor), positions)
        return len(errors) < len(consumers)

    try:
        replay.run(steps, visit, number)
    except NotApplicable:
        return {}
    return errors
