"""Kinds of right engines: in which arithmetic, and by which algorithm, an engine computes what llama.cpp computes.

`ARITHMETIC` are engines in one arithmetic throughout. `ALGORITHMS` compute in float32 by other formulas, which are the same in real
numbers, `CUTTING` in a lower type to which they cut digits off, and `MIXED` in float32 but for one part, of which a dump says nothing.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
from explain_precision import half_sums, other_order
from kind import Arithmetic, Kind
from msgspec.structs import replace

from checkpoints.points import parse
from checkpoints.rules import visible
from engine import ops
from engine.backend import Array
from engine.ggml_ops.soft_max import alibi_slopes
from engine.graph import Altered, Step, WeightSource
from engine.replay.kept import kept
from engine.replay.precision import ROUNDINGS, rounded


def multiplies(step: Step) -> bool:
    """Whether a step is a product of ggml's with weights."""
    return getattr(step.op, "name", "") in ("MUL_MAT", "MUL_MAT_ID") and any(step.weights)


def _where(test: Callable[[Step], bool], op: Callable[[Callable[..., Array]], Callable[..., Array]]) -> Arithmetic:
    """The steps of which those that pass the test compute by `op(their operation)`."""
    return lambda steps: [replace(step, op=op(step.op)) if test(step) else step for step in steps]


def _is(*names: Any) -> Callable[[Step], bool]:
    """Whether a step's operation is one of these: ours, or ggml's by its name."""
    return lambda step: step.op in names or getattr(step.op, "name", "") in names


def instead(mine: Callable[..., Array], op: Callable[..., Array]) -> Arithmetic:
    """The steps with another operation in place of one of ours."""
    return _where(_is(mine), lambda _: op)


# Float32 by another formula.


