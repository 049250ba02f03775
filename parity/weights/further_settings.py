"""config.json against a GGUF's metadata: the settings that only some architectures have. Each is compared where both sides give it."""

from collections.abc import Iterator
from math import isclose
from sys import float_info
from typing import Any, TypeGuard

from checkpoints.answers.weights import DIFFERENT, TensorCheck
from engine.weights.gguf_model import GgufModel

_ROUNDING = 1e-6  # a GGUF holds float32
# Setting, its key in a GGUF under the architecture's name, its names in config.json (those that llama.cpp's converter reads).
_NUMBERS = (
    ("sliding window", "attention.sliding_window", ("sliding_window",)),
    ("soft cap of attention", "attn_logit_softcapping", ("attn_logit_softcapping",)),
    ("soft cap of logits", "final_logit_softcapping", ("final_logit_softcapping",)),
    ("scale of logits", "logit_scale", ("logit_scale", "logits_scaling", "output_multiplier", "output_multiplier_scale")),
    ("scale of residuals", "residual_scale", ("residual_multiplier",)),
    ("scale of embeddings", "embedding_scale", ("embedding_multiplier", "embedding_multiplier_scale", "embedding_scale")),
    ("scale of attention", "attention.scale", ("attention_multiplier",)),
    ("limit of Q, K and V", "attention.clamp_kqv", ("clip_qkv",)),
    (
        "scale of expert weights",
        "expert_weights_scale",
        ("routed_scaling_factor", "moe_routed_scaling_factor", "route_scale", "router_scaling_factor"),
    ),
    ("groups of experts", "expert_group_count", ("n_group",)),
    ("groups of experts per token", "expert_group_used_count", ("topk_group",)),
    ("shared experts", "expert_shared_count", ("n_shared_experts", "num_shared_experts")),
    ("first layers without experts", "leading_dense_block_count", ("first_k_dense_replace", "num_dense_layers")),
)
_GATING = "expert_gating_func"
_GATING_NAMES = (
    "score_function",
    "scoring_func",
    "score_func",
    "moe_router_activation",
    "moe_router_activation_func",
    "expert_selection_fn",
)
_GATINGS = {"softmax": 1, "sigmoid": 2, "sqrtsoftplus": 4}  # llama_expert_gating_func_type of llama.cpp
_NORMALISED = "expert_weights_norm"
_NORMALISED_NAMES = ("norm_topk_prob", "moe_renormalize", "route_norm")
_WINDOWED = "sliding_attention"  # of `layer_types`


def further_settings(model: GgufModel, config: dict[str, Any], rope: dict[str, Any]) -> Iterator[TensorCheck]:
    """Check scales, caps, windows, RoPE of windowed layers and the choice of experts. `rope` is config.json's entry on RoPE."""
    for setting, key, names in _NUMBERS:
        if setting == "sliding window" and config.get("use_sliding_window") is False:
            continue
        yield from _number(setting, _first(config, names), _held(model, key))
    yield from _number("RoPE base of windowed layers", _windowed_base(config), _held(model, "rope.freq_base_swa"))
    for name in ("beta_fast", "beta_slow"):
        yield from _number(f"YaRN's {name}", rope.get(name), _held(model, f"rope.scaling.yarn_{name}"))
    yield from _experts(model, config)
    yield from _windows(model, config)


def _experts(model: GgufModel, config: dict[str, Any]) -> Iterator[TensorCheck]:
    """Check by which function experts are scored, and whether the weights of the chosen ones sum to one."""
    held = _held(model, _GATING)
    given = next((config[name] for name in _GATING_NAMES if isinstance(config.get(name), str)), None)
    if held is not None and given in _GATINGS and held != _GATINGS[given]:
        known = {number: name for name, number in _GATINGS.items()}
        yield _different("scores of experts", given, known.get(int(held), f"function {held}"))
    normalised = model.metadata.get(f"{model.hyperparameters.architecture}.{_NORMALISED}")
    wanted = next((config[name] for name in _NORMALISED_NAMES if isinstance(config.get(name), bool)), None)
    if isinstance(normalised, bool) and wanted is not None and normalised != wanted:
        words = {True: "that they sum to one", False: "that they are taken as they are"}
        yield _different("weights of chosen experts", words[wanted], words[normalised])


def _windows(model: GgufModel, config: dict[str, Any]) -> Iterator[TensorCheck]:
    """Check which layers attend to a window."""
    layers = config.get("layer_types")
    pattern = model.array(f"{model.hyperparameters.architecture}.attention.sliding_window_pattern")
    if not isinstance(layers, list) or _WINDOWED not in layers or not pattern:
        return
    wanted = [layer == _WINDOWED for layer in layers]
    wrong = [layer for layer, (given, held) in enumerate(zip(wanted, pattern, strict=False)) if given != bool(held)]
    if wrong:
        kinds = {True: "a window", False: "all positions"}
        first = wrong[0]
        yield _different(
            f"window of layer {first}" + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""),
            kinds[wanted[first]],
            kinds[not wanted[first]],
        )


def _windowed_base(config: dict[str, Any]) -> float | None:
    rope = config.get("rope_parameters")
    windowed = rope.get(_WINDOWED) if isinstance(rope, dict) else None
    return _first(windowed, ("rope_theta",)) if isinstance(windowed, dict) else _first(config, ("rope_local_base_freq",))


def _first(config: dict[str, Any], names: tuple[str, ...]) -> float | None:
    return next((config[name] for name in names if is_number(config.get(name))), None)


def _held(model: GgufModel, key: str) -> float | None:
    value = model.metadata.get(f"{model.hyperparameters.architecture}.{key}")
    return value if is_number(value) else None


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of config.json, or of the metadata, is a finite number; JSON has integers beyond every float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= float_info.max


def _number(setting: str, given: object, held: float | None) -> Iterator[TensorCheck]:
    if held is not None and is_number(given) and not isclose(held, given, rel_tol=_ROUNDING):
        yield _different(setting, f"{given:g}", f"{held:g}")


def _different(setting: str, given: str, held: str) -> TensorCheck:
    return TensorCheck(setting, "", (), DIFFERENT, reason=f"config.json says {given}, the GGUF {held}")
