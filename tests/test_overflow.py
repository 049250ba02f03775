"""Models whose numbers leave float32: every command answers, and nothing but the answer is printed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from changed_files import File
from cli import Cli


@pytest.mark.parametrize(
    ("lifted", "ending", "factor"),
    [
        (False, "attn_norm.weight", 3e38),
        pytest.param(False, "ffn_down.weight", 1e30, marks=pytest.mark.slow),
        pytest.param(True, "ffn_down.weight", 1e30, marks=pytest.mark.slow),
    ],
)
def test_overflowing_models_are_computed_without_warnings(
    parity: Cli,
    synthetic: Callable[..., Path],
    small_model: Callable[..., Path],
    tmp_path: Path,
    lifted: bool,
    ending: str,
    factor: float,
) -> None:
    """Steps written by hand and steps read from llama.cpp's graph: infinities are values of the model, not NumPy's warnings."""
    file = File(small_model("gemma3", layers=2, kind="f32") if lifted else synthetic("tiny-llama", layers=2))
    with np.errstate(over="ignore"):
        file.each(ending, lambda weights: weights * np.float32(factor))
    model = file.write(tmp_path / "m.gguf")
    run = parity("run", "--model", model, "--tokens", "5,6", "--points", "all", "-o", "run")
    assert (run.code in (0, 1), run.err) == (True, ""), run
    for words in (("lint", "run/ours.jsonl"), ("isolate", "run/ours.jsonl"), ("explain", "run/ours.jsonl")):
        ran = parity(*words, "--model", model)
        assert ran.code in (0, 1, 2)
        assert len(ran.err.splitlines()) == (ran.code == 2), ran.err
