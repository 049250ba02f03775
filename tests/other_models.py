"""Tiny models of architectures that our engine may not have, as llama.cpp runs them."""

from pathlib import Path

import gguf
import numpy as np
from gguf_writing import finish

from checkpoints.gguf_file import contents, header_bytes

LAYERS, WIDTH, HEADS, KV, SIZE, FEED, VOCAB = 3, 64, 4, 2, 16, 96, 2048


def _tensors(arch: str, kv_heads: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (WIDTH,),
            "attn_q": (HEADS * SIZE, WIDTH),
            "attn_k": (kv_heads * SIZE, WIDTH),
            "attn_v": (kv_heads * SIZE, WIDTH),
            "attn_output": (WIDTH, HEADS * SIZE),
            "ffn_norm": (WIDTH,),
            "ffn_gate": (FEED, WIDTH),
            "ffn_up": (FEED, WIDTH),
            "ffn_down": (WIDTH, FEED),
        }
        if arch in ("qwen3", "gemma3"):
            block |= {"attn_q_norm": (SIZE,), "attn_k_norm": (SIZE,)}
        if arch == "gemma3":
            block |= {"post_attention_norm": (WIDTH,), "post_ffw_norm": (WIDTH,)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
        if arch == "llama":
            shapes[f"blk.{layer}.attn_output.bias"] = (WIDTH,)
    return shapes


def write_model(path: Path, arch: str, tokenizer: Path, kv_heads: int = KV) -> Path:
    """Write a tiny model of an architecture, with another model's tokenizer and seeded random weights."""
    vocabulary = {key: value for key, value in contents(tokenizer).metadata.items() if key.startswith("tokenizer.")}
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(SIZE)
    writer.add_value_length(SIZE)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(SIZE)
    writer.add_vocab_size(VOCAB)
    if arch == "gemma3":
        writer.add_sliding_window(64)
    for name, shape in _tensors(arch, kv_heads).items():
        scale = 0.02 if name.endswith("bias") else 0.2
        data = rng.standard_normal(shape) * scale + (1 if name.endswith("norm.weight") else 0)
        writer.add_tensor(name, data.astype(np.float32))
    finish(writer)
    file = contents(path)
    data = path.read_bytes()[file.data :]
    path.write_bytes(header_bytes(file.metadata | vocabulary, list(file.tensors)) + data)
    return path
