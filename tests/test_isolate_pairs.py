"""Records of queries and keys with RoPE's pairs in another order: of a right engine, and of one that has them in that order itself."""

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest
from isolated_engine import Foreign
from msgspec.structs import replace
from safetensors.numpy import load_file, save_file

from checkpoints.answers.isolate import PROVEN, Isolation
from engine.graph import Step
from parity.isolate.isolate import IsolateRequest, isolate
from reference.client import Reference

SIZE = 48  # of the small model's heads
QUERIES = ("q_norm", "q_rope")
KEYS = ("k_norm", "k_rope", "k_read")


def _neighbours(value: np.ndarray) -> np.ndarray:
    """Rows of heads in halves, with the pairs as neighbours."""
    heads = value.reshape(len(value), -1, 2, SIZE // 2)
    return np.ascontiguousarray(heads.swapaxes(2, 3)).reshape(value.shape)


def _recorded(foreign: Foreign, kinds: Collection[str]) -> Isolation:
    """What isolate says of the right engine where points of these kinds were recorded as neighbours."""
    foreign.record("all")
    path = foreign.out.with_suffix(".safetensors")
    tensors = load_file(path)
    changed = {name for name in tensors if name.partition("/")[0].rpartition(".")[2] in kinds}
    assert changed
    save_file({name: _neighbours(value) if name in changed else value for name, value in tensors.items()}, path)
    return isolate(IsolateRequest(foreign.model, dump=foreign.out))


@pytest.mark.parametrize("kinds", [(*QUERIES, "k_norm", "k_rope"), (*QUERIES, *KEYS), QUERIES, ("q_rope", "k_rope")])
def test_a_right_engines_records_in_another_order_are_right(
    kinds: Collection[str], small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """Whatever was recorded as neighbours: every operation is proven, the other order is said, and no record is suspect."""
    isolation = _recorded(Foreign(small_model("qwen3", layers=2), tmp_path, reference), kinds)
    assert not isolation.wrong
    assert {item.status for item in isolation.operations} == {PROVEN}
    assert "neighbours where llama.cpp has halves: what is made from them had" in str(isolation.facts["layout"])


@pytest.mark.parametrize(
    ("kind", "wrong"), [("q_norm", {"q_norm"}), ("k_norm", {"k_norm"}), ("q_rope", {"q_rope"}), ("k_rope", {"k_rope"})]
)
def test_an_engine_that_reorders_is_wrong_where_it_does(
    kind: str, wrong: set[str], small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """Queries or keys that are reordered in the engine: what is made from them differs, and the operation is wrong, no other."""
    foreign = Foreign(small_model("qwen3", layers=2), tmp_path, reference)

    def faulty(step: Step) -> Step:
        if step.makes != f"blk.1.{kind}":
            return step
        return replace(step, op=lambda *inputs, **given: _neighbours(step.op(*inputs, **given)))

    isolation = foreign.judged([faulty(step) for step in foreign.right])
    assert {item.name for item in isolation.wrong} == {f"blk.1.{name}" for name in wrong}
    (said,) = {item.reason for item in isolation.wrong}
    assert "the right values stand in another order" in said


@pytest.mark.parametrize("factor", [1.001, 1.01])
def test_a_factor_beside_another_order_is_found(
    factor: float, small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """Records as neighbours of an engine whose queries are too large by a thousandth: their operation is wrong."""
    foreign = Foreign(small_model("qwen3", layers=2), tmp_path, reference)

    def faulty(step: Step) -> Step:
        if step.makes != "blk.1.q_rope":
            return step
        return replace(step, op=lambda *inputs, **given: step.op(*inputs, **given) * np.float32(factor))

    right = foreign.right
    foreign.engine.steps = [faulty(step) for step in right]
    isolation = _recorded(foreign, (*QUERIES, *KEYS))
    assert "blk.1.q_rope" in {item.name for item in isolation.wrong}
    assert "blk.0.q_rope" not in {item.name for item in isolation.wrong}
