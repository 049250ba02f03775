"""Folders whose weights have scales of their own, small, with what converters make of them computed value by value."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from msgspec import Struct

OUT, IN = 24, 64  # of a projection
NAME, TO = "model.layers.0.mlp.gate_proj", "blk.0.ffn_gate.weight"
Array = np.ndarray[Any, Any]


class PackedCase(Struct):
    """A folder's quantization_config, its tensors as (type, array), the right float32 weights, and wrong ones by what is said of them."""

    settings: dict[str, Any]
    folder: dict[str, tuple[str, Array]]
    right: dict[str, Array]
    faults: dict[str, dict[str, Array]]
    architecture: str = "qwen2"
    config: dict[str, Any] = {}


def generator() -> np.random.Generator:
    """Seeded, so that a failure comes again."""
    return np.random.default_rng(16)


def eight_bits(code: int, exponent_bits: int) -> float:
    """One float of 8 bits: E4M3 without infinities, or E5M2."""
    mantissa_bits = 7 - exponent_bits
    exponent, mantissa = (code & 127) >> mantissa_bits, (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    bias = (1 << (exponent_bits - 1)) - 1
    value = mantissa * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa) * 2.0 ** (exponent - bias)
    return -value if code > 127 else value


def finite_codes(*shape: int) -> Array:
    """Random codes that are neither NaN nor infinite in E4M3 and E5M2."""
    return (generator().integers(0, 0x7C, shape) | generator().integers(0, 2, shape) << 7).astype(np.uint8)


def floats(codes: Array, exponent_bits: int = 4) -> Array:
    """The values of codes of 8 bits."""
    return np.array([eight_bits(int(code), exponent_bits) for code in codes.reshape(-1)], np.float32).reshape(codes.shape)


