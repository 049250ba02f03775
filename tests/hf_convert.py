"""A folder of safetensors as GGUF, as llama.cpp's converter writes it, for tests: gguf-py's names, and what converters change."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}
_EXPERTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def convert(folder: Path, out: Path, source: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
    """Write the model in `folder` to `out`, float32. `source` are its tensors, where NumPy cannot read their type.

    `changes` plant a converter's fault: skip_permute, skip_norm_offset, eps=…, swap=(name, name), drop=name.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config["model_type"]
    arch = ARCHITECTURES.get(kind, kind)
    layers = config.get("num_hidden_layers") or config["n_layer"]
    writer = gguf.GGUFWriter(out, arch)
    _metadata(writer, arch, config, layers, changes.get("eps"))
    names = gguf.get_tensor_name_map(next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), layers)
    files = () if source else sorted(folder.glob("*.safetensors"))
    whole = {name: value for file in files for name, value in load_file(file).items()}
    tensors: dict[str, np.ndarray] = {}
    for name, value in _joined(source or whole).items():
        to = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert to is not None, name
        tensors[to] = _converted(arch, name, value, config, changes)
    if swap := changes.get("swap"):
        tensors[swap[0]], tensors[swap[1]] = tensors[swap[1]], tensors[swap[0]]
    tensors.pop(changes.get("drop", ""), None)
    for to, value in tensors.items():
        writer.add_tensor(to, np.ascontiguousarray(value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _converted(arch: str, name: str, value: np.ndarray, config: dict[str, Any], changes: dict[str, Any]) -> np.ndarray:
    if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")) and not changes.get("skip_permute"):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        return value.reshape(heads, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
    if arch.startswith("gemma") and name.endswith("norm.weight") and not changes.get("skip_norm_offset"):
        return value + 1
    if arch == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return value.T
    return value


def _joined(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with those of a layer's experts stacked."""
    made: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        head, mark, rest = name.partition(".experts.")
        if not mark:
            made[name] = value
        elif rest.startswith("0."):
            leaf = rest.removeprefix("0.")
            count = sum(other.startswith(f"{head}.experts.") and other.endswith(leaf) for other in tensors)
            stacked = np.stack([tensors[f"{head}.experts.{number}.{leaf}"] for number in range(count)])
            made[
                f"{head.replace('block_sparse_moe', 'mlp')}.experts.{_EXPERTS.get(leaf.split('.')[0], leaf.split('.')[0])}.weight"
            ] = stacked
    return made


def _metadata(writer: gguf.GGUFWriter, arch: str, config: dict[str, Any], layers: int, eps: float | None) -> None:
    def of(*names: str, default: Any = None) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), default)

    heads = of("num_attention_heads", "n_head")
    width = of("hidden_size", "n_embd")
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(of("intermediate_size", "n_inner"))
    writer.add_head_count(heads)
    writer.add_head_count_kv(of("num_key_value_heads", default=heads))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    if arch == "gpt2":
        writer.add_layer_norm_eps(eps or config["layer_norm_epsilon"])
        return
    head = of("head_dim", default=width // heads)
    writer.add_layer_norm_rms_eps(eps or config["rms_norm_eps"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    rope = config.get("rope_parameters") or {}
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
    if arch.startswith("gemma") or arch == "phi3":
        writer.add_sliding_window(of("sliding_window", default=0))
    if arch == "phi3":
        writer.add_rope_scaling_orig_ctx_len(512)
