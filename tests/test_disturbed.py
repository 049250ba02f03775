"""Rounding that a model amplifies: how far it carries is measured by runs with noise of its size, and faults are larger."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changed_files import File
from msgspec.structs import replace

from checkpoints.formats import load
from checkpoints.record import Rows
from engine import ops
from engine.graph import Step
from engine.opened import open_plain
from engine.replay.disturbed import ELEMENT, PRODUCT, disturbed
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.arbiter.arbiter import Arbiter
from parity.diff.compare import Options, compare
from parity.diff.tolerances.few_numbers import share_of_few
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
        Step("chosen", lambda: np.arange(5, dtype=np.float32), ()),
        Step("mask", lambda: np.array([0.0, -np.inf]), ()),
    ]
    product, total, ids, chosen, mask = (step.op for step in disturbed(steps, 0))
    assert _nmse(product(x, w, None), x @ w.T) == pytest.approx(PRODUCT, rel=0.05)
    assert _nmse(total(x, x), x + x) == pytest.approx(ELEMENT**2, rel=0.05)
    assert ids().tolist() == chosen().tolist() == [0, 1, 2, 3, 4]
    assert mask().tolist() == [0.0, -np.inf]
    assert np.array_equal(product(x, w, None), product(x, w, None))
    assert not np.array_equal(product(x, w, None), disturbed(steps, 1)[0].op(x, w, None))
    # What float32 gives stays float32, which ggml's tables of float16 are for.
    narrow = x.astype(np.float32)
    assert product(narrow, w.astype(np.float32), None).dtype == total(narrow, narrow).dtype == np.float32


def test_the_share_of_a_row_of_few_elements() -> None:
    """A row of one number counts as its energy does among those of its point; rows of many elements, and rows of zeros, as they are."""

    def rows(norms: list[float], n: int) -> Rows:
        stats = {"n": np.full(len(norms), float(n)), "l2": np.array(norms)}
        count = len(norms)
        zeros, at = np.zeros(count, np.int64), np.arange(count)
        values = np.zeros((count, 1), np.float32)
        return Rows("gate", zeros, at, zeros, zeros > 0, ((n,),) * count, values, zeros + 1, stats)

    assert share_of_few(rows([2.0, 0.02, 0.0], 1)).tolist() == [1.0, pytest.approx(1e-4), 1.0]
    assert share_of_few(rows([2.0, 0.02, 0.0], 64)).tolist() == [1.0, 1.0, 1.0]


def _nmse(ours: Any, other: Any) -> float:
    return float(((ours - other) ** 2).sum() / (other**2).sum())


class Scaled:
    """A small model: what llama.cpp gives for a prompt, and what our engine gives with one point's rows scaled."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        reference: Reference,
        point: str = "blk.0.mamba_y_view",
        ids: tuple[int, ...] = IDS,
        points: str = "all",
    ) -> None:
        self.engine: Transformer = open_plain(GgufModel(model), "numpy", recorded=partial(reference.graph, model))
        self.right, self.folder, self.point, self.ids, self.points = self.engine.steps, folder, point, ids, points
        reference.dump(DumpJob(model, folder / "ref.jsonl", ids, points="all"))

    def agrees(self, factor: float, at: slice = slice(None)) -> bool:
        """Whether it is parity, of the points that are compared, if the rows at these positions are larger by that factor."""

        def larger(op: Callable[..., Any], *inputs: Any, **params: Any) -> Any:
            value = np.array(op(*inputs, **params))
            value[at] *= np.float32(factor)
            return value

        assert any(step.makes == self.point for step in self.right)
        out = self.folder / "ours.jsonl"
        self.engine.steps = [
            replace(step, op=partial(larger, step.op)) if step.makes == self.point else step for step in self.right
        ]
        dump(self.engine, OursJob(out, self.ids, points=self.points))
        self.engine.steps = self.right
        truth = Arbiter.of(self.engine, self.ids)
        return bool(compare(load(out), load(self.folder / "ref.jsonl"), Options(truth=truth)))


