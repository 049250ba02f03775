"""`parity weights --hf`: a GGUF's settings against config.json, RoPE's among them."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from cli import Cli
from gguf_writing import finish
from hf_convert import convert
from hf_folders import D, H, make_folder

from checkpoints.answers.weights import DIFFERENT
from parity.weights.conversion import check_conversion


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a family's folder."""
    return partial(make_folder, tmp_path)


@pytest.mark.parametrize(
    ("family", "before", "after", "setting"),
    [
        ("gemma2", {}, {"attn_logit_softcapping": 30.0}, "soft cap of attention"),
        ("gemma2", {}, {"final_logit_softcapping": 20.0}, "soft cap of logits"),
        ("llama", {}, {"head_dim": 32}, "head size"),
        ("gpt_neox", {}, {"rotary_pct": 0.25}, "rotated dimensions"),
        ("qwen2", {"eos_token_id": 7}, {"eos_token_id": [5, 6]}, "eos token"),
        ("qwen2", {"eos_token_id": 7}, {"eos_token_id": [5, 7]}, ""),
    ],
)
def test_a_number_that_config_json_gives_otherwise_is_named(
    family: str,
    before: dict[str, Any],
    after: dict[str, Any],
    setting: str,
    folder: Callable[..., Path],
    parity: Cli,
    tmp_path: Path,
) -> None:
    """Soft caps, the heads' size, rotated dimensions, the token that ends a text, of which config.json may give several."""
    source = folder(family, **before)
    model = convert(source, tmp_path / "m.gguf")
    assert parity("weights", "--model", model, "--hf", source).code == 0
    config = source / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | after), encoding="utf-8")
    code, answer = parity.json("weights", "--model", model, "--hf", source)
    wrong = [tensor["name"] for tensor in answer["tensors"] if not tensor["status"].startswith("equal")]
    assert (code, wrong) == ((1, [setting]) if setting else (0, []))


@pytest.mark.parametrize(
    ("config", "key", "right", "wrong", "setting"),
    [
        ({"routed_scaling_factor": 2.5}, "expert_weights_scale", 2.5, 1.0, "scale of expert weights"),
        ({"route_scale": 2.826}, "expert_weights_scale", 2.826, 2.0, "scale of expert weights"),
        ({"norm_topk_prob": False}, "expert_weights_norm", False, True, "weights of chosen experts"),
        ({"route_norm": True}, "expert_weights_norm", True, False, "weights of chosen experts"),
        ({"scoring_func": "sigmoid"}, "expert_gating_func", 2, 1, "scores of experts"),
        ({"n_group": 8}, "expert_group_count", 8, 4, "groups of experts"),
        ({"topk_group": 4}, "expert_group_used_count", 4, 8, "groups of experts per token"),
        ({"first_k_dense_replace": 1}, "leading_dense_block_count", 1, 0, "first layers without experts"),
        ({"clip_qkv": 8.0}, "attention.clamp_kqv", 8.0, 6.0, "limit of Q, K and V"),
        ({"rope_local_base_freq": 1e4}, "rope.freq_base_swa", 1e4, 1e6, "RoPE base of windowed layers"),
        (
            {"layer_types": ["sliding_attention", "full_attention"]},
            "attention.sliding_window_pattern",
            [True, False],
            [True, True],
            "window of layer 1",
        ),
    ],
)
def test_a_setting_of_some_architectures_is_compared(
    config: dict[str, Any],
    key: str,
    right: Any,
    wrong: Any,
    setting: str,
    folder: Callable[..., Path],
    parity: Cli,
    tmp_path: Path,
) -> None:
    """The choice of experts, limits and windows: what a converter wrote otherwise is named, by whichever name families give it."""
    source = folder("llama", **config)
    assert parity("weights", "--model", convert(source, tmp_path / "r.gguf", metadata={key: right}), "--hf", source).code == 0
    model = convert(source, tmp_path / "w.gguf", metadata={key: wrong})
    code, answer = parity.json("weights", "--model", model, "--hf", source)
    assert code == 1
    assert [tensor["name"] for tensor in answer["tensors"] if not tensor["status"].startswith("equal")] == [setting]


def test_a_number_beyond_every_float_is_not_compared(folder: Callable[..., Path], tmp_path: Path) -> None:
    """Integers beyond every float, infinity and NaN in config.json end no command: the tensors are compared, those settings are not."""
    source = folder("llama", sliding_window=16)
    model = convert(source, tmp_path / "m.gguf", metadata={"attention.sliding_window": 16})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for value in (10**400, float("inf"), float("nan")):
        for name in ("sliding_window", "rope_theta", "partial_rotary_factor"):
            (source / "config.json").write_text(json.dumps(config | {name: value}), encoding="utf-8")
            assert [check.name for check in check_conversion(model, source).tensors if check.status == DIFFERENT] == []


