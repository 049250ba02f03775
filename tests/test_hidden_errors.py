"""Errors that the next operation removes, so that its agreement acquits nothing: a factor in front of a norm, what a ReLU sets to 0."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray
from planted import Faulty, Planted
from recorded import Change, changed

from checkpoints.reading.reader import read
from checkpoints.record import Dump
from parity.diff.compare import compare
from reference.client import Reference
from reference.jobs import DumpJob

HEAD = 48  # elements of a head of the small qwen3
IDS = (5, 99, 7, 300, 12)


class Sides:
    """An engine of a small model, and llama.cpp's dump of it."""

    def __init__(self, model: Path, folder: Path, reference: Reference) -> None:
        self.engine = Faulty(model, reference.graph(model))
        reference.dump(DumpJob(model, folder / "ref.jsonl", IDS, points="all", slice_size=4096))
        self.ref = read(folder / "ref.jsonl")

    def wrong(self, point: str, change: Change, size: int = 4096) -> Dump:
        """The dump of an engine whose operation `point` is changed so."""
        steps = [
            replace(step, op=lambda *a, op=step.op, **k: change(op(*a, **k))) if step.makes == point else step
            for step in self.engine.right
        ]
        return self.engine.dump(Planted(()), IDS, points="all", size=size, steps=steps, bare=False)


def on_head(number: int, factor: float) -> Change:
    """One head times a factor."""

    def change(x: NDArray[np.float32]) -> NDArray[np.float32]:
        out = x.copy()
        out[:, number * HEAD : (number + 1) * HEAD] *= np.float32(factor)
        return out

    return change


@pytest.fixture(scope="module")
def qwen3(small_model: Callable[..., Path], reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    return Sides(small_model("qwen3"), tmp_path_factory.mktemp("qwen3"), reference)


@pytest.mark.parametrize(("number", "factor"), [(0, 1.02), (1, 1.02), (3, 7.0), (2, 1.0005)])
def test_a_scaled_head_in_front_of_its_norm_is_not_acquitted(qwen3: Sides, number: int, factor: float) -> None:
    """The norm removes a head's factor: queries are a divergence that says which elements are scaled, and no other layout."""
    verdict = compare(qwen3.wrong("blk.1.q", on_head(number, factor)), qwen3.ref)
    assert not verdict
    assert verdict.record_faults == ()
    assert "or later operations hide the error" in verdict.operation
    assert verdict.pattern is not None
    first, last = number * HEAD, (number + 1) * HEAD - 1
    assert f"elements {first} to {last} are {factor:.6g} times the reference's" in verdict.pattern.sentence


def test_a_scaled_head_beyond_the_recorded_values_is_not_acquitted(qwen3: Sides) -> None:
    """Sixteen values and a sketch: the sketch differs, the values and the norm agree."""
    verdict = compare(qwen3.wrong("blk.1.q", on_head(2, 1.02), 16), qwen3.ref)
    assert not verdict
    assert verdict.record_faults == ()


def test_elements_that_change_in_a_record_alone_in_front_of_a_norm_are_the_record(qwen3: Sides) -> None:
    """What no norm removes (elements moved by one, one of them 1 % larger) while the norm agrees: the record, and no operation."""

    def one(x: NDArray[np.float32]) -> NDArray[np.float32]:
        out = x.copy()
        out[:, int(np.abs(x).mean(axis=0).argmax())] *= np.float32(1.01)
        return out

    right = qwen3.wrong("", one)
    for change in (one, lambda x: np.roll(x, 1, axis=1)):
        verdict = compare(changed(right, change, lambda name: name == "blk.1.q", None), qwen3.ref)
        assert verdict
        assert [fault.checkpoint for fault in verdict.record_faults] == ["blk.1.q"]


@pytest.mark.slow
def test_what_a_relu_sets_to_zero_is_not_acquitted(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """Negative numbers in front of a ReLU, half as large again: no effect here, and no other layout of the record; another order is."""
    sides = Sides(small_model("nemotron"), tmp_path, reference)
    verdict = compare(sides.wrong("blk.1.ffn_up", lambda x: np.where(x < 0, x * np.float32(1.5), x)), sides.ref)
    assert not verdict
    assert verdict.record_faults == ()
    right = sides.wrong("", lambda x: x)
    assert compare(changed(right, lambda x: np.roll(x, 1, axis=1), lambda name: name == "blk.1.ffn_up", None), sides.ref)


def test_a_position_that_agrees_as_recorded_is_no_other_position(qwen3: Sides) -> None:
    """Values that agree where only the sketch differs are not called the reference's of "t + 0"."""
    ours = changed(qwen3.wrong("", lambda x: x), lambda x: x * np.float32(1.0), lambda name: False, 16)
    beyond = qwen3.wrong("blk.1.q", on_head(1, 1.3), 16)
    verdict = compare(replace(ours, points={**ours.points, "blk.1.q": beyond.points["blk.1.q"]}), qwen3.ref)
    assert not any("t + 0" in fault.sentence for fault in verdict.record_faults)
    assert verdict.pattern is None or "t + 0" not in verdict.pattern.sentence
