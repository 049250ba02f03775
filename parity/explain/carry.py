"""Carries many versions of a layer's output on to a later point together."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

import numpy as np

from checkpoints.points import in_layer, parse
from engine.backend import Array, module_of
from engine.graph import POSITIONS, Step, WeightSource
from engine.replay.batched import can_batch, compute_batch
from engine.replay.replay import Replay, Stop

from .state import SearchState

_CARRIED = 512  # rows computed at once: enough to keep the matrix products busy


def steps_between(state: SearchState, layer: int, point: str) -> list[Step]:
    """The steps between a layer's output and a point, if `carry` can compute them; else none (a last layer's may have no name)."""
    start = state.order.get(f"blk.{layer}.l_out")
    if start is None:
        return []
    steps = list(state.steps[start + 1 : state.order[point] + 1])
    known = parse(point).known
    plain = known is not None and "t+1" not in known.row
    return steps if plain and all(can_batch(step) for step in steps) and _of_one_value(state, start, steps) else []


def _of_one_value(state: SearchState, start: int, steps: Sequence[Step]) -> bool:
    """Whether the steps after number `start` read nothing but its value, what they make, and numbers of positions."""
    made = {state.steps[start].makes, *state.of_positions}
    for step in steps:
        if not made.issuperset(step.names):
            return False
        made.add(step.makes)
    return True


def distinct(outputs: Mapping[int, Array]) -> list[tuple[Array, list[int]]]:
    """The arrays that differ in their bits, each with the keys of all that are equal to it."""
    members: dict[bytes, tuple[Array, list[int]]] = {}
    for number, output in outputs.items():
        members.setdefault(output.tobytes(), (output, []))[1].append(number)
    return list(members.values())


def carry_together(
    state: SearchState, outputs: Mapping[int, Sequence[Array]], point: str, replay: Replay, stop: Stop
) -> Iterator[Array]:
    """Versions of several layers' outputs, by layer, each [R, D], at a point after all of them, in the order of the layers.

    Each is carried to the next of these layers' outputs, and from there on with that one's versions.
    """
    values: list[Array] = []
    layers = sorted(outputs)
    for layer, following in zip_longest(layers, layers[1:]):
        values = [*values, *outputs[layer]]
        steps = steps_between(state, layer, point if following is None else in_layer(following, "l_out"))
        here = in_layer(layer, "l_out")
        carried = list(carry(steps, here, values, replay.values, replay.weights, stop))
        if len(carried) < len(values):
            return  # the time is up
        values = carried
    yield from values


def carry(
    steps: Sequence[Step],
    start: str,
    outputs: Sequence[Array],
    given: Mapping[str, Array],
    weights: WeightSource,
    stop: Stop = lambda: False,
) -> Iterator[Array]:
    """Compute the steps after value `start` for many versions of it: each [R, D] -> each version's last value [R, n].

    `given` has the positions [R] and what is made of them. `stop` is asked before each step; once it returns True, no more values come.

    Raises:
        KeyError: a step reads something other than `start`, what is given, and values of the steps before it.
    """
    positions = given[POSITIONS]
    xp = module_of(positions)
    read = {name for step in steps for name in step.names} - {start, *(step.makes for step in steps)}
    size = max(1, _CARRIED // len(positions))
    for begin in range(0, len(outputs), size):
        batch = outputs[begin : begin + size]
        values = {start: xp.concatenate(batch), **{name: xp.concatenate([given[name]] * len(batch)) for name in read}}
        carried = values[start].reshape(len(batch), *batch[0].shape)
        for step in steps:
            if stop():
                return
            with np.errstate(all="ignore"):  # faults may overflow
                carried = compute_batch(step, [values[name] for name in step.names], len(batch), weights)
            values[step.makes] = carried.reshape(-1, *carried.shape[2:])
        yield from carried
