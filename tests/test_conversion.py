"""`parity weights --hf`: a GGUF against the folder it was converted from, right and with planted faults of conversion."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from cli import Cli, refused
from gguf_writing import finish
from hf_convert import convert
from hf_folders import FAMILIES, LAYERS, NORMS, D, F, H, K, V, save, tensors

from checkpoints.answers.weights import DIFFERENT
from parity.weights.conversion import check_conversion
from reference.client import Reference


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a family's folder: config.json and safetensors in two files."""

    def make(family: str, **changes: Any) -> Path:
        place = tmp_path / family
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

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_conversion_is_equal_tensor_by_tensor(
    family: str, folder: Callable[..., Path], parity: Cli, tmp_path: Path
) -> None:
    """Permuted, offset, stacked, transposed: each tensor is what its source gives, to the bit, and config.json agrees."""
    source = folder(family)
    code, answer = parity.json("weights", "--model", convert(source, tmp_path / "m.gguf"), "--hf", source)
    assert (code, answer["verdict"]) == (0, "right"), [tensor for tensor in answer["tensors"] if tensor["status"] != "equal"]
    assert {tensor["status"] for tensor in answer["tensors"]} <= {"equal", "equal as F32"}  # the latter after an exponential
    assert len(answer["tensors"]) > 10


@pytest.mark.parametrize(
    ("family", "changes", "names", "message"),
    [
        ("llama", {"skip_permute": True}, {"attn_q", "attn_k"}, "not permuted"),
        ("falcon", {"skip_groups": True}, {"attn_qkv"}, "left in groups"),
        ("gpt_neox", {"skip_groups": True}, {"attn_qkv"}, "left in groups"),
        ("mamba", {"skip_decay": True}, {"ssm_a"}, "the logarithm of the decay"),
        ("gemma2", {"skip_norm_offset": True}, NORMS, "without the 1"),
        ("qwen2", {"swap": ("blk.1.ffn_gate.weight", "blk.1.ffn_up.weight")}, {"ffn_gate", "ffn_up"}, "exchanged"),
        ("qwen2", {"swap": ("blk.0.ffn_down.weight", "blk.1.ffn_down.weight")}, {"ffn_down"}, "exchanged: its values are in blk."),
        ("qwen2", {"turn": "blk.1.attn_output.weight"}, {"attn_output"}, "transposed"),
        ("gpt2", {"turn": "blk.0.attn_output.weight"}, {"attn_output"}, "transposed"),
        ("qwen2", {"drop": "blk.1.attn_k.bias"}, {"attn_k"}, "the GGUF does not"),
        ("qwen2", {"eps": 1e-5}, {"ε"}, "config.json says 1e-06, the GGUF"),
    ],
)  # fmt: skip
def test_a_fault_of_conversion_is_named(
    family: str,
    changes: dict[str, Any],
    names: set[str],
    message: str,
    folder: Callable[..., Path],
    parity: Cli,
    tmp_path: Path,
) -> None:
    """What the converter forgot, exchanged or lost is reported for exactly the tensors concerned."""
    source = folder(family)
    code, answer = parity.json("weights", "--model", convert(source, tmp_path / "m.gguf", **changes), "--hf", source)
    wrong = [tensor for tensor in answer["tensors"] if not tensor["status"].startswith("equal")]
    assert code == 1
    assert {tensor["name"].removesuffix(".weight").removesuffix(".bias").rpartition(".")[2] for tensor in wrong} == names
    assert all(message in tensor["reason"] for tensor in wrong)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_a_quantised_file_is_equal_as_its_type(
    kind: str, folder: Callable[..., Path], reference: Reference, parity: Cli, tmp_path: Path
) -> None:
    """Rounding to the type is no fault, and a planted permutation still is one."""
    source = folder("qwen2")
    plain = convert(source, tmp_path / "m.gguf")
    model = reference.quantize(plain, kind, tmp_path / "quantised.gguf")
    code, answer = parity.json("weights", "--model", model, "--hf", source)
    assert code == 0, [tensor for tensor in answer["tensors"] if not tensor["status"].startswith("equal")]
    assert f"equal as {kind}" in {tensor["status"] for tensor in answer["tensors"]}
    wrong = convert(source, tmp_path / "w.gguf", swap=("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"))
    model = reference.quantize(wrong, kind, tmp_path / "wrong.gguf")
    assert parity("weights", "--model", model, "--hf", source).code == 1


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
        ({"topk_group": 4}, "expert_group_used_count", 4, 8, "groups of experts a token"),
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


