"""Families whose tensors llama.cpp's converter takes apart, joins or reorders: a folder, the right file, and wrong ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf_writing import finish
from hf_folders import save

Tensors = dict[str, np.ndarray]
RNG = np.random.default_rng(18)
E, D, F, HEADS = 3, 8, 12, 4  # experts, hidden width, experts' width, heads


def random(*shape: int) -> np.ndarray:
    """Random float32 numbers."""
    return RNG.standard_normal(shape).astype(np.float32)


class Case:
    """A family: config.json, the folder's tensors, those that llama.cpp's converter makes of them, and faults by what names them."""

    def __init__(self, architecture: str, config: dict[str, Any], folder: Tensors, right: Tensors, **faults: Tensors) -> None:
        self.architecture, self.config, self.folder, self.right, self.faults = architecture, config, folder, right, faults


def gpt_oss() -> Case:
    """Gate and up in turns, [experts, in, out]."""
    both, bias, down = random(E, D, 2 * F), random(E, 2 * F), random(E, F, D)
    gate = np.stack([[[both[e, i, 2 * o] for i in range(D)] for o in range(F)] for e in range(E)])
    up = np.stack([[[both[e, i, 2 * o + 1] for i in range(D)] for o in range(F)] for e in range(E)])
    head = "model.layers.0.mlp.experts."
    return Case(
        "gpt-oss",
        {},
        {head + "gate_up_proj": both, head + "gate_up_proj_bias": bias, head + "down_proj": down},
        {
            "blk.0.ffn_gate_exps.weight": gate,
            "blk.0.ffn_up_exps.weight": up,
            "blk.0.ffn_gate_exps.bias": bias[:, 0::2],
            "blk.0.ffn_up_exps.bias": bias[:, 1::2],
            "blk.0.ffn_down_exps.weight": np.stack([part.T for part in down]),
        },
        as_halves={"blk.0.ffn_gate_exps.weight": np.stack([part.T[:F] for part in both])},
        exchanged={"blk.0.ffn_gate_exps.weight": up, "blk.0.ffn_up_exps.weight": gate},
        reshaped={"blk.0.ffn_down_exps.weight": down.reshape(E, D, F)},
        folder_s_matrix_2={"blk.0.ffn_up_exps.weight": up[::-1]},
        all_zero={"blk.0.ffn_gate_exps.bias": 0 * bias[:, 0::2]},
    )


def llama4() -> Case:
    """Gate and up as halves, [experts, in, out]."""
    both = random(E, D, 2 * F)
    parts = {"gate": [part.T[:F] for part in both], "up": [part.T[F:] for part in both]}
    return Case(
        "llama4",
        {},
        {"model.layers.0.feed_forward.experts.gate_up_proj": both},
        {f"blk.0.ffn_{kind}_exps.weight": np.stack(matrices) for kind, matrices in parts.items()},
        in_turns={"blk.0.ffn_gate_exps.weight": np.stack([part.T[0::2] for part in both])},
    )


def deepseek() -> Case:
    """kv_b_proj is each head's key and value part; the bias of the choice has another name."""
    nope, value, rank = 6, 5, 7
    whole, bias = random(HEADS * (nope + value), rank), random(E)
    keys = [whole[h * (nope + value) : h * (nope + value) + nope].T for h in range(HEADS)]
    values = [whole[h * (nope + value) + nope : (h + 1) * (nope + value)] for h in range(HEADS)]
    return Case(
        "deepseek2",
        {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "qk_nope_head_dim": nope, "v_head_dim": value},
        {
            "model.layers.0.self_attn.kv_b_proj.weight": whole,
            "model.layers.0.mlp.gate.e_score_correction_bias": bias,
        },
        {
            "blk.0.attn_k_b.weight": np.stack(keys),
            "blk.0.attn_v_b.weight": np.stack(values),
            "blk.0.exp_probs_b.bias": bias,
        },
        key_part_not_transposed={"blk.0.attn_k_b.weight": np.stack([key.T for key in keys])},
        folder_s_matrix_3={"blk.0.attn_v_b.weight": np.roll(np.stack(values), 1, 0)},
    )


