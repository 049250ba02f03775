"""Weights that a folder keeps with scales of their own, and what `parity weights --hf` expects of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import Cli
from conversion_cases import write
from packed_cases import CASES, IN, NAME, OUT, TO, PackedCase, finite_codes, floats, folder_of, fp8_blocks, gptq, mxfp4

from parity.weights.conversion import check_conversion
from parity.weights.folder_quantisation import unpacked
from parity.weights.stored import Stored


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_packed_weights_are_read_and_mistakes_with_their_scales_are_named(
    make: Callable[[], PackedCase], parity: Cli, tmp_path: Path
) -> None:
    """Right conversions are equal to the bit, nothing is left unchecked; a mistake is named for exactly its tensors."""
    case = make()
    source = folder_of(case, tmp_path / "folder")
    code, answer = parity.json("weights", "--model", write(tmp_path / "m.gguf", case.architecture, case.right), "--hf", source)
    assert (code, {tensor["status"] for tensor in answer["tensors"]}) == (0, {"equal"}), answer["tensors"]
    assert answer["notes"] == []
    for words, changed in case.faults.items():
        model = write(tmp_path / "wrong.gguf", case.architecture, case.right | changed)
        code, answer = parity.json("weights", "--model", model, "--hf", source)
        wrong = {tensor["name"]: tensor["reason"] for tensor in answer["tensors"] if tensor["status"] != "equal"}
        assert (code, wrong.keys()) == (1, changed.keys()), words
        assert all(words in reason for reason in wrong.values()), wrong


def test_floats_of_eight_bits_without_scales_are_their_values(parity: Cli, tmp_path: Path) -> None:
    """A folder that was cast to 8 bits, without a method: each code is its value."""
    case = fp8_blocks()
    codes = finite_codes(8, 64)
    source = folder_of(case, tmp_path / "folder", {}, {f"{NAME}.weight": ("F8_E4M3", codes)})
    model = write(tmp_path / "m.gguf", "qwen2", {TO: floats(codes)})
    assert parity("weights", "--model", model, "--hf", source).code == 0


def test_a_scale_that_no_method_names_is_not_left_out(parity: Cli, tmp_path: Path) -> None:
    """Floats of 8 bits beside a scale: modelopt names itself in hf_quant_config.json only; without that nothing is known of the scale."""
    codes = finite_codes(8, 64)
    scale = ("F32", np.array(0.25, np.float32))
    tensors = {f"{NAME}.weight": ("F8_E4M3", codes), f"{NAME}.weight_scale": scale, f"{NAME}.input_scale": scale}
    source = folder_of(fp8_blocks(), tmp_path / "folder", {}, tensors)
    model = write(tmp_path / "m.gguf", "qwen2", {TO: floats(codes) * np.float32(0.25)})
    for content, status in (('{"producer": {"name": "modelopt"}}', "equal"), ('{"producer": [{}]}', "not checked")):
        (source / "hf_quant_config.json").write_text(content, encoding="utf-8")
        _, answer = parity.json("weights", "--model", model, "--hf", source)
        assert [tensor["status"] for tensor in answer["tensors"] if tensor["name"] == TO] == [status]
        assert status != "equal" or len(answer["tensors"]) == 1, answer["tensors"]


def test_matrices_that_a_converter_rounds_are_not_accused(parity: Cli, tmp_path: Path) -> None:
    """BitNet's converter rounds matrices to −1, 0 and 1 times a scale of its own, and writes a linear scaling of RoPE by 1."""
    weights = finite_codes(OUT, IN).astype(np.float32) - 90
    size = np.abs(weights).mean()
    model = write(tmp_path / "m.gguf", "bitnet", {TO: np.clip(np.round(weights / size), -1, 1) * size})
    source = folder_of(fp8_blocks(), tmp_path / "folder", {}, {f"{NAME}.weight": ("F32", weights)})
    code, answer = parity.json("weights", "--model", model, "--hf", source)
    assert (code, [tensor["status"] for tensor in answer["tensors"]]) == (0, ["not checked"])


@pytest.mark.parametrize("method", ["awq", "bitsandbytes", "something-new"])
def test_a_method_that_is_not_read_is_named(method: str, parity: Cli, tmp_path: Path) -> None:
    """Packed weights of another method are not checked, and one line says whose they are and what to do."""
    case = gptq()
    source = folder_of(case, tmp_path / "folder", {"quant_method": method})
    code, answer = parity.json("weights", "--model", write(tmp_path / "m.gguf", "qwen2", case.right), "--hf", source)
    (tensor,) = answer["tensors"]
    assert (code, tensor["status"]) == (0, "not checked")
    assert f"quantised by {method}, which is not read: use the folder before quantisation" in tensor["reason"]


