"""Faults inside a recurrence: what the delta rule or a scan does to its state, and when it reads it."""

from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any

import numpy as np
from msgspec.structs import replace

from ..backend import Array, module_of
from ..ggml_ops.activations import exponential, softplus
from ..ggml_ops.params import OpParams, Shape, in_float64
from ..graph import Step
from ..inapplicable import NotApplicable
from ..lift.node import GgmlOperation
from .base import Fault, Parameters, Steps
from .edits import SOFTPLUS, Then, ggml, integer, require

_NOT_REMOVED, _REMOVED_EARLY = "without removing what the state holds", "with what the state held before its decay removed"
_BETA_OF_VALUES, _DECAY_LAST = "with β on v alone, not on v − state · k", "with the decay after the update"
_READ_EARLY, _READ_FIRST = "with the output read before the update", "with the output read before decay and update"
_DELTA = (_NOT_REMOVED, _DECAY_LAST, _READ_EARLY, _READ_FIRST, _REMOVED_EARLY, _BETA_OF_VALUES)


class _Otherwise(GgmlOperation, frozen=True):
    """A recurrence of ggml's that is computed in another way: `rule`, called as the operation, with `how`."""

    rule: Callable[..., Array]
    how: Any

    def compute(self, *arguments: Any, params: OpParams, shape: tuple[int, ...]) -> Array:
        """The recurrence in ggml's four dimensions."""
        return in_float64(partial(self.rule, how=self.how))(*arguments, params=params, shape=shape)


def _times(state: Array, vector: Array) -> Array:
    product: Array = np.matmul(state, vector[..., None])[..., 0]
    return product


