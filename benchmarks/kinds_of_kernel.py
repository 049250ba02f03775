"""Kinds of right engines by the kernels that they run: what libraries for GPUs round where, beside one arithmetic throughout."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
from eight_bit_floats import eight_bit_cache
from kind import Arithmetic, Kind
from kinds_of_engine import INSIDE, instead, masked_scores, named, result
from msgspec.structs import replace

from engine import ops
from engine.backend import Array
from engine.graph import Step
from engine.replay.precision import ROUNDINGS, rounded

_BLOCK = 2  # keys of one block: prompts here are short


def _flash(kind: str, *, running: str) -> Callable[[Sequence[Step]], list[Step]]:
    """Attention by blocks of keys, whose weights are rounded to `kind` before they are divided by their sum and multiplied with values of
    that type; largest scores, sums and values so far are kept in the type `running` ("f32": float32).
    """
    low, keep = ROUNDINGS[kind], ROUNDINGS.get(running, lambda x: x)

    def attend(scores: Array, v: Array, sinks: Array | None, kv_heads: int) -> Array:
        shape = scores.shape[:2]
        largest = np.full(shape, -np.inf, np.float32) if sinks is None else np.repeat(sinks[:, None], shape[1], axis=1)
        total = np.zeros(shape, np.float32) if sinks is None else np.ones(shape, np.float32)
        values: Array = np.float32(0)
        for start in range(0, scores.shape[2], _BLOCK):
            part = keep(scores[:, :, start : start + _BLOCK])
            top = np.maximum(largest, part.max(axis=-1))
            safe = np.where(np.isfinite(top), top, np.float32(0))
            weights, faded = keep(np.exp(part - safe[..., None])), keep(np.exp(largest - safe))
            total = keep(total * faded + weights.sum(axis=-1, dtype=np.float32))
            more = ops.weighted_values(low(weights), low(v[start : start + _BLOCK]), kv_heads=kv_heads)
            values = keep(values * np.repeat(faded.T, more.shape[1] // len(faded), axis=1) + more)
            largest = top
        return np.asarray(values / np.repeat(total.T, values.shape[1] // len(total), axis=1))

    def change(steps: Sequence[Step]) -> list[Step]:
        made = {step.makes: step for step in steps}

        def fused(step: Step) -> Step:
            soft_max = made.get(str(step.reads[0])) if step.op is ops.weighted_values else None
            if soft_max is None or soft_max.op is not ops.causal_soft_max:
                return step

            def op(scores: Array, at: Array, of_keys: Array, v: Array, *sinks: Array, kv_heads: int) -> Array:
                masked = masked_scores(scores, at, of_keys, dict(soft_max.params))
                return attend(masked, v, sinks[0] if sinks else None, kv_heads)

            return replace(step, op=op, reads=(*soft_max.reads[:3], step.reads[1]), weights=soft_max.weights)

        return [fused(step) for step in steps]

    return change


def _before(change: Arithmetic, kind: str) -> Arithmetic:
    """An engine in F16 or BF16, whose every result is kept in that type, with other operations that `change` makes of the right ones."""

    def both(steps: Sequence[Step]) -> list[Step]:
        own = {step.makes: step for step, right in zip(change(steps), steps, strict=True) if step is not right}
        keep = ROUNDINGS[kind]
        return [
            replace(own[step.makes], op=lambda *inputs, op=own[step.makes].op, **params: keep(op(*inputs, **params)))
            if step.makes in own
            else step
            for step in rounded(steps, kind, storage=True)
        ]

    return both


def by_token(x: Array) -> Array:
    """Rows in 8 bits and back, each by one scale."""
    scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    return np.where(scale > 0, np.rint(x / np.where(scale > 0, scale, 1)) * scale, x).astype(np.float32)


def by_tensor(x: Array) -> Array:
    """All rows in 8 bits and back, by one scale."""
    scale = np.abs(x).max(initial=0.0) / np.float32(127)
    return (np.rint(x / scale) * scale).astype(np.float32) if scale else x


def _eight_bits(rounding: Callable[[Array], Array]) -> Arithmetic:
    """Activations of all products with weights in 8 bits of this kind."""

    def op(own: Callable[..., Array]) -> Callable[..., Array]:
        def quantised(*inputs: Any, **params: Any) -> Array:
            with patch.dict(ROUNDINGS, {"q8": rounding}):
                return own(*inputs, **params)

        return quantised

    return lambda steps: [
        new if new is step else replace(new, op=op(new.op))
        for new, step in zip(rounded(steps, "q8", storage=False), steps, strict=True)
    ]


def _of_parts(parts: int, keep: Callable[[Array], Array]) -> Callable[..., Array]:
    """A product whose inputs are divided among several devices or blocks, and whose sums are kept in a type before they are added."""

    def product(x: Array, weight: Array, bias: Array | None = None) -> Array:
        weight, total = weight.reshape(-1, x.shape[1]), np.float32(0)
        for some in np.array_split(np.arange(x.shape[1]), parts):
            total = total + keep(np.ascontiguousarray(x[:, some]) @ weight[:, some].T)
        return keep(total) if bias is None else keep(total + bias)

    return product


def _tensor_parallel(kind: str, parts: int) -> Arithmetic:
    """An engine in this type whose products that end a half of a layer are sums of several devices' in that type."""
    low = ROUNDINGS[kind]
    product = _of_parts(parts, low)

    def split(x: Array, weight: Array, bias: Array | None = None) -> Array:
        return product(low(x), low(weight), bias)

    return _before(
        lambda steps: [
            replace(step, op=split) if step.op is ops.linear and named("attn_out", "ffn_out")(step) else step for step in steps
        ],
        kind,
    )