def sum_by_sum(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """A product summed term by term in float32, as a plain loop of C does."""
    weight = weight.reshape(-1, x.shape[1])
    product = np.zeros((len(x), len(weight)), np.float32)
    for at in range(x.shape[1]):
        product += x[:, at, None] * weight[None, :, at]
    return product if bias is None else product + bias


def masked_scores(scores: Array, at: Array, of_keys: Array, params: dict[str, Any]) -> Array:
    """Scaled scores [H, T, S], lowered by ALiBi's distance and −∞ where the key is not seen."""
    scaled = scores * np.float32(params["scale"])
    if params.get("max_bias", 0) > 0:
        slopes = np.array(alibi_slopes(len(scores), params["max_bias"]), np.float32)[:, None, None]
        scaled = scaled - slopes * abs(at[:, None] - of_keys[None, :]).astype(np.float32)
    seen = visible(at, of_keys, window=params.get("window", "causal"), size=params.get("size", 0))
    return np.where(seen, scaled, np.float32(-np.inf))


def _part_of_attention(scores: Array, v: Array, kv_heads: int) -> tuple[Array, Array, Array]:
    """Over some keys, [H, T, s] and [s, K · d]: the largest score, the sum of exponentials (both [H, T]) and of values [T, H · d]."""
    largest = scores.max(axis=-1)
    safe = np.where(np.isfinite(largest), largest, np.float32(0))
    weights = np.exp(scores - safe[..., None])
    return largest, weights.sum(axis=-1, dtype=np.float32), ops.weighted_values(weights, v, kv_heads=kv_heads)


def _joined(first: tuple[Array, Array, Array], second: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """Two parts of attention as one: sums are rescaled to the larger of both largest scores."""
    largest = np.maximum(first[0], second[0])
    safe = np.where(np.isfinite(largest), largest, np.float32(0))
    total, values = np.zeros_like(first[1]), np.zeros_like(first[2])
    for part, sums, weighted in (first, second):
        factor = np.exp(part - safe)
        total = total + sums * factor
        values = values + _of_heads(factor, weighted.shape) * weighted
    return largest, total, values


def _of_heads(factor: Array, shape: tuple[int, ...]) -> Array:
    """A factor of each head, [H, T], for each element of [T, H · d]."""
    return np.repeat(factor.T, shape[1] // len(factor), axis=1)


def _in_chunks(size: int | None) -> Arithmetic:
    """Attention without a row of weights: by chunks of so many keys, one after the other, or (None) by two halves that are joined."""

    def change(steps: Sequence[Step]) -> list[Step]:
        made = {step.makes: step for step in steps}

        def fused(step: Step) -> Step:
            soft_max = made.get(str(step.reads[0])) if step.op is ops.weighted_values else None
            if soft_max is None or soft_max.op is not ops.causal_soft_max:
                return step
            scored, n = soft_max.reads[0], len(soft_max.weights)

            def op(scores: Array, at: Array, of_keys: Array, v: Array, *sinks: Array, kv_heads: int) -> Array:
                masked = masked_scores(scores, at, of_keys, dict(soft_max.params))
                keys = masked.shape[2]
                edges = [*range(0, keys, size)] if size else [0, (keys + 1) // 2][: min(keys, 2)]
                parts = [
                    _part_of_attention(masked[:, :, start:end], v[start:end], kv_heads)
                    for start, end in zip(edges, [*edges[1:], keys], strict=True)
                ]
                if sinks and sinks[0] is not None:
                    ones = np.ones(masked.shape[:2], np.float32)
                    parts.append((ones * sinks[0][:, None], ones, np.zeros_like(parts[0][2])))
                whole = parts[0]
                for part in parts[1:]:
                    whole = _joined(whole, part)
                return whole[2] / _of_heads(whole[1], whole[2].shape)

            weights = soft_max.weights if n else ()
            return replace(step, op=op, reads=(scored, *soft_max.reads[1:3], step.reads[1]), weights=weights)

        return [fused(step) for step in steps]

    return change


def _wide(op: Callable[..., Array]) -> Callable[..., Array]:
    """An operation in float64, its result rounded."""
    return lambda *inputs, **params: op(*(x.astype(np.float64) for x in inputs), **params).astype(np.float32)


def _scale_in_query(steps: Sequence[Step]) -> list[Step]:
    """The scale of attention multiplied into the queries, not into their products with the keys."""
    scale = {str(step.reads[0]): step.params["scale"] for step in steps if step.op is ops.causal_soft_max}

    def scaled(step: Step) -> Step:
        if step.op is ops.causal_soft_max:
            return replace(step, params={**step.params, "scale": 1.0})
        if step.op is ops.attention_scores and step.makes in scale:
            by = np.float32(scale[step.makes])
            return replace(step, op=lambda q, k, **params: ops.attention_scores(q * by, k, **params))
        return step

    return [scaled(step) for step in steps]


def power_of_two(x: Array) -> Array:
    """exp(x) as 2 to the x · log₂ e, which processors compute faster, all in float32."""
    return np.exp2(x * np.float32(np.log2(np.e)))


def _soft_max_by_powers(scores: Array, at: Array, of_keys: Array, sinks: Array | None = None, **params: Any) -> Array:
    masked = masked_scores(scores, at, of_keys, params)
    largest = masked.max(axis=-1, keepdims=True)
    if sinks is not None:
        largest = np.maximum(largest, sinks[:, None, None])
    weights = power_of_two(masked - largest)
    total = weights.sum(axis=-1, keepdims=True, dtype=np.float32)
    return weights / (total if sinks is None else total + power_of_two(sinks[:, None, None] - largest))


def _swiglu_by_powers(gate: Array, up: Array) -> Array:
    with np.errstate(over="ignore"):
        return gate * (np.float32(1) / (np.float32(1) + power_of_two(-gate))) * up


def _norm_in_float32(x: Array, weight: Array, *, eps: float, heads: int = 1) -> Array:
    """An RMS norm whose squares are added one by one in float32 and whose weight is multiplied first."""
    split = x.reshape(len(x) * heads, -1)
    total = np.add.accumulate(split * split, axis=1)[:, -1:]
    scale = np.float32(1) / np.sqrt(total / np.float32(split.shape[1]) + np.float32(eps))
    return (split * weight * scale).reshape(x.shape)


def _rope_at_once(
    x: Array, at: Array, factors: Array | None = None, *, heads: int, dims: int, base: float, scale: float, pairs: str
) -> Array:
    """RoPE by angles of position · base^(−2i/d), not multiplied step by step."""
    inverse = np.float32(base) ** (np.arange(0, dims, 2, dtype=np.float32) * np.float32(-1 / dims))
    inverse = inverse if factors is None else inverse / factors[: dims // 2]
    angles = (at[:, None].astype(np.float32) * np.float32(scale)) * inverse[None, :]
    return ops.rotate(x, np.cos(angles), np.sin(angles), heads=heads, dims=dims, pairs=pairs)


def _weighted_before_down(steps: Sequence[Step]) -> list[Step]:
    """Experts' weights multiplied into what the down product reads, not into what it makes."""
    made = {step.makes: step for step in steps}
    down = {
        str(step.reads[0]): step
        for step in steps
        if getattr(step.op, "name", "") == "MUL"
        and parse(step.makes).kind == "ffn_moe_weighted"
        and isinstance(step.reads[0], str)
        and getattr(made[step.reads[0]].op, "name", "") == "MUL_MAT_ID"
    }

    def moved(step: Step) -> Step:
        if step.makes not in {weighted.makes for weighted in down.values()}:
            return step
        product = made[str(step.reads[0])]
        count = len(product.reads)

        def op(*inputs: Any, **_: Any) -> Array:
            activations, weights = inputs[0], inputs[count]
            by = weights.reshape(*weights.shape[:1], -1, 1)
            scaled = (activations.reshape(len(by), by.shape[1], -1) * by).astype(np.float32).reshape(activations.shape)
            return product.op(scaled, *inputs[1:count], *inputs[count + 1 :], **product.params)

        return replace(step, op=op, reads=(*product.reads, step.reads[1]), weights=product.weights, params={})

    return [moved(step) for step in steps]


# Float32 but for one part.


def _rounding(kind: str) -> Callable[[Array], Array]:
    return lambda x: ROUNDINGS[kind](x) if x.dtype == np.float32 else x


def result(test: Callable[[Step], bool], kind: str) -> Arithmetic:
    """The results of the steps that pass the test, kept in a lower type."""
    rounding = _rounding(kind)
    return _where(test, lambda op: lambda *inputs, **params: rounding(op(*inputs, **params)))


def named(*kinds: str) -> Callable[[Step], bool]:
    """Whether a step makes a point of these kinds."""
    return lambda step: parse(step.makes).kind in kinds


def _weights(test: Callable[[Step, str], bool], kind: str) -> Arithmetic:
    """The weights that pass the test, kept in a lower type."""

    def make(source: WeightSource, name: str) -> Array:
        return ROUNDINGS[kind](source.get(name))

    return lambda steps: [
        replace(
            step,
            weights=tuple(Altered(name, make) if isinstance(name, str) and test(step, name) else name for name in step.weights),
        )
        if any(isinstance(name, str) and test(step, name) for name in step.weights)
        else step
        for step in steps
    ]


def cut_off(kind: str) -> Callable[[Array], Array]:
    """Values of F16 or BF16 whose further digits are cut off, not rounded."""
    if kind == "bf16":
        return lambda x: (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)

    def cut(x: Array) -> Array:
        half = x.astype(np.float16)
        smaller = np.nextafter(half, np.float16(0))
        return np.where(np.abs(half.astype(np.float32)) > np.abs(x), smaller, half).astype(np.float32)

    return cut


def _cutting(kind: str, *, storage: bool) -> Arithmetic:
    """All that `rounded` rounds, cut off."""

    def op(own: Callable[..., Array]) -> Callable[..., Array]:
        def cutting(*inputs: Any, **params: Any) -> Array:
            with patch.dict(ROUNDINGS, {kind: cut_off(kind)}):
                return own(*inputs, **params)

        return cutting

    return lambda steps: [replace(step, op=op(step.op)) for step in rounded(steps, kind=kind, storage=storage)]


_soft_max = _is(ops.causal_soft_max)
_HALVES = ("f16", "bf16")


def _in_halves(make: Callable[[str], Arithmetic], **more: Any) -> Kind:
    return Kind("f32", tuple(make(kind) for kind in _HALVES), **more)


HALF_SUMS = instead(ops.linear, half_sums)
ARITHMETIC = {
    "f32": Kind("f32", (list, instead(ops.linear, other_order)), exact=True),
    "f16": Kind("f16", (partial(rounded, kind="f16", storage=False), partial(rounded, kind="f16", storage=True), HALF_SUMS)),
    "bf16": Kind("bf16", (partial(rounded, kind="bf16", storage=False), partial(rounded, kind="bf16", storage=True))),
    "tf32": Kind("tf32", (partial(rounded, kind="tf32", storage=False),)),
    "q8": Kind("q8", (partial(rounded, kind="q8", storage=False),)),
}
INSIDE = frozenset({"kq", "kq_soft_max"})
ALGORITHMS = {
    "attention in chunks of keys": Kind("f32", (_in_chunks(2), _in_chunks(3)), exact=True, without=INSIDE),
    "attention in two halves": Kind("f32", (_in_chunks(None),), exact=True, without=INSIDE),
    "attention in float64": Kind("f32", (_where(_is(ops.attention_scores, ops.weighted_values), _wide),), exact=True),
    "scale in the query": Kind("f32", (_scale_in_query,), exact=True, without=frozenset({"kq"})),
    "exp as a power of 2": Kind(
        "f32", (instead(ops.causal_soft_max, _soft_max_by_powers), instead(ops.swiglu, _swiglu_by_powers)), exact=True
    ),
    "norms in float32": Kind("f32", (instead(ops.rms_norm, _norm_in_float32),), exact=True),
    "RoPE's angles at once": Kind("f32", (instead(ops.rope, _rope_at_once),), exact=True),
    "products term by term": Kind("f32", (instead(ops.linear, sum_by_sum),), exact=True),
    "experts weighted before down": Kind("f32", (_weighted_before_down,), exact=True, without=frozenset({"ffn_moe_down"})),
}
CUTTING = {
    f"digits cut off to {kind}": Kind(kind, (_cutting(kind, storage=False), _cutting(kind, storage=True))) for kind in _HALVES
}
MIXED = {
    "cache": Kind("f32", tuple(partial(kept, kind=f"{kind} cache") for kind in (*_HALVES, "q8")), open_cache=True),
    "norms' weights": _in_halves(lambda kind: _weights(lambda _, name: name.endswith("norm.weight"), kind)),
    "biases": _in_halves(lambda kind: _weights(lambda _, name: name.endswith(".bias"), kind)),
    "products' weights": _in_halves(
        lambda kind: _weights(lambda step, name: name.endswith(".weight") and (step.op is ops.linear or multiplies(step)), kind)
    ),
    "embedding": _in_halves(lambda kind: result(lambda step: step.makes == "embd", kind)),
    "RoPE's table": _in_halves(lambda kind: partial(kept, kind=f"{kind} angles")),
    "scores": _in_halves(lambda kind: result(_is(ops.attention_scores), kind)),
    "soft max": _in_halves(lambda kind: result(_soft_max, kind)),
    "norms": _in_halves(lambda kind: result(_is(ops.rms_norm, ops.layer_norm), kind)),
    "residual": _in_halves(lambda kind: result(named("l_out", "ffn_inp"), kind)),
    "logits": _in_halves(lambda kind: result(lambda step: step.makes == "logits", kind)),
    "attention": _in_halves(lambda kind: result(_is(ops.attention_scores, ops.causal_soft_max, ops.weighted_values), kind)),
    "feed-forward": _in_halves(lambda kind: result(lambda step: parse(step.makes).kind.startswith("ffn_"), kind)),
}
