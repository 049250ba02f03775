"""Keys of RoPE that llama.cpp applies without being told of a scaling: our engine computes what it computes."""

import struct
from pathlib import Path

import numpy as np
import pytest
from cli import Cli

from checkpoints.formats import load
from checkpoints.gguf_file import contents, header_bytes
from checkpoints.gguf_values import Value

FLOAT = 6  # GGUF_TYPE_FLOAT32
KEYS = ("rope.scaling.factor", "rope.scale_linear")


def scaled(parity: Cli, path: Path, key: str) -> Path:
    """A small llama with one more key, which scales its positions by a quarter, and no `rope.scaling.type`."""
    assert parity("synth", "--architecture", "llama", "-o", path).code == 0
    model = contents(path)
    key = f"{model.architecture}.{key}"
    assert key not in model.metadata
    assert f"{model.architecture}.rope.scaling.type" not in model.metadata
    metadata = dict(model.metadata) | {key: Value(FLOAT, struct.pack("<f", 4.0))}
    path.write_bytes(header_bytes(metadata, list(model.tensors)) + path.read_bytes()[model.data :])
    return path


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_a_factor_without_a_type_is_applied_as_llama_cpp_applies_it(parity: Cli, tmp_path: Path, key: str) -> None:
    """`run` agrees, `isolate` proves every operation, and the key moves the numbers: it is not left out on both sides."""
    model = scaled(parity, tmp_path / "scaled.gguf", key)
    plain = tmp_path / "plain.gguf"
    parity("synth", "--architecture", "llama", "-o", plain)
    code, answer = parity.json("run", "--model", model, "--tokens", "5,6,7,8,9", "--points", "all", "-o", tmp_path / "run")
    assert (code, answer["verdict"]) == (0, "parity"), answer["first_divergence"]
    code, answer = parity.json("isolate", "--model", model, "--tokens", "5,6,7,8,9")
    assert (code, answer["wrong"]) == (0, []), answer["wrong"]
    assert (
        parity("dump", "ref", "--model", plain, "--tokens", "5,6,7,8,9", "--points", "all", "-o", tmp_path / "plain.jsonl").code
        == 0
    )
    rotated = [load(path).points["blk.0.q_rope"].values for path in (tmp_path / "run" / "ref.jsonl", tmp_path / "plain.jsonl")]
    assert np.abs(rotated[0] - rotated[1]).max() > 0.01
