"""Faults of the rotary position embedding."""

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..graph import PASSES, POSITIONS, History, Step, name_of
from ..inapplicable import NotApplicable
from .base import AT, Fault, Parameters, Steps, read_of, sibling
from .edits import integer, with_values
from .rotation import (
    BEGIN,
    ROTATED,
    at_positions,
    backwards,
    both,
    both_then_each,
    by_pass,
    by_prompt,
    each_then_both,
    has_factors,
    head_size,
    heads_of,
    in_decode,
    is_rotation,
    not_rotated,
    of_head,
    rotary,
    twice,
    with_rotary,
    without_factors,
)


def _pairs(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return with_rotary(step, pairs="norm" if rotary(step, "pairs") == "neox" else "neox")


def _base(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return with_rotary(step, base=parameters["base"])


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


def _position(step: Step, _right: Steps, parameters: Parameters) -> Step:
    by = parameters["position"]
    return at_positions(step, _SHIFTS[by] if isinstance(by, str) else lambda positions: positions + int(by))


def _position_per_pass(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return at_positions(step, by_pass, PASSES)


def _off_by_prompt(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return by_prompt(step, 1 if parameters["prompt"] == "added once more" else -1)


def _in_decode(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return in_decode(step, parameters["by"])


def _missing(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return not_rotated(step)


def _twice(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return twice(step)


def _sign(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return backwards(step)


def _rotated_linear(x: Array, positions: Array, weight: Array, bias: Array | None, *, rope: Mapping[str, Any]) -> Array:
    return ops.rope(ops.linear(x, weight, bias), positions, None, **rope)


def _rotated_cache(history: Array, positions: Array, *, rope: Mapping[str, Any]) -> Array:
    return ops.rope(ops.cached(history), positions, None, **rope)


def _values_too(step: Step, right: Steps, _parameters: Parameters) -> Step:
    rope = sibling(step, right, "k_rope")
    if rope.op is not ops.rope or step.op not in (ops.linear, ops.cached):
        raise NotApplicable(f"{step.makes} or {rope.makes} is not a plain operation")
    if step.op is ops.cached:
        return replace(step, op=_rotated_cache, reads=(*step.reads, History(POSITIONS)), params={"rope": rope.params})
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
    plain = step.op is ops.attention_scores and is_rotation(rotated) and isinstance(read_of(rotated, 0), str)
    if not plain or name_of(read_of(sibling(step, right, "k_read"), 0)) != rotated.makes:
        raise NotApplicable(f"{step.makes} does not read the rotated keys as they are")
    name = name_of(read_of(rotated, 0))
    return replace(step, op=_scores_of_unrotated_cache, reads=(*step.reads, History(name), PASSES, History(PASSES)))


def _whole_head(x: Array, positions: Array, *, heads: int, **params: Any) -> Array:
    return ops.rope(x, positions, None, heads=heads, **{**params, "dims": x.shape[1] // heads})


def _within_head(x: Array, positions: Array, factors: Array | None, *, heads: int, dims: int, **params: Any) -> Array:
    if dims >= x.shape[1] // heads:
        raise NotApplicable(f"a head has no more than {dims} dimensions: all of them are tried as such")
    return ops.rope(x, positions, factors, heads=heads, dims=dims, **params)


def _dims(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if has_factors(step):
        raise NotApplicable(f"{step.makes}: there are as many frequency factors as rotated dimensions")
    if parameters["of"] != _WHOLE:
        dims = int(rotary(step, "dims") * parameters["of"]) & ~1
        if dims < 2 or (step.op is not ops.rope and dims > head_size(step)):
            raise NotApplicable(f"{step.makes} cannot rotate {dims} dimensions of a head")
        if step.op is not ops.rope and dims == head_size(step) and not integer(step, BEGIN):
            raise NotApplicable(f"{step.makes}: that is the whole head, which is tried as such")
        changed = with_rotary(step, dims=dims)
        return replace(changed, op=_within_head) if step.op is ops.rope and parameters["of"] > 1 else changed
    if step.op is ops.rope:
        return replace(step, op=_whole_head, weights=())
    whole = with_rotary(step, dims=head_size(step))
    return with_values(whole, {BEGIN: 0}) if integer(step, BEGIN) else whole


def _exponent(step: Step, _right: Steps, parameters: Parameters) -> Step:
    """The exponents divided by another number than the rotary dimension, which is the base raised to another power."""
    over = parameters["over"]
    if over in (_BY_HEAD, _BY_DIMS):
        return of_head(step, -1 if over == _BY_DIMS else 1)
    return with_rotary(step, base=float(rotary(step, "base")) ** (1 / (heads_of(step) if over == "all heads" else over)))


def _no_factors(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return without_factors(step) if has_factors(step) else step


def _scale(step: Step, _right: Steps, parameters: Parameters) -> Step:
    scale = rotary(step, "scale")
    if isinstance(parameters["scaling"], float):
        return with_rotary(step, scale=parameters["scaling"])
    return with_rotary(step, scale=1.0 if parameters["scaling"] == "ignored" else 1.0 / scale)


_WHOLE = "the whole"
_BY_HEAD = "the head's size, not by the smaller rotary dimension: base^(−2i / head size)"
_BY_DIMS = "(rotary dimension)² / head size"
_PAIRWISE = {AT: both_then_each}
_SINGLE_FIRST = {AT: each_then_both}
_BOTH = {AT: both}
_NO_WEIGHT_AT_0 = "position 0 is right, later ones drift away"

FAULTS = (
    Fault(
        name="rope-pairs",
        kinds=ROTATED,
        change=_pairs,
        what="RoPE rotates the wrong pairs (NORM: adjacent, NEOX: halves) for this model, on {at}",
        symptom=_NO_WEIGHT_AT_0,
        fix="NEOX rotates x[i] with x[i + d/2], NORM x[2i] with x[2i + 1]: use the architecture's own",
        seen="Qwen2 ports of Llama code",
        parameters=_PAIRWISE,
    ),
    Fault(
        name="rope-base",
        kinds=ROTATED,
        change=_base,
        what="RoPE's base is {base}, which is not this model's",
        symptom="position 0 is right, the error grows with the position",
        fix="read <architecture>.rope.freq_base from the file",
        seen="engines that carry Llama 1's 10000 as a constant",
        parameters={"base": (10000.0, 500000.0, 1000000.0, 100000.0, 5000000.0, 10000000.0, 1000.0, 8000000.0), **_BOTH},
    ),
    Fault(
        name="rope-position",
        kinds=ROTATED,
        change=_position,
        what="RoPE counts positions wrongly on {at}: {position}",
        symptom="keys and queries disagree about their positions",
        fix="position t of the sequence, from 0, for queries and keys alike, also after a chunk",
        seen="decode loops that pass the length instead of the index; prefill in chunks",
        parameters={"position": tuple(_SHIFTS), **_SINGLE_FIRST},
    ),
    Fault(
        name="rope-position-per-pass",
        kinds=ROTATED,
        change=_position_per_pass,
        what="RoPE counts positions from 0 in every forward pass, on {at}",
        symptom="prefill right, decode wrong",
        fix="add the number of cached positions to the index in the batch",
        seen="decode steps that pass position 0 for their one token",
        parameters=_PAIRWISE,
    ),
    Fault(
        name="rope-position-by-prompt",
        kinds=ROTATED,
        change=_off_by_prompt,
        what="decode steps count positions with the prompt's length {prompt}, on {at}",
        symptom="prefill right, decode wrong from its first step on",
        fix="the first generated token has the prompt's length as its position, counted from 0",
        seen="decode loops that count from 0, or add the length to an index that already includes it",
        parameters={"prompt": ("added once more", "left out"), **_PAIRWISE},
    ),
    Fault(
        name="rope-position-in-decode",
        kinds=ROTATED,
        change=_in_decode,
        what="RoPE's positions are off by {by} in the passes after the first, on {at}",
        symptom="prefill right, decode wrong",
        fix="the position of a decode step is the number of tokens before it",
        seen="past lengths that count the token that is about to be processed, or not the last one of the prompt",
        parameters={"by": (1, -1), **_PAIRWISE},
    ),
    Fault(
        name="rope-missing",
        kinds=ROTATED,
        change=_missing,
        what="RoPE is not applied to {at}",
        symptom=_NO_WEIGHT_AT_0,
        fix="rotate both queries and keys before computing the scores",
        seen="caches that hold keys before rotation",
        parameters=_PAIRWISE,
    ),
    Fault(
        name="rope-on-values",
        kinds=("v", "v_read"),
        change=_values_too,
        what="RoPE is applied to the values as well",
        symptom="position 0 is right, attention's output wrong from 1 on",
        fix="rotate Q and K only",
        seen="fused QKV kernels that rotate the whole row",
        parameters={AT: (("v",), ("v_read",))},
    ),
    Fault(
        name="rope-twice",
        kinds=ROTATED,
        change=_twice,
        what="RoPE is applied twice to {at}",
        symptom=_NO_WEIGHT_AT_0,
        fix="rotate once: at the write to the cache or at the read, not both",
        seen="caches of rotated keys that are rotated again when read",
        parameters=_PAIRWISE,
    ),
    Fault(
        name="rope-sign",
        kinds=ROTATED,
        change=_sign,
        what="RoPE rotates backwards on {at}",
        symptom=_NO_WEIGHT_AT_0,
        fix="x' = x·cos − y·sin, y' = x·sin + y·cos",
        seen="a sign lost in a hand-written kernel",
        parameters=_SINGLE_FIRST,
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
        kinds=ROTATED,
        change=_dims,
        what="RoPE rotates {of}",
        symptom=_NO_WEIGHT_AT_0,
        fix="read <architecture>.rope.dimension_count; without it, the head size",
        seen="GPT-NeoX's partial rotation carried over",
        parameters={"of": (0.5, 0.25, 0.75, _WHOLE, 2.0), **_BOTH},
        says={
            0.5: "half of the dimensions that this model rotates",
            0.25: "a quarter of the dimensions that this model rotates",
            0.75: "three quarters of the dimensions that this model rotates",
            _WHOLE: "the whole head, of which this model rotates a part",
            2.0: "twice as many dimensions as this model does",
        },
    ),
    Fault(
        name="rope-exponent",
        kinds=ROTATED,
        change=_exponent,
        what="RoPE's exponent is divided by {over}",
        symptom=_NO_WEIGHT_AT_0,
        fix="theta_i = position · base^(−2i / d), d the rotary dimension of one head",
        seen="i / d instead of 2i / d; the model's width instead of the head's",
        parameters={"over": (2, 0.5, "all heads", _BY_HEAD, _BY_DIMS), **_BOTH},
        says={2: "twice the rotary dimension", 0.5: "half the rotary dimension", "all heads": "heads × the rotary dimension"},
    ),
    Fault(
        name="rope-factors-ignored",
        kinds=ROTATED,
        change=_no_factors,
        what="the frequency factors of rope_freqs.weight are ignored",
        symptom=_NO_WEIGHT_AT_0,
        fix="divide each frequency by rope_freqs.weight[i]",
        seen="Llama 3.1 and later in engines written for Llama 2",
        parameters=_BOTH,
    ),
    Fault(
        name="rope-scaling",
        kinds=ROTATED,
        change=_scale,
        what="RoPE's linear scaling is {scaling}",
        symptom=_NO_WEIGHT_AT_0,
        fix="multiply the position by 1 / <architecture>.rope.scaling.factor",
        seen="long-context finetunes",
        parameters={"scaling": ("ignored", "inverted"), **_BOTH},
    ),
)