def _delta(
    q: Array, k: Array, v: Array, gate: Array, beta: Array, state: Array, *, params: OpParams, shape: Shape, how: str
) -> Array:
    """`gated_delta_net` of ggml's, with one thing done otherwise."""
    sequences, tokens, heads, size = v.shape
    held = state.reshape(sequences, heads, size, size)
    q, k = (np.tile(vector, (sequences // vector.shape[0], 1, heads // vector.shape[2], 1)) for vector in (q, k))
    outputs, root = module_of(v).empty(v.shape, dtype=v.dtype), v.dtype.type(1) / np.sqrt(v.dtype.type(size))
    for token in range(tokens):
        decay, key, now = exponential(gate[:, token])[:, :, None, :], k[:, token], beta[:, token]
        before, first = held, held if how == _DECAY_LAST else held * decay
        known = _times(before if how == _REMOVED_EARLY else first, key)
        delta = (v[:, token] - (0 if how == _NOT_REMOVED else known)) * now
        if how == _BETA_OF_VALUES:
            delta = v[:, token] * now - known
        held = first + delta[..., None] * key[:, :, None, :]
        held = held * decay if how == _DECAY_LAST else held
        read = {_READ_EARLY: first, _READ_FIRST: before}.get(how, held)
        outputs[:, token] = _times(read, q[:, token]) * root
    return np.concatenate([outputs.reshape(-1), _kept(held, params)]).reshape(shape)


def _kept(held: Array, params: OpParams) -> Array:
    """The last state as what ggml keeps of states, where it keeps one."""
    if params.int(0) > 1:
        raise NotApplicable("more states than the last are kept")
    return held.reshape(-1)


_UNSTEPPED, _EXACT = "with B · x not multiplied by dt", "with B · x times (exp(dt · A) − 1) / A, not times dt"
_EULER = "with 1 + dt · A for exp(dt · A)"
_SCAN = (_READ_FIRST, _READ_EARLY, _DECAY_LAST, _UNSTEPPED, _EXACT, _EULER)


def _scan(
    states: Array, x: Array, dt: Array, a: Array, b: Array, c: Array, ids: Array, *, params: OpParams, shape: Shape, how: Any
) -> Array:
    """`ssm_scan` of ggml's, with one thing done otherwise; `how` may be two limits of the time step instead."""
    steps = softplus(dt.astype(np.float32)).astype(dt.dtype)  # rounded as in ggml's scan
    if isinstance(how, tuple):
        steps = steps.clip(*how)
    held, outputs = states[ids.reshape(-1).astype(np.int64)], module_of(x).empty_like(x, order="C")
    group = x.shape[2] // b.shape[2]
    for token in range(x.shape[1]):
        step, rate = steps[0, :, token, :, None, None], a[0, 0][None, :, None, :]
        decay = 1 + step * rate if how == _EULER else exponential(step * rate)
        b_now, c_now = (np.repeat(matrix[:, token], group, axis=1)[:, :, None, :] for matrix in (b, c))
        driven = b_now * x[:, token, :, :, None]
        driven = driven * {_UNSTEPPED: 1.0, _EXACT: (decay - 1) / rate}.get(how, step)
        before, first = held, held if how == _DECAY_LAST else held * decay
        held = first + driven
        held = held * decay if how == _DECAY_LAST else held
        read = {_READ_EARLY: first, _READ_FIRST: before}.get(how, held)
        outputs[:, token] = (read * c_now).sum(axis=-1)
    return np.concatenate([outputs.reshape(-1), _kept(held, params)]).reshape(shape)


def _other_delta(step: Step, _right: Steps, parameters: Parameters) -> Step:
    name = require(step, "GATED_DELTA_NET").op.name  # type: ignore[attr-defined]
    return replace(step, op=_Otherwise(name, _delta, parameters["how"]))


def _other_scan(step: Step, _right: Steps, parameters: Parameters) -> Step:
    name = require(step, "SSM_SCAN").op.name  # type: ignore[attr-defined]
    return replace(step, op=_Otherwise(name, _scan, parameters["how"]))


def _limited(step: Step, _right: Steps, parameters: Parameters) -> Step:
    """Mamba's scan applies softplus itself; elsewhere it is a step of its own."""
    low, high = parameters["to"]
    if ggml(step, "SSM_SCAN"):
        return replace(step, op=_Otherwise("SSM_SCAN", _scan, (low, high)))
    if not ggml(step, "UNARY") or integer(step, 0) != SOFTPLUS:
        return step
    return replace(step, op=Then(step.op, lambda steps: steps.clip(np.float32(low), np.float32(high))))


_LIMITS = {(0.0, 0.1): "0.1 or less", (0.001, 0.1): "0.001 to 0.1", (0.001, inf): "0.001 or more", (0.0, 1.0): "1 or less"}

FAULTS = (
    Fault(
        name="delta-update",
        kinds=("GATED_DELTA_NET",),
        change=_other_delta,
        what="the delta rule is computed {how}",
        symptom="wrong from position 0 or 1 on, of plausible size",
        fix="for each position: state ← exp(gate) · state; state += k ⊗ β · (v − state · k); then out = state · q",
        seen="linear attention taken for the delta rule; updates in another order",
        parameters={"how": _DELTA},
    ),
    Fault(
        name="scan-update",
        kinds=("SSM_SCAN",),
        change=_other_scan,
        what="the scan is computed {how}",
        symptom="wrong from position 0 or 1 on, of plausible size",
        fix="for each position: state ← exp(dt · A) · state + dt · B · x; then y = C · state",
        seen="outputs taken of the old state; the papers' discretisation where the code has dt · B",
        parameters={"how": _SCAN},
    ),
    Fault(
        name="time-step-limited",
        kinds=("SSM_SCAN", "UNARY"),
        change=_limited,
        what="the time step is limited to {to} after softplus",
        symptom="wrong where the time step is large (or small), from position 0 or 1 on",
        fix="dt = softplus(projection + bias) without a limit: time_step_min and time_step_max say how dt was initialised",
        seen="time_step_min and time_step_max of Mamba-2 and Nemotron-H, read as limits",
        parameters={"to": tuple(_LIMITS)},
        says=_LIMITS,
    ),
)
