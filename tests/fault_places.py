"""Where faults that only some architectures can have are shown: fault -> (recipe, parameters, what is tried: all layers, one layer)."""

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
    "norm-not-centred": ("starcoder2", {}, BOTH),
    "window-off-by-one": ("gemma3", {}, BOTH),
    "window-ignored": ("gemma3", {}, BOTH),
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
    "multiplier": ("granite", {"how": "missing", "at": ("scale", "scale.2")}, BOTH),
    "rope-base-of-other-layers": ("gemma3", {}, BOTH),
    "yarn": ("llama-yarn", {}, BOTH),
    "gelu-kind": ("gemma", {"gelu": "quick"}, BOTH),
    "swiglu-clamp": ("gpt-oss", {}, BOTH),
    "position-rows": ("gpt2", {}, ALL),
    "position-rows-missing": ("gpt2", {}, ALL),
    "convolution-taps": ("mamba", {}, BOTH),
    "time-step-softplus-missing": ("qwen35", {}, ALL),
    "decay-missing": ("qwen35", {}, ALL),
    "skip-missing": ("mamba", {}, BOTH),
    "convolution-bias-missing": ("mamba", {}, BOTH),
}
