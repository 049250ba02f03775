"""A measured arithmetic: single rows at which rounding is amplified are judged by what float64 with noise shows of them."""

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from planted import Faulty, Planted, half_sums, tokens_of

from checkpoints.formats import load
from checkpoints.record import Dump
from engine import ops
from engine.graph import Step
from engine.replay.precision import rounded
from engine.synth.recipe import shape_of
from engine.synth.recipes import RECIPES
from parity.diff.compare import Options
from parity.explain.case import ExplainOptions
from parity.explain.explain import explain
from parity.explain.on_model import compared_on
from parity.models.embedded import path as embedded
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference
from reference.jobs import DumpJob

_TOKENS = {"mamba2": (4, 220085), "arwkv7": (9, 220075)}


def summed_in_f16(architecture: str, folder: Path, reference: Reference, wrong: str = "") -> tuple[Path, Dump, Dump]:
    """A small model with weights of Q5_1, the dump of an engine that sums its products in F16, with one value 1 % too large (`wrong`), and
    llama.cpp's.
    """
    number, seed = _TOKENS[architecture]
    path, out, recipe = folder / "model.gguf", folder / "ref.jsonl", RECIPES[architecture]
    make_by_recipe(path, recipe, shape_of(recipe), {}, kind="q5_1", seed=seed, tokenizer=embedded(), running=reference)
    engine = Faulty(path, reference.graph(path))
    tokens = tokens_of(path, number, seed)
    reference.dump(DumpJob(path, out, tokens, points="all", slice_size=None, binary=True))

    def lower(step: Step) -> Step:
        summed = replace(step, op=half_sums) if step.op is ops.linear else step
        if step.makes != wrong:
            return summed
        return replace(summed, op=lambda *x, **params: summed.op(*x, **params) * np.float32(1.01))

    dump = engine.dump(Planted(()), tokens, points="all", size=16, bare=False, steps=[lower(step) for step in engine.right])
    return path, dump, load(out)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["", "blk.1.ssm_scan"])
def test_a_scan_of_which_next_to_nothing_is_left_at_one_position(tmp_path: Path, reference: Reference, wrong: str) -> None:
    """mamba2's scan at position 0 is one number times a row, which all but cancels: a quarter of it may be F16's, which nothing states;
    1 % at all positions is none even where F16 is stated.
    """
    path, ours, ref = summed_in_f16("mamba2", tmp_path, reference, wrong)
    assert ours.header is not None
    ours = replace(ours, header=replace(ours.header, compute="f16" if wrong else "", dataflow=None))
    verdict = compared_on(ours, ref, Options(), path).verdict
    assert bool(verdict) == (not wrong)
    assert verdict.first_divergence is None or verdict.first_divergence.checkpoint == wrong
    assert bool(explain(ours, path, ExplainOptions(budget=20))) == (not wrong)


@pytest.mark.slow
def test_one_record_over_what_few_values_cost_is_judged_as_diff_judges_it(tmp_path: Path, reference: Reference) -> None:
    """Ten values a row of a right arwkv7 with sums in F16, which it states: one row is 1.1 times over what F16 costs at these values, and
    not over what it costs whole rows. No cause is looked for.
    """
    path, ours, _ = summed_in_f16("arwkv7", tmp_path, reference)
    assert ours.header is not None
    points = {
        name: replace(rows, values=rows.values[:, :10], counts=np.minimum(rows.counts, 10), stats={}, sketch=None)
        for name, rows in ours.points.items()
    }
    answer = explain(replace(ours, points=points), path, ExplainOptions(budget=20, compute="f16"))
    assert not answer.causes
    assert answer.precision_only == "f16"


@pytest.mark.slow
def test_a_row_twenty_times_as_sensitive_is_judged_by_what_its_point_costs(tmp_path: Path, reference: Reference) -> None:
    """2 % at one position of a right arwkv7 in F16, which it states, are a divergence there: noise moves that row 20 times as far as usual
    ones, and no right engine needed a limit of its own for that.
    """
    wrong, row = "blk.1.sum_rows", 6
    path, _, ref = summed_in_f16("arwkv7", tmp_path, reference)
    engine = Faulty(path, reference.graph(path))

    def faulty(step: Step) -> Step:
        def op(*inputs: np.ndarray, **params: object) -> np.ndarray:
            value = np.array(step.op(*inputs, **params))
            value[row] *= np.float32(1.021)
            return value

        return replace(step, op=op) if step.makes == wrong else step

    steps = [faulty(step) for step in rounded(engine.right, "f16", storage=True)]
    ours = engine.dump(Planted(()), tokens_of(path, *_TOKENS["arwkv7"]), points="all", size=1 << 20, bare=False, steps=steps)
    assert ours.header is not None
    ours = replace(ours, header=replace(ours.header, compute="f16", dataflow=None))
    first = compared_on(ours, ref, Options(), path).verdict.first_divergence
    assert first is not None
    assert (first.checkpoint, first.token_idx) == (wrong, row)
