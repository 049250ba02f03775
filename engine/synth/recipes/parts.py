"""What recipes share: regular expressions of optional tensors, values that depend on the shape, groups of metadata.

Numbers are small, and odd enough to reveal mistakes: heads of another size than width / heads where the architecture allows it,
attention windows shorter than a prompt of ten tokens, rotations of only a part of the head.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ..recipe import Recipe, Value
from ..shape import Shape

Metadata = Mapping[str, Value | Callable[[Shape], Value]]

BIAS = r"attn_(q|k|v|qkv)\.bias|attn_output\.bias|ffn_(up|down|gate)\.bias"
OUTPUT_BIAS = r"attn_output\.bias"
FACTORS = r"rope_(freqs|factors\w*)\.weight"
EXPERTS = r"exps|gate_inp|shexp"
CLASSIFIER = r"^cls"
QK_NORM = r"attn_(q|k)_norm"


def small(
    name: str,
    metadata: Metadata | None = None,
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
    vocab: int = 2048,
    layer_norm: bool = False,
    fused_qkv: bool = False,
    qk_norm: float = 1.0,
    kind: str = "f16",
) -> Recipe:
    """A recipe of its metadata and the optional tensors that it lacks; the shape is small by default."""
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
        vocab=vocab,
    )
    return Recipe(name, shape.architecture, shape, metadata or {}, without, layer_norm, fused_qkv, qk_norm, kind)


def layers(shape: Shape) -> int:
    """The number of layers."""
    return shape.layers


def six_times_layers(shape: Shape) -> int:
    """Six layers for each one that the file has."""
    return 6 * shape.layers


def head(shape: Shape) -> int:
    """The size of a head."""
    return shape.head


def half_head(shape: Shape) -> int:
    """Half the size of a head."""
    return shape.head // 2


def quarter_head(shape: Shape) -> int:
    """A quarter of the size of a head."""
    return shape.head // 4


def sections(shape: Shape) -> list[Any]:
    """M-RoPE: how many pairs are rotated by time, height and width: a half and two quarters of the head's pairs."""
    return [shape.head // 4, shape.head // 8, shape.head // 8, 0]


def layers_with(*pattern: Any) -> Callable[[Shape], Value]:
    """One value per layer, by repeating the pattern."""
    return lambda shape: [pattern[layer % len(pattern)] for layer in range(shape.layers)]


def alternating_kv(shape: Shape) -> list[Any]:
    """Every second layer has attention; the others have no key/value heads."""
    return [shape.kv_heads if layer % 2 else 0 for layer in range(shape.layers)]


def same(value: float) -> Callable[[Shape], Value]:
    """One value for every layer."""
    return lambda shape: [value] * shape.layers


def yarn(factor: float) -> dict[str, Value]:
    """YaRN that stretches a context of 128 positions."""
    return {"rope.scaling.type": "yarn", "rope.scaling.factor": factor, "rope.scaling.original_context_length": 128}


EXPERT_COUNTS: Metadata = {"expert_count": 8, "expert_used_count": 2}
MOE: Metadata = {**EXPERT_COUNTS, "expert_feed_forward_length": 96}
GRANITE: Metadata = {
    "rope.dimension_count": head,
    "logit_scale": 6.0,
    "residual_scale": 0.22,
    "embedding_scale": 12.0,
    "attention.scale": 0.015625,
}
MAMBA: Metadata = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": lambda shape: 2 * shape.width,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 8,
    "ssm.group_count": 1,
}
DELTA_NET: Metadata = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": lambda shape: shape.width,
    "ssm.state_size": 32,
    "ssm.time_step_rank": lambda shape: shape.width // 32,
    "ssm.group_count": 2,
}
# A dense layer, then layers with a shared expert and a sigmoid for the choice.
SHARED: Metadata = {
    **MOE,
    "leading_dense_block_count": 1,
    "expert_shared_count": 1,
    "expert_weights_scale": 1.5,
    "expert_weights_norm": True,
    "expert_gating_func": 2,
}
MLA: Metadata = {
    "rope.dimension_count": 16,
    "attention.kv_lora_rank": 64,
    "attention.key_length": 64 + 16,
    "attention.value_length": 64,
    "attention.key_length_mla": 48,
    "attention.value_length_mla": 32,
    "leading_dense_block_count": 1,
    **MOE,
    "expert_shared_count": 1,
    "expert_weights_scale": 1.5,
}
# Gates that decay channel by channel, with attention in every second layer only (Kimi Delta Attention).
KDA: Metadata = {
    **MLA,
    "attention.head_count_kv": layers_with(0, 1),
    "attention.q_lora_rank": 64,
    "ssm.conv_kernel": 4,
    "kda.head_dim": 32,
    "kda.gate_lower_bound": -5.0,
    "expert_gating_func": 2,
    "expert_weights_norm": True,
}
BERT: Metadata = {"attention.causal": False, "pooling_type": 1, "/tokenizer.ggml.token_type_count": 2}
INDEXER: Metadata = {
    "attention.q_lora_rank": 64,
    "expert_gating_func": 2,
    "expert_weights_norm": True,
    "attention.indexer.head_count": 4,
    "attention.indexer.key_length": 64,
    "attention.indexer.top_k": 8,
}
