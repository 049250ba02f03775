"""Edits of one operation as a wrong loop or buffer makes them: another group, another layer's value, another axis, one term less."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
from msgspec.structs import replace

from checkpoints.points import parse
from engine import ops
from engine.backend import Array
from engine.graph import Step
from engine.lift.node import GgmlOperation

STRUCTURAL = (
    "group of the neighbour",
    "operand of the layer before",
    "second operand twice",
    "second operand subtracted",
    "norm in two halves",
    "norm over positions",
    "last term of the sum lost",
    "first term of the sum twice",
    "heads and elements exchanged",
    "each element with its neighbour",
    "row without its smallest",
    "last positions first",
    "squared",
    "every second head negated",
)
_TWO = ("ADD", "MUL", "SUB")


def structural(step: Step, how: str, draw: random.Random, right: dict[str, Step]) -> Step | None:
    """The step with this edit; None where it does not apply."""
    name = step.op.name if isinstance(step.op, GgmlOperation) else ""
    if how == "group of the neighbour":
        heads = step.params.get("kv_heads", 1)
        if step.op not in (ops.attention_scores, ops.weighted_values) or heads < 2:
            return None
        return _input(step, 1, lambda x: np.roll(x.reshape(len(x), heads, -1), 1, axis=1).reshape(x.shape))
    if how == "operand of the layer before":
        return _of_layer_before(step, draw, right)
    if how in ("second operand twice", "second operand subtracted"):
        if not (step.op is ops.add or name in _TWO) or len(step.reads) < 2:
            return None
        twice = np.square if name == "MUL" else lambda y: y + y
        return _input(step, 1, twice if how == "second operand twice" else np.negative)
    if how.startswith("norm"):
        if step.op is not ops.rms_norm or step.params.get("heads", 1) != 1:
            return None
        return _result(step, _in_halves if how == "norm in two halves" else _over_positions)
    if how in ("last term of the sum lost", "first term of the sum twice"):
        if not (step.op is ops.linear or (name == "MUL_MAT" and step.weights)):
            return None
        return _input(step, 0, _without_last if how == "last term of the sum lost" else _first_twice)
    if step.axis != 0 or parse(step.makes).kind in ("kq", "kq_soft_max"):
        return None
    size = draw.choice([16, 32])
    ways: dict[str, Callable[[Array], Array]] = {
        "heads and elements exchanged": lambda x: _transposed(x, size),
        "each element with its neighbour": lambda x: (x + np.roll(x, 1, axis=-1)) * x.dtype.type(0.5),
        "row without its smallest": lambda x: x - x.min(axis=-1, keepdims=True),
        "last positions first": lambda x: x[::-1].copy(),
        "squared": lambda x: x * x,
        "every second head negated": lambda x: _negated(x, size),
    }
    return _result(step, ways[how])


def _result(step: Step, change: Callable[[Array], Array]) -> Step:
    return replace(step, op=lambda *inputs, **params: change(step.op(*inputs, **params)))


def _input(step: Step, at: int, change: Callable[[Array], Array]) -> Step:
    def op(*inputs: Any, **params: Any) -> Array:
        return step.op(*(change(value) if number == at else value for number, value in enumerate(inputs)), **params)

    return replace(step, op=op)


def _of_layer_before(step: Step, draw: random.Random, right: dict[str, Step]) -> Step | None:
    names = [at for at, read in enumerate(step.reads) if isinstance(read, str) and parse(read).layer]
    if not names:
        return None
    at = draw.choice(names)
    read = parse(str(step.reads[at]))
    other = f"blk.{(read.layer or 0) - 1}.{read.kind}"
    return replace(step, reads=(*step.reads[:at], other, *step.reads[at + 1 :])) if other in right else None


def _in_halves(x: Array) -> Array:
    out = x.copy()
    half = x.shape[-1] // 2
    for part in (slice(0, half), slice(half, None)):
        out[..., part] *= np.sqrt(
            (x * x).mean(-1, keepdims=True) / np.maximum((x[..., part] ** 2).mean(-1, keepdims=True), 1e-20)
        )
    return out


def _over_positions(x: Array) -> Array:
    return x * np.sqrt((x * x).mean() / np.maximum((x * x).mean(axis=0, keepdims=True), 1e-20)).astype(x.dtype)


def _without_last(x: Array) -> Array:
    out = x.copy()
    out[..., -1] = 0
    return out


def _first_twice(x: Array) -> Array:
    out = x.copy()
    out[..., 0] *= x.dtype.type(2)
    return out


def _transposed(x: Array, size: int) -> Array:
    if x.shape[-1] % size or x.shape[-1] == size:
        raise ValueError("no heads")
    return np.ascontiguousarray(x.reshape(*x.shape[:-1], -1, size).swapaxes(-1, -2)).reshape(x.shape)


def _negated(x: Array, size: int) -> Array:
    if x.shape[-1] % size or x.shape[-1] == size:
        raise ValueError("no heads")
    out = x.copy().reshape(*x.shape[:-1], -1, size)
    out[..., 1::2, :] *= x.dtype.type(-1)
    return out.reshape(x.shape)
