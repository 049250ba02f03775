"""Models for faults that only some architectures can have: fault -> (recipe, parameters, what is tried: all layers, one layer)."""

from typing import Any

BOTH = (None, (2,))
ALL = (None,)
_LOGITS = {"at": ("logits",)}  # a cap of 50 hardly moves the scores of random weights

PLACES: dict[str, tuple[str, dict[str, Any], tuple[tuple[int, ...] | None, ...]]] = {
    "head-norm-missing": ("qwen3", {}, BOTH),
    "head-norm-whole-width": ("qwen3", {}, BOTH),
    "head-norm-across-heads": ("qwen3", {}, BOTH),
    "head-norm-after-rope": ("qwen3", {}, BOTH),
    "post-norm-missing": ("gemma2", {}, BOTH),
    "post-norm-one-plus-weight": ("gemma3", {}, BOTH),
    "norm-bias-missing": ("starcoder2", {}, BOTH),
    "norm-one-missing": ("gemma3", {}, BOTH),
    "bias-missing": ("starcoder2", {"at": ("ffn_up",)}, BOTH),
    "norm-not-centred": ("starcoder2", {}, BOTH),
    "window-off-by-one": ("gemma3", {}, BOTH),
    "window-size": ("gemma3", {"size": 4}, BOTH),
    "window-ignored": ("gemma3", {}, BOTH),
    "alibi": ("mpt", {}, BOTH),
    "window-on-other-layers": ("gemma3", {}, BOTH),
    "window-kind": ("gemma3", {}, BOTH),
    "softcap-missing": ("gemma2", _LOGITS, ALL),
    "sinks-missing": ("gpt-oss", {}, BOTH),
    "query-scale": ("gemma3", {}, BOTH),
    "keys-for-values": ("qwen3", {}, BOTH),
    "experts-not-normalised": ("qwen3moe", {}, BOTH),
    "experts-normalised": ("qwen2moe", {}, BOTH),
    "experts-scale-missing": ("deepseek2", {}, BOTH),
    "experts-gating": ("deepseek2", {}, BOTH),
    "experts-bias-as-weight": ("deepseek2", {}, BOTH),
    "experts-bias-ignored": ("deepseek2", {}, BOTH),
    "experts-one-fewer": ("qwen3moe", {}, BOTH),
    "experts-weights-exchanged": ("qwen3moe", {}, BOTH),
    "shared-expert-missing": ("qwen2moe", {}, BOTH),
    "shared-expert-gate-missing": ("qwen2moe", {}, BOTH),
    "experts-gate-up-swapped": ("qwen3moe", {}, BOTH),
    "sequential-branches": ("cohere2", {}, BOTH),
    "multiplier": ("granite", {"how": "missing", "at": ("scale", "scale.2")}, BOTH),
    "rope-base-of-other-layers": ("gemma3", {}, BOTH),
    "yarn": ("llama-yarn", {}, BOTH),
    "rope-sections": ("qwen2vl", {}, BOTH),
    "rope-front": ("minicpm3", {"at": ("q_rope",)}, BOTH),
    "rope-magnitude": ("phi3-longrope", {}, BOTH),
    "rope-factors-of-other-length": ("phi3-longrope", {}, ((2,),)),
    "cache-of-other-layer": ("qwen3", {}, BOTH),
    "softcap-after-mask": ("gemma2-small-caps", {}, BOTH),
    "softcap-before-scale": ("gemma2-small-caps", {}, BOTH),
    "latent-norm-missing": ("deepseek2", {}, BOTH),
    "latent-rope-part": ("deepseek2", {}, BOTH),
    "latent-parts-joined": ("deepseek2", {}, BOTH),
    "latent-rope-dropped": ("deepseek2", {}, BOTH),
    "latent-absorbed": ("deepseek2", {}, BOTH),
    "experts-order": ("mixtral", {}, BOTH),
    "experts-one-more": ("qwen3moe", {}, BOTH),
    "router-order": ("qwen3moe", {}, BOTH),
    "experts-layout": ("mixtral", {}, BOTH),
    "mxfp4-scale": ("gpt-oss", {}, BOTH),
    "mxfp4-integers": ("gpt-oss", {}, BOTH),
    "fused-qkv-order": ("phi3", {}, BOTH),
    "fused-qkv-by-group": ("phi3", {}, BOTH),
    "attention-gate-missing": ("qwen35", {}, (None, (3,))),
    "delta-gate-missing": ("qwen35", {}, BOTH),
    "delta-beta": ("qwen3next", {}, BOTH),
    "delta-norm-missing": ("kimi-linear", {}, BOTH),
    "state-not-carried": ("qwen35", {}, BOTH),
    "state-of-other-sequence": ("lfm2", {}, ALL),
    "gelu-kind": ("gemma", {"gelu": "quick"}, BOTH),
    "swiglu-clamp": ("gpt-oss", {}, BOTH),
    "position-rows": ("gpt2", {}, ALL),
    "position-rows-missing": ("gpt2", {}, ALL),
    "convolution-taps": ("mamba", {}, BOTH),
    "time-step-softplus-missing": ("qwen35", {}, ALL),
    "time-step-bias-missing": ("qwen35", {}, BOTH),
    "decay-missing": ("qwen35", {}, ALL),
    "decay-form": ("mamba", {}, BOTH),
    "skip-missing": ("mamba", {}, BOTH),
    "convolution-bias-missing": ("mamba", {}, BOTH),
}

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {  # other metadata than the recipe's: name here -> (recipe, metadata)
    "gemma2-small-caps": ("gemma2", {"attn_logit_softcapping": 3.0}),  # so small that scores of random weights reach it
}
GENERATED = {"state-not-carried"}  # seen in decode steps only

# Faults of encoder–decoders, in t5: fault -> what it spoils (the encoder, the decoder, what is handed over), parameters.
HALVES: dict[str, tuple[str, dict[str, Any]]] = {
    "encoder-norm-missing": ("handed over", {}),
    "encoder-rows": ("handed over", {"rows": "its last row alone, at every position"}),
    "cross-attention-mask": ("decoder", {"seen": "rows up to its own position only"}),
    "cross-attention-matrices": ("decoder", {"read": "the keys' matrix for the values"}),
    "cross-attention-missing": ("decoder", {"without": "what cross-attention makes"}),
    "relative-bias-missing": ("decoder", {"where": "in the passes after the first"}),
    "relative-bias-buckets": ("encoder", {"how": "with the sign of the distance reversed"}),
}
