"""Faults of RWKV: the token shift, and the operands of its recurrence."""

from collections.abc import Callable
from typing import Any

import numpy as np
from msgspec.structs import replace

from ..backend import Array, module_of
from ..graph import PASSES, Altered, Step, name_of
from ..inapplicable import NotApplicable
from .base import Fault, Parameters, Steps, read_of
from .edits import WithInput, ggml, left_out, maker, require
from .index import of_operation

_RULE = ("RWKV_WKV7",)
_DECAY, _REMOVED, _PUT_BACK = 1, 4, 5  # operands of the recurrence: w, a = −κ, b = κ · rate
_SCALE = np.exp(-0.5)  # w = exp(−e^−½ · σ(x))
_LERPS = ("r", "w", "k", "v", "a", "g")  # in the order of time_mix_lerp_fused


def _logit(sigmoid: Array) -> Array:
    return np.log(sigmoid / (1 - sigmoid))


def _sigmoid_of(decay: Array) -> Array:
    """The sigmoid that a decay was made of."""
    return -np.log(decay) / _SCALE


_DECAYS: dict[str, Callable[[Array], Array]] = {
    "1: the state does not decay": np.ones_like,
    "exp(−σ(x)), without the factor e^−½": lambda decay: decay ** (1 / _SCALE),
    "σ(x) itself": _sigmoid_of,
    "exp(−exp(x)), as in RWKV 6": lambda decay: np.exp(-np.exp(_logit(_sigmoid_of(decay)))),
    "−e^−½ · σ(x), without exp": np.log,
}


def _operand(step: Step, place: int, change: Callable[[Array], Array]) -> Step:
    operands = require(step, *_RULE).params["operands"]
    return replace(step, op=WithInput(step.op, operands[place].index, change))


def _decay(step: Step, _right: Steps, parameters: Parameters) -> Step:
    change = _DECAYS[parameters["w"]]
    return _operand(step, _DECAY, lambda decay: change(decay.astype(np.float64)).astype(decay.dtype))


def _removal(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if parameters["how"] == "left out":
        return _operand(step, _REMOVED, lambda removed: removed * 0)
    if parameters["how"] == "added, not subtracted":
        return _operand(step, _REMOVED, lambda removed: -removed)
    operands = require(step, *_RULE).params["operands"]
    removed, put_back = (operands[place].index for place in (_REMOVED, _PUT_BACK))
    reads = list(step.reads)
    if parameters["how"] == "without its rate":
        at = len(reads)
        return replace(step, op=WithInput(step.op, put_back, lambda _, keys: -keys, (at,)), reads=(*reads, reads[removed]))
    reads[removed], reads[put_back] = reads[put_back], reads[removed]
    return replace(step, reads=tuple(reads))


def _no_norm(step: Step, right: Steps, _parameters: Parameters) -> Step:
    """The removed key without its norm to length 1."""
    rules = of_operation(right, *_RULE)
    keys = {name_of(read_of(maker(rule, right, _REMOVED), 0)) for rule in rules}
    return left_out(require(step, "L2_NORM")) if step.makes in keys else step


class _Shift:
    """The difference to the position before, with another value in its place."""

    def __init__(self, op: Callable[..., Array], how: str) -> None:
        self._op, self._how = op, how

    def __call__(self, *inputs: Any, **params: Any) -> Array:
        """The difference, of [T, n] values; the last input holds `passes`."""
        *own, passes = inputs
        before = own[0].copy()
        if self._how == "the value itself":
            before[...] = own[1].reshape(before.shape)
        elif self._how == "0":
            before[...] = 0
        else:
            numbers = passes.reshape(-1)
            first = module_of(numbers).concatenate([numbers[:1] > 0, numbers[1:] != numbers[:-1]])
            before.reshape(len(numbers), -1)[first] = 0
        return self._op(before, *own[1:], **params)


def _shift(step: Step, right: Steps, parameters: Parameters) -> Step:
    before = right.get(name_of(read_of(step, 0)))
    if before is None or not ggml(before, "CONCAT"):
        return step
    time = name_of(read_of(step, 1)).endswith(".attn_norm")
    if parameters["in"] == ("channel mixing" if time else "time mixing"):
        return step
    return replace(step, op=_Shift(step.op, parameters["before"]), reads=(*step.reads, PASSES))


def _lerps(step: Step, _right: Steps, parameters: Parameters) -> Step:
    """The step with two of the factors of its token shift exchanged; the factors lie along the first axis."""
    places = [_LERPS.index(name) for name in parameters["lerps"]]
    weight = step.weights[0] if step.weights else None
    if not isinstance(weight, str) or "lerp_fused" not in weight:
        return step

    def exchanged(source: Any, name: str) -> Array:
        factors = source.get(name)
        if factors.shape[0] <= max(places):
            raise NotApplicable(f"{name} has no factors of {' and '.join(parameters['lerps'])}")
        factors = factors.copy()
        factors[places] = factors[places[::-1]]
        return factors

    return replace(step, weights=(Altered(weight, exchanged), *step.weights[1:]))


FAULTS = (
    Fault(
        name="token-shift",
        kinds=("SUB",),
        change=_shift,
        what="the token shift mixes with {before}, not with the position before, in {in}",
        symptom="wrong from position 0 or 1 on, or only in decode",
        fix="keep the last position's normalised row of each layer from pass to pass, one for time and one for channel mixing",
        seen="a state that is not written back after decode steps: RWKV-6 Qwen2 in llama.cpp",
        parameters={
            "before": ("the value itself", "0", "0 at the first position of each later pass"),
            "in": ("both", "time mixing", "channel mixing"),
        },
        says={"both": "time and channel mixing"},
    ),
    Fault(
        name="token-shift-order",
        kinds=("MUL",),
        change=_lerps,
        what="the token shift's factors of {lerps} are exchanged",
        symptom="wrong from position 1 on, of plausible size",
        fix="time_mix_lerp_fused holds the factors of r, w, k, v, a, g, in this order",
        seen="factors stacked in the order of RWKV 6, or of the projections",
        parameters={"lerps": tuple((a, b) for at, a in enumerate(_LERPS) for b in _LERPS[at + 1 :])},
    ),
    Fault(
        name="rwkv-decay",
        kinds=_RULE,
        change=_decay,
        what="the decay of RWKV 7's state is {w}",
        symptom="position 0 is right, later ones are wrong",
        fix="w = exp(−e^−½ · σ(x)), x = w0 + tanh(…) · w2",
        seen="decays of RWKV 6 and of gated linear attention, taken over",
        parameters={"w": tuple(_DECAYS)},
    ),
    Fault(
        name="rwkv-removal",
        kinds=_RULE,
        change=_removal,
        what="what RWKV 7's recurrence removes from the state is {how}",
        symptom="position 0 is right, later ones are wrong",
        fix="state · (diag(w) − κᵀ(rate · κ)) + vᵀk, κ the normalised key, rate = σ(…)",
        seen="RWKV 6 and gated linear attention, which remove nothing",
        parameters={
            "how": ("left out", "added, not subtracted", "without its rate", "multiplied by its rate on the other side")
        },
    ),
    Fault(
        name="rwkv-key-norm-missing",
        kinds=("L2_NORM",),
        change=_no_norm,
        what="the key that RWKV 7's recurrence removes is not normalised to length 1",
        symptom="position 0 is right, later ones are wrong or grow without bound",
        fix="κ = k · k_k / ‖k · k_k‖ of each head",
        seen="recurrences written after RWKV 6",
    ),
)
