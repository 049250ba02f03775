"""A norm divides by what is left of a row: in a lower arithmetic single rows may be far over a limit that is one for all models."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from planted import Faulty, Planted, tokens_of
from test_lower_records import with_rows

from checkpoints.points import of_scores
from checkpoints.reading.reader import read
from checkpoints.record import Dump
from engine.replay.precision import rounded
from engine.synth.recipe import shape_of
from engine.synth.recipes import RECIPES
from parity.diff.compare import Options, compare
from parity.models.embedded import path as embedded
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference
from reference.jobs import DumpJob


def as_in_f16(values: np.ndarray) -> np.ndarray:
    """Every row off by a factor of its own, an NMSE of some 1e-8: a norm whose sum was rounded."""
    return values * (1 + np.random.default_rng(2).standard_normal((len(values), 1), dtype=np.float32) * np.float32(1e-4))


def smaller(size: float) -> Callable[[np.ndarray], np.ndarray]:
    """A row of position 2 that is smaller, by this NMSE: its norm divided by too much."""

    def change(values: np.ndarray) -> np.ndarray:
        values[2] *= 1 - np.sqrt(size)
        return values

    return change


@pytest.mark.parametrize(
    ("first", "size", "left_open"), [("attn_norm", 1e-4, True), ("attn_norm", 0.1, False), ("attn_out", 1e-4, False)]
)
def test_a_norm_may_amplify_noise_at_single_positions(right: Dump, ref: Dump, first: str, size: float, left_open: bool) -> None:
    """In a stated F16 a norm divides by what is left of a row that all but cancels: one row that is ten times over a limit that is one for
    all models is left open for it. A larger error is not, nor is one at a product, which amplifies nothing.
    """
    plain = [name for name in right.points if name != "embd" and not of_scores(name) and "_read" not in name]
    ours = replace(right, points={name: right.points[name] for name in ("embd", *plain)})
    for name in plain:
        ours = with_rows(ours, name, as_in_f16, "f16")
    for name in plain[plain.index(f"blk.1.{first}") :]:
        ours = with_rows(ours, name, smaller(size), "f16")
    bare = {
        name: replace(rows, values=rows.values[:, :16], counts=np.minimum(rows.counts, 16), sketch=None, stats={})
        for name, rows in ours.points.items()
    }
    verdict = compare(replace(ours, points=bare), ref, Options(compute="f16"))
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == f"blk.1.{first}"
    assert verdict.pattern is not None
    assert ("a recurrence or a norm may amplify it" in verdict.pattern.sentence) == left_open


@pytest.mark.slow
@pytest.mark.parametrize(("size", "left_open"), [(0.0, True), (3.0, False)])
def test_the_norm_of_a_recurrences_head_makes_any_rounding_large(
    tmp_path: Path, reference: Reference, size: float, left_open: bool
) -> None:
    """A head of rwkv6 reads one key at position 0, in proportion to a number that is next to nothing: in a right engine with 8-bit
    activations its norm is 0.14 off there, which is left open; a row that is three times its size is not.
    """
    path, out, recipe = tmp_path / "model.gguf", tmp_path / "ref.jsonl", RECIPES["rwkv6"]
    make_by_recipe(path, recipe, shape_of(recipe), {}, kind="f16", seed=200011, tokenizer=embedded(), running=reference)
    engine = Faulty(path, reference.graph(path))
    tokens = tokens_of(path, 7, seed=200011)
    reference.dump(DumpJob(path, out, tokens, points="all", slice_size=None))
    larger = np.where(np.arange(7)[:, None] == 0, np.float32(1 + size), np.float32(1))
    steps = [
        replace(step, op=lambda *x, op=step.op, **params: op(*x, **params) * larger)
        if size and step.makes == "blk.2.norm.2"
        else step
        for step in rounded(engine.right, "q8", storage=False)
    ]
    dump = engine.dump(Planted(()), tokens, points="all", size=10, bare=False, steps=steps)
    assert dump.header is not None
    verdict = compare(replace(dump, header=replace(dump.header, compute="q8", dataflow=None)), read(out))
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.2.norm.2"
    assert verdict.pattern is not None
    assert ("a recurrence or a norm may amplify it" in verdict.pattern.sentence) == left_open
