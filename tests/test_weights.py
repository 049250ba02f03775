"""`parity weights`: three dequantisations byte for byte, and what happened to a foreign engine's weights."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from changed_files import File, permuted
from cli import Cli, refused

from engine.weights.gguf_model import GgufModel
from parity.weights import foreign_weights, weights
from parity.weights.dumped_weights import load
from parity.weights.foreign_weights import check_foreign
from parity.weights.weights import check_weights
from reference.client import Reference
from reference.to_float import ToFloat

KINDS = (
    "F16",
    "BF16",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K_M",
    "Q4_K_M",
    "Q5_K_M",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
)


@pytest.mark.parametrize("kind", KINDS)
def test_three_agree_in_every_type(kind: str, synthetic: Callable[..., Path], reference: Reference, tmp_path: Path) -> None:
    """Every tensor of a model comes out of us, libggml and gguf-py the same, to the bit."""
    model = reference.quantize(synthetic(layers=1, width=256, ff=512), kind, tmp_path / "model.gguf")
    checked = check_weights(model, "numpy")
    assert checked
    assert {tensor.status for tensor in checked.tensors} == {"equal"}
    assert {tensor.by for tensor in checked.tensors} == {("ours", "libggml", "gguf")}
    assert len(checked.tensors) == 15


def test_a_wrong_dequantiser_is_named_with_its_block(parity: Cli, stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One value off by an ulp in one block: the tensor, the element, the block's bytes and who stands alone are told."""
    right = weights.dequantize
    seen: list[int] = []

    def wrong(raw: np.ndarray, kind: int, columns: int) -> np.ndarray:
        values = right(raw, kind, columns)
        if kind == 8 and not seen:
            seen.append(1)
            values.reshape(-1)[70] = np.nextafter(values.reshape(-1)[70], np.float32(np.inf))
        return values

    monkeypatch.setattr(weights, "dequantize", wrong)  # a bug of ours, which no file and no option can bring about
    code, answer = parity.json("weights", "--backend", "numpy", "--model", stories)
    assert code == 1
    (bad,) = [tensor for tensor in answer["tensors"] if tensor["status"] != "equal"]
    assert bad["reason"] == "ours stands alone"
    assert (bad["first"]["element"], bad["first"]["block"]) == (70, 2)
    model = GgufModel(stories)
    assert bad["first"]["bytes"] == model.raw(bad["name"]).reshape(-1)[68:102].tobytes().hex()
    seen.clear()
    ran = parity("weights", "--backend", "numpy", "--model", stories)
    assert "element 70, block 2" in ran.out


def test_progress_reaches_the_end(synthetic: Callable[..., Path]) -> None:
    """A file is read in portions, and the last report is that of all its bytes."""
    seen: list[tuple[int, int]] = []
    checked = check_weights(
        synthetic(kind="q8_0"), "numpy", lambda _what, done, total: seen.append((done, total)), portion=1000
    )
    assert checked
    assert len(seen) > 3 * len(checked.tensors)
    assert seen[-1][0] == seen[-1][1] == checked.bytes


def test_libggml_reads_what_gguf_quantised() -> None:
    """to_float gives the values of blocks that gguf-py made, refuses other sizes, and knows no function for integers."""
    values = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    dequantised = ToFloat()(raw, 8, 128)
    assert dequantised is not None
    np.testing.assert_array_equal(dequantised, gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0).reshape(-1))
    assert ToFloat()(np.zeros(64, np.uint8), 26, 16) is None


def altered(model: GgufModel, name: str, change: Callable[[np.ndarray], None], size: int) -> np.ndarray:
    """Values of a tensor whose blocks were changed, by gguf-py."""
    info = model.tensors[name]
    blocks = model.raw(name).reshape(-1, size).copy()
    change(blocks)
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(info.type)).reshape(-1)


def swap_nibbles(blocks: np.ndarray) -> None:
    blocks[:, 16:] = (blocks[:, 16:] >> 4) | (blocks[:, 16:] << 4)


