"""How a row of a value responds to small changes of the same row of earlier values: derivatives, carried backwards through the steps.

Rows before it stay as they are: in a causal model they do not depend on it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .. import ops
from ..backend import Array, module_of
from ..graph import Read, Step, View, WeightSource, name_of, viewed, weight_of_step
from ..lift.node import GgmlOperation
from .batched import compute_elementwise, elementwise, same_part_of_rows
from .transposed import DIFFERENCE, passes, through

_Back = Callable[[Step, Array, Sequence[Array], Sequence[Any], int], Sequence["Array | None"]]


def derivatives(
    steps: Sequence[Step],
    point: str,
    elements: Any,
    row: int,
    values: Mapping[str, Array],
    weights: WeightSource,
    *,
    partial: bool = False,
) -> dict[str, Array]:
    """The derivatives of some elements of a row of `point` with respect to the same row of each value that it is made from: [k, n] by
    name.
    Those with respect to attention's scores, and to values without a row for each position, are only passed on.

    Args:
        steps: those that lead to `point`, of operations that `can_batch` takes. elements: [k], which of the row.
        values: of the right run, over the rows up to that one at least.
        partial: what goes through other operations, such as experts, is left out; what residuals hand on past them is most of it.

    Raises:
        KeyError: a step is of another operation, or reads other parts of values than the same of each row.
    """
    last = values[point]
    xp = module_of(last)
    unit = xp.zeros((len(elements), last.shape[-1]), dtype=last.dtype)
    unit[xp.arange(len(elements)), xp.asarray(elements)] = 1
    by_name: dict[str, Array] = {point: unit}
    axes = {step.makes: step.axis for step in steps}
    for step in reversed(steps):
        if step.makes not in by_name:
            continue
        carry = (_elementwise if elementwise(step) else _BACK.get(step.op)) if step.axis is not None else None
        by_rows = carry is not None and all(map(same_part_of_rows, step.reads))
        if not by_rows and not passes(step):
            if partial:
                continue
            raise KeyError(step.makes)
        back, names = by_name[step.makes], step.names
        if back.ndim > 2:
            del by_name[step.makes]  # of scores, or of whole values: [k, heads, S] in every layer
        whole = [values[name] for name in names]
        if carry is None or not by_rows:
            of_value = _of_whole(back, values[step.makes], step.axis, row)
            for name, part in zip(names, through(step, of_value, values[step.makes], whole, weights), strict=True):
                if part is not None and (name in axes or values[name].ndim == 2):
                    of_row = _of_row(part, axes.get(name, 0), row)
                    by_name[name] = by_name[name] + of_row if name in by_name else of_row
            continue
        inputs = [_rows_of(read, value) for read, value in zip(step.reads, whole, strict=True)]
        arrays = [weight_of_step(weight, weights) for weight in step.weights]
        for read, value, part in zip(step.reads, whole, carry(step, back, inputs, arrays, row), strict=False):
            if part is not None:
                name = name_of(read)
                of_whole = _scattered(read, part, value) if isinstance(read, View) else part
                by_name[name] = by_name[name] + of_whole if name in by_name else of_whole
    return {name: back for name, back in by_name.items() if axes.get(name, 0) == 0 and back.ndim == 2}


def _of_whole(back: Array, value: Array, axis: int | None, row: int) -> Array:
    """Derivatives by a row of a value as those by the whole value: those by its other rows are 0."""
    if axis is None:
        return back
    whole = module_of(back).zeros((len(back), *value.shape), dtype=back.dtype)
    whole[(slice(None),) * (1 + axis) + (row,)] = back
    return whole


def _of_row(whole: Array, axis: int | None, row: int) -> Array:
    """Derivatives by a whole value as those by one of its rows: the others do not change."""
    part: Array = whole if axis is None else whole[(slice(None),) * (1 + axis) + (row,)]
    return part


def _rows_of(read: Read, value: Array) -> Array:
    """What a step reads of a value, a row for each of the value's rows."""
    return viewed(read, value).reshape(len(value), -1) if isinstance(read, View) else value


def _scattered(read: View, part: Array, value: Array) -> Array:
    """Derivatives by the elements of a part of each row as those by the whole row: [k, m] -> [k, n]."""
    xp = module_of(value)
    columns = _rows_of(read, xp.arange(value.size).reshape(value.shape))[0]
    whole = xp.zeros((len(part), value.shape[1]), dtype=part.dtype)
    xp.add.at(whole.T, columns, part.T)
    return whole


def _linear(_step: Step, back: Array, inputs: Sequence[Array], weights: Sequence[Any], _row: int) -> Sequence[Array]:
    return [back @ weights[0].reshape(-1, inputs[0].shape[1])]


def _rms_norm(step: Step, back: Array, inputs: Sequence[Array], weights: Sequence[Any], row: int) -> Sequence[Array]:
    x = inputs[0][row].reshape(step.params.get("heads", 1), -1)
    scale = 1 / np.sqrt((x * x).mean(axis=1, keepdims=True) + step.params["eps"])
    weighted = back.reshape(len(back), *x.shape) * weights[0]
    along = (weighted * x).sum(axis=2, keepdims=True) * x
    return [(weighted * scale - along * scale**3 / x.shape[1]).reshape(back.shape)]


