"""Recipes: small models of many architectures, one entry each, as metadata. See `recipe` for what an entry says.

Numbers are small and odd enough to tell things apart: heads of another size than width / heads where the architecture
allows it, windows of attention shorter than a prompt of ten tokens, rotations of a part of the head.
"""

from collections.abc import Callable, Mapping
from typing import Any

from checkpoints.errors import InputError

from .dense import Shape
from .recipe import Recipe, Value

RECIPES: dict[str, Recipe] = {}

_Metadata = Mapping[str, Value | Callable[[Shape], Value]]

_BIAS = r"attn_(q|k|v|qkv)\.bias|attn_output\.bias|ffn_(up|down|gate)\.bias"
_OUTPUT_BIAS = r"attn_output\.bias"
_FACTORS = r"rope_(freqs|factors\w*)\.weight"
_EXPERTS = r"exps|gate_inp|shexp"
_CLASSIFIER = r"^cls"
_QK_NORM = r"attn_(q|k)_norm"


def _add(
    name: str,
    metadata: _Metadata | None = None,
    *without: str,
    architecture: str = "",
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 0,
    ff: int = 192,
    tied: bool = True,
    rope_base: float = 10000.0,
    context: int = 512,
    layer_norm: bool = False,
    fused_qkv: bool = False,
    kind: str = "f16",
) -> None:
    eps = 1e-5 if layer_norm else 1e-6
    shape = Shape(
        architecture or name,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        ff=ff,
        tied=tied,
        eps=eps,
        rope_base=rope_base,
        context=context,
    )
    RECIPES[name] = Recipe(name, shape.architecture, shape, metadata or {}, without, layer_norm, fused_qkv, kind)


def names() -> list[str]:
    """Everything that `--architecture` takes: qwen2, llama and the recipes, sorted."""
    return sorted({"llama", "qwen2", *RECIPES})


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        InputError: there is none.
    """
    if name not in RECIPES:
        raise InputError(
            f"there is no recipe for a model of architecture {name!r}.",
            f"Take one of {', '.join(names())}.",
            code="architecture",
        )
    return RECIPES[name]


def _head(shape: Shape) -> int:
    return shape.head


def _half_head(shape: Shape) -> int:
    return shape.head // 2


def _quarter_head(shape: Shape) -> int:
    return shape.head // 4


def _sections(shape: Shape) -> list[Any]:
    """M-RoPE: how many pairs turn by time, height and width; a half and two quarters of the head's pairs."""
    return [shape.head // 4, shape.head // 8, shape.head // 8, 0]


def _layers_with(*pattern: Any) -> Callable[[Shape], Value]:
    """One value a layer, the pattern repeated."""
    return lambda shape: [pattern[layer % len(pattern)] for layer in range(shape.layers)]


def _alternating_kv(shape: Shape) -> list[Any]:
    """Every second layer has attention; the others have no key/value heads."""
    return [shape.kv_heads if layer % 2 else 0 for layer in range(shape.layers)]


def _same(value: float) -> Callable[[Shape], Value]:
    return lambda shape: [value] * shape.layers


def _yarn(factor: float) -> dict[str, Value]:
    return {"rope.scaling.type": "yarn", "rope.scaling.factor": factor, "rope.scaling.original_context_length": 128}


_EXPERT_COUNTS: _Metadata = {"expert_count": 8, "expert_used_count": 2}
_MOE: _Metadata = {**_EXPERT_COUNTS, "expert_feed_forward_length": 96}
_GRANITE: _Metadata = {
    "rope.dimension_count": _head,
    "logit_scale": 6.0,
    "residual_scale": 0.22,
    "embedding_scale": 12.0,
    "attention.scale": 0.015625,
}
_MAMBA: _Metadata = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": lambda shape: 2 * shape.width,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 8,
    "ssm.group_count": 1,
}
_DELTA_NET: _Metadata = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": lambda shape: shape.width,
    "ssm.state_size": 32,
    "ssm.time_step_rank": lambda shape: shape.width // 32,
    "ssm.group_count": 2,
}
_MLA: _Metadata = {
    "rope.dimension_count": 16,
    "attention.kv_lora_rank": 64,
    "attention.key_length": 64 + 16,
    "attention.value_length": 64,
    "attention.key_length_mla": 48,
    "attention.value_length_mla": 32,
    "leading_dense_block_count": 1,
    **_MOE,
    "expert_shared_count": 1,
    "expert_weights_scale": 1.5,
}
_BERT: _Metadata = {"attention.causal": False, "pooling_type": 1, "/tokenizer.ggml.token_type_count": 2}

