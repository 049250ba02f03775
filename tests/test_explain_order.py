"""The orders in which `parity explain` takes records, whatever order a dump has, and tries candidates."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from planted import PATIENT, Faulty, Planted, tokens_of

from checkpoints.dataflow import Computation, Dataflow
from engine.faults import CATALOGUE
from parity.diff.measured.dataflow import Flow
from parity.diff.measured.operations import suspects
from parity.explain.explain import explain
from parity.explain.findings.leads import _steps
from reference.client import Reference


@pytest.mark.slow
def test_a_router_is_judged_before_the_layer_that_it_feeds(reference: Reference, small_model: Callable[..., Path]) -> None:
    """A hunt's dump has the layers' outputs in front: weights of experts taken from raw logits are found there, not in what follows."""
    path = small_model("qwen2moe")
    engine = Faulty(path, reference.graph(path))
    weights = "blk.0.ffn_moe_weights"
    steps = [
        replace(step, reads=("blk.0.ffn_moe_logits", *step.reads[1:])) if step.makes == weights else step
        for step in engine.right
    ]
    dump = engine.dump(Planted(()), tokens_of(path, 5, seed=4), points="*", steps=steps)
    wanted = ("l_out", "embd", "ffn_out", "ffn_norm", "ffn_moe_logits", "ffn_moe_probs", "ffn_moe_topk", "ffn_moe_weights")
    ordered = sorted(
        (name for name in dump.points if name.split(".")[-1] in wanted), key=lambda name: wanted.index(name.split(".")[-1])
    )
    explanation = explain(replace(dump, points={name: dump.points[name] for name in ordered}), path, PATIENT)
    assert explanation.first is not None
    assert explanation.first.checkpoint == weights
    assert [(cause.named.fault, cause.named.layers) for cause in explanation.causes] == [("experts-raw-scores", (0,))]
    assert explanation.remaining is None


@pytest.mark.slow
@pytest.mark.parametrize(("by", "most"), [(-12, 100), (-1, 3000)])
def test_late_faults_of_all_layers_come_before_many_variants_of_single_ones(faulty: Faulty, by: int, most: int) -> None:
    """Weights of the twelfth layer before show after the first twelve only, with so large an error that whole layers are tried first: 25
    variants (17,435 in the order of the catalogue), of the layer before 1,382 (7,140).
    """
    entry = CATALOGUE["layer-offset"]
    steps = {step.makes: step for step in faulty.right}
    parameters = next(each for each in entry.variants(steps) if each["by"] == by)
    tokens = tokens_of(faulty.model, 12, seed=5)
    dump = faulty.dump(Planted(((entry.name, parameters, None),)), tokens)
    explanation = explain(dump, faulty.model, replace(PATIENT, tokens=tokens))
    named = [(cause.named.fault, cause.named.layers, cause.named.parameters["by"]) for cause in explanation.causes]
    assert named == [(entry.name, None, by)]
    assert explanation.variants < most


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["", "experts-not-normalised"])
def test_experts_may_be_listed_in_any_order(reference: Reference, small_model: Callable[..., Path], fault: str) -> None:
    """A right engine that lists the chosen experts backwards has no fault, and a wrong one has its own fault, at 16 values per row."""
    path = small_model("qwen3moe")
    engine = Faulty(path, reference.graph(path))
    planted = Planted(((fault, {}, None),) if fault else ())
    dump = engine.dump(planted, tokens_of(path, 7, seed=4), points="*")
    points = dict(dump.points)
    for name, rows in points.items():
        if "moe" in name and not name.endswith(("logits", "probs", "out", "sum", "clamped")):
            width = rows.values.shape[1]
            backwards = rows.values[:, ::-1] if width == 2 else rows.values + np.float32(1)  # 16 of 192: another expert's
            points[name] = replace(rows, values=backwards.copy())
    explanation = explain(replace(dump, points=points), path, PATIENT)
    assert [cause.named.fault for cause in explanation.causes] == ([fault] if fault else [])
    assert explanation.remaining is None
    assert any("not listed in the order of their scores" in note for note in explanation.notes)


@pytest.mark.slow
def test_rows_of_another_length_are_left_out(reference: Reference, small_model: Callable[..., Path]) -> None:
    """A recorder that took all heads and positions of q_norm for one row is no reason to call the norm wrong: RoPE is named."""
    path = small_model("qwen3")
    engine = Faulty(path, reference.graph(path))
    planted = Planted((("rope-pairs", {}, None),))
    wanted = "embd,blk.*.q_norm,blk.*.k_norm,blk.*.attn_out,blk.*.l_out,logits"
    dump = engine.dump(planted, tokens_of(path, 7, seed=4), points=wanted, bare=False)
    points = dict(dump.points)
    for name in [name for name in points if name.endswith(("q_norm", "k_norm"))]:
        first = points[name].take([0])
        points[name] = replace(first, shapes=tuple((7, *shape) for shape in first.shapes), sketch=None, stats={})
    explanation = explain(replace(dump, points=points), path, PATIENT)
    assert [cause.named.fault for cause in explanation.causes] == ["rope-pairs"]
    assert any("another length than the model's: blk.0.q_norm" in note for note in explanation.notes)


def test_ids_of_experts_are_no_lower_type() -> None:
    """Small whole numbers are exact in bfloat16; that says nothing of the engine's activations."""
    assert list(_steps(np.arange(16, dtype=np.float64))) == []
    assert list(_steps(np.arange(16, dtype=np.float64) / 8)) == [
        "every value is a bfloat16: the engine keeps activations in BF16"
    ]


def test_rows_of_a_computed_value_are_no_table() -> None:
    """Experts' weights are looked up among the router's scores: nothing is dequantised there, as in the embedding."""
    computations = {
        "embd": Computation("GET_ROWS", (), ("token_embd.weight",)),
        "blk.0.ffn_moe_weights": Computation("GET_ROWS", ("blk.0.ffn_moe_probs", "blk.0.ffn_moe_topk")),
    }
    flow = Flow(Dataflow(computations), tuple(computations), known=True)
    assert suspects(flow, ["embd"]).startswith("the table token_embd.weight")
    assert suspects(flow, ["blk.0.ffn_moe_weights"]) == "the lookup: which rows it takes, or of which value"
