"""Weights that an engine loaded wrongly: each mishap, made by other code than the one that looks for it, is named."""

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from changed_files import permuted
from gguf_writing import finish

from engine.weights.gguf_model import GgufModel
from parity.weights.foreign_weights import check_foreign

COUNT = 400


def status_of(model: Path, name: str, values: np.ndarray, folder: Path) -> str:
    """What is said of a tensor's leading values."""
    np.savez(folder / "theirs.npz", **{name: np.ascontiguousarray(values).reshape(-1)[:COUNT]})
    checked = check_foreign(model, folder / "theirs.npz")
    assert bool(checked) == checked.tensors[0].right
    return checked.tensors[0].status


def bf16(values: np.ndarray) -> np.ndarray:
    """Cut to bfloat16."""
    return (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def test_two_things_at_once_are_told(quantized: Callable[[str], Path], tmp_path: Path) -> None:
    """Permuted or transposed, and rounded besides; scaled by a constant, rounded or not."""
    path = quantized("F32")
    name = "blk.1.attn_q.weight"
    q = GgufModel(path).load(name)
    assert (
        status_of(path, name, permuted(q, 8).astype(np.float16), tmp_path)
        == "equal when permuted as Hugging Face's Q/K, as F16"
    )
    assert status_of(path, name, bf16(np.ascontiguousarray(q.T)), tmp_path) == "equal when transposed, as BF16"
    root = np.float32(1 / np.sqrt(32))
    assert status_of(path, name, q * root, tmp_path) == "scaled by a constant: 0.176777 = 1/√32 times the file's values"
    assert status_of(path, name, q * np.float32(1.01), tmp_path) == "scaled by a constant: 1.01 times the file's values"
    assert (
        status_of(path, name, bf16(q * np.float32(16)), tmp_path) == "scaled by a constant: 16 times the file's values, as BF16"
    )
    assert status_of(path, name, q + np.float32(0.01), tmp_path) == "different"


def test_a_whole_model_held_transposed_and_rounded_is_right(quantized: Callable[[str], Path], tmp_path: Path) -> None:
    """Where every matrix is transposed it is a layout, in F16 as in F32."""
    model = GgufModel(quantized("F32"))
    names = [f"blk.{layer}.ffn_{kind}.weight" for layer in (0, 1) for kind in ("up", "gate")]
    np.savez(tmp_path / "theirs.npz", **{name: model.load(name).T.astype(np.float16) for name in names})
    assert check_foreign(model.path, tmp_path / "theirs.npz")


def test_a_wrong_place_in_the_file_is_told(quantized: Callable[[str], Path], tmp_path: Path) -> None:
    """The header is not skipped, or its padding; a tensor is read one alignment too late."""
    path = quantized("F32")
    model, data = GgufModel(path), path.read_bytes()
    info = model.tensors["blk.1.ffn_up.weight"]
    # The reader of gguf-py says where the data begin; the table of contents ends after the last tensor's entry.
    reader = gguf.GGUFReader(path)
    last = reader.tensors[-1].field
    end = last.offset + sum(part.nbytes for part in last.parts)

    def at(offset: int) -> np.ndarray:
        return np.frombuffer(data, np.float32, COUNT, offset)

    answers = {by: status_of(path, info.name, at(info.offset + by), tmp_path) for by in (-reader.data_offset, 32, -4)}
    assert (
        answers[-reader.data_offset]
        == "read too early: its offset is counted from the start of the file, the header is not skipped"
    )
    assert answers[32] == "read 32 bytes too late: one alignment"
    assert answers[-4] in ("read 4 bytes too early", "off by one block, backwards")
    padding = reader.data_offset - end
    if padding:
        status = status_of(
            path,
            info.name,
            np.frombuffer(data, np.uint8)[info.offset - padding :][: COUNT * 4].copy().view(np.float32),
            tmp_path,
        )
        assert status == "read too early: the padding after the header is not skipped"


def scalar_q3_k(block: bytes, *, change: str = "") -> list[float]:
    """dequantize_row_q3_K of ggml-quants.c, one element after the other, with one mistake."""
    mask, quants, packed = block[:32], block[32:96], block[96:108]
    d = struct.unpack("<e", block[108:110])[0]
    scales = []
    for j in range(16):
        low = packed[j] & 15 if j < 8 else packed[j - 8] >> 4
        high = (packed[8 + j % 4] >> (2 * (j // 4))) & 3
        scales.append(low if change == "upper bits" else low | (high << 4))
    if change == "bytes":
        scales = [scales[8 * (j % 2) + j // 2] for j in range(16)]
    values = []
    for i in range(256):
        part, rest = divmod(i, 128)
        shift, at = divmod(rest, 32)
        quant = (quants[32 * part + at] >> (2 * shift)) & 3
        bit = mask[at] >> (4 * part + shift) & 1
        if change == "inverted":
            bit = 1 - bit
        quant -= 0 if bit or change == "no third bit" else 4
        zero = 0 if change == "zero" else 32
        values.append(d * (scales[i // 16] - zero) * quant)
    return values


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ("", "equal"),
        ("zero", "32 not subtracted from the scales"),
        ("upper bits", "scales without their upper two bits"),
        ("bytes", "scales in the order of their bytes (low, high, low, high)"),
        ("inverted", "the quants' third bit inverted"),
        ("no third bit", "the quants' third bit ignored, 4 not subtracted"),
    ],
)
def test_what_goes_wrong_with_q3_k(change: str, status: str, quantized: Callable[[str], Path], tmp_path: Path) -> None:
    """A scalar reader of block_q3_K with one mistake each."""
    path = quantized("Q3_K_M")
    model = GgufModel(path)
    name = next(name for name, info in model.tensors.items() if info.type == 11)
    blocks = model.raw(name).reshape(-1, 110)[:2]
    values = [value for block in blocks for value in scalar_q3_k(block.tobytes(), change=change)]
    assert status_of(path, name, np.array(values, np.float32), tmp_path) == status


def _model_of(kind: gguf.GGMLQuantizationType, folder: Path) -> tuple[Path, str, np.ndarray]:
    """A llama file whose one matrix is of that type, the matrix's name and its blocks' bytes."""
    path, name = folder / "one.gguf", "blk.0.ffn_up.weight"
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 64), (writer.add_embedding_length, 64), (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 64), (writer.add_head_count, 2), (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_vocab_size, 8),
    ):  # fmt: skip
        add(value)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(3).integers(0, 256, (64 * 64 // elements, size), dtype=np.uint8)
    if kind == gguf.GGMLQuantizationType.MXFP4:
        blocks[:, 0] = 120 + blocks[:, 0] % 8
    else:
        blocks[:, :2] = np.full(len(blocks), 0.01, np.float16).view(np.uint8).reshape(-1, 2)
    writer.add_tensor(name, blocks.reshape(64, -1), raw_dtype=kind)
    writer.add_tensor("token_embd.weight", np.zeros((8, 64), np.float32))
    finish(writer)
    return path, name, blocks


_FP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)


@pytest.mark.parametrize(
    ("mistake", "status"),
    [
        ("", "equal"),
        ("high first", "nibbles swapped"),
        ("neighbours", "nibbles in the order of bytes (low, high, low, high)"),
        ("doubled", "scales twice as large: the exponent's bias is 127 where values are doubled"),
    ],
)
def test_what_goes_wrong_with_mxfp4(mistake: str, status: str, tmp_path: Path) -> None:
    """A plain reader of block_mxfp4 (one exponent byte, 32 nibbles) with one mistake each."""
    path, name, blocks = _model_of(gguf.GGMLQuantizationType.MXFP4, tmp_path)
    values: list[float] = []
    for block in blocks:
        low, high = ([_FP4[byte & 15] for byte in block[1:]], [_FP4[byte >> 4] for byte in block[1:]])
        order = high + low if mistake == "high first" else low + high
        if mistake == "neighbours":
            order = [value for pair in zip(low, high, strict=True) for value in pair]
        scale = 2.0 ** (int(block[0]) - 127)
        values += [value * scale * (2 if mistake == "doubled" else 1) for value in order]
    assert status_of(path, name, np.array(values, np.float32), tmp_path) == status


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_what_quants_are_stored_above(kind: str, tmp_path: Path) -> None:
    """Q4_0 without the 8 that is subtracted; Q8_0's signed bytes read as unsigned."""
    path, name, blocks = _model_of(gguf.GGMLQuantizationType[kind], tmp_path)
    quants = blocks[:, 2:].astype(np.float32)
    if kind == "Q4_0":
        quants = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float32)
    values = quants * np.float32(np.float16(0.01))
    wanted = "8 not subtracted from the quants" if kind == "Q4_0" else "quants read as unsigned bytes"
    assert status_of(path, name, values, tmp_path) == wanted
