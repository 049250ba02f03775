"""`parity weights --hf`: a GGUF against the folder it was converted from, right and with planted faults of conversion."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from cli import Cli, refused
from hf_convert import convert
from hf_folders import FAMILIES, NORMS, make_folder, save, tensors

from reference.client import Reference


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a family's folder."""
    return partial(make_folder, tmp_path)


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


@pytest.mark.parametrize("damage", ["no-config", "no-tensors", "cut", "header", "offsets", "pointer", "shard", "other-model"])
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
    elif damage == "pointer":
        first.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    elif damage == "shard":
        index = {"weight_map": {"a.weight": first.name, "b.weight": second.name}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        second.unlink()
    else:
        save(first, {"something.else": np.ones(3, np.float32)})
        second.unlink()
    refused = parity("weights", "--model", model, "--hf", source)
    assert refused.code == 2, refused.out
    words = {"pointer": "is a Git LFS pointer", "shard": f"lacks {second.name}, which its index lists"}
    assert words.get(damage, "parity: ") in refused.err
    assert refused.err.count("\n") == 1


def test_the_folder_of_another_model_of_the_same_shape_is_suspected(
    folder: Callable[..., Path], parity: Cli, tmp_path: Path
) -> None:
    """Where nothing is equal the answer says first that the folder may be another model's."""
    source = folder("llama")
    model = convert(source, tmp_path / "m.gguf")
    for number, file in enumerate(sorted(source.glob("*.safetensors"))):
        half = list(tensors("llama").items())[number::2]
        save(file, {name: 1.5 - 2 * values for name, values in half})
    code, answer = parity.json("weights", "--model", model, "--hf", source)
    assert (code, answer["notes"][0]) == (
        1,
        "no tensor is equal: the folder may be another model's (its config.json says llama)",
    )


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