def test_a_number_that_is_none_is_not_compared(folder: Callable[..., Path], parity: Cli, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_one_lost_row_is_named(
    kind: str, folder: Callable[..., Path], reference: Reference, parity: Cli, tmp_path: Path
) -> None:
    """A row of the vocabulary that is its neighbour's, in a type that rounds: the row, and the first element that differs in it."""
    source = folder("qwen2")
    model = reference.quantize(convert(source, tmp_path / "m.gguf"), kind, tmp_path / "quantised.gguf")
    info = next(tensor for tensor in gguf.GGUFReader(model).tensors if tensor.name == "token_embd.weight")
    rows = int(info.shape[1])
    size = int(info.n_bytes) // rows
    data = bytearray(model.read_bytes())
    at = int(info.data_offset) + (rows - 1) * size
    data[at : at + size] = data[at - size : at]
    model.write_bytes(data)
    code, answer = parity.json("weights", "--model", model, "--hf", source)
    (wrong,) = [tensor for tensor in answer["tensors"] if not tensor["status"].startswith("equal")]
    assert (code, wrong["name"]) == (1, "token_embd.weight")
    assert wrong["reason"].startswith(f"row {rows - 1:,} of {rows:,}")
    assert wrong["first"]["element"] // int(info.shape[0]) == rows - 1


def test_bfloat16_is_read_by_its_bits(folder: Callable[..., Path], parity: Cli, tmp_path: Path) -> None:
    """A folder in bfloat16 against a GGUF of the same numbers in float32 is equal to the bit."""
    source = folder("llama")
    cut = {name: (value.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) for name, value in tensors("llama").items()}
    for file in source.glob("*.safetensors"):
        file.unlink()
    save(source / "model.safetensors", cut, bf16=True)
    model = convert(source, tmp_path / "m.gguf", cut)
    assert parity("weights", "--model", model, "--hf", source).code == 0


@pytest.mark.parametrize("damage", ["no-config", "no-tensors", "cut", "header", "offsets", "other-model"])
def test_a_damaged_folder_is_one_line(damage: str, folder: Callable[..., Path], parity: Cli, tmp_path: Path) -> None:
    """A damaged folder is one line that names the damage, exit 2, without a traceback."""
    source = folder("llama")
    model = convert(source, tmp_path / "m.gguf")
    first, second = sorted(source.glob("*.safetensors"))
    if damage == "no-config":
        (source / "config.json").unlink()
    elif damage == "no-tensors":
        first.unlink()
        second.unlink()
    elif damage == "cut":
        first.write_bytes(first.read_bytes()[:-100])
    elif damage == "header":
        first.write_bytes(b"\xff" * 100)
    elif damage == "offsets":
        first.write_bytes(first.read_bytes().replace(b'"data_offsets": [0', b'"data_offsets": [9', 1))
    else:
        save(first, {"something.else": np.ones(3, np.float32)})
        second.unlink()
    refused = parity("weights", "--model", model, "--hf", source)
    assert refused.code == 2, refused.out
    assert refused.err.count("\n") == 1


def test_a_header_says_where_it_is_damaged_and_an_unknown_type_is_no_missing_tensor(
    folder: Callable[..., Path], parity: Cli, tmp_path: Path
) -> None:
    """The tensor whose entry has another form is named, not Python's error; a tensor of a type that is not read is listed with it."""
    source = folder("llama")
    model = convert(source, tmp_path / "m.gguf")
    first = min(source.glob("*.safetensors"))
    whole = first.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    name = next(name for name in header if name.endswith("norm.weight"))
    for change, words in (
        ({"shape": None}, "Expected `array`, got `null` - at `$.shape`"),
        ({"shape": [-64]}, "Expected `int` >= 0"),
        ({"data_offsets": [0.5, 256]}, "Expected `int`, got `float`"),
    ):
        changed = json.dumps({**header, name: header[name] | change}).encode()
        first.write_bytes(len(changed).to_bytes(8, "little") + changed + whole[8 + size :])
        refused(parity("weights", "--model", model, "--hf", source), f"its header is damaged at {name}: {words}")
    first.write_bytes(b"\2" + bytes(7) + b"[]")
    refused(parity("weights", "--model", model, "--hf", source), "Expected `object`, got `array`")
    changed = json.dumps({**header, name: header[name] | {"dtype": "F99"}}).encode()
    first.write_bytes(len(changed).to_bytes(8, "little") + changed + whole[8 + size :])
    answer = parity.json("weights", "--model", model, "--hf", source)[1]
    assert f"left out, of a type that is not read: {name} (F99)" in answer["notes"]


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
