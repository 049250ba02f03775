"""Further bugs of public trackers, planted by hand as those of `public_bugs` are."""

from collections.abc import Callable

import numpy as np
from msgspec.structs import replace
from public_bugs import Bug, Edit, Steps

from checkpoints.points import parse
from engine import ops
from engine.backend import Array
from engine.faults.base import sibling
from engine.faults.edits import Then, WithInput
from engine.ggml_ops.error_function import erf
from engine.graph import PASSES, Altered, Step


def _params(**changed: object) -> Edit:
    return lambda step, _: replace(step, params={**step.params, **changed})


def _by(op: Callable[..., Array]) -> Edit:
    return lambda step, _: replace(step, op=op)


def _alone(at: int) -> Edit:
    """Only the operand `at`."""
    return lambda step, _: replace(step, op=lambda *inputs, **_params: inputs[at].copy(), params={})


def _without_weights(step: Step, _right: Steps) -> Step:
    return replace(step, weights=())


def _keys_of_heads(of: Callable[[int, int], int]) -> dict[str, Edit]:
    """Attention in which query head h reads the keys and values of head `of(h, number of key heads)`."""

    def chosen(x: Array, heads: int, kv_heads: int) -> Array:
        split = x.reshape(len(x), kv_heads, -1)
        return split[:, [of(head, kv_heads) for head in range(heads)]].reshape(len(x), -1)

    def scores(q: Array, k: Array, *, heads: int, kv_heads: int) -> Array:
        return ops.attention_scores(q, chosen(k, heads, kv_heads), heads=heads, kv_heads=heads)

    def values(weights: Array, v: Array, *, kv_heads: int) -> Array:
        return ops.weighted_values(weights, chosen(v, len(weights), kv_heads), kv_heads=len(weights))

    return {"kq": _by(scores), "kqv_out": _by(values)}


def _root_plus_epsilon(x: Array, weight: Array, *, eps: float) -> Array:
    root = np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=1, keepdims=True))
    return (x / (root + eps)).astype(np.float32) * weight.reshape(-1)


def _scale_by_layer(step: Step, _right: Steps) -> Step:
    layer = parse(step.makes).layer
    assert layer is not None
    return replace(step, params={**step.params, "scale": step.params["scale"] / (layer + 1)})


def _prompt_added_in_decode(step: Step, _right: Steps) -> Step:
    def rope(x: Array, positions: Array, passes: Array, factors: Array | None = None, **params: object) -> Array:
        prompt = positions[passes == 0].size or positions[0] - passes[0] + 1
        return step.op(x, positions + (passes > 0) * prompt, factors, **params)

    return replace(step, op=rope, reads=(*step.reads, PASSES))


def _windows_exchanged(step: Step, right: Steps) -> Step:
    params = dict(step.params)
    if params.pop("window", None):
        del params["size"]
        return replace(step, params=params)
    sizes = [other.params["size"] for other in right.values() if other.op is ops.causal_soft_max and other.params.get("window")]
    return replace(step, params={**params, "window": "standard", "size": sizes[0]})


def _of_attn_norm(step: Step, right: Steps) -> Step:
    return replace(step, weights=sibling(step, right, "attn_norm").weights)


def _on_normed(step: Step, right: Steps) -> Step:
    return replace(step, reads=(step.reads[0], sibling(step, right, "attn_norm").makes))


def _biased_weights(step: Step, right: Steps) -> Step:
    return replace(step, reads=(sibling(step, right, "ffn_moe_probs_biased").makes, *step.reads[1:]))


def _sigmoid(x: Array, **_params: object) -> Array:
    return (1 / (1 + np.exp(-x.astype(np.float64)))).astype(np.float32)


def _exact_gelu(gate: Array, up: Array, **_params: object) -> Array:
    wide = gate.astype(np.float64)
    return (wide * (1 + erf(wide / np.sqrt(2))) / 2).astype(np.float32) * up


def _altered(change: Callable[[Array], Array]) -> Edit:
    """The step with its only weight changed."""
    return lambda step, _: replace(
        step, weights=(Altered(str(step.weights[0]), lambda source, name: change(source.get(name))),)
    )


def _queries_unscaled(step: Step, _right: Steps) -> Step:
    root = np.float32(np.sqrt(step.params["operands"][0].shape[-1].fixed))  # of the head's size: the value handed over is flat
    return replace(step, op=WithInput(step.op, 0, lambda queries: queries * root))


