"""Bugs of engines that port a model, planted by hand as those of `public_bugs` are; nobody reported them in these words."""

from collections.abc import Callable
from typing import Any

import numpy as np
from msgspec.structs import replace
from public_bugs import Bug, Steps

from checkpoints.points import parse
from engine import ops
from engine.backend import Array
from engine.faults.base import sibling
from engine.faults.edits import WithInput
from engine.graph import Step

_BY_HAND = "no public report"


def _deviation(step: Step, _right: Steps) -> Step:
    """(x − mean) / (torch.std(x) + ε) · weight + bias."""

    def norm(x: Array, weight: Array, bias: Array, *, eps: float) -> Array:
        deviation = x.std(axis=1, keepdims=True, ddof=1)
        result: Array = ((x - x.mean(axis=1, keepdims=True)) / (deviation + np.float32(eps)) * weight + bias).astype(np.float32)
        return result

    return replace(step, op=norm)


def _variance(step: Step, _right: Steps) -> Step:
    def norm(x: Array, weight: Array, bias: Array, *, eps: float) -> Array:
        root = np.sqrt(x.var(axis=1, keepdims=True, ddof=1) + np.float32(eps))
        result: Array = ((x - x.mean(axis=1, keepdims=True)) / root * weight + bias).astype(np.float32)
        return result

    return replace(step, op=norm)


def _soft_max(scores: Array) -> Array:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: Array = (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)
    return result


def _times_mask(step: Step, _right: Steps) -> Step:
    def soft_max(scores: Array, positions: Array, keys: Array, *, scale: float) -> Array:
        return _soft_max(scores * np.float32(scale) * (keys[None, :] <= positions[:, None]))

    return replace(step, op=soft_max)


def _weights_cut(step: Step, _right: Steps) -> Step:
    def soft_max(scores: Array, positions: Array, keys: Array, *, scale: float) -> Array:
        return _soft_max(scores * np.float32(scale)) * (keys[None, :] <= positions[:, None]).astype(np.float32)

    return replace(step, op=soft_max)


def _of_residual(step: Step, right: Steps) -> Step:
    return replace(step, reads=(sibling(step, right, "ffn_inp").makes, *step.reads[1:]))


def _ascending(step: Step, _right: Steps) -> Step:
    return replace(step, op=WithInput(step.op, 0, lambda scores: -scores))


def _over_tokens(step: Step, _right: Steps) -> Step:
    return replace(
        step, op=lambda x, **_params: (np.exp(x) / np.exp(x).sum(axis=0, keepdims=True)).astype(np.float32), params={}
    )


def _multiplied_stream(step: Step, _right: Steps) -> Step:
    """The residual multiplier of the recipe, 0.22, on the hidden state."""
    return replace(step, op=lambda branch, x: (branch / np.float32(0.22) + x * np.float32(0.22)).astype(np.float32))


def _normed_sum(step: Step, right: Steps) -> Step:
    norm = right[step.names[0]]

    def summed(branch: Array, x: Array, weight: Array) -> Array:
        return ops.rms_norm(branch + x, weight, eps=norm.params["eps"])

    return replace(step, op=summed, reads=(norm.reads[0], step.reads[1]), weights=norm.weights[:1])


def _values_of_next(step: Step, _right: Steps) -> Step:
    def values(weights: Array, v: Array, *, kv_heads: int, **params: Any) -> Array:
        moved = np.roll(v.reshape(len(v), kv_heads, -1), -1, axis=1).reshape(v.shape)
        return step.op(weights, moved, kv_heads=kv_heads, **params)

    return replace(step, op=values)


def _unnormed(step: Step, _right: Steps) -> Step:
    return step if parse(step.makes).layer is not None else replace(step, op=lambda x, *_: x.copy(), weights=(), params={})


def _stream_of(kind: str) -> Callable[[Step, Steps], Step]:
    """The sum with another value of its layer in place of the stream; "" is what the layer reads."""

    def other(step: Step, _right: Steps) -> Step:
        layer = parse(step.makes).layer
        if layer is None:
            return step
        before = f"blk.{layer - 1}.l_out" if layer else "embd"
        return replace(step, reads=(step.reads[0], f"blk.{layer}.{kind}" if kind else before))

    return other


def _fused_sum(step: Step, _right: Steps) -> Step:
    return replace(step, op=lambda branch, x: branch + x + x)


PORTED = {
    "second residual of the layer's input": Bug(
        "strutive07/transformer-tensorflow2.0#14", "bert", {"add": _stream_of("")}, "residual-old-buffer"
    ),
    "residual before the norm": Bug("NVIDIA-NeMo/Speech#4350", "bert", {"add": _stream_of("ffn_inp")}, "residual-after-norm"),
    "stream after one norm for two branches": Bug(
        "Howuhh/faster-trajectory-transformer#3", "falcon", {"l_out": _stream_of("attn_norm")}, "residual-after-norm"
    ),
    "stream after attention's norm": Bug(
        "Howuhh/faster-trajectory-transformer#3", "gptneox", {"ffn_out.add": _stream_of("attn_norm")}, "residual-after-norm"
    ),
    "stream after the norm of a scan": Bug(
        "Howuhh/faster-trajectory-transformer#3", "mamba2", {"l_out": _stream_of("attn_norm")}, "residual-after-norm"
    ),
    "channel mix on the layer's input": Bug(_BY_HAND, "rwkv7", {"l_out": _stream_of("")}, "residual-old-buffer"),
    "residual added again": Bug(_BY_HAND, "qwen3next", {"attn_residual": _fused_sum}, "residual-twice"),
    "std of n − 1 beside ε": Bug(
        "the Annotated Transformer", "gptneox", {"attn_norm ffn_norm output_norm": _deviation}, "norm-unbiased"
    ),
    "variance of n − 1": Bug("torch.var's default", "gpt2", {"attn_norm ffn_norm output_norm": _variance}, "norm-unbiased"),
    "scores times the mask": Bug(_BY_HAND, "qwen3", {"kq_soft_max": _times_mask}, "mask-by-product"),
    "weights times the mask": Bug(_BY_HAND, "smollm3", {"kq_soft_max": _weights_cut}, "mask-by-product"),
    "router of the residual": Bug(_BY_HAND, "qwen2moe", {"ffn_moe_logits": _of_residual}, "norm-not-read"),
    "shared expert of the residual": Bug(_BY_HAND, "deepseek2", {"ffn_gate_shexp ffn_up_shexp": _of_residual}, "norm-not-read"),
    "ascending choice": Bug(_BY_HAND, "qwen3moe", {"ARGSORT": _ascending}, "experts-smallest"),
    "router over tokens": Bug(_BY_HAND, "olmoe", {"ffn_moe_probs": _over_tokens}, "router-over-positions"),
    "multiplier on the residual": Bug(_BY_HAND, "granite", {"ffn_inp l_out": _multiplied_stream}, "multiplier-on-stream"),
    "post-norm after the sum": Bug(_BY_HAND, "gemma2", {"ffn_inp l_out": _normed_sum}, "norm-of-sum"),
    "values of the next group": Bug(_BY_HAND, "llama4", {"kqv_out": _values_of_next}, "gqa-modulo"),
    "embeddings not normalised": Bug(_BY_HAND, "bloom", {"embd": _unnormed}, "norm-skipped"),
}
