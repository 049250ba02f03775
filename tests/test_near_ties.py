"""Experts that are chosen by a hair: a right engine in lower arithmetic chooses others, and is no more accused for that."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from changed_files import File
from explaining import unstated
from msgspec.structs import replace
from planted import Faulty, Planted, tokens_of

from checkpoints.reading.reader import read
from engine.replay.precision import rounded
from engine.synth.recipe import shape_of
from engine.synth.recipes import RECIPES
from parity.diff.compare import Options, compare
from parity.explain.on_model import compared_on
from parity.models.embedded import path as embedded
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference
from reference.jobs import DumpJob


def _near_ties(model: Path, out: Path) -> Path:
    """The model with every second row of its routers nearly that of the one before: scores are 1e-4 apart."""
    file, draw = File(model), np.random.default_rng(1)
    for name in file.named("ffn_gate_inp.weight"):
        router = file.tensors[name]
        router[1::2] = router[::2] * (1 + 3e-4 * draw.standard_normal(router[::2].shape)).astype(np.float32)
    return file.write(out)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "storage"), [("f16", False), ("bf16", True)])
def test_a_right_engine_is_not_accused(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path, kind: str, storage: bool
) -> None:
    """Nothing says what it computes in: products in F16, or everything in BF16. The arithmetic is named, the choices are near ties."""
    path, out = _near_ties(small_model("mixtral", kind="f32"), tmp_path / "model.gguf"), tmp_path / "ref.jsonl"
    engine = Faulty(path, reference.graph(path))
    tokens = tokens_of(path, 9, seed=2)
    reference.dump(DumpJob(path, out, tokens, points="all", slice_size=None))
    steps = rounded(engine.right, kind, storage=storage)
    dump = engine.dump(Planted(()), tokens, points="all", size=1 << 20, bare=False, steps=steps)
    assert dump.header is not None
    dump = replace(dump, header=replace(dump.header, compute="", dataflow=None))
    verdict = compared_on(dump, read(out), Options(), path).verdict
    assert verdict.first_divergence is None
    assert verdict.precision is not None
    assert verdict.precision.arithmetic == kind


@pytest.mark.slow
def test_an_engine_whose_experts_are_chosen_as_in_float32_spares_nothing(tmp_path: Path, reference: Reference) -> None:
    """Where our own BF16 run chooses other experts at most positions, what that costs is no rounding that a right engine spared; a
    product 1.3 times too large in that engine is still a divergence.
    """
    path, out, tokens = tmp_path / "model.gguf", tmp_path / "ref.jsonl", (316, 145, 637, 627)
    chosen = RECIPES["bailingmoe"]
    make_by_recipe(path, chosen, shape_of(chosen), {}, kind="q6_k", seed=70437, tokenizer=embedded(), running=reference)
    engine = Faulty(path, reference.graph(path))
    steps = rounded(engine.right, "bf16", storage=True)
    reference.dump(DumpJob(path, out, tokens, points="all", slice_size=None))
    right = read(out)
    verdict = compared_on(unstated(engine.dump(Planted(()), tokens, points="all", steps=steps)), right, Options(), path).verdict
    assert verdict
    assert verdict.precision is not None
    assert verdict.precision.arithmetic == "bf16"
    faulty = [
        replace(step, op=lambda *x, op=step.op, **params: op(*x, **params) * np.float32(1.3))
        if step.makes == "blk.1.attn_out"
        else step
        for step in steps
    ]
    assert not compared_on(
        unstated(engine.dump(Planted(()), tokens, points="all", steps=faulty)), right, Options(), path
    ).verdict


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True])
def test_scores_of_other_groups_of_experts_are_not_compared(tmp_path: Path, reference: Reference, wrong: bool) -> None:
    """BF16 chooses another group of experts at one position, whose scores are then others: right; a tenth too large, they are wrong at all
    others."""
    path, out, recipe = tmp_path / "model.gguf", tmp_path / "ref.jsonl", RECIPES["bailingmoe2"]
    make_by_recipe(path, recipe, shape_of(recipe), {}, kind="q3_k_m", seed=71029, tokenizer=embedded(), running=reference)
    engine, tokens = Faulty(path, reference.graph(path)), tokens_of(path, 9, seed=71029)
    reference.dump(DumpJob(path, out, tokens, points="all", slice_size=None))
    steps = [
        replace(step, op=lambda *x, op=step.op, **params: op(*x, **params) * np.float32(1.1))
        if wrong and step.makes == "blk.2.get_rows.2"
        else step
        for step in rounded(engine.right, "bf16", storage=False)
    ]
    dump = engine.dump(Planted(()), tokens, points="all", size=1 << 20, bare=False, steps=steps)
    assert dump.header is not None
    verdict = compare(replace(dump, header=replace(dump.header, compute="bf16", dataflow=None)), read(out))
    assert bool(verdict) is not wrong
    if not wrong:
        assert any(
            "blk.2.get_rows.2, position 8: its rows are chosen by blk.2.sum_rows: a near tie" in note for note in verdict.notes
        )


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.1, 3.0])
def test_a_near_tie_of_groups_excuses_no_other_values(tmp_path: Path, reference: Reference, factor: float) -> None:
    """One token whose groups nearly tie, and scores too large: they are no other group's."""
    path, out, recipe = tmp_path / "model.gguf", tmp_path / "ref.jsonl", RECIPES["bailingmoe2"]
    make_by_recipe(path, recipe, shape_of(recipe), {}, kind="f16", seed=91021, tokenizer=embedded(), running=reference)
    engine, tokens = Faulty(path, reference.graph(path)), tokens_of(path, 1, seed=91021)
    reference.dump(DumpJob(path, out, tokens, points="all", slice_size=None))
    steps = [
        replace(step, op=lambda *x, op=step.op, **params: op(*x, **params) * np.float32(factor))
        if step.makes == "blk.1.get_rows.2"
        else step
        for step in rounded(engine.right, "bf16", storage=False)
    ]
    dump = engine.dump(Planted(()), tokens, points="all", size=1 << 20, bare=False, steps=steps)
    assert dump.header is not None
    verdict = compare(replace(dump, header=replace(dump.header, compute="bf16", dataflow=None)), read(out))
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.1.get_rows.2"