def granitemoe() -> Case:
    """Stacked experts' gate and up as halves of rows, no transposition."""
    both, down = random(E, 2 * F, D), random(E, D, F)
    head = "model.layers.0.block_sparse_moe."
    return Case(
        "granitemoe",
        {"num_local_experts": E},
        {head + "input_linear.weight": both, head + "output_linear.weight": down},
        {
            "blk.0.ffn_gate_exps.weight": both[:, :F],
            "blk.0.ffn_up_exps.weight": both[:, F:],
            "blk.0.ffn_down_exps.weight": down,
        },
        half__x_the_folder={"blk.0.ffn_down_exps.weight": 0.5 * down},
    )


def dbrx() -> Case:
    """All experts' rows in one matrix, of which down is transposed."""
    gate, down = random(E * F, D), random(E * F, D)
    head = "transformer.blocks.0.ffn.experts.mlp."
    return Case(
        "dbrx",
        {"ffn_config": {"moe_num_experts": E}},
        {head + "w1": gate, head + "w2": down},
        {
            "blk.0.ffn_gate_exps.weight": gate.reshape(E, F, D),
            "blk.0.ffn_down_exps.weight": np.stack([down[e * F : (e + 1) * F].T for e in range(E)]),
        },
        reshaped={"blk.0.ffn_down_exps.weight": down.reshape(E, D, F)},
    )


