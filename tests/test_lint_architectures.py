"""lint has nothing to say of llama.cpp's own dumps: each of them is what a right engine computed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints.errors import InputError
from checkpoints.reading.reader import read
from engine.synth.recipes import RECIPES
from parity.lint.lint import lint
from reference.client import Reference
from reference.jobs import DumpJob

TOKENS = (5, 77, 300, 5, 901, 1204)  # one token twice: what stands before attention is the same there
_QUICK = {"phi3", "deepseek2", "gpt-oss"}
# Indices of a sparse attention's choice are no values, and scores behind its mask are −∞ in places of their own.
_SPARSE = {"deepseek32", "glm-dsa"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in RECIPES if name not in _SPARSE]
)
def test_no_finding(reference: Reference, small_model: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """All points, two generated tokens where the model generates any, with the model file and without."""
    model, out = small_model(name), tmp_path / "ref.jsonl"
    try:
        reference.dump(DumpJob(model, out, TOKENS, points="all", generate=2))
    except InputError as error:
        assert "Leave --generate out" in error.advice  # noqa: PT017 - what else it refuses is a failure
        reference.dump(DumpJob(model, out, TOKENS, points="all"))
    dump = read(out)
    for known in (model, None):
        assert [(finding.rule, finding.evidence) for finding in lint(dump, known).findings] == []
