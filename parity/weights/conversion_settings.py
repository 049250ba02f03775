"""config.json against a GGUF's metadata: the numbers that every engine reads, and RoPE's factors, which converters compute from them."""

from collections.abc import Iterator
from math import isclose
from typing import Any

import numpy as np

from checkpoints.answers.weights import DIFFERENT, TensorCheck
from engine.weights.gguf_model import GgufModel

from .further_settings import further_settings, is_number
from .packed import Floats
from .safetensors_folder import Folder

DERIVED_TENSORS = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)  # by converters, from config.json
FACTOR_ROUNDING = 1e-5  # converters compute the factors in float32, from powers: a few ulps
_EPSILON = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon")  # all that the converter reads
_NAMES = {"llama3": "none", "linear": "linear", "yarn": "yarn", "longrope": "longrope", "su": "longrope", "default": "none"}


def settings(model: GgufModel, folder: Folder) -> Iterator[TensorCheck]:
    """config.json against the metadata: the numbers that every engine reads."""
    hp = model.hyperparameters
    for setting, in_gguf, in_config in (
        ("layers", hp.n_layers, folder.number("num_hidden_layers", "n_layer")),
        ("embedding width", hp.n_embd, folder.number("hidden_size", "n_embd")),
        ("heads", hp.n_heads, folder.number("num_attention_heads", "n_head")),
        ("key/value heads", _key_heads(model), folder.number("num_key_value_heads")),
        ("experts", _of(model, "expert_count"), folder.number("num_local_experts", "num_experts", "n_routed_experts")),
        ("experts per token", _of(model, "expert_used_count"), folder.number("num_experts_per_tok")),
    ):
        if in_config is not None and in_gguf is not None and in_gguf != in_config:
            yield TensorCheck(setting, "", (), DIFFERENT, reason=f"config.json says {in_config}, the GGUF {in_gguf}")
    yield from _epsilon(model, folder)
    rope = _rope(folder)
    base = rope.get("rope_theta", folder.config.get("rope_theta"))
    if is_number(base) and hp.rope_base and not isclose(hp.rope_base, base, rel_tol=1e-6):
        yield TensorCheck("RoPE base", "", (), DIFFERENT, reason=f"config.json says {base:g}, the GGUF {hp.rope_base:g}")
    yield from _scaling(model, folder, rope)
    yield from further_settings(model, folder.config, rope)
    yield from _head_sizes(model, folder, rope)
    yield from special_tokens(model, folder)


