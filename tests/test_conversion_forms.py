"""What converters take apart, join or reorder, and what `parity weights --hf` expects of it, computed here element by element."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import Cli
from conversion_cases import (
    CASES,
    HEADS,
    Case,
    D,
    E,
    F,
    dbrx,
    falcon_h1,
    folder_of,
    granitemoe,
    qwen35,
    random,
    roberta,
    write,
)


@pytest.mark.parametrize("family", CASES, ids=lambda family: family.__name__)
def test_what_converters_make_of_a_tensor_is_equal_and_its_faults_are_named(
    family: Callable[[], Case], parity: Cli, tmp_path: Path
) -> None:
    """Every right tensor is equal to the bit; a fault is reported for exactly its tensors, in words that say what happened."""
    case = family()
    source = folder_of(case, tmp_path / "folder")
    model = write(tmp_path / "right.gguf", case.architecture, case.right)
    code, answer = parity.json("weights", "--model", model, "--hf", source)
    assert (code, {tensor["status"] for tensor in answer["tensors"]}) == (0, {"equal"}), answer["tensors"]
    for words, changed in case.faults.items():
        model = write(tmp_path / "wrong.gguf", case.architecture, case.right | changed)
        code, answer = parity.json("weights", "--model", model, "--hf", source)
        wrong = {tensor["name"]: tensor["reason"] for tensor in answer["tensors"] if tensor["status"] != "equal"}
        assert (code, wrong.keys()) == (1, changed.keys()), words
        said = words.removeprefix("_").replace("_s_", "'s ").replace("_x_", " × ").replace("half_", "0.5").replace("_", " ")
        assert all(said in reason for reason in wrong.values()), (said, wrong)


@pytest.mark.parametrize("kind", ["U8", "I32"])
def test_a_type_with_scales_of_its_own_is_not_called_extra(kind: str, parity: Cli, tmp_path: Path) -> None:
    """Weights that the folder keeps in 8 bits or packed are not checked, and it is said why; the others are."""
    case = granitemoe()
    source = folder_of(case, tmp_path / "folder")
    file = source / "model.safetensors"
    packed = np.zeros(
        case.folder["model.layers.0.block_sparse_moe.output_linear.weight"].shape, np.int32 if kind == "I32" else np.uint8
    )
    content = dict(case.folder) | {"model.layers.0.block_sparse_moe.output_linear.weight": packed}
    header, data, at = {}, b"", 0
    for name, values in content.items():
        raw = values.tobytes()
        dtype = "F32" if values.dtype == np.float32 else kind
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [at, at + len(raw)]}
        data += raw
        at += len(raw)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    model = write(tmp_path / "m.gguf", case.architecture, case.right)
    code, answer = parity.json("weights", "--model", model, "--hf", source)
    statuses = {tensor["name"]: (tensor["status"], tensor["reason"]) for tensor in answer["tensors"]}
    status, reason = statuses.pop("blk.0.ffn_down_exps.weight")
    assert (code, status) == (0, "not checked")
    assert "scales of its own" in reason
    assert {entry[0] for entry in statuses.values()} == {"equal"}


def test_a_tensor_with_nan_is_not_called_zero(parity: Cli, tmp_path: Path) -> None:
    """One NaN among right values: what is said is about that row."""
    case = granitemoe()
    source = folder_of(case, tmp_path / "folder")
    down = case.right["blk.0.ffn_down_exps.weight"].copy()
    down[1, 2, 3] = np.nan
    model = write(tmp_path / "m.gguf", case.architecture, case.right | {"blk.0.ffn_down_exps.weight": down})
    code, answer = parity.json("weights", "--model", model, "--hf", source)
    (wrong,) = (tensor["reason"] for tensor in answer["tensors"] if tensor["status"] != "equal")
    assert (code, wrong) == (1, f"row {D + 2} of {E * D}: nothing known gives these values; all other rows are right")


@pytest.mark.parametrize("architecture", ["llama", "mistral3", "chameleon"])
def test_a_wrong_row_of_reordered_ones_is_named_by_its_place(architecture: str, parity: Cli, tmp_path: Path) -> None:
    """Queries that lie otherwise in the folder: the number of a row is that in the GGUF."""
    stored = random(4 * HEADS, D)
    right = np.concatenate([head[[0, 2, 1, 3]] for head in stored.reshape(HEADS, 4, D)])
    case = Case(architecture, {}, {"model.layers.0.self_attn.q_proj.weight": stored}, {"blk.0.attn_q.weight": right})
    source = folder_of(case, tmp_path / "folder")
    assert parity("weights", "--model", write(tmp_path / "right.gguf", architecture, case.right), "--hf", source).code == 0
    wrong = right.copy()
    wrong[1] = right[6]
    model = write(tmp_path / "wrong.gguf", architecture, {"blk.0.attn_q.weight": wrong})
    code, answer = parity.json("weights", "--model", model, "--hf", source)
    (reason,) = (tensor["reason"] for tensor in answer["tensors"])
    assert (code, reason) == (1, "row 1 of 16: row 1 has the values that belong in row 6; all other rows are right")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (dbrx, {"ffn_config": None}),
        (dbrx, {"ffn_config": {"moe_num_experts": "3"}}),
        (dbrx, {"ffn_config": {"moe_num_experts": 10**30}}),
        (qwen35, {"linear_num_key_heads": 10**30, "linear_num_value_heads": 10**30}),
        (falcon_h1, {"embedding_multiplier": 10**400}),
        (roberta, {"pad_token_id": "1"}),
        (roberta, {"pad_token_id": [1]}),
    ],
)
def test_a_config_that_does_not_fit_the_tensors_is_an_answer(
    family: Callable[[], Case], changes: dict[str, Any], parity: Cli, tmp_path: Path
) -> None:
    """Numbers that are missing, of another kind or too large: tensors that are not what they should be, no error of parity's."""
    case = family()
    case.config = case.config | changes
    source = folder_of(case, tmp_path / "folder")
    model = write(tmp_path / "m.gguf", case.architecture, case.right)
    assert parity("weights", "--model", model, "--hf", source).code == 1