def _layer_norm(step: Step, back: Array, inputs: Sequence[Array], weights: Sequence[Any], row: int) -> Sequence[Array]:
    x = inputs[0][row].reshape(step.params.get("heads", 1), -1)
    centred = x - x.mean(axis=1, keepdims=True)
    scale = 1 / np.sqrt((centred * centred).mean(axis=1, keepdims=True) + step.params["eps"])
    weighted = back.reshape(len(back), *x.shape) * weights[0]
    along = (weighted * centred).sum(axis=2, keepdims=True) * centred
    plain = (weighted - weighted.mean(axis=2, keepdims=True)) * scale
    return [(plain - along * scale**3 / x.shape[1]).reshape(back.shape)]


def _rope(step: Step, back: Array, inputs: Sequence[Array], weights: Sequence[Any], row: int) -> Sequence["Array | None"]:
    size = {name: step.params[name] for name in ("heads", "dims", "pairs")}
    scaled = {name: step.params[name] for name in ("base", "scale")}
    factors = weights[0] if weights else None
    cos, sin = ops.rope_angles(inputs[1][row : row + 1], size["dims"], **scaled, factors=factors, dtype=back.dtype)
    xp = module_of(back)
    rows = len(back)
    return [ops.rotate(back, xp.repeat(cos, rows, axis=0), -xp.repeat(sin, rows, axis=0), **size), None]


def _rotated(step: Step, back: Array, inputs: Sequence[Array], weights: Sequence[Any], row: int) -> Sequence["Array | None"]:
    """A rotation of ggml's, whose transpose is that by the opposite angles."""
    xp = module_of(back)
    _, _, heads, size = (dimension.fixed for dimension in step.params["shape"])
    rows, positions = len(back), inputs[1].reshape(-1, len(inputs[0]))[:, row]
    turned = GgmlOperation("ROPE_BACK").compute(
        back.reshape(1, rows, heads, size),
        xp.repeat(positions, rows),
        *weights,
        params=step.params["params"],
        shape=(1, rows, heads, size),
    )
    return [turned.reshape(back.shape), None]


def _part(_step: Step, back: Array, _inputs: Sequence[Array], _weights: Sequence[Any], _row: int) -> Sequence[Array]:
    return [back]


def _cached(_step: Step, back: Array, _inputs: Sequence[Array], _weights: Sequence[Any], _row: int) -> Sequence[Array]:
    return [back]


def _add(_step: Step, back: Array, _inputs: Sequence[Array], _weights: Sequence[Any], _row: int) -> Sequence[Array]:
    return [back, back]


def _swiglu(_step: Step, back: Array, inputs: Sequence[Array], _weights: Sequence[Any], row: int) -> Sequence[Array]:
    gate, up = inputs[0][row], inputs[1][row]
    part = 1 / (1 + np.exp(-gate))
    return [back * up * part * (1 + gate * (1 - part)), back * gate * part]


def _elementwise(step: Step, back: Array, inputs: Sequence[Array], _weights: Sequence[Any], row: int) -> Sequence[Array]:
    """By differences in float64, in which ggml's operations take nothing from their tables."""
    rows = [(x[row] if x.ndim == 2 else x[:, row]).astype(np.float64) for x in inputs]
    parts = []
    for number, x in enumerate(rows):
        step_of = DIFFERENCE * (1 + abs(x))
        up, down = (
            compute_elementwise(step, [*rows[:number], moved, *rows[number + 1 :]]) for moved in (x + step_of, x - step_of)
        )
        parts.append(back * ((up - down) / (2 * step_of)).astype(back.dtype))
    return parts


def _weighted_values(step: Step, back: Array, inputs: Sequence[Array], _weights: Sequence[Any], row: int) -> Sequence[Array]:
    weights, v = inputs
    groups = step.params["kv_heads"]
    split = back.reshape(len(back), groups, len(weights) // groups, -1)
    values = v.reshape(len(v), groups, -1)
    of_weights = np.einsum("kghd,sgd->kghs", split, values).reshape(len(back), len(weights), -1)
    of_row = weights[:, row, row].reshape(groups, -1)
    return [of_weights, np.einsum("kghd,gh->kgd", split, of_row).reshape(len(back), -1)]


def _causal_soft_max(
    step: Step, back: Array, inputs: Sequence[Array], weights: Sequence[Any], row: int
) -> Sequence["Array | None"]:
    scores, positions, keys = (inputs[0][:, row : row + 1], inputs[1][row : row + 1], inputs[2])
    seen = ops.causal_soft_max(scores, positions, keys, *weights, **step.params)[:, 0]
    return [seen * (back - (seen * back).sum(axis=2, keepdims=True)) * step.params["scale"], None, None]


def _attention_scores(step: Step, back: Array, inputs: Sequence[Array], _weights: Sequence[Any], row: int) -> Sequence[Array]:
    q, k = inputs
    heads, groups = step.params["heads"], step.params["kv_heads"]
    split = back.reshape(len(back), groups, heads // groups, -1)
    keys = k.reshape(len(k), groups, -1)
    of_query = np.einsum("kghs,sgd->kghd", split, keys).reshape(len(back), -1)
    query = q[row].reshape(groups, heads // groups, -1)
    return [of_query, np.einsum("kgh,ghd->kgd", split[..., row], query).reshape(len(back), -1)]


_BACK: Mapping[Callable[..., Any], _Back] = {
    ops.rms_norm: _rms_norm,
    ops.layer_norm: _layer_norm,
    ops.linear: _linear,
    ops.rope: _rope,
    ops.part: _part,
    GgmlOperation("ROPE"): _rotated,
    GgmlOperation("CONT"): _part,
    ops.cached: _cached,
    ops.add: _add,
    ops.swiglu: _swiglu,
    ops.attention_scores: _attention_scores,
    ops.causal_soft_max: _causal_soft_max,
    ops.weighted_values: _weighted_values,
}
