"""The pattern of a divergence names what lies between the point and those before it, in models whose graph is known."""

from pathlib import Path

import numpy as np
import pytest
from explaining import RIGHT
from msgspec.structs import replace
from planted import Faulty, tokens_of

from checkpoints.reading.reader import read
from engine.backend import Array
from engine.faults.edits import Then
from engine.synth.recipe import shape_of
from engine.synth.recipes import RECIPES
from parity.diff.compare import Options, compare
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference
from reference.jobs import DumpJob


def _scaled(x: Array) -> Array:
    return np.asarray(x * np.float32(1.1))


def _second_row(x: Array) -> Array:
    changed = x.copy()
    changed[1] += np.float32(0.1) * x[2]
    return changed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "place", "points", "says", "never"),
    [
        ("gpt-oss", "ffn_moe_weights", "blk.0.{ffn_norm,ffn_moe_out,l_out}", "the choice of experts", "causal mask"),
        ("gpt2", "embd", "embd,blk.0.l_out", "row 1 of position_embd.weight", "attention"),
    ],
)
def test_a_pattern_speaks_of_what_lies_between(
    reference: Reference, stories: Path, tmp_path: Path, architecture: str, place: str, points: str, says: str, never: str
) -> None:
    """Behind attention that agrees nothing of attention is suspected; a row of the embedding is a token's and a position's."""
    model, out, recipe = tmp_path / "m.gguf", tmp_path / "ref.jsonl", RECIPES[architecture]
    make_by_recipe(model, recipe, shape_of(recipe), {}, kind="f32", seed=5, tokenizer=stories, running=reference)
    engine, tokens = Faulty(model, reference.graph(model)), tokens_of(model, 9, 5)
    reference.dump(DumpJob(model, out, tokens, points=points))
    change = _second_row if place == "embd" else _scaled
    steps = [
        replace(step, op=Then(step.op, change)) if step.makes in (place, f"blk.0.{place}") else step for step in engine.right
    ]
    verdict = compare(engine.dump(RIGHT, tokens, points=points, steps=steps), read(out), Options(compute="f32"))
    assert verdict.pattern is not None
    assert says in verdict.pattern.sentence
    assert never not in verdict.pattern.sentence