@pytest.mark.slow
def test_a_scan_whose_terms_cancel(small_model: Callable[..., Path], reference: Reference, tmp_path: Path) -> None:
    """At one position plamo2's scan is all but nothing, and the reference near the truth by luck: that is parity, and a scan that is a
    thousandth too large is not, were it there alone, nor one of a ten-thousandth."""
    plamo2 = Scaled(small_model("plamo2", layers=2), tmp_path, reference)
    assert plamo2.agrees(1.0)
    assert not plamo2.agrees(1.001)
    assert not plamo2.agrees(1.001, slice(AT, AT + 1))
    assert not plamo2.agrees(1.0001)
    assert not plamo2.agrees(1.0001, slice(AT, AT + 1))


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "factor"), [("neo-bert", 4.0), ("eurobert", 10.0)])
def test_an_encoders_large_scores(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path, architecture: str, factor: float
) -> None:
    """Large scores, as T5's unscaled ones are, amplify rounding in the soft max of an encoder, whose rows have all positions: that is
    parity, and a soft max that is a thousandth or a ten-thousandth too large is not."""
    file = File(small_model(architecture, "f32"))
    file.each(
        "attn_qkv.weight" if architecture == "neo-bert" else "attn_q.weight", lambda weight: _larger_queries(weight, factor)
    )
    ids = tuple((37 * i + 61) % 1900 for i in range(40))
    encoder = Scaled(file.write(tmp_path / "large.gguf"), tmp_path, reference, "blk.2.kq_soft_max", ids)
    assert encoder.agrees(1.0)
    assert not encoder.agrees(1.001)
    assert not encoder.agrees(1.0001)


def _larger_queries(weight: np.ndarray, factor: float) -> np.ndarray:
    """Rows of a matrix multiplied: all of them, or the first half of a fused one, which has the queries and some keys."""
    fused = weight.shape[0] > weight.shape[1]
    weight[: weight.shape[0] // 2 if fused else None] *= np.float32(factor)
    return weight


@pytest.mark.slow
def test_a_gate_of_one_number_that_cancels(small_model: Callable[..., Path], reference: Reference, tmp_path: Path) -> None:
    """qwen3next's shared expert has a gate of one number, at two positions all but 0, of which rounding is a far larger part: that is
    parity, and a gate that is a thousandth too large is not, nor is it if only the small ones are."""
    ids = tuple((401 * i + 37) % 1999 + 3 for i in range(37))
    qwen3next = Scaled(small_model("qwen3next"), tmp_path, reference, "blk.3.shared_expert_gate", ids)
    assert qwen3next.agrees(1.0)
    assert not qwen3next.agrees(1.001)
    assert not qwen3next.agrees(1.0001)
    assert not qwen3next.agrees(1.1, slice(3, 4))


@pytest.mark.slow
def test_rows_of_which_a_table_leaves_little(small_model: Callable[..., Path], reference: Reference, tmp_path: Path) -> None:
    """gemma3n keeps a few elements of a row and looks GELU up for them in a table of float16, so that one other entry moves the whole
    row: that is parity for a prompt at which other entries are used, and one activation that is a hundredth too large is not."""
    draw = random.Random(5)
    ids = tuple(draw.randrange(3, 250) for _ in range(21))
    gemma3n = Scaled(small_model("gemma3n"), tmp_path, reference, "blk.4.unary.2", ids)
    assert gemma3n.agrees(1.0)
    assert not gemma3n.agrees(1.01)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["granitemoe", "qwen3moe"])
def test_noise_leaves_the_choice_of_experts(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path, architecture: str
) -> None:
    """Rounding's noise chooses no other experts, so that a product which is a thousandth too large is seen after them."""
    model = small_model(architecture)
    experts = Scaled(model, tmp_path, reference, "blk.0.attn_out", tuple(range(5, 13)), "default")
    assert experts.agrees(1.0)
    assert not experts.agrees(1.001)