@pytest.mark.slow
def test_what_was_done_to_a_weight_is_told(quantized: Callable[[str], Path], tmp_path: Path) -> None:
    """Each known mishap, made here by other code, is called by its name from the leading hundred values."""
    model = GgufModel(quantized("Q4_K_M"))
    up = next(name for name, info in model.tensors.items() if info.type == 12 and "ffn_up" in name)
    q = model.load("blk.1.attn_q.weight")

    def head(values: np.ndarray, count: int = 100) -> np.ndarray:
        return np.ascontiguousarray(values).reshape(-1)[:count]

    def mins(blocks: np.ndarray) -> None:
        for block in blocks:
            unpacked = [int(gguf.quants.Q4_K.get_scale_min(block[None, 4:16])[part][0, i]) for part in (1, 0) for i in range(8)]
            scales, low = unpacked[:8], unpacked[8:]
            packed = [(s & 63) | ((scales[i + 4] >> 4) << 6) for i, s in enumerate(scales[:4])]
            packed += [(m & 63) | ((low[i + 4] >> 4) << 6) for i, m in enumerate(low[:4])]
            packed += [(scales[i + 4] & 15) | ((low[i + 4] & 15) << 4) for i in range(4)]
            block[4:16] = packed

    cases = {
        "equal": {"blk.0.ffn_up.weight": head(model.load("blk.0.ffn_up.weight"))},
        "equal as F16": {"blk.0.ffn_up.weight": head(model.load("blk.0.ffn_up.weight")).astype(np.float16)},
        "equal when transposed": {"blk.1.attn_q.weight": head(q.T)},
        "equal when permuted as Hugging Face's Q/K": {"blk.1.attn_q.weight": head(permuted(q, 8), 600)},
        "equal to another tensor: blk.2.ffn_up.weight": {"blk.2.ffn_gate.weight": head(model.load("blk.2.ffn_up.weight"))},
        "off by one block": {"blk.1.attn_q.weight": q.reshape(-1)[256:356]},
        "nibbles swapped": {up: head(altered(model, up, swap_nibbles, 144))},
        "scales and mins swapped": {up: head(altered(model, up, mins, 144))},
        "scaled by a constant: 1.01 times the file's values": {"blk.1.attn_q.weight": head(q) * np.float32(1.01)},
    }
    for status, values in cases.items():
        np.savez(tmp_path / "theirs.npz", **values)
        checked = check_foreign(model.path, tmp_path / "theirs.npz")
        assert [tensor.status for tensor in checked.tensors] == [status]
        assert bool(checked) == (status in ("equal", "equal as F16"))
    assert checked.tensors[0].first is not None
    assert checked.tensors[0].first.element == int(q.reshape(-1)[0] == 0)


def test_sixteen_bits_read_as_others_are_told(quantized: Callable[[str], Path], tmp_path: Path) -> None:
    """F16 read as BF16 and bytes in the other order are recognised in an F16 file."""
    model = GgufModel(quantized("F16"))
    raw = model.raw("blk.0.ffn_up.weight").reshape(-1)[:200]
    cases = {
        "F16 read as BF16": (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32),
        "byte order of the 16-bit fields": raw.view(">f2").astype(np.float32),
    }
    for status, values in cases.items():
        np.savez(tmp_path / "theirs.npz", **{"blk.0.ffn_up.weight": values})
        assert [tensor.status for tensor in check_foreign(model.path, tmp_path / "theirs.npz").tensors] == [status]