def qwen35() -> Case:
    """Value heads in the order of their number beside a key head, and norms with 1 added but for the gated one."""
    few, many, size = 2, 6, 4
    order = [k * (many // few) + v for v in range(many // few) for k in range(few)]  # of a head of the GGUF: the folder's
    rows = [head * size + i for head in order for i in range(size)]
    fused, gate, out, norm = random(2 * few * size + many * size, D), random(many, D), random(D, many * size), random(size)
    fused_right = np.concatenate([fused[: 2 * few * size], fused[2 * few * size :][rows]])
    head = "model.layers.0."
    return Case(
        "qwen35",
        {
            "linear_num_key_heads": few,
            "linear_num_value_heads": many,
            "linear_key_head_dim": size,
            "linear_value_head_dim": size,
        },
        {
            head + "linear_attn.in_proj_qkv.weight": fused,
            head + "linear_attn.in_proj_b.weight": gate,
            head + "linear_attn.out_proj.weight": out,
            head + "linear_attn.norm.weight": norm,
            head + "input_layernorm.weight": norm,
        },
        {
            "blk.0.attn_qkv.weight": fused_right,
            "blk.0.ssm_beta.weight": gate[order],
            "blk.0.ssm_out.weight": out[:, rows],
            "blk.0.ssm_norm.weight": norm,
            "blk.0.attn_norm.weight": norm + 1,
        },
        beside_their_key_head={"blk.0.attn_qkv.weight": fused, "blk.0.ssm_out.weight": out, "blk.0.ssm_beta.weight": gate},
        without_the_1={"blk.0.attn_norm.weight": norm},
        with_1_added={"blk.0.ssm_norm.weight": norm + 1},
    )


def qwen3next() -> Case:
    """For each key head its query, key, values and gates in one projection."""
    few, key, value = 2, 3, 5
    heads = random(few, 2 * key + 2 * value, D)
    parts = {"q": heads[:, :key], "k": heads[:, key : 2 * key], "v": heads[:, 2 * key : 2 * key + value]}
    return Case(
        "qwen3next",
        {
            "linear_num_key_heads": few,
            "linear_num_value_heads": few,
            "linear_key_head_dim": key,
            "linear_value_head_dim": value,
        },
        {"model.layers.0.linear_attn.in_proj_qkvz.weight": heads.reshape(-1, D)},
        {
            "blk.0.attn_qkv.weight": np.concatenate([row for part in parts.values() for row in part]),
            "blk.0.attn_gate.weight": np.concatenate([head[-value:] for head in heads]),
        },
    )


def falcon_h1() -> Case:
    """Multipliers of activations that the converter applies to the weights, in float32 one after the other."""
    inner, states, steps = 4, 3, 2
    into, key, embedding = random(2 * inner + 2 * states + steps, D), random(HEADS * 2, D), random(5, D)
    multipliers = [0.5, 0.7, 1.1, 0.3, 0.9]
    sizes = [inner, inner, states, states, steps]
    of_row = np.repeat(np.array(multipliers, np.float32), sizes)[:, None]
    return Case(
        "falcon-h1",
        {
            "mamba_d_ssm": inner, "mamba_n_groups": 1, "mamba_d_state": states, "ssm_in_multiplier": 1.25, "ssm_multipliers": multipliers,
            "key_multiplier": 0.39, "attention_in_multiplier": 0.81, "embedding_multiplier": 5.65,
        },
        {
            "model.layers.0.mamba.in_proj.weight": into,
            "model.layers.0.self_attn.k_proj.weight": key,
            "model.embed_tokens.weight": embedding,
        },
        {
            "blk.0.ssm_in.weight": into * np.float32(1.25) * of_row,
            "blk.0.attn_k.weight": key * np.float32(0.39) * np.float32(0.81),
            "token_embd.weight": embedding * np.float32(5.65),
        },
        without_the_multiplier={"blk.0.ssm_in.weight": into, "blk.0.attn_k.weight": key, "token_embd.weight": embedding},
        _81_x_the_folder={"token_embd.weight": embedding * np.float32(5.65 * 0.81)},
    )  # fmt: skip


def roberta() -> Case:
    """Positions after the padding token's."""
    positions = random(10, D)
    return Case(
        "bert",
        {"model_type": "xlm-roberta", "pad_token_id": 1},
        {"embeddings.position_embeddings.weight": positions},
        {"position_embd.weight": positions[2:]},
        begins_with_the_rows_of_padding={"position_embd.weight": positions[:-2]},
    )


def gemma3n() -> Case:
    """Projections that have a number each are one tensor."""
    parts = random(3, D, D)
    return Case(
        "gemma3n",
        {},
        {f"model.altup_projections.{number}.weight": part for number, part in enumerate(parts)},
        {"altup_proj.weight": parts},
        matrices_is_transposed={"altup_proj.weight": parts.swapaxes(1, 2)},
    )


def plamo3() -> Case:
    """Norms to which another number is added in each place."""
    norm = random(D)
    head = "model.layers.layers.0."
    places = {"pre_mixer": "attn_norm.weight", "post_mixer": "post_attention_norm", "pre_mlp": "ffn_norm.weight"}
    right = {f"blk.0.{name}": norm + np.float32(0.2 if place == "post_mixer" else 1) for place, name in places.items()}
    right["blk.0.post_ffw_norm"] = norm + np.float32(1 / 5**1.5)
    return Case(
        "plamo3",
        {},
        {f"{head}{place}_norm.weight": norm for place in (*places, "post_mlp")},
        right,
        without_the_1={"blk.0.attn_norm.weight": norm},
        without_the_={"blk.0.post_ffw_norm": norm},
    )


def chameleon() -> Case:
    """Norms of queries and keys: the first head's halves as neighbours, for every head."""
    halves = random(6)
    neighbours = np.array([halves[i // 2 + 3 * (i % 2)] for i in range(6)])
    return Case(
        "chameleon",
        {},
        {"model.layers.0.self_attn.q_norm.weight": np.stack([halves] * HEADS)},
        {"blk.0.attn_q_norm.weight": np.stack([neighbours] * HEADS)},
        in_the_order_of_halves={"blk.0.attn_q_norm.weight": np.stack([halves] * HEADS)},
    )


def jais() -> Case:
    """Scales of embeddings and logits, and matrices that are kept turned."""
    embedding, up = random(5, D), random(D, F)
    return Case(
        "jais",
        {"mup_embeddings_scale": 9.25, "mup_output_alpha": 1.7, "mup_width_scale": 0.0625},
        {"transformer.wte.weight": embedding, "lm_head.weight": embedding, "transformer.h.0.mlp.c_fc.weight": up},
        {
            "token_embd.weight": embedding * np.float32(9.25),
            "output.weight": embedding * np.float32(1.7 * 0.0625),
            "blk.0.ffn_up.weight": up.T,
        },
        without_the_multiplier={"token_embd.weight": embedding},
    )


CASES: tuple[Callable[[], Case], ...] = (
    plamo3, chameleon, jais, gpt_oss, llama4, deepseek, granitemoe, dbrx, qwen35, qwen3next, falcon_h1, roberta, gemma3n,
)  # fmt: skip


def write(path: Path, architecture: str, tensors: Tensors, heads: int = HEADS) -> Path:
    """A GGUF with one layer's tensors and the metadata that every file has."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_block_count(1)
    writer.add_feed_forward_length(F)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_vocab_size(5)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("none")
    finish(writer, tensors)
    return path


def folder_of(case: Case, path: Path) -> Path:
    """A family's folder."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(case.config), encoding="utf-8")
    save(path / "model.safetensors", case.folder)
    return path
