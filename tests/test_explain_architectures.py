"""Faults that only some architectures can have: each is named in a model to which it applies, in all layers and in one."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fault_places import GENERATED, PLACES, SETTINGS
from msgspec.structs import replace
from planted import PATIENT, Faulty, Planted, tokens_of

from checkpoints.points import parse
from engine.faults import CATALOGUE, plant
from engine.faults.base import kind_of
from engine.replay.wide import without_tables
from parity.explain.case import Case
from parity.explain.explain import explain
from reference.client import Reference

_QUICK = {"head-norm-missing", "window-ignored"}


@pytest.fixture(scope="module")
def faulty(reference: Reference, small_model: Callable[..., Path]) -> Callable[[str], Faulty]:
    """The engine of a recipe's model, lifted from llama.cpp's graph."""
    engines: dict[str, Faulty] = {}

    def of(name: str) -> Faulty:
        if name not in engines:
            recipe, settings = SETTINGS.get(name, (name, {}))
            model = small_model(recipe, settings=settings)
            engines[name] = Faulty(model, reference.graph(model))
        return engines[name]

    return of


@pytest.mark.slow
def test_states_are_left_out_and_named(faulty: Callable[[str], Faulty]) -> None:
    """A recurrent model's dump of every point: what explain does not compare, since it has no row for each position, is said."""
    engine = faulty("mamba2")
    explanation = explain(engine.dump(Planted(()), tokens_of(engine.model, 4, seed=5), points="*"), engine.model, PATIENT)
    assert explanation
    [note] = [note for note in explanation.notes if note.startswith("left out")]
    assert "blk.0.cache_s" in note


@pytest.mark.slow
def test_a_right_engine_whose_decay_begins_anew_in_each_pass(faulty: Callable[[str], Faulty]) -> None:
    """Lightning attention's parts depend on where a pass begins, their sum does not: over several passes only the sum is compared."""
    engine = faulty("minimax-01")
    dump = engine.dump(Planted(()), tokens_of(engine.model, 7, seed=3), points="*", generated=2)
    explanation = explain(dump, engine.model, PATIENT)
    assert explanation
    assert any("they depend on where a pass begins" in note for note in explanation.notes)
    assert "blk.0.qkv" in {entry.point for entry in Case(dump, engine.model, PATIENT).entries}


@pytest.mark.slow
@pytest.mark.parametrize("layers", [None, (2,)])
def test_a_norm_behind_a_branch_by_any_name(faulty: Callable[[str], Faulty], layers: tuple[int, ...] | None) -> None:
    """GLM-4's norms behind its branches have names of their own, `post_attn_norm`: one that an engine leaves out is named all the same."""
    engine = faulty("glm4")
    steps = [
        replace(step, op=lambda x, *_weights, **_params: x.copy())
        if kind_of(step) == "post_attn_norm" and (layers is None or parse(step.makes).layer in layers)
        else step
        for step in engine.right
    ]
    tokens = tokens_of(engine.model, 6, seed=5)
    explanation = explain(engine.dump(Planted(()), tokens, steps=steps), engine.model, replace(PATIENT, tokens=tokens))
    [cause] = explanation.causes
    assert (cause.named.fault, cause.named.layers) == ("post-norm-missing", layers)
    assert explanation.remaining is None


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "name"), [("blk.2.attn_out", "branch-missing"), ("blk.1.l_out", "residual-missing")])
def test_what_is_lost_of_a_block_with_parallel_branches(faulty: Callable[[str], Faulty], lost: str, name: str) -> None:
    """Cohere 2 adds the layer's input to the feed-forward, then attention's result to that sum: which was lost is said."""
    engine = faulty("cohere2")
    steps = [
        replace(step, op=lambda x, y, own=step: y if own.names[0] == lost else x)
        if lost in step.names and parse(step.makes).layer == 2 and len(step.names) == 2
        else step
        for step in engine.right
    ]
    tokens = tokens_of(engine.model, 6, seed=5)
    dump = engine.dump(Planted(()), tokens, steps=steps)
    [cause] = explain(dump, engine.model, replace(PATIENT, tokens=tokens)).causes
    assert (cause.named.fault, cause.named.layers) == (name, (2,))


@pytest.mark.slow
def test_a_residual_of_another_name_is_one(faulty: Callable[[str], Faulty]) -> None:
    """PLaMo 2's Mamba layers add their input at attn_residual: that it is missing there is said, not that a term is multiplied by 0."""
    engine = faulty("plamo2")
    tokens = tokens_of(engine.model, 6, seed=5)
    dump = engine.dump(Planted((("residual-missing", {"at": ("attn_residual",)}, None),)), tokens)
    [cause] = explain(dump, engine.model, replace(PATIENT, tokens=tokens)).causes
    assert (cause.named.fault, cause.named.parameters) == ("residual-missing", {"at": ("attn_residual",)})


