"""The newest of the bugs of public trackers, planted by hand as those of `public_bugs` are."""

from collections.abc import Callable
from typing import Any

import numpy as np
from msgspec.structs import replace
from public_bugs import Bug, Edit, Steps

from checkpoints.points import parse
from engine import ops
from engine.backend import Array
from engine.faults.base import sibling
from engine.faults.edits import Then, WithInput
from engine.graph import POSITIONS, Step


def _times(factor: float) -> Edit:
    return lambda step, _: replace(step, op=Then(step.op, lambda x: x * np.float32(factor)))


def _scaled(change: Callable[[float], float]) -> Edit:
    """Attention with another scale."""
    return lambda step, _: replace(step, params={**step.params, "scale": change(step.params["scale"])})


def _rotated(step: Step, _right: Steps) -> Step:
    """A product whose result is rotated, heads of 32, in an architecture without positions."""

    def product(x: Array, positions: Array, weight: Array, bias: Array | None = None) -> Array:
        made = ops.linear(x, weight, bias)
        return ops.rope(made, positions, None, heads=made.shape[1] // 32, dims=32, base=1e4, scale=1.0, pairs="neox")

    return replace(step, op=product, reads=(*step.reads, POSITIONS))


def _half_of_heads(values: Array) -> Array:
    kept = values.copy()
    kept[..., kept.shape[-2] // 2 :, :] = 0
    return kept


def _biased_scores(step: Step, right: Steps) -> Step:
    return replace(step, reads=(sibling(step, right, "ffn_moe_probs_biased").makes, *step.reads[1:]))


def _in_layers(edit: Edit) -> Edit:
    return lambda step, right: step if parse(step.makes).layer is None else edit(step, right)


def _first_alone(step: Step, _right: Steps) -> Step:
    return replace(step, op=lambda x, *_inputs, **_params: x.copy(), params={})


def _sum_of_one(step: Step, _right: Steps) -> Step:
    def normalised(weights: Array) -> Array:
        return weights / weights.sum(axis=tuple(range(1, weights.ndim)), keepdims=True)

    return replace(step, op=Then(step.op, normalised))


def _of_embeddings(step: Step, _right: Steps) -> Step:
    return replace(step, weights=("token_embd.weight", *step.weights[1:]))


def _alibi(step: Step, _right: Steps) -> Step:
    def soft_max(scores: Array, positions: Array, keys: Array, *, scale: float, **params: Any) -> Array:
        slopes = np.array([2.0 ** (-8 * (head + 1) / len(scores)) for head in range(len(scores))], np.float32)[:, None, None]
        biased = scores * np.float32(scale) - slopes * (positions[:, None] - keys[None, :]).astype(np.float32)
        return step.op(biased, positions, keys, scale=1.0, **params)

    return replace(step, op=soft_max)


def _capped(cap: float) -> Edit:
    """Attention with a soft cap, whatever else its soft max has: a window, sinks."""

    def edit(step: Step, _right: Steps) -> Step:
        def soft_max(scores: Array, *inputs: Array, scale: float, **params: Any) -> Array:
            return step.op(np.float32(cap) * np.tanh(scores * np.float32(scale / cap)), *inputs, scale=1.0, **params)

        return replace(step, op=soft_max)

    return edit


def _scores_for_weights(step: Step, right: Steps) -> Step:
    return replace(step, reads=(sibling(step, right, "ffn_moe_logits").makes, *step.reads[1:]))


def _without_soft_max(step: Step, _right: Steps) -> Step:
    return _first_alone(step, {}) if "ffn_moe_weights" in step.names[0] else step


def _ahead(step: Step, _right: Steps) -> Step:
    """RoPE whose positions are three too large from position 5 on."""

    def rope(x: Array, positions: Array, *factors: Array, **params: Any) -> Array:
        return step.op(x, positions + 3 * (positions >= 5), *factors, **params)

    return replace(step, op=rope)


def _unwritten(step: Step, _right: Steps) -> Step:
    return replace(step, op=Then(step.op, lambda x: x * (np.arange(len(x)) != 3)[:, None].astype(np.float32)))


def _epsilon(step: Step, _right: Steps) -> Step:
    """llama.cpp computes this norm twice, for attention and for the scan beside it."""
    return replace(step, params={**step.params, "eps": 1e-5}) if "attn_norm.weight" in str(step.weights) else step


LATEST = {
    "routed scale twice": Bug("vllm-project/vllm#24119", "deepseek2", {"ffn_moe_weights_scaled": _times(1.5)}, "multiplier"),
    "softmax of the chosen alone": Bug("lablup/mlxcel#391", "olmoe", {"ffn_moe_weights": _sum_of_one}, "experts-normalised"),
    "experts' outputs unweighted": Bug("edwardcapriolo/deliverance#88", "olmoe", {"ffn_moe_weighted": _first_alone}, "experts-unweighted"),
    "embeddings as output matrix": Bug("pegainfer-project/pegainfer#544", "olmoe", {"logits": _of_embeddings}, "output-tied"),
    "embeddings' multiplier in the tied head": Bug("ml-explore/mlx-lm#764", "granite", {"logits": _times(12)}, "multiplier"),
    "√width in BF16": Bug("Lightning-AI/litgpt#1031", "gemma", {"embd": _times(11.3125 / np.sqrt(128))}, "multiplier"),
    "mscale": Bug("NVIDIA/Megatron-LM#1429", "deepseek2", {"kq_soft_max": _scaled(lambda scale: scale * 1.3689)}, "attn-scale"),
    "scale of the width": Bug("FrancescoSaverioZuppichini/ViT#1", "bert", {"kq_soft_max": _scaled(lambda _: 128**-0.5)}, "attn-scale"),
    "rotated where nothing rotates": Bug("kekzl/imp#518", "nemotron_h", {"q k": _rotated}, "rope-added"),
    "scale of width and heads": Bug(
        "ggml-org/llama.cpp#8197", "gemma2", {"scale": _in_layers(_times(float(np.sqrt(48 / 32))))}, "attn-scale"
    ),
    "output without its bias": Bug(
        "huggingface/transformers#35625", "phi2",
        {"logits": lambda step, _: replace(step, weights=(step.weights[0], None))}, "bias-missing",
    ),
    "half of Qwen3.5's value heads": Bug(
        "ohdearquant/lattice#262", "qwen35",
        {"GATED_DELTA_NET": lambda step, _: replace(step, op=WithInput(step.op, 2, _half_of_heads))}, "delta-value-heads",
    ),
    "weights from biased scores": Bug(
        "huggingface/transformers#39581", "ernie4_5-moe", {"ffn_moe_weights": _biased_scores}, "experts-bias-as-weight"
    ),
    "YaRN's magnitude lost": Bug(
        "turboderp-org/exllamav3#259", "llama-yarn", {"q_rope k_rope": _times(float(1 / (0.1 * np.log(4) + 1)))}, "yarn"
    ),
    "YaRN's magnitude twice": Bug("sgl-project/sglang#33558", "qwen2-yarn", {"q_rope k_rope": _times(1.1)}, "attn-scale"),
    "sum not 1": Bug("leonickson1/Swiftlet#6", "qwen35moe", {"ffn_moe_weights_norm": _first_alone}, "experts-not-normalised"),
    "ALiBi beside learned positions": Bug("vllm-project/vllm#37631", "gpt2", {"kq_soft_max": _alibi}, "alibi-added"),
    "raw scores as weights": Bug("sgl-project/sglang#35160", "qwen2moe", {"ffn_moe_weights": _scores_for_weights}, "experts-raw-scores"),
    "no soft max of the chosen": Bug("no public report", "gpt-oss", {"SOFT_MAX": _without_soft_max}, "experts-raw-scores"),
    "Gemma 2's cap in Gemma 3": Bug("a C engine", "gemma3", {"kq_soft_max": _capped(50.0)}, "attn-softcap"),
    "a cap beside sinks": Bug("no public report", "gpt-oss", {"kq_soft_max": _capped(5.0)}, "attn-softcap"),
    "positions ahead from one on": Bug("no public report", "qwen3", {"q_rope k_rope": _ahead}, "rope-position-from"),
    "ε of attention's norm": Bug("a C engine", "falcon-h1", {"attn_norm ssm_in": _epsilon}, "norm-epsilon"),
    "one row of V unwritten": Bug("no public report", "qwen3", {"v": _unwritten}, "row-multiplier"),
}  # fmt: skip
