"""Models whose numbers leave float32: every command answers, and nothing but the answer is printed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from changed_files import File
from cli import Cli


@pytest.mark.parametrize(
    ("lifted", "ending", "factor", "codes"),
    [
        pytest.param(False, "attn_norm.weight", 3e38, (1, 1, 2, 1), marks=pytest.mark.slow),
        pytest.param(False, "ffn_down.weight", 1e30, (0, 1, 0, 0), marks=pytest.mark.slow),
        pytest.param(True, "ffn_down.weight", 1e30, (0, 1, 0, 0), marks=pytest.mark.slow),
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
    codes: tuple[int, ...],
) -> None:
    """Steps written by hand and steps read from llama.cpp's graph: infinities are values of the model, not NumPy's warnings.

    `codes` are the exit codes of run, lint, isolate and explain. Where the first norm overflows, NaN is all that either side has: nothing
    is parity, and `isolate` has no whole row. Where the last product of a layer does, both sides are infinite at the same elements and
    the rest is right, while lint calls a dump with infinities unusable.
    """
    file = File(small_model("gemma3", layers=2, kind="f32") if lifted else synthetic("tiny-llama", layers=2))
    with np.errstate(over="ignore"):
        file.each(ending, lambda weights: weights * np.float32(factor))
    model = file.write(tmp_path / "m.gguf")
    commands = (("lint", "run/ours.jsonl"), ("isolate", "run/ours.jsonl"), ("explain", "run/ours.jsonl"))
    ran = [parity("run", "--model", model, "--tokens", "5,6", "--points", "all", "-o", "run")]
    ran += [parity(*words, "--model", model) for words in commands]
    assert [command.code for command in ran] == list(codes)
    assert all(len(command.err.splitlines()) == (command.code == 2) for command in ran)