def fp8_blocks() -> PackedCase:
    """DeepSeek's: blocks that do not divide the matrix, in E5M2 for a change, and the usual mistakes with a scale called inverse."""
    codes, scale = finite_codes(OUT, IN), generator().uniform(0.5, 2, (2, 2)).astype(np.float32)
    plain = floats(codes, 5)
    each = np.array([[scale[row // 16, column // 40] for column in range(IN)] for row in range(OUT)])
    return PackedCase(
        {"quant_method": "fp8", "weight_block_size": [16, 40]},
        {f"{NAME}.weight": ("F8_E5M2", codes), f"{NAME}.weight_scale_inv": ("F32", scale)},
        {TO: plain * each},
        {
            "without the scales that the folder keeps beside it": {TO: plain},
            "divided by the folder's scales instead of multiplied": {TO: plain / each},
        },
    )


def fp8_latent() -> PackedCase:
    """A matrix that is taken apart by heads after its scales were applied."""
    heads, nope, value, rank = 4, 6, 5, 20
    codes, scale = finite_codes(heads * (nope + value), rank), generator().uniform(0.5, 2, (3, 2)).astype(np.float32)
    whole = floats(codes) * np.repeat(np.repeat(scale, 16, 0)[: len(codes)], 16, 1)[:, :rank]
    parts = whole.reshape(heads, nope + value, rank)
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    return PackedCase(
        {"quant_method": "fp8", "weight_block_size": [16, 16]},
        {name: ("F8_E4M3", codes), f"{name}_scale_inv": ("F32", scale)},
        {"blk.0.attn_k_b.weight": np.stack([part[:nope].T for part in parts]), "blk.0.attn_v_b.weight": parts[:, nope:]},
        {"key part not transposed": {"blk.0.attn_k_b.weight": np.stack([part[:nope] for part in parts])}},
        "deepseek2",
        {"num_attention_heads": heads, "qk_nope_head_dim": nope},
    )


def eight_bit_rows() -> PackedCase:
    """compressed-tensors: whole numbers of 8 bits, a bfloat16 scale for each row."""
    codes = generator().integers(-127, 128, (OUT, IN)).astype(np.int8)
    scale = (generator().uniform(0.5, 2, (OUT, 1)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    right = codes * (scale.astype(np.uint32) << 16).view(np.float32)
    return PackedCase(
        {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"a": {"weights": {"num_bits": 8}}}},
        {f"{NAME}.weight": ("I8", codes), f"{NAME}.weight_scale": ("BF16", scale)},
        {TO: right},
        {"without the scales": {TO: codes}},
    )


def words(numbers: Array, axis: int) -> Array:
    """Eight numbers of 4 bits in each 32 bits along an axis, the first in the lowest bits."""
    first = np.moveaxis(numbers, axis, 0)
    packed = np.zeros((len(first) // 8, *first.shape[1:]), np.uint32)
    for place in range(8):
        packed |= first[place::8].astype(np.uint32) << np.uint32(4 * place)
    return np.ascontiguousarray(np.moveaxis(packed.view(np.int32), 0, axis))


def packed_groups() -> PackedCase:
    """compressed-tensors: whole numbers of 4 bits in groups of 16 with zero points."""
    numbers, zeros = generator().integers(0, 16, (OUT, IN)), generator().integers(1, 15, (OUT, IN // 16))
    scale = generator().uniform(0.5, 2, (OUT, IN // 16)).astype(np.float32)
    right = np.array([[(numbers[r, c] - zeros[r, c // 16]) * scale[r, c // 16] for c in range(IN)] for r in range(OUT)])
    return PackedCase(
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"a": {"weights": {"num_bits": 4, "group_size": 16, "strategy": "group"}}},
        },
        {
            f"{NAME}.weight_packed": ("I32", words(numbers, 1)), f"{NAME}.weight_scale": ("F32", scale),
            f"{NAME}.weight_shape": ("I64", np.array([OUT, IN])), f"{NAME}.weight_zero_point": ("I32", words(zeros, 0)),
        },
        {TO: right},
        {"without the zero points": {TO: (numbers - 8) * np.repeat(scale, 16, 1)}},
    )  # fmt: skip


def gptq() -> PackedCase:
    """Packed along the inputs, with groups in another order than the inputs and zero points less 1."""
    numbers, zeros = generator().integers(0, 16, (IN, OUT)), generator().integers(0, 15, (IN // 16, OUT))
    scale = generator().uniform(0.5, 2, (IN // 16, OUT)).astype(np.float32)
    groups = generator().permutation(np.arange(IN) // 16).astype(np.int32)

    def weights(groups: Array, offset: int) -> Array:
        return np.array(
            [[(numbers[i, o] - zeros[groups[i], o] - offset) * scale[groups[i], o] for i in range(IN)] for o in range(OUT)]
        )

    return PackedCase(
        {"quant_method": "gptq", "bits": 4, "group_size": 16},
        {
            f"{NAME}.qweight": ("I32", words(numbers, 0)), f"{NAME}.qzeros": ("I32", words(zeros, 1)),
            f"{NAME}.scales": ("F32", scale), f"{NAME}.g_idx": ("I32", groups),
        },
        {TO: weights(groups, 1)},
        {
            "zero points off by 1: this folder's are stored less 1": {TO: weights(groups, 0)},
            "the groups in the order of inputs": {TO: weights(np.arange(IN) // 16, 1)},
        },
    )  # fmt: skip


def bitnet() -> PackedCase:
    """−1, 0 and 1, four rows far apart in a byte."""
    trits = generator().integers(0, 3, (OUT, IN))
    codes = sum((trits[OUT // 4 * place : OUT // 4 * (place + 1)] << 2 * place for place in range(4)), start=np.zeros(1, int))
    return PackedCase(
        {"quant_method": "bitnet"},
        {f"{NAME}.weight": ("U8", codes.astype(np.uint8)), f"{NAME}.weight_scale": ("F32", np.array([3.5], np.float32))},
        {TO: (trits - 1) / np.float32(3.5)},
        {"multiplied by the folder's scale": {TO: (trits - 1) * np.float32(3.5)}},
    )


FOUR = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)


def four_bits(codes: Array, first: int = 0) -> Array:
    """The values of pairs of 4-bit floats, one after the other: [..., n] → [..., 2 n]."""
    halves = [FOUR[(int(code) >> 4 * half) & 15] for code in codes.reshape(-1) for half in (first, 1 - first)]
    return np.array(halves, np.float32).reshape(*codes.shape[:-1], -1)


def nvfp4() -> PackedCase:
    """modelopt: a scale of 8 bits for each sixteen, and one for the whole beside the weight."""
    codes, scale = generator().integers(0, 256, (OUT, IN // 2)).astype(np.uint8), finite_codes(OUT, IN // 16) & 127
    right = four_bits(codes) * np.repeat(floats(scale), 16, 1)
    return PackedCase(
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {
            f"{NAME}.weight": ("U8", codes), f"{NAME}.weight_scale": ("F8_E4M3", scale),
            f"{NAME}.weight_scale_2": ("F32", np.array(0.25, np.float32)), f"{NAME}.input_scale": ("F32", np.ones(1, np.float32)),
        },
        {TO: right, "blk.0.ffn_gate.scale": np.array([0.25])},
        {
            "the high half of each byte first": {TO: four_bits(codes, 1) * np.repeat(floats(scale), 16, 1)},
            "2 × the folder's values": {"blk.0.ffn_gate.scale": np.array([0.5])},
        },
    )  # fmt: skip


def compressed_nvfp4() -> PackedCase:
    """compressed-tensors: the same, with what is divided by."""
    case = nvfp4()
    return PackedCase(
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        {
            f"{NAME}.weight_packed": case.folder[f"{NAME}.weight"], f"{NAME}.weight_scale": case.folder[f"{NAME}.weight_scale"],
            f"{NAME}.weight_global_scale": ("F32", np.array([4.0], np.float32)),
            f"{NAME}.input_global_scale": ("F32", np.array([1.0], np.float32)),
        },
        case.right,
        {"16 × the folder's values": {"blk.0.ffn_gate.scale": np.array([4.0])}},
    )  # fmt: skip


def mxfp4() -> PackedCase:
    """gpt-oss' experts, whose values gguf-py gives from blocks in ggml's order."""
    experts, width, groups = 3, 16, 2
    codes = generator().integers(0, 256, (experts, 2 * width, groups, 16)).astype(np.uint8)
    exponents = generator().integers(110, 130, (experts, 2 * width, groups)).astype(np.uint8)

    def dequantised(codes: Array) -> Array:
        blocks = np.concatenate((exponents[..., None], codes), axis=-1).reshape(-1, groups * 17)
        values: Array = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)
        return values.reshape(experts, 2 * width, -1)

    halves = np.stack((codes & 15, codes >> 4), axis=-1).reshape(*codes.shape[:-1], 32)
    right, copied = dequantised(halves[..., :16] | halves[..., 16:] << 4), dequantised(codes)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    return PackedCase(
        {"quant_method": "mxfp4"},
        {f"{name}_blocks": ("U8", codes), f"{name}_scales": ("U8", exponents)},
        {"blk.0.ffn_gate_exps.weight": right[:, 0::2], "blk.0.ffn_up_exps.weight": right[:, 1::2]},
        {
            "whose bytes were copied as they are": {"blk.0.ffn_up_exps.weight": copied[:, 1::2]},
            "gate and up taken as halves": {
                "blk.0.ffn_gate_exps.weight": right[:, :width],
                "blk.0.ffn_up_exps.weight": right[:, width:],
            },
        },
        "gpt-oss",
    )


CASES: tuple[Callable[[], PackedCase], ...] = (
    fp8_blocks, fp8_latent, eight_bit_rows, packed_groups, gptq, bitnet, nvfp4, compressed_nvfp4, mxfp4,
)  # fmt: skip


def folder_of(case: PackedCase, path: Path, settings: Any = None, folder: dict[str, Any] | None = None) -> Path:
    """The folder of a case, with other settings or tensors if they are given."""
    path.mkdir(exist_ok=True)
    config = case.config | {"quantization_config": case.settings if settings is None else settings}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    header, body = {}, b""
    for name, (kind, values) in (case.folder if folder is None else folder).items():
        raw = values.tobytes()
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path
