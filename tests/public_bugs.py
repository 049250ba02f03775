"""Bugs of engines, most from public trackers, planted by hand into our engine's steps and not by the catalogue's own functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec.structs import replace

from checkpoints.points import parse
from engine import ops
from engine.backend import Array
from engine.faults.base import kinds_of, sibling
from engine.faults.edits import Then, WithInput, left_out, with_values
from engine.graph import PASSES, POSITIONS, Altered, History, Step

Steps = dict[str, Step]
Edit = Callable[[Step, Steps], Step]
_SIGMOID = 7  # enum ggml_unary_op


@dataclass(frozen=True)
class Bug:
    """One bug: where it was reported, the recipe of a model that can have it, its edits by kinds of step, and the entry that names it.

    `generated`: how many tokens are generated, for what only decode shows.
    """

    source: str
    recipe: str
    edits: dict[str, Edit]
    named: str
    generated: int = 0

    def planted(self, steps: Sequence[Step]) -> list[Step]:
        """The steps of an engine with this bug."""
        right = {step.makes: step for step in steps}
        result = [self._edited(step, right) for step in steps]
        assert any(step is not before for step, before in zip(result, steps, strict=True))
        return result

    def _edited(self, step: Step, right: Steps) -> Step:
        for kinds, edit in self.edits.items():
            if not set(kinds_of(step)).isdisjoint(kinds.split()):
                step = edit(step, right)
        return step


def _result(change: Callable[[Array], Array]) -> Edit:
    return lambda step, _: replace(step, op=Then(step.op, change))


def _operand(at: int, change: Callable[[Array], Array]) -> Edit:
    return lambda step, _: replace(step, op=WithInput(step.op, at, change))


def _first_alone(step: Step, _right: Steps) -> Step:
    return replace(step, op=lambda x, *_inputs, **_params: x.copy(), params={})


def _reading(name: str, edit: Edit) -> Edit:
    """The edit, of steps alone that read a value or a weight of this name."""

    def some(step: Step, right: Steps) -> Step:
        known = [*step.names, *(weight for weight in step.weights if isinstance(weight, str))]
        return edit(step, right) if any(name in text for text in known) else step

    return some


def _weighted(step: Step, right: Steps) -> Step:
    def weigh(x: Array, weights: Array, **_params: Any) -> Array:
        return (x.reshape(len(x), -1) * weights.reshape(len(x), -1)).reshape(x.shape)

    return replace(step, op=weigh, reads=(*step.reads, sibling(step, right, "ffn_moe_weights").makes), params={})


def _rotated(step: Step, _right: Steps) -> Step:
    def product(x: Array, positions: Array, weight: Array, bias: Array | None = None) -> Array:
        made = ops.linear(x, weight, bias)
        return ops.rope(made, positions, None, heads=4, dims=made.shape[1] // 4, base=1e4, scale=1.0, pairs="neox")

    return replace(step, op=product, reads=(*step.reads, POSITIONS))


def _pairs_of_head(x: Array, positions: Array, *_rest: Any, heads: int, dims: int, base: float, **_params: Any) -> Array:
    split = x.reshape(len(x), heads, -1).copy()
    near = np.arange(dims // 2)
    far = near + split.shape[2] // 2
    angle = (positions[:, None] * base ** (-np.arange(0, dims, 2) / dims))[:, None]
    a, b = split[..., near].copy(), split[..., far].copy()
    split[..., near], split[..., far] = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
    return split.reshape(x.shape)


def _values_rotated(step: Step, right: Steps) -> Step:
    rope = sibling(step, right, "k_rope").params
    return replace(
        step, op=lambda v, positions: ops.rope(ops.cached(v), positions, None, **rope), reads=(*step.reads, History(POSITIONS))
    )


def _one_slot_late(history: Array, **_params: Any) -> Array:
    rows = ops.cached(history)
    return np.concatenate([np.zeros_like(rows[:1]), rows[:-1]])


def _one_more(scores: Array, positions: Array, keys: Array, **params: Any) -> Array:
    return ops.causal_soft_max(scores, positions, keys, np.zeros(scores.shape[0], np.float32), **params)


def _windowed(step: Step, right: Steps) -> Step:
    sizes = [other.params["size"] for other in right.values() if other.op is ops.causal_soft_max and other.params.get("window")]
    return step if "window" in step.params else replace(step, params={**step.params, "window": "standard", "size": sizes[0]})


def _decode_unnormed(step: Step, _right: Steps) -> Step:
    def norm(x: Array, passes: Array, weight: Array, **params: Any) -> Array:
        return np.where((passes > 0)[:, None], x, step.op(x, weight, **params))

    return replace(step, op=norm, reads=(*step.reads, PASSES))


def _one_on_in_decode(step: Step, _right: Steps) -> Step:
    def rope(x: Array, positions: Array, passes: Array, factors: Array | None = None, **params: Any) -> Array:
        return ops.rope(x, positions + (passes > 0), factors, **params)

    return replace(step, op=rope, reads=(*step.reads, PASSES))


def _heads_in_turn(x: Array) -> Array:
    return x.reshape(len(x), 4, -1)[:, [0, 2, 1, 3]].reshape(x.shape)


def _norm_in_groups(x: Array, weight: Array, *, eps: float) -> Array:
    half = x.shape[1] // 2
    return ops.rms_norm(x.reshape(-1, half), np.ones(half, np.float32), eps=eps).reshape(x.shape) * weight.reshape(-1)


def _altered(change: Callable[[Array], Array]) -> Edit:
    """The step with its last weight changed."""

    def edit(step: Step, _right: Steps) -> Step:
        *first, last = step.weights
        return replace(step, weights=(*first, Altered(str(last), lambda source, name: change(source.get(name)))))

    return edit


def _slopes(of: Callable[[int], Sequence[float]]) -> Edit:
    """ALiBi with other slopes, which `of` gives for a number of heads."""

    def soft_max(scores: Array, positions: Array, keys: Array, *, scale: float, **_params: Any) -> Array:
        slopes = np.asarray(of(len(scores)), dtype=np.float32)[:, None, None]
        biased = scores * np.float32(scale) - slopes * (positions[:, None] - keys[None, :]).astype(np.float32)
        return ops.causal_soft_max(biased, positions, keys, scale=1.0)

    return lambda step, _: replace(step, op=soft_max)


def _window_one_larger(step: Step, _right: Steps) -> Step:
    return replace(step, params=step.params | {"size": step.params["size"] + 1}) if step.params.get("size") else step


def _weighted_result(step: Step, right: Steps) -> Step:
    """A product of chosen experts, each times its weight."""

    def product(x: Array, ids: Array, factors: Array, *weights: Array, **params: Any) -> Array:
        value = step.op(x, ids, *weights, **params)
        rows = factors.reshape(len(factors), -1)
        return (value.reshape(*rows.shape, -1) * rows[:, :, None]).reshape(value.shape)

    return replace(step, op=product, reads=(*step.reads, sibling(step, right, "ffn_moe_weights_norm").makes))


def _zeros_in_last_block(scores: Array, positions: Array, _keys: Array, *, scale: float, **_params: Any) -> Array:
    weights = np.zeros_like(scores)
    for row, position in enumerate(positions):
        seen = int(position) + 1
        block = np.zeros((len(scores), -(-seen // 8) * 8), dtype=np.float64)
        block[:, :seen] = scores[:, row, :seen] * scale
        exponentials = np.exp(block - block.max(axis=1, keepdims=True))
        weights[:, row, :seen] = (exponentials / exponentials.sum(axis=1, keepdims=True))[:, :seen]
    return weights


def _first_two_of_each(step: Step, right: Steps) -> Step:
    """Buffers of ceil(1.25 · 2 · T / 8) tokens for each of eight experts: who comes later gets nothing of that expert."""

    def product(down: Array, weights: Array, ids: Array, **params: Any) -> Array:
        ids = ids.reshape(len(ids), -1)
        room = -(-5 * ids.size // (4 * 8))
        taken = dict.fromkeys(range(8), 0)
        value = step.op(down, weights, **params)
        shaped = value.reshape(*ids.shape, -1).copy()
        for token, chosen in enumerate(ids):
            for slot, expert in enumerate(chosen):
                taken[int(expert)] += 1
                shaped[token, slot] *= taken[int(expert)] <= room
        return shaped.reshape(value.shape)

    return replace(step, op=product, reads=(*step.reads, sibling(step, right, "ffn_moe_topk").makes))


def _half_of_value_heads(values: Array) -> Array:
    kept = values.copy()
    kept[..., kept.shape[-2] // 2 :, :] = 0
    return kept


def _normalised_to_one(weights: Array) -> Array:
    rows = weights.reshape(len(weights), -1)
    return (rows / (rows.sum(axis=1, keepdims=True) + np.float32(1e-20))).reshape(weights.shape)


BUGS = {
    "slopes from head 0 on": Bug(
        "paiml/aprender#2143", "mpt", {"kq_soft_max": _slopes(lambda heads: [2.0 ** (-8 * head / heads) for head in range(heads)])},
        "alibi",
    ),
    "slopes of a rank's heads": Bug(
        "flashinfer-ai/flashinfer#5101", "mpt",
        {"kq_soft_max": _slopes(lambda heads: 2 * [2.0 ** (-16 * (head + 1) / heads) for head in range(heads // 2)])}, "alibi",
    ),
    "zeros in the last block of keys": Bug(
        "flashinfer-ai/flashinfer#5090", "qwen3", {"kq_soft_max": lambda step, _: replace(step, op=_zeros_in_last_block)},
        "keys-padded",
    ),
    "capacity of experts": Bug(
        "no public report", "qwen3moe", {"ffn_moe_weighted": _first_two_of_each}, "experts-capacity"
    ),
    "half of the value heads": Bug(
        "no public report", "qwen3next", {"GATED_DELTA_NET": _operand(2, _half_of_value_heads)}, "delta-value-heads"
    ),
    "weights of experts normalised": Bug(
        "flashinfer-ai/flashinfer#2889", "qwen2moe", {"ffn_moe_weights": _result(_normalised_to_one)}, "experts-normalised"
    ),
    "weights of experts not normalised": Bug(
        "pytorch/torchtitan#1448", "bailingmoe", {"ffn_moe_weights_norm": _first_alone}, "experts-not-normalised"
    ),
    "no scale of the experts' sum": Bug(
        "vllm-project/vllm#23123", "deepseek2", {"ffn_moe_weights_scaled": _first_alone}, "experts-scale-missing"
    ),
    "no residual multiplier": Bug(
        "OpenNMT/CTranslate2#1882", "granite",
        {"SCALE": lambda step, _: step if parse(step.makes).layer is None else left_out(step)}, "multiplier",
    ),
    "no scale of the embeddings": Bug(
        "labscommunity/cascadia#61", "gemma2", {"embd": lambda step, _: left_out(step)}, "multiplier"
    ),
    "no soft cap of the logits": Bug(
        "labscommunity/cascadia#61", "gemma2",
        {"logits": lambda step, _: replace(step, op=lambda x: x.copy(), reads=("mul_mat",), params={})}, "softcap-missing",
    ),
    "window of one key more": Bug("ml-explore/mlx-lm#390", "gemma3", {"kq_soft_max": _window_one_larger}, "window-off-by-one"),
    "weights of experts before their product": Bug(
        "no public report", "qwen3moe",
        {"ffn_moe_gate ffn_moe_up": _weighted_result, "ffn_moe_weighted": _first_alone}, "experts-weights-on-other-side",
    ),
    "router's weight on the output": Bug(
        "vllm-project/llm-compressor#1907", "llama4", {"ffn_moe_weighted": _first_alone, "ffn_moe_out": _weighted},
        "experts-weights-on-other-side",
    ),
    "router's weight twice": Bug("vllm-project/vllm#43694", "llama4", {"ffn_moe_out": _weighted}, "experts-weights-on-other-side"),
    "gated norm with sigmoid": Bug(
        "Avarok-Cybersecurity/atlas#754", "qwen3next", {"unary.2": lambda step, _: with_values(step, {0: _SIGMOID})},
        "function-of-other",
    ),
    "key heads repeated in turn": Bug(
        "huggingface/transformers#38320", "qwen3next", {"repeat repeat.2": _result(_heads_in_turn)}, "delta-heads-repeated"
    ),
    "softplus of dt twice": Bug(
        "fla-org/flash-linear-attention#63", "mamba2", {"ssm_dt": _result(lambda x: np.log1p(np.exp(x)))},
        "time-step-softplus-twice",
    ),
    "bias of dt twice": Bug(
        "modular/modular#5748", "mamba", {"MUL_MAT ADD": _reading("ssm_dt.bias", _altered(lambda bias: 2 * bias))}, "bias-twice"
    ),
    "norm of groups": Bug(
        "huggingface/transformers#35943", "mamba2", {"ssm_norm": lambda step, _: replace(step, op=_norm_in_groups)},
        "norm-in-halves",
    ),
    "norm without its weight": Bug(
        "1bit-MONSTER/1bit-MONSTER#1154", "mamba2", {"ssm_norm": _altered(np.ones_like)}, "norm-weight-missing"
    ),
    "Gemma's 1 + twice": Bug(
        "vllm-project/vllm#31464", "gemma3",
        {"RMS_NORM": lambda step, right: _altered(lambda weight: weight + 1)(step, right) if step.weights else step},
        "norm-one-plus-weight",
    ),
    "partial rotary, pairs of the head": Bug(
        "labscommunity/cascadia#69", "stablelm", {"q_rope k_rope": lambda step, _: replace(step, op=_pairs_of_head)},
        "rope-pairs-of-head",
    ),
    "no causal mask in prefill": Bug(
        "osaurus-ai/vmlx-swift#185", "falcon-h1",
        {"kq_soft_max": lambda step, _: replace(step, params={**step.params, "window": "all"})}, "no-causal-mask",
    ),
    "RoPE in BERT": Bug("nntrainer/nntrainer#3982", "bert", {"q k": _rotated}, "rope-added"),
    "YaRN's scale of attention": Bug(
        "huggingface/transformers#47435", "deepseek2",
        {"kq_soft_max": lambda step, _: replace(step, params={**step.params, "scale": 0.5 * step.params["scale"]})}, "attn-scale",
    ),
    "norms of heads, not in decode": Bug(
        "paiml/aprender#2085", "qwen3", {"q_norm k_norm": _decode_unnormed}, "head-norm-not-in-decode", generated=5
    ),
    "positions one on in decode": Bug(
        "microsoft/onnxruntime-genai#2354", "qwen3", {"q_rope k_rope": _one_on_in_decode}, "rope-position-in-decode", generated=5
    ),
    "centred output matrix": Bug(
        "TransformerLensOrg/TransformerLens#693", "qwen3",
        {"logits": _result(lambda x: x - x.mean(axis=1, keepdims=True))}, "logits-normalised",
    ),
    "token shift lost": Bug(
        "ggml-org/llama.cpp#11445", "rwkv7", {"sub": _operand(0, lambda before: before * 0)}, "token-shift"
    ),
    "no removal from the state": Bug(
        "ooples/AiDotNet.Tensors#895", "rwkv7", {"RWKV_WKV7": _operand(4, lambda removed: removed * 0)}, "rwkv-removal"
    ),
    "key not normalised": Bug(
        "ooples/AiDotNet.Tensors#895", "rwkv7", {"l2_norm": lambda step, _: left_out(step)}, "rwkv-key-norm-missing"
    ),
    "rate without its sigmoid": Bug(
        "ooples/AiDotNet.Tensors#895", "rwkv7",
        {"UNARY": _reading("time_mix_a0", lambda step, _: left_out(step))}, "function-of-other",
    ),
    "no mix with the first layer's value": Bug(
        "ooples/AiDotNet.Tensors#895", "rwkv7",
        {"SUM": _reading("time_mix_value", lambda step, right: step if parse(step.makes).layer == 0 else _mix_left_out(step))},
        "operand-left-out",
    ),
    "softmax with 1 more": Bug(
        "karpathy/llama2.c#59", "gemma3", {"kq_soft_max": lambda step, _: replace(step, op=_one_more)}, "softmax-plus-one"
    ),
    "a window in every layer": Bug("chrishayuk/larql#273", "gemma3", {"kq_soft_max": _windowed}, "window-added"),
    "values rotated": Bug("a C engine", "phi3", {"v_read": _values_rotated}, "rope-on-values"),
    "values one slot late": Bug(
        "ekryski/mlx-swift-lm#90", "qwen3", {"v_read": lambda step, _: replace(step, op=_one_slot_late)}, "cache-slot"
    ),
    "post-norm of another": Bug(
        "ikawrakow/ik_llama.cpp#1530", "gemma3",
        {"ffn_post_norm": lambda step, right: replace(step, weights=sibling(step, right, "ffn_norm").weights)}, "norm-of-other",
    ),
    "ReLU that is not squared": Bug("mlc-ai/mlc-llm#3069", "nemotron", {"SQR": lambda step, _: left_out(step)}, "function-of-other"),
}  # fmt: skip


def _mix_left_out(step: Step) -> Step:
    """Only the sum of a layer's own value and its difference to the first layer's."""
    return _first_alone(step, {}) if ".mul" in step.names[-1] and "time_mix_value" in step.names[0] else step
