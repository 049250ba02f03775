"""Whole tensors beside a dump that are of a type which NumPy lacks."""

import json
from pathlib import Path

import pytest

from checkpoints.errors import DumpError
from checkpoints.tensors import TensorReader


def test_a_tensor_in_bfloat16_is_one_line(tmp_path: Path) -> None:
    """NumPy has no bfloat16: the tensor and its type are named."""
    header = json.dumps({"embd/0": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "ours.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(DumpError, match="embd is of type BF16, which is not read here"):
        TensorReader(path).get("embd")
