"""Folders of Hugging Face models with random weights, as small as they can be."""

import json
from pathlib import Path
from typing import Any

import numpy as np

V, D, F, H, K, LAYERS = 96, 64, 128, 4, 2, 2
ROW = D // H
NORMS = {"attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm", "output_norm"}
FAMILIES = ("llama", "qwen2", "gemma2", "mixtral", "gpt2", "falcon", "gpt_neox", "mamba")


def tensors(family: str) -> dict[str, np.ndarray]:
    """Random tensors under the names that transformers gives them."""
    rng = np.random.default_rng(3)

    def random(*shape: int) -> np.ndarray:
        return (0.15 * rng.standard_normal(shape)).astype(np.float32)

    arrays: dict[str, np.ndarray] = {}
    if family == "gpt2":
        arrays |= {"transformer.wte.weight": random(V, D), "transformer.wpe.weight": random(512, D)}
        arrays |= {"transformer.ln_f.weight": random(D), "transformer.ln_f.bias": random(D)}
        for layer in range(LAYERS):
            head = f"transformer.h.{layer}"
            for name, shape in (
                ("attn.c_attn", (D, 3 * D)),
                ("attn.c_proj", (D, D)),
                ("mlp.c_fc", (D, F)),
                ("mlp.c_proj", (F, D)),
            ):
                arrays |= {f"{head}.{name}.weight": random(*shape), f"{head}.{name}.bias": random(shape[1])}
            arrays |= {f"{head}.{norm}.{part}": random(D) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
        return arrays
    if family == "falcon":
        arrays |= {"transformer.word_embeddings.weight": random(V, D), "lm_head.weight": random(V, D)}
        arrays |= {"transformer.ln_f.weight": random(D), "transformer.ln_f.bias": random(D)}
        for layer in range(LAYERS):
            head = f"transformer.h.{layer}"
            arrays[f"{head}.self_attention.query_key_value.weight"] = random((H + 2 * K) * D // H, D)
            arrays[f"{head}.self_attention.dense.weight"] = random(D, D)
            arrays |= {f"{head}.mlp.dense_h_to_4h.weight": random(F, D), f"{head}.mlp.dense_4h_to_h.weight": random(D, F)}
            arrays |= {f"{head}.{norm}.{part}": random(D) for norm in ("ln_attn", "ln_mlp") for part in ("weight", "bias")}
        return arrays
    if family == "gpt_neox":
        arrays |= {"gpt_neox.embed_in.weight": random(V, D), "embed_out.weight": random(V, D)}
        arrays |= {f"gpt_neox.final_layer_norm.{part}": random(D) for part in ("weight", "bias")}
        for layer in range(LAYERS):
            head = f"gpt_neox.layers.{layer}"
            products = {"attention.query_key_value": (3 * D, D), "attention.dense": (D, D), "mlp.dense_h_to_4h": (F, D)}
            for name, shape in (products | {"mlp.dense_4h_to_h": (D, F)}).items():
                arrays |= {f"{head}.{name}.weight": random(*shape), f"{head}.{name}.bias": random(shape[0])}
            norms = ("input_layernorm", "post_attention_layernorm")
            arrays |= {f"{head}.{norm}.{part}": random(D) for norm in norms for part in ("weight", "bias")}
        return arrays
    if family == "mamba":
        arrays |= {"backbone.embeddings.weight": random(V, D), "backbone.norm_f.weight": random(D)}
        for layer in range(LAYERS):
            head = f"backbone.layers.{layer}"
            arrays |= {f"{head}.norm.weight": random(D), f"{head}.mixer.conv1d.weight": random(F, 1, 4)}
            arrays |= {f"{head}.mixer.A_log": random(F, 8), f"{head}.mixer.D": random(F)}
            arrays |= {f"{head}.mixer.in_proj.weight": random(2 * F, D), f"{head}.mixer.out_proj.weight": random(D, F)}
        return arrays
    arrays |= {"model.embed_tokens.weight": random(V, D), "model.norm.weight": random(D)}
    if family != "gemma2":
        arrays["lm_head.weight"] = random(V, D)
    for layer in range(LAYERS):
        head = f"model.layers.{layer}"
        for name, rows in (("q", H * ROW), ("k", K * ROW), ("v", K * ROW)):
            arrays[f"{head}.self_attn.{name}_proj.weight"] = random(rows, D)
            if family == "qwen2":
                arrays[f"{head}.self_attn.{name}_proj.bias"] = random(rows)
        arrays[f"{head}.self_attn.o_proj.weight"] = random(D, H * ROW)
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] * (family == "gemma2")
        arrays |= {f"{head}.{norm}.weight": random(D) for norm in norms}
        if family == "mixtral":
            arrays[f"{head}.block_sparse_moe.gate.weight"] = random(4, D)
            for expert in range(4):
                place = f"{head}.block_sparse_moe.experts.{expert}"
                arrays |= {
                    f"{place}.w1.weight": random(F, D),
                    f"{place}.w2.weight": random(D, F),
                    f"{place}.w3.weight": random(F, D),
                }
        else:
            arrays |= {f"{head}.mlp.gate_proj.weight": random(F, D), f"{head}.mlp.up_proj.weight": random(F, D)}
            arrays[f"{head}.mlp.down_proj.weight"] = random(D, F)
    return arrays


def save(path: Path, content: dict[str, np.ndarray], *, bf16: bool = False) -> None:
    """A safetensors file; bfloat16, which NumPy lacks, is written as its bits."""
    header, body = {}, b""
    for name, value in content.items():
        data = (value.view(np.uint32) >> 16).astype("<u2").tobytes() if bf16 else value.tobytes()
        header[name] = {
            "dtype": "BF16" if bf16 else "F32",
            "shape": value.shape,
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def make_folder(parent: Path, family: str, **changes: Any) -> Path:
    """Write a family's folder, config.json and safetensors in two files; `changes` are further settings."""
    place = parent / family
    place.mkdir()
    config: dict[str, Any] = {
        "model_type": family, "vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": H,
        "num_key_value_heads": K, "intermediate_size": F, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    }  # fmt: skip
    if family == "mixtral":
        config |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if family == "falcon":
        config = {
            "model_type": family, "vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": H,
            "num_kv_heads": K, "ffn_hidden_size": F, "layer_norm_epsilon": 1e-5,
        }  # fmt: skip
    if family == "gpt_neox":
        del config["rms_norm_eps"], config["num_key_value_heads"]
        config |= {"layer_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 10000.0}, "use_parallel_residual": True}
    if family == "gpt2":
        config = {
            "model_type": family, "vocab_size": V, "n_embd": D, "n_layer": LAYERS, "n_head": H, "n_inner": F,
            "layer_norm_epsilon": 1e-5,
        }  # fmt: skip
    (place / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    content = tensors(family)
    half = len(content) // 2
    save(place / "model-00001-of-00002.safetensors", dict(list(content.items())[:half]))
    save(place / "model-00002-of-00002.safetensors", dict(list(content.items())[half:]))
    return place
