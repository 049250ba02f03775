"""Writes a tiny random model of a family, with transformers' own classes. Run by an interpreter that has torch and transformers:

python hf_make.py FAMILY FOLDER
"""

import sys

import torch
import transformers

COMMON = {
    "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 16}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True},
    ),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}),
    # A short window: of three layers all have it, and llama.cpp aborts when it is asked to move what such a model cached.
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True, "sliding_window": 128},
    ),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    "glm4": ("Glm4Config", {"head_dim": 16}),
    "falcon": (
        "FalconConfig",
        {
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "ffn_hidden_size": 96,
            "bias": False,
            "max_position_embeddings": 512,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 128,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": True,  # llama.cpp rounds the corrected dimensions (ggml_rope_yarn_corr_dims)
                "original_max_position_embeddings": 512,
            },
        },
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            "q_lora_rank": 24,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "num_key_value_heads": 4,
        },
    ),
    "olmo2": ("Olmo2Config", {}),
    "stablelm": ("StableLmConfig", {"layer_norm_eps": 1e-5}),  # a quarter of each head is rotated
    "gpt_neox": ("GPTNeoXConfig", {"layer_norm_eps": 1e-5, "num_key_value_heads": 4}),  # the same, and attention beside the MLP
    "gpt2": (
        "GPT2Config",
        {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, "n_inner": 96, "tie_word_embeddings": True},
    ),
}


def main(family: str, folder: str) -> None:
    """Every parameter random, norms and biases as well: what is missing or mixed up shows."""
    torch.manual_seed(5)
    name, own = FAMILIES[family]
    common = {
        key: value
        for key, value in COMMON.items()
        if (family != "gpt2" or key in ("vocab_size", "bos_token_id", "eos_token_id"))
        and (
            family not in ("falcon", "stablelm", "gpt_neox") or key != "rms_norm_eps"
        )  # these have layer norms, with an ε of their own
    }
    config = getattr(transformers, name)(**{**common, **own})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale, mean = (0.2, 1.0) if "norm" in key or ".ln_" in key else (0.15, 0.0)
            parameter.copy_(torch.randn_like(parameter) * scale + (mean if key.endswith("weight") else 0.0))
    model.save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