# RoPE variants of the two architectures that `dense` has
_add("llama3-factors", {"rope.dimension_count": _head}, _BIAS, "rope_factors", _EXPERTS, architecture="llama", rope_base=5e5)
_add("llama-yarn", {"rope.dimension_count": _head, **_yarn(4.0)}, _BIAS, _FACTORS, _EXPERTS, architecture="llama")
_add("qwen2-yarn", _yarn(4.0), _OUTPUT_BIAS, _CLASSIFIER, _FACTORS, architecture="qwen2")

# dense decoders with RMS norm
_add("qwen3", None, _BIAS, _CLASSIFIER, head_size=48)
_add("qwen2vl", {"rope.dimension_sections": _sections}, _OUTPUT_BIAS)
_add("qwen3vl", {"rope.dimension_sections": _sections, "n_deepstack_layers": 0}, _BIAS)
_add("gemma", None, _BIAS, head_size=48)
_add(
    "gemma2",
    {"attention.sliding_window": 8, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    _BIAS,
    head_size=48,
)
_add(
    "gemma3",
    {"attention.sliding_window": 8, "rope.freq_base_swa": 10000.0},
    _BIAS,
    _CLASSIFIER,
    "dense_",
    layers=7,
    head_size=48,
    rope_base=1e6,
)
_add(
    "gemma3n",
    {
        "attention.sliding_window": 8,
        "altup.num_inputs": 4,
        "altup.active_idx": 0,
        "embedding_length_per_layer_input": 32,
    },
    _BIAS,
    layers=22,
    width=64,
    ff=96,
    head_size=32,
)
_add(
    "gemma4",
    {
        "attention.key_length_swa": _half_head,
        "attention.value_length_swa": _half_head,
        "attention.sliding_window": 8,
        "attention.sliding_window_pattern": _layers_with(True, True, True, True, False),
        "attention.shared_kv_layers": 0,
        "rope.dimension_count": _head,
        "rope.dimension_count_swa": _half_head,
        "rope.freq_base_swa": 10000.0,
        "embedding_length_per_layer_input": 32,
        "final_logit_softcapping": 30.0,
    },
    _BIAS,
    r"exps|gate_inp|_2\.|_1\.",
    layers=5,
    head_size=64,
    rope_base=1e6,
)
_add("phi3", {"rope.dimension_count": _head, "attention.sliding_window": 0}, _BIAS, _FACTORS, r"output\.bias", fused_qkv=True)
_add(
    "phi3-longrope",
    {"rope.dimension_count": _head, "rope.scaling.original_context_length": 128, "rope.scaling.attn_factor": 1.19},
    _BIAS,
    "rope_freqs",
    r"output\.bias",
    architecture="phi3",
    context=1024,
    fused_qkv=True,
)
_add("granite", _GRANITE, _BIAS, _FACTORS, _EXPERTS)
_add("olmo2", None, _BIAS, kv_heads=4, tied=False)
_add("glm4", {"rope.dimension_count": _half_head}, _OUTPUT_BIAS, "nextn")
_add("minicpm", {"rope.dimension_count": _head}, _BIAS, _FACTORS, _EXPERTS)
_add("exaone4", None, _BIAS, _FACTORS)
_add("smollm3", {"rope.dimension_count": _head}, _BIAS, _FACTORS)
_add("ernie4_5", None, _BIAS)
_add("hunyuan-dense", None, _BIAS)
_add(
    "mistral3",
    {
        "rope.dimension_count": _head,
        "attention.temperature_scale": 0.1,
        **_yarn(4.0),
        "rope.scaling.yarn_log_multiplier": 1.0,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
    },
    _BIAS,
    _FACTORS,
    _EXPERTS,
)
_add("seed_oss", None, _OUTPUT_BIAS)
_add("chatglm", {"rope.dimension_count": _half_head}, _OUTPUT_BIAS, fused_qkv=True)
_add("internlm2", {"rope.dimension_count": _head}, _BIAS, _FACTORS, tied=False)
_add(
    "apertus",
    {
        "rope.dimension_count": _head,
        "/xielu.alpha_n": _same(1.0),
        "/xielu.alpha_p": _same(1.0),
        "/xielu.beta": _same(1.0),
        "/xielu.eps": _same(1e-6),
    },
    _BIAS,
    _FACTORS,
    tied=False,
)

# dense decoders with LayerNorm
_add("phi2", {"rope.dimension_count": _half_head}, kv_heads=4, tied=False, layer_norm=True, fused_qkv=True)
_add("starcoder2", {"rope.dimension_count": _head}, layer_norm=True)
_add("gpt2", None, kv_heads=4, layer_norm=True, fused_qkv=True)
_add(
    "gptneox",
    {"rope.dimension_count": _quarter_head, "use_parallel_residual": True},
    kv_heads=4,
    tied=False,
    layer_norm=True,
    fused_qkv=True,
)
_add("falcon", None, _BIAS, "attn_norm_2", kv_heads=1, layer_norm=True, fused_qkv=True)
_add(
    "stablelm",
    {"rope.dimension_count": _quarter_head, "use_parallel_residual": False},
    _QK_NORM,
    kv_heads=4,
    tied=False,
    layer_norm=True,
)
_add("command-r", {"logit_scale": 0.0625}, _BIAS, _QK_NORM, layer_norm=True)
_add("cohere2", {"logit_scale": 0.25, "attention.sliding_window": 8, "rope.dimension_count": _head}, _BIAS, layer_norm=True)
_add("nemotron", {"rope.dimension_count": _half_head}, _BIAS, tied=False, layer_norm=True)
_add("bloom", None, kv_heads=4, layer_norm=True, fused_qkv=True)
_add(
    "mpt",
    {"attention.max_alibi_bias": 8.0},
    _BIAS,
    r"norm.*\.bias",
    "pos_embd|position",
    _QK_NORM,
    "ffn_act",
    kv_heads=4,
    layer_norm=True,
    fused_qkv=True,
)

# mixtures of experts
_add("mixtral", {"rope.dimension_count": _head, **_EXPERT_COUNTS}, _BIAS, _FACTORS, architecture="llama")
_add("qwen2moe", {**_MOE, "expert_shared_feed_forward_length": 128}, _OUTPUT_BIAS, tied=False)
_add("qwen3moe", _MOE, _BIAS)
_add(
    "gpt-oss",
    {**_MOE, "attention.sliding_window": 8, **_yarn(32.0)},
    head_size=32,
    tied=False,
    rope_base=150000.0,
    kind="mxfp4_moe",
)
_add("granitemoe", {**_GRANITE, **_MOE}, _BIAS, _FACTORS)
_add("olmoe", _MOE, _BIAS, kv_heads=4, tied=False)
_add(
    "deepseek",
    {
        "rope.dimension_count": _head,
        "leading_dense_block_count": 1,
        **_MOE,
        "expert_shared_count": 2,
        "expert_weights_scale": 1.0,
    },
    _BIAS,
    _FACTORS,
    kv_heads=4,
)
_add(
    "glm4moe",
    {
        "rope.dimension_count": _half_head,
        "leading_dense_block_count": 1,
        **_MOE,
        "expert_shared_count": 1,
        "expert_weights_scale": 1.0,
        "expert_weights_norm": True,
        "expert_gating_func": 2,
        "nextn_predict_layers": 0,
    },
    _OUTPUT_BIAS,
)
_add(
    "ernie4_5-moe",
    {
        **_MOE,
        "interleave_moe_layer_step": 1,
        "leading_dense_block_count": 1,
        "expert_shared_feed_forward_length": 96,
        "expert_shared_count": 1,
    },
    _BIAS,
)
_add(
    "llama4",
    {
        "rope.dimension_count": _head,
        "expert_count": 8,
        "expert_used_count": 1,
        "expert_feed_forward_length": 96,
        "interleave_moe_layer_step": 2,
    },
    _BIAS,
    _FACTORS,
)
_add("minimax-m2", {**_MOE, "rope.dimension_count": _half_head, "expert_gating_func": 2}, _BIAS, tied=False)

# multi-head latent attention; llama.cpp takes 26 layers for DeepSeek-V2-Lite's, whose queries have no latent
_add(
    "deepseek2",
    {**_MLA, "attention.q_lora_rank": 64, "expert_gating_func": 2, "expert_weights_norm": True},
    _BIAS,
    r"attn_kv_b\.",
    _FACTORS,
    kv_heads=1,
)
_add(
    "deepseek2-lite",
    {**_MLA, "expert_gating_func": 1},
    _BIAS,
    r"attn_kv_b\.",
    "exp_probs",
    _FACTORS,
    architecture="deepseek2",
    layers=26,
    width=64,
    kv_heads=1,
)

# recurrent and hybrid
_add("mamba", _MAMBA, heads=0, kv_heads=0, ff=0)
_add("mamba2", _MAMBA, heads=0, kv_heads=0, ff=0)
_add(
    "rwkv6",
    {
        "wkv.head_size": 32,
        "time_mix_extra_dim": 32,
        "time_decay_extra_dim": 32,
        "rescale_every_n_layers": 0,
        "token_shift_count": 2,
    },
    heads=0,
    kv_heads=0,
    tied=False,
    layer_norm=True,
)
_add(
    "rwkv7",
    {
        "wkv.head_size": 32,
        "attention.decay_lora_rank": 16,
        "attention.iclr_lora_rank": 16,
        "attention.value_residual_mix_lora_rank": 16,
        "attention.gate_lora_rank": 16,
        "token_shift_count": 2,
    },
    heads=0,
    kv_heads=0,
    tied=False,
    layer_norm=True,
)
_add("lfm2", {"attention.head_count_kv": _alternating_kv, "shortconv.l_cache": 3}, _BIAS, "exps|gate_inp", _CLASSIFIER)
_add("granitehybrid", {**_GRANITE, "attention.head_count_kv": _alternating_kv, **_MOE, **_MAMBA}, _BIAS, _FACTORS)
_add(
    "qwen3next",
    {"rope.dimension_count": _quarter_head, **_MOE, "expert_shared_feed_forward_length": 96, **_DELTA_NET},
    _BIAS,
    "ssm_in",
)
_add("qwen35", {"rope.dimension_count": _quarter_head, "rope.dimension_sections": [2, 1, 1, 0], **_DELTA_NET}, _BIAS)
_add(
    "qwen35moe",
    {
        "rope.dimension_count": _quarter_head,
        "rope.dimension_sections": [2, 1, 1, 0],
        **_MOE,
        "expert_shared_feed_forward_length": 96,
        **_DELTA_NET,
    },
    _BIAS,
)

# encoders, embedding models, encoder–decoders
_add("bert", _BERT, _CLASSIFIER, _QK_NORM, "attn_norm_2", kv_heads=4, layer_norm=True)
_add(
    "nomic-bert",
    _BERT,
    _CLASSIFIER,
    _QK_NORM,
    _BIAS,
    "attn_norm_2",
    kv_heads=4,
    rope_base=1000.0,
    layer_norm=True,
    fused_qkv=True,
)
_add(
    "t5",
    {"attention.relative_buckets_count": 32, "decoder_start_token_id": 0, "decoder_block_count": lambda shape: shape.layers},
    kv_heads=4,
    head_size=32,
)