def test_three_kinds_of_file_are_read(tmp_path: Path, stories: Path) -> None:
    """Safetensors, npz and JSONL with printed decimals hold the same values."""
    from safetensors.numpy import save_file

    values = GgufModel(stories).load("blk.0.ffn_up.weight").reshape(-1)[:100]
    save_file({"blk.0.ffn_up.weight": values}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **{"blk.0.ffn_up.weight": values})
    printed = [float(f"{value:.7g}") for value in values]
    (tmp_path / "a.jsonl").write_text("log line\n" + json.dumps({"name": "blk.0.ffn_up.weight", "values": printed}) + "\n")
    for suffix in ("safetensors", "npz", "jsonl"):
        assert load(tmp_path / f"a.{suffix}").keys() == {"blk.0.ffn_up.weight"}
        assert check_foreign(stories, tmp_path / f"a.{suffix}")
    half = (values.view(np.uint32) >> 16).astype("<u2")  # bfloat16, which NumPy lacks
    entry = {"dtype": "BF16", "shape": [100], "data_offsets": [0, 200]}
    header = json.dumps({"blk.0.ffn_up.weight": entry}).encode()
    (tmp_path / "b.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + half.tobytes())
    loaded = load(tmp_path / "b.safetensors")["blk.0.ffn_up.weight"]
    np.testing.assert_array_equal(loaded.view(np.uint32), values.view(np.uint32) >> 16 << 16)


def test_an_engine_that_holds_all_matrices_transposed_is_not_accused(stories: Path, tmp_path: Path) -> None:
    """Where every matrix is transposed it is a layout, and a note says what to look at."""
    model = GgufModel(stories)
    names = ("blk.0.ffn_up.weight", "blk.0.attn_q.weight")
    np.savez(tmp_path / "theirs.npz", **{name: model.load(name).T.reshape(-1)[:100] for name in names})
    checked = check_foreign(stories, tmp_path / "theirs.npz")
    assert checked
    assert any("transposed" in note for note in checked.notes)


def test_one_tensor_that_is_not_given_is_one(stories: Path, tmp_path: Path) -> None:
    """What the engine's file lacks is counted in words that fit one as well as many."""
    model = GgufModel(stories)
    values = {name: model.load(name).reshape(-1)[:100] for name in model.tensors}
    values.pop("output_norm.weight")
    np.savez(tmp_path / "theirs.npz", **values)
    assert check_foreign(stories, tmp_path / "theirs.npz").notes == (
        "not in theirs.npz and not checked: 1 tensor of the model",
    )


def test_not_a_number_in_the_file_is_said(parity: Cli, stories: Path, tmp_path: Path) -> None:
    """Weights that the file itself has as NaN are read right, and the answer names their tensor: no dequantiser made them."""
    model = GgufModel(stories)
    data = bytearray(stories.read_bytes())
    at = data.index(model.raw("blk.3.ffn_norm.weight").tobytes())
    data[at : at + 4] = np.float32(np.nan).tobytes()
    (tmp_path / "damaged.gguf").write_bytes(data)
    code, answer = parity.json("weights", "--model", tmp_path / "damaged.gguf")
    assert (code, sum(tensor["nonfinite"] for tensor in answer["tensors"])) == (0, 1)
    assert "the file itself contains NaN or infinities: blk.3.ffn_norm.weight" in answer["notes"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e400"])
def test_values_that_json_lacks_are_wrong_values_not_missing_ones(
    value: str, parity: Cli, stories: Path, tmp_path: Path
) -> None:
    """What Python's json writes for NaN and infinity is read, as are numbers that double precision lacks."""
    (tmp_path / "theirs.jsonl").write_text(f'{{"name": "blk.0.attn_norm.weight", "values": [{value}, 1.0]}}\n')
    code, answer = parity.json("weights", "--model", stories, "--theirs", tmp_path / "theirs.jsonl")
    assert (code, [tensor["name"] for tensor in answer["tensors"] if tensor["status"] != "not checked"]) == (
        1,
        ["blk.0.attn_norm.weight"],
    )


def test_another_file_of_the_model_is_compared(parity: Cli, small_model: Callable[..., Path], tmp_path: Path) -> None:
    """A GGUF file with one scaled block and another ε: that tensor is different, the others equal, and the ε is said."""
    model = small_model("qwen3", kind="f32")
    file = File(model)
    file.set("attention.layer_norm_rms_epsilon", 1e-5)
    file.tensors["blk.1.ffn_up.weight"].reshape(-1)[64:96] *= 2
    code, answer = parity.json("weights", "--model", model, "--theirs", file.write(tmp_path / "theirs.gguf"))
    assert code == 1
    assert [tensor["name"] for tensor in answer["tensors"] if tensor["status"] != "equal"] == ["blk.1.ffn_up.weight"]
    assert answer["notes"] == ["metadata that differ: qwen3.attention.layer_norm_rms_epsilon 1e-05 (the model's: 1e-06)"]
    (tmp_path / "cut.gguf").write_bytes(model.read_bytes()[:500])
    refused(parity("weights", "--model", model, "--theirs", tmp_path / "cut.gguf"), "cut.gguf")


def test_a_hostile_file_of_weights_is_one_line(parity: Cli, stories: Path, tmp_path: Path) -> None:
    """Missing, damaged, empty and unrelated files exit 2 with one line."""
    (tmp_path / "bad.npz").write_bytes(b"PK not a zip")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 64)
    (tmp_path / "empty.jsonl").write_text("")
    np.savez(tmp_path / "other.npz", nothing=np.zeros(8))
    np.savez(tmp_path / "pickled.npz", **{"blk.0.ffn_up.weight": np.array([{}], dtype=object)})
    np.savez(tmp_path / "text.npz", **{"blk.0.ffn_up.weight": np.array(["a", "b"])})
    np.savez(tmp_path / "complex.npz", **{"blk.0.ffn_up.weight": np.array([1j, 2])})
    for name, values in {"text": '["a", 1]', "ragged": "[[1, 2], [3]]", "mapping": "[{}]"}.items():
        (tmp_path / f"{name}.jsonl").write_text(f'{{"name": "blk.0.ffn_up.weight", "values": {values}}}\n')
    for name in ("text.npz", "complex.npz", "text.jsonl", "ragged.jsonl", "mapping.jsonl"):
        ran = parity("weights", "--model", stories, "--theirs", tmp_path / name)
        assert (ran.code, ran.err.count("\n"), ran.out) == (2, 1, "")
        assert "the values of blk.0.ffn_up.weight are not all numbers" in ran.err
    for name in ("bad.npz", "bad.safetensors", "empty.jsonl", "other.npz", "pickled.npz", "no-such.npz"):
        ran = parity("weights", "--model", stories, "--theirs", tmp_path / name)
        assert (ran.code, ran.err.count("\n"), ran.out) == (2, 1, "")
    (tmp_path / "few.jsonl").write_text('{"name": "blk.0.attn_norm.weight", "values": [1, 2, 3]}')
    refused(parity("weights", "--model", stories, "--theirs", tmp_path / "few.jsonl"), "fewer than 4 values of each tensor")
    lines = '{"name": "blk.0.attn_norm.weight", "values": [1, 2]}\n{"name": "blk.0.attn_norm.weight", "values": [1, 3]}\n'
    (tmp_path / "twice.jsonl").write_text(lines)
    refused(parity("weights", "--model", stories, "--theirs", tmp_path / "twice.jsonl"), "blk.0.attn_norm.weight twice")
    assert foreign_weights.same(np.array([np.nan], np.float32), np.array([np.nan], np.float32))
