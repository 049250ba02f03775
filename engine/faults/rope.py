"""Faults of the rotary position embedding."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .. import ops
from ..backend import Array, module_of
from ..graph import PASSES, POSITIONS, History, Step, name_of
from ..inapplicable import NotApplicable
from ..lift.node import GgmlOperation
from .base import AT, Fault, Parameters, Steps, parameter_of, read_of, sibling, subsets, weight_of, with_parameters

_ROPE = ("q_rope", "k_rope")


def _pairs(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return with_parameters(step, pairs="norm" if parameter_of(step, "pairs") == "neox" else "neox")


def _base(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return with_parameters(step, base=parameters["base"])


_SHIFTS = {
    "one more": lambda positions: positions + 1,
    "one less": lambda positions: positions - 1,
    "always 0": lambda positions: positions * 0,
    "from the end": lambda positions: positions.max() - positions,
    "in chunks of 4": lambda positions: positions % 4,
    "in chunks of 8": lambda positions: positions % 8,
    "in chunks of 16": lambda positions: positions % 16,
    "in chunks of 32": lambda positions: positions % 32,
    "in chunks of 64": lambda positions: positions % 64,
}


def _moved(x: Array, positions: Array, factors: Array | None = None, *, by: str | float, **params: Any) -> Array:
    return ops.rope(x, _SHIFTS[by](positions) if isinstance(by, str) else positions + int(by), factors, **params)


def _with(step: Step, op: Callable[..., Array], *reads: str, **parameters: Any) -> Step:
    """The step with an operation that calls RoPE in another way; `reads` are values that it reads as well.

    Raises:
        NotApplicable: another fault has changed the operation already.
    """
    if step.op is not ops.rope:
        raise NotApplicable(f"{step.makes} is no plain RoPE")
    return replace(step, op=op, reads=(*step.reads, *reads), params={**step.params, **parameters})


def _position(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return _with(step, _moved, by=parameters["position"])


def _within_pass(x: Array, positions: Array, passes: Array, factors: Array | None = None, **params: Any) -> Array:
    same = passes[:, None] == passes[None, :]
    before = same & (positions[None, :] < positions[:, None])
    return ops.rope(x, before.sum(axis=1), factors, **params)


def _position_per_pass(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return _with(step, _within_pass, PASSES)


def _copy(x: Array, _positions: Array, _factors: Array | None = None, **_params: Any) -> Array:
    return x.copy()


def _missing(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return _with(step, _copy)


def _again(x: Array, positions: Array, factors: Array | None = None, **params: Any) -> Array:
    return ops.rope(ops.rope(x, positions, factors, **params), positions, factors, **params)


def _twice(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return _with(step, _again)


def _backwards(x: Array, positions: Array, factors: Array | None = None, **params: Any) -> Array:
    return ops.rope(x, -positions, factors, **params)


def _sign(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return _with(step, _backwards)


def _rotated_linear(x: Array, positions: Array, weight: Array, bias: Array | None, *, rope: Mapping[str, Any]) -> Array:
    return ops.rope(ops.linear(x, weight, bias), positions, None, **rope)


def _values_too(step: Step, right: Steps, _parameters: Parameters) -> Step:
    rope = sibling(step, right, "k_rope")
    if rope.op is not ops.rope or step.op is not ops.linear:
        raise NotApplicable(f"{step.makes} or {rope.makes} is no plain operation")
    return replace(step, op=_rotated_linear, reads=(*step.reads, POSITIONS), params={"rope": rope.params})


def _scores_of_unrotated_cache(
    q: Array, k_rope: Array, k: Array, passes: Array, key_passes: Array, *, heads: int, kv_heads: int
) -> Array:
    now = ops.attention_scores(q, k_rope, heads=heads, kv_heads=kv_heads)
    before = ops.attention_scores(q, k, heads=heads, kv_heads=kv_heads)
    xp = module_of(q)
    return xp.where((key_passes[None, :] < passes[:, None])[None], before, now)


def _after_cache(step: Step, right: Steps, _parameters: Parameters) -> Step:
    rotated = sibling(step, right, "k_rope")
    plain = step.op is ops.attention_scores and rotated.op is ops.rope
    if not plain or name_of(read_of(sibling(step, right, "k_read"), 0)) != rotated.makes:
        raise NotApplicable(f"{step.makes} does not read the rotated keys as they are")
    name = name_of(read_of(rotated, 0))
    return replace(step, op=_scores_of_unrotated_cache, reads=(*step.reads, History(name), PASSES, History(PASSES)))


def _dims(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if weight_of(step, 0) is not None:
        raise NotApplicable(f"{step.makes}: the frequency factors are as many as the dimensions that are rotated")
    dims = int(parameter_of(step, "dims") * parameters["of"]) & ~1
    return with_parameters(step, dims=dims)


def _frequencies(x: Array, positions: Array, factors: Array | None = None, *, over: int, **params: Any) -> Array:
    """RoPE whose exponents are divided by another number than the rotary dimension."""
    dims = params["dims"]
    base = float(params["base"]) ** (dims / over)
    return ops.rope(x, positions, factors, **{**params, "base": base})


def _exponent(step: Step, _right: Steps, parameters: Parameters) -> Step:
    over = parameter_of(step, "dims") * (
        parameter_of(step, "heads") if parameters["over"] == "all heads" else parameters["over"]
    )
    return _with(step, _frequencies, over=int(over))


@dataclass(frozen=True)
class _Unfactored:
    """One of ggml's rotations, whose last operand are the frequency factors, with factors of 1."""

    op: GgmlOperation

    def __call__(self, *inputs: Any, **params: Any) -> Array:
        return self.op(*inputs[:-1], module_of(inputs[-1]).ones_like(inputs[-1]), **params)