def test_tensors_with_fewer_dimensions_than_their_form_are_an_answer(parity: Cli, tmp_path: Path) -> None:
    """Experts in one row, a bias that is a single number: different, no error of parity's."""
    head = "model.layers.0.mlp.experts."
    flat = {head + "gate_up_proj": random(2 * E * F * D), head + "down_proj": random(E * D * F)}
    case = Case("gpt-oss", {}, flat | {"model.norm.weight": np.array(1, dtype=np.float32)}, {"output_norm.weight": random(1)})
    source = folder_of(case, tmp_path / "folder")
    assert parity("weights", "--model", write(tmp_path / "m.gguf", "gpt-oss", case.right), "--hf", source).code == 1


@pytest.mark.parametrize("heads", [3, 1000])
def test_heads_that_do_not_divide_the_rows_are_an_answer(heads: int, parity: Cli, tmp_path: Path) -> None:
    """A file whose number of heads is wrong: its queries are not what the folder's become, or the file is refused."""
    stored = random(4 * HEADS, D)
    case = Case("llama", {}, {"model.layers.0.self_attn.q_proj.weight": stored}, {"blk.0.attn_q.weight": stored[::-1]})
    source = folder_of(case, tmp_path / "folder")
    model = write(tmp_path / "m.gguf", "llama", case.right, heads)
    assert parity("weights", "--model", model, "--hf", source).code in (1, 2)


@pytest.mark.parametrize(("architecture", "added"), [("gemma3", 1), ("gemma4", 0), ("gemma3n", 0)])
def test_norms_have_1_added_where_the_converter_adds_it(architecture: str, added: int, parity: Cli, tmp_path: Path) -> None:
    """Of the Gemmas only those before 3n: w + 1 is right where the model multiplies by it, and wrong elsewhere."""
    norm = random(D)
    source = folder_of(Case(architecture, {}, {"model.layers.0.input_layernorm.weight": norm}, {}), tmp_path / "folder")
    for offset in (0, 1):
        model = write(tmp_path / "m.gguf", architecture, {"blk.0.attn_norm.weight": norm + offset})
        assert parity("weights", "--model", model, "--hf", source).code == (offset != added)
