"""A folder of safetensors as GGUF, as llama.cpp's converter writes it, for tests: gguf-py's names, and what converters change."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf_writing import finish
from safetensors.numpy import load_file

ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "gpt_oss": "gpt-oss",
    "gpt_neox": "gptneox",
    "deepseek_v2": "deepseek2",
}
_EXPERTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def convert(folder: Path, out: Path, source: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
    """Write the model in `folder` to `out`, float32. `source` are its tensors, where NumPy cannot read their type.

    `changes` plant a converter's fault: skip_permute, skip_norm_offset, skip_groups, skip_decay, eps=…, swap=(name, name), turn=name,
    drop=name; metadata={key: value} are further settings.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config["model_type"]
    arch = ARCHITECTURES.get(kind, kind)
    layers = config.get("num_hidden_layers") or config["n_layer"]
    writer = gguf.GGUFWriter(out, arch)
    _metadata(writer, arch, config, layers, changes.get("eps"))
    for key, value in changes.get("metadata", {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}[type(value)]
        add(f"{arch}.{key}", value)
    names = gguf.get_tensor_name_map(next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), layers)
    files = () if source else sorted(folder.glob("*.safetensors"))
    whole = {name: value for file in files for name, value in load_file(file).items()}
    tensors: dict[str, np.ndarray] = {}
    for name, value in _split(_joined(source or whole), config, changes).items():
        to = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert to is not None, name
        if not to.endswith((".weight", ".bias", ".ssm_a", ".ssm_d")):
            to += ".weight"  # attention sinks
        tensors[to] = _converted(arch, name, value, config, changes)
    if swap := changes.get("swap"):
        tensors[swap[0]], tensors[swap[1]] = tensors[swap[1]], tensors[swap[0]]
    if turn := changes.get("turn"):
        tensors[turn] = tensors[turn].T
    tensors.pop(changes.get("drop", ""), None)
    finish(writer, tensors)
    return out


def _converted(arch: str, name: str, value: np.ndarray, config: dict[str, Any], changes: dict[str, Any]) -> np.ndarray:
    if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")) and not changes.get("skip_permute"):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        return value.reshape(heads, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
    if arch.startswith("gemma") and name.endswith("norm.weight") and not changes.get("skip_norm_offset"):
        return value + 1
    if name.endswith("A_log"):
        return value if changes.get("skip_decay") else -np.exp(value)
    if name.endswith("conv1d.weight"):
        return value.squeeze(1)
    if arch == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return value.T
    return value


