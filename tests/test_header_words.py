"""A header's arithmetic decides the limits: known spellings are understood, others never loosen a limit silently."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import Cli, refused

from checkpoints.gguf_file import contents
from checkpoints.reading.reader import read
from checkpoints.record import ModelInfo

RECORD = {"checkpoint": "embd", "token_idx": 0, "values": [1.5, -2.25, 0.123456789]}


def dump(path: str, **fields: Any) -> Path:
    """A dump of one record with these fields in its header."""
    header = {"type": "header", "source": "x", "mode": "exact", "compute": "f32", "tokens": [1]} | fields
    text = "\n".join(map(json.dumps, (header, RECORD, {"type": "end", "checkpoints": 1})))
    Path(path).write_text(text + "\n")
    return Path(path)


@pytest.mark.parametrize(
    ("field", "message", "understood"),
    [
        ("mode", "EXACT", "exact"),
        ("mode", " Native ", "native"),
        ("compute", "float32", "f32"),
        ("compute", "torch.bfloat16", "bf16"),
        ("compute", "FP16", "f16"),
        ("compute", "half", "f16"),
        ("compute", "int8", "q8"),
        ("compute", "unknown", ""),
        ("kv_type", "Float16", "f16"),
        ("kv_type", "Q8_0", "q8_0"),
        ("kv_type", "fp8_e4m3", "fp8_e4m3"),
    ],
)
def test_known_spellings_are_understood(parity: Cli, field: str, message: str, understood: str) -> None:
    """Upper case, NumPy's and PyTorch's names mean what they say."""
    header = read(dump("a.jsonl", **{field: message})).header
    assert getattr(header, field) == understood


@pytest.mark.parametrize(
    ("message", "understood"),
    [("MOSTLY_Q4_K_M", "Q4_K_M"), ("float16", "F16"), ("Q4_K - Medium", "Q4_K - Medium"), ("IQ2_XXS", "IQ2_XXS"), ("", "")],
)
def test_file_types_are_understood(parity: Cli, message: str, understood: str) -> None:
    """Names of llama.cpp's mixtures stay, floats have one name."""
    header = read(dump("a.jsonl", model={"name": "m", "file_type": message})).header
    assert header is not None
    assert header.model.file_type == understood


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "f32"}, "\"mode\" is 'f32', which is not known: write exact, native"),
        ({"compute": "fast"}, "\"compute\" is 'fast', which is not known: write f64, f32, tf32, f16, bf16, q8"),
        ({"kv_type": "tf32"}, '"kv_type" is'),
        ({"model": {"file_type": "banana"}}, '"file_type" is'),
        ({"mode": "x" * 5000}, '"mode" is'),
    ],
)
def test_unknown_words_are_an_error_with_the_list(parity: Cli, fields: dict[str, Any], message: str) -> None:
    """A word that nobody knows is refused with those that are known, in one line of a sane length."""
    ran = parity("diff", dump("a.jsonl", **fields), dump("b.jsonl"))
    refused(ran, "a.jsonl, line 1", message)
    assert len(ran.err) < 400


def test_the_limits_are_those_of_the_words(parity: Cli) -> None:
    """An engine that writes float32 and EXACT is judged as one that writes f32 and exact."""
    for fields in ({}, {"mode": "EXACT", "compute": "float32"}, {"compute": "torch.float32", "kv_type": "fp32"}):
        _, answer = parity.json("diff", dump("a.jsonl", **fields), dump("b.jsonl"))
        assert answer["limit"] == {"operations": 1e-10, "logits": 1e-09} or answer["limit"] == 1e-10, answer["limit"]


def test_two_modes_are_compared_with_a_note(parity: Cli) -> None:
    """Where one side is exact and the other native the looser limits hold, and the answer says so."""
    _, answer = parity.json("diff", dump("a.jsonl"), dump("b.jsonl", mode="native"))
    assert any("mode: ours exact, the reference native; the looser limits" in note for note in answer["notes"])


def test_native_limits_follow_the_weights_themselves(parity: Cli) -> None:
    """F32 matrices in a file that calls itself Q4_K_M are judged as F32, quantised ones in one that calls itself F32 as quantised."""
    limits = []
    for file_type, weights in (("Q4_K_M", "f32"), ("F32", "f32 quantised"), ("Q4_K_M", "")):
        model = {"name": "m", "file_type": file_type, "weights": weights}
        _, answer = parity.json(
            "diff", *(dump(name, mode="native", kv_type="f32", model=model) for name in ("a.jsonl", "b.jsonl"))
        )
        limits.append(answer["limit"])
    assert limits[0] != limits[1] == limits[2]


def test_a_dump_says_what_its_matrices_are(synthetic: Callable[..., Path], stories: Path) -> None:
    """The families are read from the tensors, norms and biases left out."""
    info: ModelInfo = contents(stories).info("Q8_0")
    assert info.weights == "quantised"
    assert contents(synthetic(kind="f16")).info("F16").weights == "f16"
    assert np.all([tensor.type == 0 for tensor in contents(synthetic()).tensors])