def _several_rows(kind: str) -> Arithmetic:
    """Products of several rows in this type, and of a single one in float32, as cuBLAS multiplies where TF32 is allowed."""

    def op(own: Callable[..., Array], lower: Callable[..., Array], axis: int) -> Callable[..., Array]:
        def product(*inputs: Any, **params: Any) -> Array:
            whole = own(*inputs, **params)
            return whole if whole.shape[axis] == 1 else lower(*inputs, **params)

        return product

    return lambda steps: [
        right if new is right or right.axis is None else replace(right, op=op(right.op, new.op, right.axis))
        for new, right in zip(rounded(steps, kind, storage=False), steps, strict=True)
    ]


_HALVES = ("f16", "bf16")
KERNELS = {
    **{
        f"several rows in {kind}, single ones in float32": Kind(kind, (_several_rows(kind),), after=2)
        for kind in ("tf32", *_HALVES)
    },
    **{
        f"flash attention in {kind}": Kind(
            kind,
            tuple(_before(_flash(kind, running=running), kind) for running in ("f32", kind)),
            without=INSIDE,
        )
        for kind in _HALVES
    },
    "sums of several blocks": Kind("f32", tuple(instead(ops.linear, _of_parts(n, lambda x: x)) for n in (2, 8)), exact=True),
    **{
        f"norms rounded before the weight in {kind}": Kind(kind, (partial(rounded, kind=kind, storage=True, normed=True),))
        for kind in _HALVES
    },
    "8 bits by token or tensor": Kind("q8", (_eight_bits(by_token), _eight_bits(by_tensor))),
    **{f"several devices in {kind}": Kind(kind, (_tensor_parallel(kind, 2), _tensor_parallel(kind, 4))) for kind in _HALVES},
}
MIXED_KERNELS = {
    "flash attention in lower types": Kind(
        "f32", tuple(_flash(kind, running=running) for kind in _HALVES for running in ("f32", kind)), without=INSIDE
    ),
    "cache in FP8": Kind("f32", (eight_bit_cache,), open_cache=True),
    "Q, K and V": Kind("f32", tuple(result(named("q", "k", "v", "wqkv"), kind) for kind in _HALVES)),
}
