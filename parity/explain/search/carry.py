"""Carries many versions of a layer's output on to a later point together."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

import numpy as np

from checkpoints.points import in_layer, parse
from engine.backend import Array, module_of
from engine.faults.base import layer_near
from engine.graph import POSITIONS, Step, WeightSource, compute, inputs_of, leading_to, made_from
from engine.replay.batched import can_batch, compute_batch
from engine.replay.replay import Replay, Stop

from .state import SearchState

_CARRIED = 512  # rows computed at once: enough to keep the matrix products busy


def steps_between(state: SearchState, layer: int, point: str, since: int | None = None) -> list[Step]:
    """The steps that lead from a layer's output to a point, if `carry` can compute them; else none (a last layer's may have no name).

    Args:
        since: the first layer of which values may be changed; None: the layer itself.
    """
    start = state.order.get(in_layer(layer, "l_out"))
    if start is None:
        return []
    output = state.steps[start]
    steps = leading_to({point}, state.steps[start + 1 : state.order[point] + 1])
    changed = made_from(output.makes, steps)
    steps = [step for step in steps if step.makes in changed]
    known = parse(point).known
    plain = known is not None and "t+1" not in known.row and output.axis == 0
    own = _of_layers(state, layer if since is None else min(since, layer), layer, start)
    return steps if plain and own.isdisjoint(name for step in steps for name in step.names) else []


def _of_layers(state: SearchState, first: int, last: int, end: int) -> set[str]:
    """What these layers make before step number `end`, but for what is made of positions alone."""
    before = state.order.get(in_layer(first - 1, "l_out"), state.layers_begin - 1)
    layers = range(first, last + 1)
    made = {step.makes for at, step in enumerate(state.steps[:end]) if at > before or layer_near(step) in layers}
    return made - state.of_positions


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
        steps = steps_between(state, layer, point if following is None else in_layer(following, "l_out"), layers[0])
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

    `given` has what else they read, of the same rows. `stop` is asked before each step; once it returns True, no more values come.

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
                together = compute_batch if can_batch(step) else _one_by_one
                carried = together(step, [values[name] for name in step.names], len(batch), weights)
            values[step.makes] = carried.reshape(-1, *carried.shape[2:])
        yield from carried


def _one_by_one(step: Step, inputs: Sequence[Array], many: int, weights: WeightSource) -> Array:
    """`compute_batch` for a step that mixes the rows of what it reads, or their order: version by version."""
    versions = [value.reshape(many, len(value) // many, *value.shape[1:]) for value in inputs]
    xp = module_of(inputs[0])
    values = []
    for number in range(many):
        read = dict(zip(step.names, (version[number] for version in versions), strict=True))
        values.append(compute(step, inputs_of(step, read.__getitem__, weights), weights))
    stacked: Array = xp.stack(values)
    return stacked
