"""Edits of a part of one operation that neither the catalogue nor the usual edits have: a head of an operand, a tap, a row of a table."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
from msgspec.structs import replace

from engine import ops
from engine.backend import Array
from engine.graph import POSITIONS, Altered, Step, WeightSource
from engine.lift.node import GgmlOperation

OF_OPERANDS = ("heads of an operand exchanged", "a head of an operand scaled")
OF_RESULTS = (
    "one position rolled",
    "a block of 32 negated",
    "every second position scaled",
    "largest element lost",
    "mean with the position before",
    "last third of the second position",
)
OF_WEIGHTS = (
    "an expert scaled",
    "an expert's rows rolled",
    "a tap of a convolution",
    "bias rolled",
    "a column of a weight zeroed",
    "a row of a weight as the one before",
    "a block of a weight transposed",
)
RARE = (
    *OF_OPERANDS,
    *OF_RESULTS,
    *OF_WEIGHTS,
    "a row of RoPE's table",
    "norm of the first half",
    "second term halved",
    "first key left out",
)


def rare(step: Step, how: str, draw: random.Random) -> Step | None:
    """The step with this edit; None where it does not apply. The same draw gives the same edit in every layer."""
    place = draw.randrange(1 << 20)
    if how in OF_OPERANDS:
        return _operand_edited(step, how, place)
    if how in OF_RESULTS:
        if step.axis != 0:
            return None
        return _of_result(step, lambda x: _result(x, how, place))
    if how in OF_WEIGHTS:
        return _weight_edited(step, how, place)
    if how == "a row of RoPE's table":
        rotates = step.op is ops.rope or (isinstance(step.op, GgmlOperation) and step.op.name == "ROPE")
        return _of_input(step, step.reads.index(POSITIONS), _next_row) if rotates and POSITIONS in step.reads else None
    if how == "norm of the first half":
        return replace(step, op=_norm_of_half) if step.op is ops.rms_norm and step.params.get("heads", 1) == 1 else None
    if how == "second term halved":
        return _of_input(step, 1, lambda y: y * y.dtype.type(0.5)) if step.op is ops.add else None
    return _of_result(step, _without_first_key) if step.op is ops.causal_soft_max else None


def _of_result(step: Step, change: Callable[[Array], Array]) -> Step:
    return replace(step, op=lambda *inputs, **params: change(step.op(*inputs, **params)))


def _of_input(step: Step, at: int, change: Callable[[Array], Array]) -> Step:
    def op(*inputs: Any, **params: Any) -> Array:
        return step.op(*(change(value) if number == at else value for number, value in enumerate(inputs)), **params)

    return replace(step, op=op)


def _operand_edited(step: Step, how: str, place: int) -> Step | None:
    """An operand of attention's two products, [T, heads · d], with two heads exchanged or one scaled."""
    if step.op is ops.attention_scores:
        at = place % 2
        heads = step.params["kv_heads" if at else "heads"]
    elif step.op is ops.weighted_values:
        at, heads = 1, step.params["kv_heads"]
    else:
        return None
    if heads < 2:
        return None

    def changed(x: Array) -> Array:
        out = x.reshape(len(x), heads, -1).copy()
        first = place % (heads - 1)
        if how == "heads of an operand exchanged":
            out[:, [first, first + 1]] = out[:, [first + 1, first]]
        else:
            out[:, first] *= out.dtype.type(1.1)
        return out.reshape(x.shape)

    return _of_input(step, at, changed)


def _result(x: Array, how: str, place: int) -> Array:
    out, count = x.copy(), x.shape[-1]
    at = 1 + place % max(1, len(x) - 1)
    if how == "one position rolled":
        out[at] = np.roll(x[at], 1, axis=-1)
    elif how == "a block of 32 negated":
        start = 32 * (place % max(1, count // 32))
        out[..., start : start + 32] *= x.dtype.type(-1)
    elif how == "every second position scaled":
        out[1::2] *= x.dtype.type(1.05)
    elif how == "largest element lost":
        np.put_along_axis(out, np.abs(x).argmax(axis=-1, keepdims=True), x.dtype.type(0), axis=-1)
    elif how == "mean with the position before":
        out[1:] = (x[1:] + x[:-1]) * x.dtype.type(0.5)
    else:
        out[1, ..., count - max(1, count // 3) :] = 0
    return out


def _weight_edited(step: Step, how: str, place: int) -> Step | None:
    names = [weight for weight in step.weights if isinstance(weight, str)]
    operation = step.op.name if isinstance(step.op, GgmlOperation) else ""
    if how == "bias rolled":
        chosen = next((name for name in names if "bias" in name), None)
    elif how == "a tap of a convolution":
        chosen = names[0] if operation == "SSM_CONV" and names else None
    elif how.startswith("an expert"):
        chosen = names[0] if operation == "MUL_MAT_ID" and names else None
    else:
        chosen = names[0] if names and (step.op is ops.linear or operation == "MUL_MAT") else None
    if chosen is None:
        return None

    def altered(source: WeightSource, name: str) -> Array:
        weight = source.get(name).copy()
        if how == "bias rolled":
            return np.roll(weight, 1)
        if how == "a tap of a convolution":
            weight[..., place % weight.shape[-1]] *= weight.dtype.type(0.5)
        elif how == "an expert scaled":
            weight[place % len(weight)] *= weight.dtype.type(1.25)
        elif how == "an expert's rows rolled":
            weight[place % len(weight)] = np.roll(weight[place % len(weight)], 1, axis=0)
        elif how == "a column of a weight zeroed":
            weight[..., place % weight.shape[-1]] = 0
        elif how == "a row of a weight as the one before":
            row = 1 + place % (weight.shape[-2] - 1)
            weight[..., row, :] = weight[..., row - 1, :]
        else:
            size = min(32, *weight.shape[-2:])
            weight[..., :size, :size] = weight[..., :size, :size].swapaxes(-1, -2).copy()
        return weight

    return replace(step, weights=tuple(Altered(chosen, altered) if weight == chosen else weight for weight in step.weights))


def _next_row(positions: Array) -> Array:
    """Position 1 is rotated as position 2."""
    out = positions.copy()
    out[1] += 1
    return out


def _norm_of_half(x: Array, weight: Array, *, eps: float, heads: int = 1) -> Array:
    """RMS norm whose squares are summed over the first half of the row."""
    half = x[..., : x.shape[-1] // 2].astype(np.float64)
    scale = 1 / np.sqrt((half * half).mean(axis=-1, keepdims=True) + eps)
    return (x * scale).astype(x.dtype) * weight


def _without_first_key(weights: Array) -> Array:
    """Attention's weights [H, T, S] as if every position but the first had not seen position 0."""
    out = weights.copy()
    out[:, 1:, 0] = 0
    out[:, 1:] /= np.maximum(out[:, 1:].sum(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    return out
