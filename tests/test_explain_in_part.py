"""What a dump recorded in part says of the rest: leading values, one head, row 0 of a cache."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explaining import PROMPT, RIGHT, edited, names
from msgspec.structs import replace
from planted import Faulty, Planted

from engine.backend import Array
from engine.faults.edits import Then
from engine.opened import open_plain
from engine.synth import Shape, synthesize
from engine.weights.gguf_model import GgufModel
from parity.explain.explain import ExplainOptions, explain
from parity.explain.search.cone import mixes
from reference.client import Reference

_PATIENT = ExplainOptions(budget=300.0)


@pytest.mark.slow
def test_a_fault_outside_of_the_slice_is_not_a_factor_of_one(engine: Faulty) -> None:
    """One logit far after the slice is wrong and the sketch shows it: no law of the 16 values, which are right."""

    def late(x: Array) -> Array:
        return np.concatenate([x[..., :-1], x[..., -1:] + np.float32(50)], axis=-1)

    steps = [
        replace(step, op=lambda *inputs, op=step.op, **params: late(op(*inputs, **params))) if step.makes == "logits" else step
        for step in engine.right
    ]
    explanation = explain(engine.dump(RIGHT, PROMPT, steps=steps, bare=False), engine.model, _PATIENT)
    assert explanation.first is not None
    assert explanation.first.checkpoint == "logits"
    assert explanation.law == "every recorded element is right: what differs was not recorded"
    assert explanation.placed is not None
    assert (explanation.placed.operations, explanation.placed.behind) == (("logits",), True)
    assert (explanation.next, explanation.next_slice) == ("logits", explanation.seen[-1].of)


@pytest.mark.slow
def test_logits_that_are_right_where_recorded_acquit_everything_before(engine: Faulty) -> None:
    """With the logits alone, too: sixteen right ones are made of the whole row before, so that no layer is searched for a fault."""

    def scattered(*inputs: Array, op: Callable[..., Array], **params: Any) -> Array:
        changed = op(*inputs, **params).copy()
        changed[:, [100, 200, 299]] = 91.5
        return changed

    steps = [replace(step, op=partial(scattered, op=step.op)) if step.makes == "logits" else step for step in engine.right]
    dump = engine.dump(RIGHT, PROMPT, points="logits", steps=steps, bare=False)
    explanation = explain(dump, engine.model, _PATIENT)
    assert explanation.placed is not None
    assert (explanation.placed.operations, explanation.placed.behind) == (("logits",), True)
    assert explanation.variants < 500


@pytest.mark.slow
def test_recorded_values_of_another_point_are_not_its_row(engine: Faulty) -> None:
    """Of ffn_up the 16 recorded values are ffn_gate's: that the row is not is seen by the sketch, and said."""

    def mixed(x: Array, gate: Array, weight: Array, *_: Any) -> Array:
        return np.concatenate([gate[:, :16], np.tanh(x @ weight.T)[:, :15:-1]], axis=1)

    steps = [
        replace(step, op=mixed, reads=(*step.reads, "blk.2.ffn_gate")) if step.makes == "blk.2.ffn_up" else step
        for step in engine.right
    ]
    law = explain(engine.dump(RIGHT, PROMPT, points="*", steps=steps, bare=False), engine.model, _PATIENT).law
    assert law == "the 16 recorded values are those of blk.2.ffn_gate in a right engine, the rest of the row is not"


@pytest.mark.slow
def test_zeros_of_one_head_prove_no_factor(engine: Faulty) -> None:
    """The only recorded head is zero: that all heads are multiplied by 0 would reproduce it, and nothing that is made from it."""

    def headless(x: Array) -> Array:
        changed = x.copy()
        changed[:, :8] = 0
        return changed

    explanation = explain(edited(engine, "blk.1.q", headless, size=8), engine.model, _PATIENT)
    assert names(explanation) == []
    assert explanation.first is not None
    assert explanation.first.checkpoint == "blk.1.q"
    assert explanation.law.startswith("every element is 0")


@pytest.mark.slow
def test_what_the_cache_shows_in_part_has_no_cause(engine: Faulty) -> None:
    """Rows 0 and 1 of V's cache are exchanged, and its record shows row 0 alone: that the cache is read one row late is not said."""

    def exchanged(x: Array) -> Array:
        return x[[1, 0, *range(2, len(x))]] if len(x) > 1 else x

    explanation = explain(edited(engine, "blk.1.v_read", exchanged, size=10), engine.model, _PATIENT)
    assert explanation.first is not None
    assert (explanation.first.checkpoint, names(explanation)) == ("blk.1.v_read", [])


@pytest.mark.slow
def test_a_cause_of_weights_recorded_in_part_stays_beside_what_has_no_entry(engine: Faulty) -> None:
    """Attention's weights show no cache: their wrong scale is named also where the feed-forward after them is wrong in an unknown way."""
    makes = "blk.1.ffn_out"
    steps = [
        replace(step, op=Then(step.op, lambda x: np.sign(x) * np.abs(x) ** np.float32(1.1))) if step.makes == makes else step
        for step in engine.right
    ]
    fault = ("attn-scale", {"scale": "missing"}, (1,))
    dump = engine.dump(Planted((fault,)), PROMPT, points="*", steps=steps)
    explanation = explain(dump, engine.model, ExplainOptions(budget=20.0))
    assert explanation.first is not None
    assert explanation.remaining is not None
    assert (explanation.first.checkpoint, names(explanation)) == ("blk.1.kq_soft_max", ["attn-scale"])
    assert explanation.remaining.checkpoint == makes


@pytest.mark.slow
def test_a_cause_that_the_next_point_contradicts_is_none(tmp_path: Path) -> None:
    """Half of each key negated is a rotation backwards in the sixteen elements that were recorded, but not in the scores made of them."""
    path = tmp_path / "heads.gguf"
    synthesize(path, Shape("qwen2", 2, 128, 4, 2, 0, 128, 300), weight_type="f32", seed=11)
    engine = Faulty(path)

    def half_negated(x: Array) -> Array:
        return (x.reshape(len(x), -1, 2, 16) * np.array([[1], [-1]], np.float32)).reshape(x.shape)

    steps = [replace(step, op=Then(step.op, half_negated)) if step.makes.endswith(".k") else step for step in engine.right]
    explanation = explain(engine.dump(RIGHT, PROMPT, points="*", steps=steps), engine.model, ExplainOptions(budget=20.0))
    assert explanation.first is not None
    assert (explanation.first.checkpoint, names(explanation)) == ("blk.0.k_rope", [])
    assert "in the 16 recorded elements: others may be wrong otherwise" in explanation.law


@pytest.mark.slow
def test_a_product_by_heads_shows_one_head(small_model: Callable[..., Path], reference: Reference) -> None:
    """deepseek2's absorbed queries are a product of each head's own matrix: right elements of head 0 say nothing of what the other heads
    are made from, while those of the output projection do.
    """
    path = small_model("deepseek2", layers=1)
    engine = open_plain(GgufModel(path), "numpy", recorded=partial(reference.graph, path))
    whole = {step.makes for step in engine.steps if mixes(step, engine.weights)}
    assert {"blk.0.q", "blk.0.attn_out", "logits"} <= whole
    assert not any(name.startswith(("blk.0.q_nope_absorbed", "blk.0.kqv_mla")) for name in whole)
