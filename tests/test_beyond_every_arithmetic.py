"""Errors that begin as large as rounding makes them and are further off than any rounding later: a fault, whatever the arithmetic."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from planted import Faulty, Planted, half_sums, tokens_of

from checkpoints.formats import load
from engine import ops
from engine.backend import Array
from engine.graph import Step
from parity.diff.compare import Options
from parity.explain.on_model import compared_on
from reference.client import Reference
from reference.jobs import DumpJob

WRONG = "blk.2.ffn_out"


def _of_half_the_terms(x: Array, weight: Array, bias: Array | None = None) -> Array:
    half = x.shape[1] // 2
    return half_sums(x[:, :half], weight[:, :half], bias)


def _in_half_sums(steps: list[Step], *, wrong: bool) -> list[Step]:
    def op(step: Step) -> Any:
        return _of_half_the_terms if wrong and step.makes == WRONG else half_sums

    return [replace(step, op=op(step)) if step.op is ops.linear else step for step in steps]


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True])
def test_a_sum_that_leaves_terms_out_beside_sums_in_f16(
    wrong: bool, tmp_path: Path, small_model: Callable[..., Path], reference: Reference
) -> None:
    """Sums in F16, which nothing states and our rounding does not copy, leave no divergence that names a place; with half of the
    terms of one product left out its layer is one.
    """
    path = small_model("qwen3")
    faulty = Faulty(path, reference.graph(path))
    tokens, out = tokens_of(path, 7, 1), tmp_path / "ref.jsonl"
    reference.dump(DumpJob(path, out, tokens, points="all", slice_size=None, binary=True))
    dump = faulty.dump(Planted(()), tokens, size=16, bare=True, steps=_in_half_sums(list(faulty.right), wrong=wrong))
    verdict = compared_on(replace(dump, header=None), load(out), Options(), path).verdict
    first = verdict.first_divergence
    if wrong:
        assert first is not None
        assert first.checkpoint == "blk.3.l_out"
        assert verdict.last_agreement is not None
        assert verdict.pattern is None or verdict.pattern.code != "undecided"
    else:
        assert first is None or (verdict.pattern is not None and verdict.pattern.code == "undecided")
