"""Rounding that a model amplifies: how far it carries is measured by runs with noise of its size, and faults are larger."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.formats import load
from engine import ops
from engine.graph import Step
from engine.opened import open_plain
from engine.replay.disturbed import ELEMENT, PRODUCT, disturbed
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.arbiter.arbiter import Arbiter
from parity.diff.compare import Options, compare
from parity.run.ours import OursJob, dump
from reference.client import Reference
from reference.jobs import DumpJob

IDS = tuple(50 + (37 * i + 11) % 1900 for i in range(33))
AT = 29  # where the terms of plamo2's first scan cancel


def test_the_noise_is_of_roundings_size() -> None:
    """A product's rows are off by the worst of a right product's errors, anything else by one rounding; ids and masks are not."""
    rng = np.random.default_rng(2)
    x, w = rng.normal(size=(50, 400)), rng.normal(size=(300, 400))
    steps = [
        Step("product", ops.linear, ("x",)),
        Step("sum", ops.add, ("x", "x")),
        Step("ids", lambda: np.arange(5), ()),
        Step("mask", lambda: np.array([0.0, -np.inf]), ()),
    ]
    product, total, ids, mask = (step.op for step in disturbed(steps, 0))
    assert _nmse(product(x, w, None), x @ w.T) == pytest.approx(PRODUCT, rel=0.05)
    assert _nmse(total(x, x), x + x) == pytest.approx(ELEMENT**2, rel=0.05)
    assert ids().tolist() == [0, 1, 2, 3, 4]
    assert mask().tolist() == [0.0, -np.inf]
    assert np.array_equal(product(x, w, None), product(x, w, None))
    assert not np.array_equal(product(x, w, None), disturbed(steps, 1)[0].op(x, w, None))


def _nmse(ours: Any, other: Any) -> float:
    return float(((ours - other) ** 2).sum() / (other**2).sum())


class Plamo2:
    """A small plamo2: what llama.cpp gives for a prompt, and what our engine gives with a scan that is off."""

    def __init__(self, model: Path, folder: Path, reference: Reference) -> None:
        self.engine: Transformer = open_plain(GgufModel(model), "numpy", recorded=partial(reference.graph, model))
        self.right, self.folder = self.engine.steps, folder
        reference.dump(DumpJob(model, folder / "ref.jsonl", IDS, points="all"))

    def agrees(self, factor: float, at: slice = slice(None)) -> bool:
        """Whether a scan whose rows are larger by that factor at these positions is parity, all points compared."""

        def larger(op: Callable[..., Any], *inputs: Any, **params: Any) -> Any:
            value = np.array(op(*inputs, **params))
            value[at] *= np.float32(factor)
            return value

        point = "blk.0.mamba_y_view"
        assert any(step.makes == point for step in self.right)
        out = self.folder / "ours.jsonl"
        self.engine.steps = [replace(step, op=partial(larger, step.op)) if step.makes == point else step for step in self.right]
        dump(self.engine, OursJob(out, IDS, points="all"))
        self.engine.steps = self.right
        truth = Arbiter.of(self.engine, IDS)
        return bool(compare(load(out), load(self.folder / "ref.jsonl"), Options(truth=truth)))


@pytest.mark.slow
def test_a_scan_whose_terms_cancel(small_model: Callable[..., Path], reference: Reference, tmp_path: Path) -> None:
    """At one position plamo2's scan is all but nothing, and the reference near the truth by luck: that is parity, and a scan that is a
    thousandth too large is not, were it there alone, nor one of a ten-thousandth."""
    plamo2 = Plamo2(small_model("plamo2", layers=2), tmp_path, reference)
    assert plamo2.agrees(1.0)
    assert not plamo2.agrees(1.001)
    assert not plamo2.agrees(1.001, slice(AT, AT + 1))
    assert not plamo2.agrees(1.0001)
    assert not plamo2.agrees(1.0001, slice(AT, AT + 1))