def _no_factors(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    if isinstance(step.op, GgmlOperation):
        if not step.weights or step.weights[-1] is None:
            raise NotApplicable(f"{step.makes} has no frequency factors")
        return replace(step, op=_Unfactored(step.op))
    return replace(step, weights=(None,))


def _scale(step: Step, _right: Steps, parameters: Parameters) -> Step:
    scale = parameter_of(step, "scale")
    if isinstance(parameters["scaling"], float):
        return with_parameters(step, scale=parameters["scaling"])
    return with_parameters(step, scale=1.0 if parameters["scaling"] == "ignored" else 1.0 / scale)


_PAIRWISE = {AT: subsets(*_ROPE)}
_NO_WEIGHT_AT_0 = "position 0 is right, later ones drift away"

FAULTS = (
    Fault(
        name="rope-pairs",
        kinds=_ROPE,
        change=_pairs,
        what="RoPE rotates the wrong pairs (NORM: adjacent, NEOX: halves) for this model, on {at}",
        symptom=_NO_WEIGHT_AT_0,
        fix="NEOX rotates x[i] with x[i + d/2], NORM x[2i] with x[2i + 1]: take the architecture's own",
        seen="Qwen2 ports of Llama code",
        parameters=_PAIRWISE,
    ),
    Fault(
        name="rope-base",
        kinds=_ROPE,
        change=_base,
        what="RoPE's base is {base}, which is not this model's",
        symptom="position 0 is right, the error grows with the position",
        fix="read <architecture>.rope.freq_base from the file",
        seen="engines that carry Llama 1's 10000 as a constant",
        parameters={"base": (10000.0, 500000.0, 1000000.0, 100000.0, 5000000.0, 10000000.0, 1000.0, 8000000.0)},
    ),
    Fault(
        name="rope-position",
        kinds=_ROPE,
        change=_position,
        what="RoPE counts positions wrongly ({position}) on {at}",
        symptom="keys and queries disagree about their positions",
        fix="position t of the sequence, from 0, for queries and keys alike, also after a chunk",
        seen="decode loops that pass the length instead of the index; prefill in chunks",
        parameters={"position": tuple(_SHIFTS), AT: (("q_rope",), ("k_rope",), _ROPE)},
    ),
    Fault(
        name="rope-position-per-pass",
        kinds=_ROPE,
        change=_position_per_pass,
        what="RoPE counts positions from 0 in every forward pass, on {at}",
        symptom="prefill right, decode wrong",
        fix="add the number of cached positions to the index in the batch",
        seen="decode steps that pass position 0 for their one token",
        parameters=_PAIRWISE,
    ),
    Fault(
        name="rope-missing",
        kinds=_ROPE,
        change=_missing,
        what="RoPE is not applied to {at}",
        symptom=_NO_WEIGHT_AT_0,
        fix="rotate both queries and keys before computing the scores",
        seen="caches that hold keys before rotation",
        parameters=_PAIRWISE,
    ),
    Fault(
        name="rope-on-values",
        kinds=("v",),
        change=_values_too,
        what="RoPE is applied to the values as well",
        symptom="position 0 is right, attention's output wrong from 1 on",
        fix="rotate Q and K only",
        seen="fused QKV kernels that rotate the whole row",
    ),
    Fault(
        name="rope-twice",
        kinds=_ROPE,
        change=_twice,
        what="RoPE is applied twice to {at}",
        symptom=_NO_WEIGHT_AT_0,
        fix="rotate once: at the write to the cache or at the read, not both",
        seen="caches of rotated keys that are rotated again when read",
        parameters=_PAIRWISE,
    ),
    Fault(
        name="rope-sign",
        kinds=_ROPE,
        change=_sign,
        what="RoPE rotates backwards on {at}",
        symptom=_NO_WEIGHT_AT_0,
        fix="x' = x·cos − y·sin, y' = x·sin + y·cos",
        seen="a sign lost in a hand-written kernel",
        parameters={AT: (("q_rope",), ("k_rope",), _ROPE)},
    ),
    Fault(
        name="rope-after-cache",
        kinds=("kq",),
        change=_after_cache,
        what="keys go to the cache before they are rotated",
        symptom="prefill right, decode wrong from its first step on",
        fix="write k after RoPE, or rotate what is read",
        seen="cache writes fused into the projection",
    ),
    Fault(
        name="rope-dims",
        kinds=_ROPE,
        change=_dims,
        what="RoPE rotates {of} of the head's rotary dimensions",
        symptom=_NO_WEIGHT_AT_0,
        fix="read <architecture>.rope.dimension_count; without it, the head size",
        seen="GPT-NeoX's partial rotation carried over",
        parameters={"of": (0.5, 0.25, 0.75)},
    ),
    Fault(
        name="rope-exponent",
        kinds=_ROPE,
        change=_exponent,
        what="RoPE's exponent is divided by {over} × the rotary dimension",
        symptom=_NO_WEIGHT_AT_0,
        fix="theta_i = position · base^(−2i / d), d the rotary dimension of one head",
        seen="i / d instead of 2i / d; the model's width instead of the head's",
        parameters={"over": (2, 0.5, "all heads")},
    ),
    Fault(
        name="rope-factors-ignored",
        kinds=_ROPE,
        change=_no_factors,
        what="the frequency factors of rope_freqs.weight are ignored",
        symptom=_NO_WEIGHT_AT_0,
        fix="divide each frequency by rope_freqs.weight[i]",
        seen="Llama 3.1 and later in engines written for Llama 2",
    ),
    Fault(
        name="rope-scaling",
        kinds=_ROPE,
        change=_scale,
        what="RoPE's linear scaling is {scaling}",
        symptom=_NO_WEIGHT_AT_0,
        fix="multiply the position by 1 / <architecture>.rope.scaling.factor",
        seen="long-context finetunes",
        parameters={"scaling": ("ignored", "inverted")},
    ),
)