def _epsilon(model: GgufModel, folder: Folder) -> Iterator[TensorCheck]:
    """Check the norms' ε. Where config.json has several, of which its model reads one, the GGUF's may be any of them."""
    held = _of(model, "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
    given = [value for name in _EPSILON if isinstance(value := folder.config.get(name), float)]
    if held is not None and given and not any(isclose(held, value, rel_tol=1e-6) for value in given):
        yield TensorCheck("ε", "", (), DIFFERENT, reason=f"config.json says {given[0]:g}, the GGUF {held:.7g}")


def _key_heads(model: GgufModel) -> int | None:
    """The number of key/value heads of each layer that has some; None where layers differ, or the keys are latent and so one head."""
    if any(name.endswith(".attn_k_b.weight") for name in model.tensors):
        return None
    held = model.array(f"{model.hyperparameters.architecture}.attention.head_count_kv")
    if not held:
        return model.hyperparameters.n_kv_heads
    counts = {int(number) for number in held if number}
    return counts.pop() if len(counts) == 1 else None


def _head_sizes(model: GgufModel, folder: Folder, rope: dict[str, Any]) -> Iterator[TensorCheck]:
    """Check the size of heads, and how much of one RoPE rotates."""
    config, hp = folder.config, model.hyperparameters
    head = folder.number("head_dim")
    if "kv_lora_rank" in config:  # latent attention has heads of several sizes
        return
    if head is not None and hp.n_heads and hp.head_size != head:
        yield TensorCheck("head size", "", (), DIFFERENT, reason=f"config.json says {head}, the GGUF {hp.head_size}")
    share = next(
        (
            part
            for part in (rope.get("partial_rotary_factor"), config.get("partial_rotary_factor"), config.get("rotary_pct"))
            if part
        ),
        None,
    )
    rotated = _of(model, "rope.dimension_count")
    if str(rope.get("rope_type", rope.get("type", "default"))) not in _NAMES:
        return
    if is_number(share) and rotated is not None and hp.n_heads:
        possible = {int(share * hp.head_size), int(share * hp.n_embd) // hp.n_heads}  # as converters round it
        if rotated not in possible:
            reason = f"config.json says {share:g} of {hp.head_size}, the GGUF {rotated:g}"
            yield TensorCheck("rotated dimensions", "", (), DIFFERENT, reason=reason)


def special_tokens(model: GgufModel, folder: Folder) -> Iterator[TensorCheck]:
    """Check the ids of the tokens that begin and end a text, which may be any of those that the folder's files name."""
    for short in ("bos", "eos"):
        held = model.metadata.get(f"tokenizer.ggml.{short}_token_id")
        possible = folder.special(short)
        if isinstance(held, int) and possible and held not in possible:
            named = " or ".join(map(str, sorted(possible)))
            yield TensorCheck(f"{short} token", "", (), DIFFERENT, reason=f"the folder says {named}, the GGUF {held}")


def _rope(folder: Folder) -> dict[str, Any]:
    """config.json's entry on RoPE; that of full attention if the model has several kinds of layers."""
    rope = folder.config.get("rope_parameters") or folder.config.get("rope_scaling") or {}
    settings = rope.get("full_attention", rope) if isinstance(rope, dict) else {}
    return settings if isinstance(settings, dict) else {}


def _scaling(model: GgufModel, folder: Folder, rope: dict[str, Any]) -> Iterator[TensorCheck]:
    """Check by how much and how RoPE is scaled."""
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    if kind not in _NAMES:
        return
    held = str(model.metadata.get(f"{model.hyperparameters.architecture}.rope.scaling.type", "none"))
    if held == "linear" and _of(model, "rope.scaling.factor") == 1:  # what BitNet's converter writes: none
        held = "none"
    if held != _NAMES[kind] and not (kind == "longrope" and "rope_factors_long.weight" in model.tensors):
        yield TensorCheck("RoPE scaling", "", (), DIFFERENT, reason=f"config.json says {kind}, the GGUF {held}")
        return
    if kind == "llama3" and "rope_freqs.weight" not in model.tensors:
        yield TensorCheck(
            "rope_freqs.weight", "", (), "missing", reason="config.json scales frequencies (llama3), the GGUF has no factors"
        )
    for setting, in_config, in_gguf in (
        ("RoPE scaling factor", rope.get("factor"), _of(model, "rope.scaling.factor")),
        (
            "RoPE's original context",
            rope.get("original_max_position_embeddings", folder.config.get("original_max_position_embeddings")),
            _of(model, "rope.scaling.original_context_length"),
        ),
    ):
        matters = kind in ("linear", "yarn") if "factor" in setting else kind == "yarn"
        if matters and is_number(in_config) and (in_gguf is None or not isclose(in_gguf, in_config, rel_tol=1e-6)):
            yield TensorCheck(
                setting,
                "",
                (),
                DIFFERENT,
                reason=f"config.json says {in_config:g}, the GGUF {'nothing' if in_gguf is None else f'{in_gguf:g}'}",
            )


def rope_factors(name: str, folder: Folder) -> Floats | None:
    """The numbers by which a converter's tensor divides RoPE's frequencies, from config.json; None if it does not give them.

    `rope_freqs` are llama3's: frequencies with long waves are divided by `factor`, with short ones by 1, in between by a mix of
    both (`Llama3Model.generate_extra_tensors` of convert_hf_to_gguf.py; `_compute_llama3_parameters` of transformers).
    """
    rope = _rope(folder)
    kind = rope.get("rope_type", rope.get("type"))
    if name != "rope_freqs.weight":
        factors = rope.get("long_factor" if "long" in name else "short_factor")
        return np.array(factors, dtype=np.float32) if isinstance(factors, list) and factors else None
    if kind != "llama3":
        return None
    try:
        base = float(rope.get("rope_theta", folder.config.get("rope_theta", 10000.0)))
        size = folder.number("head_dim") or folder.config["hidden_size"] // folder.config["num_attention_heads"]
        factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        context = float(rope["original_max_position_embeddings"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    turns = context / (
        2 * np.pi * base ** (np.arange(0, size, 2) / size)
    )  # number of turns of each pair over the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / ((1 - smooth) / factor + smooth), dtype=np.float32)


def _of(model: GgufModel, *keys: str) -> float | None:
    """The first of these numbers that the metadata have, under the architecture's name."""
    values = (model.metadata.get(f"{model.hyperparameters.architecture}.{key}") for key in keys)
    return next((value for value in values if isinstance(value, (int, float))), None)