def test_the_tokenizers_files_name_the_end_of_a_text(folder: Callable[..., Path], parity: Cli, tmp_path: Path) -> None:
    """An id that only tokenizer_config.json's added tokens, or generation_config.json, have is right as well."""
    source = folder("qwen2", eos_token_id=7)
    model = convert(source, tmp_path / "m.gguf")
    config = source / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"eos_token_id": 7', '"eos_token_id": 5'), encoding="utf-8")
    assert parity("weights", "--model", model, "--hf", source).code == 1
    tokenizer = {"eos_token": {"content": "<end>"}, "added_tokens_decoder": {"7": {"content": "<end>"}, "x": 1}}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert parity("weights", "--model", model, "--hf", source).code == 0
    (source / "tokenizer_config.json").write_text("[", encoding="utf-8")
    (source / "generation_config.json").write_text('{"eos_token_id": [7]}', encoding="utf-8")
    assert parity("weights", "--model", model, "--hf", source).code == 0


def _add(path: Path, out: Path, tensors_: dict[str, np.ndarray], **numbers: Any) -> Path:
    """The same file with further tensors and metadata, by gguf-py."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        if field.types[0] != gguf.GGUFValueType.ARRAY:
            writer.add_key_value(name, field.contents(), field.types[0])
    for name, value in numbers.items():
        kind = gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.FLOAT32
        writer.add_key_value(f"llama.rope.scaling.{name}", value, kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    for name, values in tensors_.items():
        writer.add_tensor(name, values)
    finish(writer)
    return out


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def llama3_factors(size: int, base: float) -> np.ndarray:
    """One pair after the other, as transformers' _compute_llama3_parameters decides by the wavelength."""
    factors = []
    for pair in range(size // 2):
        wave = 2 * np.pi * base ** (2 * pair / size)
        if wave < 128 / 4.0:
            factors.append(1.0)
        elif wave > 128 / 1.0:
            factors.append(8.0)
        else:
            smooth = (128 / wave - 1.0) / (4.0 - 1.0)
            factors.append(1 / ((1 - smooth) / 8.0 + smooth))
    return np.array(factors, np.float32)


def test_ropes_factors_are_those_of_config_json(folder: Callable[..., Path], parity: Cli, tmp_path: Path) -> None:
    """llama3's frequencies: right ones are equal; those of another factor, their inverse and missing ones are reported."""
    source = folder("llama", rope_scaling=LLAMA3)
    plain = convert(source, tmp_path / "plain.gguf")
    right = llama3_factors(D // H, 10000.0)
    assert len(set(right.tolist())) > 2
    message = {}
    for name, values in {"right": right, "other": llama3_factors(D // H, 500.0), "inverse": 1 / right}.items():
        model = _add(plain, tmp_path / f"{name}.gguf", {"rope_freqs.weight": values.astype(np.float32)})
        code, answer = parity.json("weights", "--model", model, "--hf", source)
        message[name] = (
            code,
            [tensor["reason"] for tensor in answer["tensors"] if tensor["status"] not in ("equal", "not checked")],
        )
    assert message["right"] == (0, [])
    assert message["other"] == (1, ["other factors than config.json gives"])
    assert message["inverse"] == (1, ["1 / the factors that config.json gives"])
    code, answer = parity.json("weights", "--model", plain, "--hf", source)
    assert code == 1
    assert "the GGUF has no factors" in answer["tensors"][-1]["reason"]


@pytest.mark.parametrize(
    ("config", "held", "message"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}, ""),
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 2.0}, "config.json says 4, the GGUF 2"),
        ({"rope_type": "yarn", "factor": 4.0}, {}, "config.json says yarn, the GGUF none"),
        ({}, {"type": "linear", "factor": 2.0}, "config.json says default, the GGUF linear"),
    ],
)
def test_ropes_scaling_is_that_of_config_json(
    config: dict[str, Any], held: dict[str, Any], message: str, folder: Callable[..., Path], parity: Cli, tmp_path: Path
) -> None:
    """The kind of scaling and its factor are compared with config.json."""
    source = folder("llama", rope_scaling=config)
    model = _add(convert(source, tmp_path / "plain.gguf"), tmp_path / "m.gguf", {}, **held)
    code, answer = parity.json("weights", "--model", model, "--hf", source)
    wrong = [tensor["reason"] for tensor in answer["tensors"] if tensor["status"] != "equal"]
    assert (code, wrong) == ((1, [message]) if message else (0, []))