def _joined(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with those of a layer's experts stacked."""
    converted: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        head, mark, rest = name.partition(".experts.")
        if not mark or not rest[0].isdigit():
            converted[name] = value
        elif rest.startswith("0."):
            leaf = rest.removeprefix("0.")
            count = sum(other.startswith(f"{head}.experts.") and other.endswith(leaf) for other in tensors)
            stacked = np.stack([tensors[f"{head}.experts.{number}.{leaf}"] for number in range(count)])
            converted[
                f"{head.replace('block_sparse_moe', 'mlp')}.experts.{_EXPERTS.get(leaf.split('.')[0], leaf.split('.')[0])}.weight"
            ] = stacked
    return converted


def _split(tensors: dict[str, np.ndarray], config: dict[str, Any], changes: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors with what converters take apart or put in another order: gpt-oss's and deepseek's experts, MLA, falcon's Q, K and V."""
    converted: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        if name.endswith("mlp.experts.gate_up_proj") and config["model_type"] == "deepseek_v2":
            gate, up = np.split(value, 2, axis=1)
            converted |= {
                name.replace("gate_up_proj", "gate_proj.weight"): gate,
                name.replace("gate_up_proj", "up_proj.weight"): up,
            }
        elif ".mlp.experts.gate_up_proj" in name:  # gpt-oss: gate and up in turns
            kind = "bias" if name.endswith("_bias") else "weight"
            whole = value if kind == "bias" else value.swapaxes(1, 2)
            head = name.partition("gate_up_proj")[0]
            converted |= {f"{head}gate_proj.{kind}": whole[:, 0::2], f"{head}up_proj.{kind}": whole[:, 1::2]}
        elif ".mlp.experts.down_proj" in name and not name.endswith(".weight"):
            kind = "bias" if name.endswith("_bias") else "weight"
            turned = kind == "weight" and config["model_type"] == "gpt_oss"
            converted[f"{name.partition('down_proj')[0]}down_proj.{kind}"] = value.swapaxes(1, 2) if turned else value
        elif name.endswith("kv_b_proj.weight"):
            heads, inner = config["num_attention_heads"], config["qk_nope_head_dim"]
            k, v = np.split(value.reshape(heads, -1, value.shape[-1]), [inner], axis=1)
            converted |= {name.replace("kv_b_proj", "k_b_proj"): k.swapaxes(1, 2), name.replace("kv_b_proj", "v_b_proj"): v}
        elif name.endswith(("query_key_value.weight", "query_key_value.bias")) and not changes.get("skip_groups"):
            kv = config.get("num_kv_heads") or config["num_attention_heads"]
            size = config["hidden_size"] // config["num_attention_heads"]
            groups = value.reshape(kv, -1, size, *value.shape[1:])
            parts = (groups[:, :-2], groups[:, [-2]], groups[:, [-1]])
            converted[name] = np.concatenate([part.reshape(-1, *value.shape[1:]) for part in parts])
        else:
            converted[name] = value
    return converted


def _metadata(writer: gguf.GGUFWriter, arch: str, config: dict[str, Any], layers: int, eps: float | None) -> None:
    def of(*names: str, default: Any = None) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), default)

    heads = of("num_attention_heads", "n_head")
    width = of("hidden_size", "n_embd")
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(of("intermediate_size", "n_inner", "ffn_hidden_size"))
    writer.add_head_count(heads)
    writer.add_head_count_kv(1 if arch == "deepseek2" else of("num_key_value_heads", "num_kv_heads", default=heads))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    if "eos_token_id" in config:
        writer.add_eos_token_id(config["eos_token_id"])
    rope = config.get("rope_parameters") or {}
    rotated = int(of("head_dim", default=width // heads) * rope.get("partial_rotary_factor", 1.0))
    if arch in ("stablelm", "gptneox"):
        writer.add_layer_norm_eps(eps or config["layer_norm_eps"])
        writer.add_rope_dimension_count(rotated)
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_parallel_residual(config["use_parallel_residual"])
        return
    if arch == "mamba":
        writer.add_layer_norm_rms_eps(eps or config["rms_norm_eps"])
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(2 * width)
        writer.add_ssm_state_size(8)
        writer.add_ssm_time_step_rank(4)
        return
    if arch == "falcon":
        writer.add_layer_norm_eps(eps or config["layer_norm_epsilon"])
        return
    if arch == "deepseek2":
        _latent_attention(writer, config, eps)
        return
    if arch == "gpt2":
        writer.add_layer_norm_eps(eps or config["layer_norm_epsilon"])
        return
    head = of("head_dim", default=width // heads)
    writer.add_layer_norm_rms_eps(eps or config["rms_norm_eps"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(rotated)
    writer.add_rope_freq_base(
        rope.get("rope_theta") or rope.get("full_attention", {}).get("rope_theta") or of("rope_theta", default=10000.0)
    )
    if experts := of("num_local_experts", "num_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        if inner := of("moe_intermediate_size"):
            writer.add_expert_feed_forward_length(inner)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if arch == "gpt-oss":
        writer.add_expert_feed_forward_length(config["intermediate_size"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if arch.startswith("gemma") or arch in ("phi3", "gpt-oss"):
        writer.add_sliding_window(of("sliding_window", default=0))
    if arch == "phi3":
        writer.add_rope_scaling_orig_ctx_len(512)


def _latent_attention(writer: gguf.GGUFWriter, config: dict[str, Any], eps: float | None) -> None:
    """deepseek2's metadata: latent attention is multi-query attention of the latent row and the rotated part."""
    latent, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_layer_norm_rms_eps(eps or config["rms_norm_eps"])
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rotated)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rotated)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rotated)
    writer.add_rope_freq_base((config.get("rope_parameters") or {}).get("rope_theta", 10000.0))
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_weights_scale(config.get("routed_scaling_factor", 1.0))
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
