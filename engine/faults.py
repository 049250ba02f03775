"""Known faults of engines, each a small change to the list of steps.

`plant` gives the list that an engine with that fault would run. Adding one is an entry in `CATALOGUE` and a test.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from checkpoints.points import parse

from . import ops
from .backend import Array
from .dequantize import dequantize
from .graph import Altered, Step, WeightSource


@dataclass(frozen=True)
class Fault:
    """One way in which an engine can be wrong.

    Attributes:
        kinds: the kinds of step that it changes ("q_rope" in every layer, "output_norm" once).
        change: the changed step, given the right one, all right steps by name, and the fault's parameters.
        parameters: the values that are tried, by name.
        symptom, fix, seen: sentences for the user: what it looks like, how to mend it, where it was met.
    """

    name: str
    kinds: tuple[str, ...]
    change: Callable[[Step, Mapping[str, Step], Mapping[str, Any]], Step]
    symptom: str
    fix: str
    seen: str
    parameters: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def plant(steps: Sequence[Step], fault: Fault, layers: Collection[int] | None = None, **parameters: Any) -> list[Step]:
    """The steps of an engine that has this fault, in the given layers or in all of them.

    Parameters that are not given take the first value of the fault's own list.

    Raises:
        ValueError: the fault changes none of these steps.
    """
    chosen = {name: values[0] for name, values in fault.parameters.items()} | parameters
    right = {step.makes: step for step in steps}
    result = []
    changed = 0
    for step in steps:
        point = parse(step.makes)
        if point.kind in fault.kinds and (layers is None or point.layer is None or point.layer in layers):
            result.append(fault.change(step, right, chosen))
            changed += 1
        else:
            result.append(step)
    if not changed:
        raise ValueError(f"{fault.name} changes none of these steps")
    return result


def _with(step: Step, **parameters: Any) -> Step:
    return replace(step, params={**step.params, **parameters})


def _rope_pairs(step: Step, _right: Mapping[str, Step], _parameters: Mapping[str, Any]) -> Step:
    return _with(step, pairs="norm" if step.params["pairs"] == "neox" else "neox")


def _rope_base(step: Step, _right: Mapping[str, Step], parameters: Mapping[str, Any]) -> Step:
    return _with(step, base=parameters["base"])


def _no_bias(step: Step, _right: Mapping[str, Step], _parameters: Mapping[str, Any]) -> Step:
    return replace(step, weights=(step.weights[0], None))


def _epsilon(step: Step, _right: Mapping[str, Step], parameters: Mapping[str, Any]) -> Step:
    return _with(step, eps=parameters["eps"])


def _by_modulo(kv_rows: Array, heads: int, kv_heads: int) -> Array:
    """Key or value rows repeated for each query head in the order h % K: [S, K · d] -> [S, H · d]."""
    split = kv_rows.reshape(kv_rows.shape[0], kv_heads, -1)
    return split[:, [h % kv_heads for h in range(heads)]].reshape(kv_rows.shape[0], -1)


def _scores_by_modulo(q: Array, k: Array, *, heads: int, kv_heads: int) -> Array:
    return ops.attention_scores(q, _by_modulo(k, heads, kv_heads), heads=heads, kv_heads=heads)


def _values_by_modulo(weights: Array, v: Array, *, kv_heads: int) -> Array:
    heads = weights.shape[0]
    return ops.weighted_values(weights, _by_modulo(v, heads, kv_heads), kv_heads=heads)


def _gqa_modulo(step: Step, _right: Mapping[str, Step], _parameters: Mapping[str, Any]) -> Step:
    return replace(step, op=_scores_by_modulo if step.op is ops.attention_scores else _values_by_modulo)


def _unmasked(scores: Array, positions: Array, key_positions: Array, *, scale: float) -> Array:
    everywhere = np.zeros_like(positions) + key_positions.max()
    return ops.causal_soft_max(scores, everywhere, key_positions, scale=scale)


def _no_mask(step: Step, _right: Mapping[str, Step], _parameters: Mapping[str, Any]) -> Step:
    return replace(step, op=_unmasked)


def _swap_gate_up(step: Step, right: Mapping[str, Step], _parameters: Mapping[str, Any]) -> Step:
    other = "ffn_up" if parse(step.makes).kind == "ffn_gate" else "ffn_gate"
    return replace(step, weights=right[f"blk.{parse(step.makes).layer}.{other}"].weights)


def _transposed(source: WeightSource, name: str) -> Array:
    weight = source.get(name)
    return np.ascontiguousarray(weight.T).reshape(weight.shape)


def _transpose(step: Step, _right: Mapping[str, Step], _parameters: Mapping[str, Any]) -> Step:
    return replace(step, weights=(Altered(str(step.weights[0]), _transposed), *step.weights[1:]))


def _without_norm(x: Array, _weight: Array, *, eps: float) -> Array:
    del eps
    return x + np.float32(0)


def _no_norm(step: Step, _right: Mapping[str, Step], _parameters: Mapping[str, Any]) -> Step:
    return replace(step, op=_without_norm)


_Q4_K, _K_HEAD = 12, 4  # ggml_type Q4_K; bytes of d and dmin in front of the packed scales


def _scales_and_mins_swapped(source: WeightSource, name: str) -> Array:
    """block_q4_K with the roles of scales and mins exchanged; weights of other types as they are."""
    raw, kind, shape = source.raw(name)
    if kind != _Q4_K:
        return source.get(name)
    blocks = raw.reshape(-1, 144).copy()
    packed = blocks[:, _K_HEAD : _K_HEAD + 12].copy()
    low_scales, low_mins, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    blocks[:, _K_HEAD : _K_HEAD + 4] = low_mins
    blocks[:, _K_HEAD + 4 : _K_HEAD + 8] = low_scales
    blocks[:, _K_HEAD + 8 : _K_HEAD + 12] = (high >> 4) | (high << 4)
    weight = dequantize(blocks.reshape(raw.shape), kind, shape[-1]).reshape(shape)
    return source.array(weight)


def _swap_scales_and_mins(step: Step, _right: Mapping[str, Step], _parameters: Mapping[str, Any]) -> Step:
    return replace(step, weights=(Altered(str(step.weights[0]), _scales_and_mins_swapped), *step.weights[1:]))


_MATRICES = ("q", "k", "v", "attn_out", "ffn_gate", "ffn_up", "ffn_out")
_ROPE = ("q_rope", "k_rope")
_NORMS = ("attn_norm", "ffn_norm", "output_norm")

CATALOGUE: Mapping[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault(
            "rope-pairs",
            _ROPE,
            _rope_pairs,
            "position 0 is right, later ones drift away",
            "NEOX rotates x[i] with x[i + d/2], NORM x[2i] with x[2i + 1]: take the architecture's own",
            "Qwen2 ports of Llama code",
        ),
        Fault(
            "rope-base",
            _ROPE,
            _rope_base,
            "position 0 is right, the error grows with the position",
            "read <architecture>.rope.freq_base from the file",
            "engines that carry Llama 1's 10000 as a constant",
            {"base": (10000.0, 500000.0, 1000000.0, 100000.0)},
        ),
        Fault(
            "no-qkv-bias",
            ("q", "k", "v"),
            _no_bias,
            "wrong from the first layer and position on",
            "add blk.N.attn_{q,k,v}.bias",
            "Qwen2 ports of Llama code",
        ),
        Fault(
            "norm-epsilon",
            _NORMS,
            _epsilon,
            "a difference of 1e-6 to 1e-3 that looks like rounding",
            "read <architecture>.attention.layer_norm_rms_epsilon from the file",
            "engines that carry 1e-5 as a constant",
            {"eps": (1e-5, 1e-6, 1e-8, 1e-12)},
        ),
        Fault(
            "gqa-modulo",
            ("kq", "kqv_out"),
            _gqa_modulo,
            "wrong from position 0 on in models with fewer key/value heads than heads",
            "query head h reads key/value head h // (H / K), not h % K",
            "attention kernels written for K = H",
        ),
        Fault(
            "no-causal-mask",
            ("kq_soft_max",),
            _no_mask,
            "prefill wrong everywhere but at the last position; decode right",
            "mask scores of later positions with -inf before the softmax",
            "batched prefill added to a decode-only engine",
        ),
        Fault(
            "gate-up-swapped",
            ("ffn_gate", "ffn_up"),
            _swap_gate_up,
            "fluent nonsense from layer 0 on",
            "SiLU is applied to ffn_gate, and ffn_up multiplies it",
            "fused gate_up weights split in the wrong order",
        ),
        Fault(
            "transposed",
            ("attn_out",),
            _transpose,
            "wrong from position 0 on; of plausible size",
            "GGUF stores a matrix as out rows of in elements: y = x · Wᵀ",
            "square matrices, where no shape check helps",
        ),
        Fault(
            "no-final-norm",
            ("output_norm",),
            _no_norm,
            "all layers right, logits of the wrong size",
            "normalise with output_norm.weight before the output matrix",
            "ports from code in which the norm is part of the head",
        ),
        Fault(
            "q4k-scale-min",
            _MATRICES,
            _swap_scales_and_mins,
            "only Q4_K files are wrong",
            "get_scale_min_k4: bytes 0-3 are scales, 4-7 mins, 8-11 the high bits' nibbles of both",
            "hand-written K-quant kernels",
        ),
    )
}