FURTHER = {
    "Llama 3's factors unread": Bug("felafax/felafax#59", "llama3-factors", {"q_rope k_rope": _without_weights}, "rope-factors-ignored"),
    "base of 10000": Bug("lyogavin/airllm#368", "llama3-factors", {"q_rope k_rope": _params(base=1e4)}, "rope-base"),
    "ε of 1e-5": Bug(
        "huggingface/candle#271", "llama3-factors", {"attn_norm ffn_norm output_norm": _params(eps=1e-5)}, "norm-epsilon"
    ),
    "ε outside the root": Bug(
        "allenai/OLMo#281", "qwen2moe", {"attn_norm ffn_norm output_norm": _by(_root_plus_epsilon)}, "eps-outside-root"
    ),
    "the whole head rotated": Bug("ml-explore/mlx-lm#1698", "glm4", {"q_rope k_rope": _params(dims=32)}, "rope-dims"),
    "always a sigmoid": Bug("1bit-MONSTER/1bit-MONSTER#650", "qwen3moe", {"ffn_moe_probs": _by(_sigmoid)}, "experts-gating"),
    "selection's bias in the weights": Bug(
        "MetaX-MACA/vLLM-metax#270", "bailingmoe2", {"ffn_moe_weights": _biased_weights}, "experts-bias-as-weight"
    ),
    "windows in the other layers": Bug(
        "NVIDIA-NeMo/Megatron-Bridge#4875", "gemma3", {"kq_soft_max": _windows_exchanged}, "window-on-other-layers"
    ),
    "local base in all layers": Bug("Blaizzy/mlx-vlm#2196", "gemma3", {"q_rope k_rope": _params(base=1e4)}, "rope-base"),
    "exact GELU": Bug("ml-explore/mlx-examples#1057", "gemma3", {"ffn_geglu": _by(_exact_gelu)}, "gelu-kind"),
    "heads tiled": Bug("ekzhang/jax-js#180", "qwen3moe", _keys_of_heads(lambda head, kv_heads: head % kv_heads), "gqa-modulo"),
    "first key head alone": Bug("PSAL-POSTECH/ONNXim#34", "glm4", _keys_of_heads(lambda _head, _kv_heads: 0), "gqa-modulo"),
    "shared expert without its gate": Bug(
        "NousResearch/torchtitan#36", "qwen2moe", {"ffn_shexp_out": _alone(0)}, "shared-expert-gate-missing"
    ),
    "shared expert of two ranks": Bug(
        "sgl-project/sglang#26845", "qwen2moe",
        {"ffn_shexp_out": lambda step, _: replace(step, op=Then(step.op, lambda x: x * np.float32(2)))}, "multiplier",
    ),
    "routed experts alone": Bug("divyamakkar0/JAXformer#21", "qwen2moe", {"ffn_out": _alone(0)}, "shared-expert-missing"),
    "experts' values not doubled": Bug(
        "tinygrad/tinygrad#14850", "gpt-oss", {"ffn_moe_gate ffn_moe_up ffn_moe_down": _altered(lambda weight: weight / 2)}, "values-scaled"
    ),
    "sinks not bound": Bug("vllm-project/vllm-metal#550", "gpt-oss", {"kq_soft_max": _without_weights}, "sinks-missing"),
    "sinks of other heads": Bug(
        "ekryski/mlx-swift-lm#130", "gpt-oss", {"kq_soft_max": _altered(lambda sinks: np.roll(sinks, 1))}, "sinks-order"
    ),
    "attention's scale by layer": Bug("TransformerLensOrg/TransformerLens#27", "gpt2", {"kq_soft_max": _scale_by_layer}, "attn-scale"),
    "first norm twice": Bug("ml-explore/mlx#1636", "gpt2", {"ffn_norm": _of_attn_norm}, "norms-exchanged"),
    "residual after the norm": Bug("lbcb-sci/RiNALMo#9", "qwen3", {"ffn_inp": _on_normed}, "residual-after-norm"),
    "prompt's length twice in decode": Bug(
        "skyzh/tiny-llm#46", "qwen3", {"q_rope k_rope": _prompt_added_in_decode}, "rope-position-by-prompt", generated=5
    ),
    "queries of the delta rule unscaled": Bug(
        "ml-explore/mlx-lm#1799", "qwen3next",
        {"GATED_DELTA_NET": _queries_unscaled},
        "delta-query-scale",
    ),
}  # fmt: skip