@pytest.mark.slow
def test_causes_beside_the_records_of_attentions_weights(faulty: Callable[[str], Faulty]) -> None:
    """Where scores and weights [heads, T, T] are recorded, a fault that changes them is named, and causes come in the model's order."""
    engine = faulty("gpt-oss")
    tokens = tokens_of(engine.model, 9, seed=5)
    faults = (("experts-weighted-before-choice", {}, (2,)), ("sinks-order", {"order": "head 0"}, None))
    dump = engine.dump(Planted(faults), tokens, points="*")
    explanation = explain(dump, engine.model, replace(PATIENT, tokens=tokens))
    assert [cause.named.fault for cause in explanation.causes] == ["sinks-order", "experts-weighted-before-choice"]
    assert explanation.remaining is None


@pytest.mark.slow
def test_a_gross_fault_of_an_engine_whose_gelu_is_no_table(faulty: Callable[[str], Faulty]) -> None:
    """GELU of up instead of gate, computed by the function itself: what ggml's table costs at other arguments is no second fault."""
    engine = faulty("gemma3")
    tokens = tokens_of(engine.model, 8, seed=5)
    name, parameters = "gate-up-split", {"split": "in the other order", "seen": "in the activation alone"}
    steps = plant(without_tables(engine.right), CATALOGUE[name], None, **parameters)
    explanation = explain(
        engine.dump(Planted(()), tokens, points="*", steps=steps), engine.model, replace(PATIENT, tokens=tokens)
    )
    [cause] = explanation.causes
    assert (cause.named.fault, explanation.remaining) == (name, None)
    assert explanation.variants
    assert any("compared with the function itself" in note for note in explanation.notes)


def test_parts_of_a_product_that_were_recorded_as_they_were_taken(faulty: Callable[[str], Faulty]) -> None:
    """GLM-4's gate and up are halves of one product: an engine that takes them in the other order, and records them so, has one fault."""
    engine = faulty("glm4")
    right = {step.makes: step for step in engine.right}
    exchanged = {"ffn_gate": "ffn_up", "ffn_up": "ffn_gate"}
    steps = [
        replace(step, reads=right[step.makes.replace(kind_of(step), exchanged[kind_of(step)])].reads)
        if kind_of(step) in exchanged
        else replace(step, reads=step.reads[::-1])
        if kind_of(step) == "ffn_swiglu"
        else step
        for step in engine.right
    ]
    tokens = tokens_of(engine.model, 5, seed=5)
    dump = engine.dump(Planted(()), tokens, points="embd,blk.0.*,logits", steps=steps)
    [cause] = explain(dump, engine.model, replace(PATIENT, tokens=tokens)).causes
    assert cause.named.fault == "gate-up-split"
    assert dict(cause.named.parameters)["split"] == "in the other order"
    assert not cause.equivalent


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        pytest.param(name, layers, marks=() if name in _QUICK and layers is None else pytest.mark.slow)
        for name, (_, _, places) in PLACES.items()
        for layers in places
    ],
)
def test_each_fault_is_named(faulty: Callable[[str], Faulty], name: str, layers: tuple[int, ...] | None) -> None:
    """Sixteen values a record are enough to name the fault, or one with the same numbers, and no other."""
    recipe, chosen, _ = PLACES[name]
    engine = faulty(recipe)
    tokens = tokens_of(engine.model, 14, seed=5)
    parameters = CATALOGUE[name].variants({step.makes: step for step in engine.right})[0] | chosen
    dump = engine.dump(Planted(((name, parameters, layers),)), tokens, generated=4 if name in GENERATED else 0)
    explanation = explain(dump, engine.model, replace(PATIENT, tokens=tokens))
    assert explanation.first is not None
    assert explanation.remaining is None
    assert len(explanation.causes) == 1
    assert explanation.causes[0].explained == 1
    assert name in {explanation.causes[0].named.fault, *(other.fault for other in explanation.causes[0].equivalent)}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted({recipe for recipe, _, _ in PLACES.values()}))
def test_no_fault_in_a_right_engine(faulty: Callable[[str], Faulty], recipe: str) -> None:
    """The right engine of each of these models has no fault at any point."""
    engine = faulty(recipe)
    tokens = tokens_of(engine.model, 14, seed=6)
    explanation = explain(engine.dump(Planted(()), tokens, points="all"), engine.model, replace(PATIENT, tokens=tokens))
    assert not explanation.causes
    assert explanation.differing == 0


@pytest.mark.parametrize("name", PLACES)
def test_each_entry_speaks_to_the_user(name: str) -> None:
    """Each entry has its sentences, and each of its listed variants can be put into words."""
    fault = CATALOGUE[name]
    assert all((fault.symptom, fault.fix, fault.seen, fault.group, fault.what))
    variants = fault.variants({})
    assert variants
    assert all("{" not in fault.sentence(parameters) for parameters in variants)