@pytest.mark.parametrize("settings", [{"quant_method": "something-new"}, {"quant_method": ""}, {}], ids=str)
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_what_belongs_to_weights_that_are_not_read_is_no_finding(
    make: Callable[[], PackedCase], settings: dict[str, str], tmp_path: Path
) -> None:
    """Every known way of packing under a method of another name, or of none: not checked, with its scales, and no note."""
    case = make()
    model = write(tmp_path / "m.gguf", case.architecture, case.right)
    answer = check_conversion(model, folder_of(case, tmp_path / "folder", settings))
    assert {tensor.name: tensor.status for tensor in answer.tensors} == dict.fromkeys(case.right, "not checked")
    assert answer.notes == ()


@pytest.mark.parametrize("form", ["marlin", "gptq_v3", ""])
def test_a_format_of_gptq_that_is_not_known_is_not_guessed(form: str, parity: Cli, tmp_path: Path) -> None:
    """The two formats of GPTQ differ by one in each zero point; another one is neither, and the answer names it."""
    case = gptq()
    source = folder_of(case, tmp_path / "folder", case.settings | {"checkpoint_format": form})
    code, answer = parity.json("weights", "--model", write(tmp_path / "m.gguf", "qwen2", case.right), "--hf", source)
    (tensor,) = answer["tensors"]
    assert (code, tensor["status"]) == (0, "not checked")
    assert f"quantised by gptq in the format '{form}', which is not read" in tensor["reason"]


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_damaged_scales_are_left_unread(make: Callable[[], PackedCase]) -> None:
    """Settings of another form, and scales of another shape or type: what cannot be read is said not to be readable."""
    case = make()
    method = {"quant_method": case.settings["quant_method"]}
    zero = {"weight_block_size": [0, 0], "bits": 0, "config_groups": {"a": {"weights": {"group_size": 0}}}}
    lists = {"weight_block_size": [[]], "bits": [], "config_groups": [1], "checkpoint_format": {}}
    for settings in (method, method | zero, method | lists, [1], None, {"quant_method": {}}, case.settings):
        for name, (kind, values) in case.folder.items():
            for damaged in (
                (kind, values),
                (kind, values.reshape(-1)[:-1]),
                (kind, values.reshape(-1)),
                (kind, values.reshape(*values.shape, 1)),
                (kind, values.reshape(-1)[:0]),
                ("I64", np.zeros(values.shape, np.int64)),
            ):
                folder = case.folder | {name: damaged}
                stored = {name: Stored(values, kind) for name, (kind, values) in folder.items()}
                for tensor in unpacked(stored, {"quantization_config": settings}).values():
                    if tensor.readable:
                        assert tensor.part().shape == tensor.shape


@pytest.mark.parametrize("config", ["[]", "1", '"x"', "null", "[" * 100_000, '{"a": ' * 100_000, "{"])
def test_a_config_json_that_is_no_object_is_one_line(config: str, parity: Cli, tmp_path: Path) -> None:
    """A list, a number, nesting without end: one line that names the file, exit 2."""
    case = gptq()
    source = folder_of(case, tmp_path / "folder")
    (source / "config.json").write_text(config, encoding="utf-8")
    refused = parity("weights", "--model", write(tmp_path / "m.gguf", "qwen2", case.right), "--hf", source)
    assert (refused.code, refused.err.count("\n")) == (2, 1), refused.err
    assert "config.json" in refused.err


def test_packed_experts_take_no_more_memory_than_a_few_rows() -> None:
    """Halves of packed experts are views: reading rows of them decodes those rows, not the whole."""
    case = mxfp4()
    tensors = {name: Stored(values, kind) for name, (kind, values) in case.folder.items()}
    (whole,) = unpacked(tensors, {"quantization_config": case.settings}).values()
    assert whole.packed is not None
    asked: list[tuple[int, int]] = []
    rows = whole.packed.source.rows

    class Counted:
        def rows(self, start: int, stop: int) -> np.ndarray[Any, Any]:
            asked.append((start, stop))
            return rows(start, stop)

        mistakes = whole.packed.source.mistakes

    whole.packed.source = Counted()
    matrix = whole.array[1].T[0::2]
    np.testing.assert_array_equal(whole.view(matrix).part(slice(2, 4)), case.right["blk.0.ffn_gate_exps.weight"][1][2:4])
    assert asked == [(32 + 4, 32 + 7)]
