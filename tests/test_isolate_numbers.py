"""What isolate says of the numbers of a wrong operation: the law that they follow, which is explain's as well."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from isolated_engine import TOKENS, Foreign
from msgspec.structs import replace

from checkpoints.formats import load
from parity.explain.case import ExplainOptions
from parity.explain.input import explain_dump

Change = Callable[[np.ndarray], np.ndarray]


def _exchanged(value: np.ndarray) -> np.ndarray:
    order = np.arange(value.shape[-1])
    order[[3, 11]] = 11, 3
    return value[..., order]


def _first_head_halved(value: np.ndarray) -> np.ndarray:
    return np.concatenate([value[..., :16] * np.float32(0.5), value[..., 16:]], axis=-1)


# An operation, what is done to its result, and what is said of it.
CASES: list[tuple[str, Change, str]] = [
    ("blk.1.ffn_out", lambda value: value * np.float32(1.01), "every element is 1.01 times the right one"),
    ("blk.1.attn_out", lambda value: value * np.float32(1.001), "every element is 1.001 times the right one"),
    ("blk.1.ffn_swiglu", lambda value: value + np.float32(0.25), "every element is the right one plus 0.25"),
    ("blk.1.ffn_up", lambda value: np.roll(value, -1, axis=-1), "element i is the right element i + 1: the row is rolled"),
    ("blk.1.ffn_gate", _exchanged, "elements 3 and 11 are exchanged; the others are right"),
    ("blk.1.kqv_out", _first_head_halved, "head 0 alone is 0.5 times the right one; the others are right"),
]


def _spoiled(foreign: Foreign, name: str, change: Change) -> dict[str, str]:
    """What isolate says of each operation that it calls wrong where one operation's result is changed."""

    def faulty(*inputs: np.ndarray, **given: object) -> np.ndarray:
        return change(right.op(*inputs, **given))

    right = next(step for step in foreign.right if step.makes == name)
    isolation = foreign.judged([replace(step, op=faulty) if step is right else step for step in foreign.right])
    return {item.name: item.reason for item in isolation.wrong}


@pytest.mark.parametrize(("name", "change", "sentence"), CASES)
def test_the_law_of_the_numbers_is_said(
    name: str, change: Change, sentence: str, synthetic: Callable[..., Path], tmp_path: Path
) -> None:
    """An operation whose result is changed by one law is wrong, alone, and the law is said in place of how large its error is."""
    assert _spoiled(Foreign(synthetic(layers=3), tmp_path), name, change) == {name: sentence}


def test_numbers_without_a_law_have_none(synthetic: Callable[..., Path], tmp_path: Path) -> None:
    """Noise of a hundredth in a product is no factor of about 1: it is called close, as before."""
    noise = np.random.default_rng(5)

    def noisy(value: np.ndarray) -> np.ndarray:
        return (value * (1 + 0.01 * noise.standard_normal(value.shape))).astype(np.float32)

    said = _spoiled(Foreign(synthetic(layers=2), tmp_path), "blk.0.ffn_out", noisy)
    assert said == {
        "blk.0.ffn_out": "every element is close: rounding of inputs, or a detail of the weight's format, not its layout"
    }


def test_scores_have_no_law_of_rows(synthetic: Callable[..., Path], tmp_path: Path) -> None:
    """Scores of as many heads as positions are no rows of one length: those that are wrong are named, and no law is looked for."""
    noise = np.random.default_rng(5)

    def noisy(value: np.ndarray) -> np.ndarray:
        return (value * (1 + 0.3 * noise.standard_normal(value.shape))).astype(np.float32)

    model = synthetic(layers=2, width=96, heads=len(TOKENS))
    assert set(_spoiled(Foreign(model, tmp_path), "blk.0.kq", noisy)) == {"blk.0.kq"}


@pytest.mark.slow
def test_isolate_and_explain_say_the_same(synthetic: Callable[..., Path], tmp_path: Path) -> None:
    """Of one dump both say the same law of the operation that they locate."""
    foreign = Foreign(synthetic(layers=3), tmp_path)
    for name, change, sentence in CASES[3:5]:
        assert _spoiled(foreign, name, change) == {name: sentence}
        explanation = explain_dump(load(foreign.out), foreign.model, ExplainOptions())
        assert explanation.law == sentence, name
