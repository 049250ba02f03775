"""The newest of the bugs of public trackers, planted by hand as those of `public_bugs` are."""

from collections.abc import Callable

import numpy as np
from msgspec.structs import replace
from public_bugs import Bug, Edit, Steps

from engine.backend import Array
from engine.faults.edits import Then
from engine.graph import Step


def _times(factor: float) -> Edit:
    return lambda step, _: replace(step, op=Then(step.op, lambda x: x * np.float32(factor)))


def _scaled(change: Callable[[float], float]) -> Edit:
    """Attention with another scale."""
    return lambda step, _: replace(step, params={**step.params, "scale": change(step.params["scale"])})


def _first_alone(step: Step, _right: Steps) -> Step:
    return replace(step, op=lambda x, *_inputs, **_params: x.copy(), params={})


def _sum_of_one(step: Step, _right: Steps) -> Step:
    def normalised(weights: Array) -> Array:
        return weights / weights.sum(axis=tuple(range(1, weights.ndim)), keepdims=True)

    return replace(step, op=Then(step.op, normalised))


def _of_embeddings(step: Step, _right: Steps) -> Step:
    return replace(step, weights=("token_embd.weight", *step.weights[1:]))


LATEST = {
    "routed scale twice": Bug("vllm-project/vllm#24119", "deepseek2", {"ffn_moe_weights_scaled": _times(1.5)}, "multiplier"),
    "softmax of the chosen alone": Bug("lablup/mlxcel#391", "olmoe", {"ffn_moe_weights": _sum_of_one}, "experts-normalised"),
    "experts' outputs unweighted": Bug("edwardcapriolo/deliverance#88", "olmoe", {"ffn_moe_weighted": _first_alone}, "experts-unweighted"),
    "embeddings as output matrix": Bug("pegainfer-project/pegainfer#544", "olmoe", {"logits": _of_embeddings}, "output-tied"),
    "embeddings' multiplier in the tied head": Bug("ml-explore/mlx-lm#764", "granite", {"logits": _times(12)}, "multiplier"),
    "√width in BF16": Bug("Lightning-AI/litgpt#1031", "gemma", {"embd": _times(11.3125 / np.sqrt(128))}, "multiplier"),
    "mscale": Bug("NVIDIA/Megatron-LM#1429", "deepseek2", {"kq_soft_max": _scaled(lambda scale: scale * 1.3689)}, "attn-scale"),
    "scale of the width": Bug("FrancescoSaverioZuppichini/ViT#1", "bert", {"kq_soft_max": _scaled(lambda _: 128**-0.5)}, "attn-scale"),
    "sum not 1": Bug("leonickson1/Swiftlet#6", "qwen35moe", {"ffn_moe_weights_norm": _first_alone}, "experts-not-normalised"),
}  # fmt: skip
