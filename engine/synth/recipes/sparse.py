"""Sparse attention, whose indexer chooses eight positions or two blocks of four, and hidden states of several streams."""

from .parts import BIAS, DELTA_NET, FACTORS, INDEXER, MLA, MOE, SHARED, half_head, layers_with, same, small

_STREAMS = {"hyper_connection.count": 4, "hyper_connection.epsilon": 1e-6}

RECIPES = (
    small("deepseek32", {**MLA, **INDEXER}, BIAS, r"attn_kv_b\.", FACTORS, "nextn", kv_heads=1),
    small("glm-dsa", {**MLA, **INDEXER}, BIAS, r"attn_kv_b\.", FACTORS, "nextn", kv_heads=1),
    small(
        "dots3note",
        {
            **MLA,
            **INDEXER,
            "attention.indexer.types": layers_with(True, False),
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": layers_with(False, True),
            "attention.kv_lora_rank_swa": 32,
            "attention.key_length_swa": 32 + 16,
            "attention.value_length_swa": 32,
            "attention.key_length_mla_swa": 40,
            "attention.value_length_mla_swa": 24,
            "rope.freq_base_swa": 5e4,
        },
        BIAS,
        r"attn_kv_b\.",
        FACTORS,
        "nextn",
        kv_heads=1,
    ),
    small(
        "minimax-m3",
        {
            **SHARED,
            "rope.dimension_count": half_head,
            "attention.indexer.head_count": 2,
            "attention.indexer.key_length": 32,
            "attention.indexer.top_k": 2,
            "attention.indexer.block_size": 4,
            "attention.indexer.local_blocks": 1,
        },
        BIAS,
        tied=False,
    ),
    small(
        "hy_v4",
        {
            **MLA,
            **INDEXER,
            **_STREAMS,
            "hyper_connection.magnitude": 2.0,
            "attention.indexer.types": layers_with(True, False),
            "swiglu_clamp_exp": same(7.0),
        },
        BIAS,
        r"attn_kv_b\.",
        FACTORS,
        "nextn",
        kv_heads=1,
        tied=False,
    ),
    small(
        "qwen4exp",
        {
            **MOE,
            **DELTA_NET,
            **_STREAMS,
            "hyper_connection.low_rank": 16,
            "expert_shared_feed_forward_length": 96,
            "rope.dimension_count": half_head,
            "rope.dimension_sections": [4, 4, 4, 0],
            "full_attention_interval": 2,
            "attention.indexer.head_count": 2,
            "attention.indexer.key_length": 32,
            "attention.indexer.top_k": 8,
            "attention.compress_ratios": same(0),
        },
        BIAS,
        "nextn",
        head_size=64,
        tied=False,
    ),
)
