"""What llama.cpp's quantiser leaves undone: weights in their own type, of which the F32 copy of a model has none; the alignment."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli import Cli, refused
from gguf import GGMLQuantizationType, GGUFReader, quants
from msgspec.structs import replace

from checkpoints.gguf_file import TensorEntry, contents, header_bytes
from checkpoints.gguf_values import uint32_value
from engine.weights.gguf_model import GgufModel
from reference.after_quantising import dequantize_rest, is_f32

Make = Callable[..., Path]
PADDING, WIDE = 32, 64  # GGUF's default alignment, and another
BLOCK = 32  # elements of a block of Q8_0
F16, BF16, Q8_0 = GGMLQuantizationType.F16, GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0


def retyped(source: Path, out: Path, pattern: str, kind: GGMLQuantizationType) -> Path:
    """A copy of an F32 model in which tensors of that name have another type."""
    whole = contents(source)
    infos, data = [], b""
    for tensor, info in zip(GGUFReader(source).tensors, whole.tensors, strict=True):
        fits = kind != Q8_0 or info.ne[0] % BLOCK == 0
        own = kind if fits and re.search(pattern, info.name) else GGMLQuantizationType.F32
        infos.append(TensorEntry(info.name, info.ne, int(own), len(data)))
        part = quants.quantize(np.asarray(tensor.data, np.float32), own).tobytes()
        data += part + b"\0" * (-len(part) % PADDING)
    out.write_bytes(header_bytes(whole.metadata, infos) + data)
    return out


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [("norm", F16), (r"blk\.1\.", BF16), ("", Q8_0)],
)
def test_every_weight_is_dequantised_in_place(
    small_model: Make, tmp_path: Path, pattern: str, kind: GGMLQuantizationType
) -> None:
    """The file has the same tensors and metadata, as F32, with the values that gguf-py and our functions give."""
    source = small_model("gpt-oss", "f32", layers=2, width=128)
    mixed = retyped(source, tmp_path / "m.gguf", pattern, kind)
    before, expected = contents(mixed), GgufModel(mixed)
    values = {name: expected.load(name) for name in expected.tensors}
    dequantize_rest(mixed)
    after = contents(mixed)
    assert is_f32(after)
    assert after.metadata == before.metadata
    assert [(tensor.name, tensor.ne) for tensor in after.tensors] == [(tensor.name, tensor.ne) for tensor in before.tensors]
    for tensor in GGUFReader(mixed).tensors:
        np.testing.assert_array_equal(tensor.data.ravel(), values[tensor.name].ravel(), err_msg=tensor.name)


def test_a_model_of_another_alignment_is_converted(parity: Cli, small_model: Make, tmp_path: Path) -> None:
    """Tensors that begin at multiples of 64 bytes: llama.cpp's quantiser writes multiples of 32, and so does the copy say."""
    source, wide, twin = small_model("qwen3", "q8_0", layers=1), tmp_path / "wide.gguf", tmp_path / "twin.gguf"
    whole = contents(source)
    expected = GgufModel(source)
    metadata = whole.metadata | {"general.alignment": uint32_value(WIDE)}
    infos, data = [], b""
    for tensor in whole.tensors:
        infos.append(replace(tensor, offset=len(data)))
        part = expected.raw(tensor.name).tobytes()
        data += part + b"\0" * (-len(part) % WIDE)
    header = header_bytes(metadata, infos)
    wide.write_bytes(header + b"\0" * (-len(header) % WIDE) + data)
    assert parity("twin", wide, "-o", twin).code == 0
    assert contents(twin).alignment == PADDING
    for tensor in GGUFReader(twin).tensors:
        np.testing.assert_array_equal(tensor.data.ravel(), expected.load(tensor.name).ravel(), err_msg=tensor.name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("gemma3n", r"altup_(proj|unembd)|per_layer_model_proj|laurel"),
        ("rwkv7", r"time_mix_[wavg][012]"),
        ("gpt-oss", r"_exps\.bias|sinks"),
    ],
)
def test_models_with_such_weights_are_run_exactly(
    parity: Cli, small_model: Make, tmp_path: Path, name: str, pattern: str
) -> None:
    """F16 where files have it and llama.cpp's quantiser leaves it: exact mode is parity."""
    model = retyped(small_model(name, "f32"), tmp_path / "m.gguf", pattern, F16)
    ran = parity("run", "--model", model, "--tokens", "5,6,7")
    assert (ran.code, "parity: " in ran.out) == (0, True), ran


@pytest.mark.slow
def test_types_that_ggml_does_not_multiply(parity: Cli, small_model: Make, tmp_path: Path) -> None:
    """In native mode llama.cpp aborts on norms of F16: one line with its reason, without the folders of who compiled it."""
    model = retyped(small_model("qwen3", "f32"), tmp_path / "m.gguf", "norm", F16)
    ran = parity("dump", "ref", "--mode", "native", "--model", model, "--tokens", "5,6", "-o", tmp_path / "ref.jsonl")
    refused(ran, "unsupported types: dst: f32, src0: f32, src1: f16")
    assert "/ggml/" not in ran.err
