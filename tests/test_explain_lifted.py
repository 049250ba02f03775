"""`parity explain` and the arbiter on models whose steps are read from llama.cpp's graph."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import faulty_engines
import numpy as np
import pytest
from explaining import STEPS, unstated
from msgspec.structs import replace
from planted import PATIENT, Faulty, Planted, tokens_of

from checkpoints.reading.reader import read
from engine.backend import Array
from engine.faults import CATALOGUE, FITTED, plant
from engine.graph import Step
from engine.replay.precision import rounded
from engine.replay.wide import without_tables
from engine.synth.recipe import shape_of
from engine.synth.recipes import RECIPES
from parity.arbiter.arbiter import Arbiter
from parity.explain.case import Case, ExplainOptions
from parity.explain.explain import explain
from parity.explain.rounding.precision import fits, floor
from parity.explain.rounding.uneven import in_two_elements
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference
from reference.jobs import DumpJob

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["qwen3", "qwen3moe", "phi3"])
def engine(request: pytest.FixtureRequest, reference: Reference, small_model: Callable[..., Path]) -> Faulty:
    """A small model: QK-norms; routed experts; fused projections."""
    path = small_model(request.param)
    return Faulty(path, reference.graph(path))


def test_the_truth_of_a_lifted_model_is_near_what_float32_gives(engine: Faulty) -> None:
    """Every point is computed in float64, and our float32 run is near it: as far as rounding goes, or GELU's table of F16."""
    tokens = tokens_of(engine.model, 7, seed=2)
    distances = Arbiter.of(engine.transformer, tokens).distances(engine.dump(Planted(()), tokens, points="*").points)
    coarse = any(name.endswith("geglu") for name in distances)
    assert max(float(np.nanmax(distance)) for distance in distances.values()) < (1e-4 if coarse else 1e-10)


def test_what_f16_costs_an_engine_with_a_fault_is_no_second_fault(
    reference: Reference, small_model: Callable[..., Path]
) -> None:
    """Norms applied twice amplify F16's rounding beyond what it costs the right engine: no other cause is given for that."""
    path = small_model("arwkv7", kind="f32")
    engine = Faulty(path, reference.graph(path))
    twice = plant(list(engine.right), CATALOGUE["norm-twice"], None, at=("attn_norm", "ffn_norm", "output_norm"))
    dump = engine.dump(Planted(()), tokens_of(path, 7, seed=2), size=1 << 20, steps=rounded(twice, "f16", storage=False))
    explanation = explain(dump, path, replace(PATIENT, compute="f16"))
    assert [cause.named.fault for cause in explanation.causes] == ["norm-twice"]
    assert explanation.remaining is None


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("norm-epsilon", {"eps": 3e-2, "at": ("attn_norm", "ffn_norm", "output_norm")}),
        ("rope-pairs", {}),
        ("residual-missing", {"at": ("l_out",)}),
    ],
)
def test_faults_are_named_in_any_architecture(engine: Faulty, name: str, parameters: dict[str, Any]) -> None:
    """From the default points; a number is fitted there as well."""
    tokens = tokens_of(engine.model, 7, seed=2)
    explanation = explain(engine.dump(Planted(((name, parameters, None),)), tokens), engine.model, PATIENT)
    assert explanation.remaining is None
    assert name in [named.fault for cause in explanation.causes for named in (cause.named, *cause.equivalent)]


@pytest.mark.parametrize("name", ["qwen3next", "glm-dsa"])
def test_llama_cpps_own_dump_has_no_fault(
    reference: Reference, small_model: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """Neither a gate of one number that all but cancels is a fault, nor a choice of more keys than a position sees."""
    model, out = small_model(name), tmp_path / "ref.jsonl"
    reference.dump(DumpJob(model, out, tuple((401 * i + 37) % 1999 + 3 for i in range(37)), points="all"))
    explanation = explain(read(out), model)
    assert explanation
    assert explanation.first is None


@pytest.mark.parametrize("result", ["q_rope holds the result", "q_norm holds the result", "both hold the result"])
def test_a_norm_after_rope_is_one_cause(reference: Reference, small_model: Callable[..., Path], result: str) -> None:
    """Whatever an engine that normalises after RoPE calls what it records: one cause that reproduces every record."""
    model = small_model("qwen3")
    engine = Faulty(model, reference.graph(model))
    planted = Planted((("head-norm-after-rope", {"result": result}, None),))
    explanation = explain(engine.dump(planted, tokens_of(model, 7, seed=2), points="*"), model, PATIENT)
    assert [(cause.named.fault, cause.named.parameters["result"]) for cause in explanation.causes] == [
        ("head-norm-after-rope", result)
    ]
    assert explanation.remaining is None


@pytest.mark.parametrize("points", ["default", "*"])
def test_the_epsilon_of_one_layers_head_norms_is_fitted(
    reference: Reference, small_model: Callable[..., Path], points: str
) -> None:
    """ε 1e-4 for 1e-6 in the norms of queries and keys of layer 2."""
    model = small_model("qwen3")
    engine = Faulty(model, reference.graph(model))
    fault = next(fit.fault for fit in FITTED if fit.fault.name == "head-norm-epsilon")
    steps = plant(engine.right, fault, (2,), eps=1e-4, at=("q_norm", "k_norm"))
    explanation = explain(engine.dump(Planted(()), tokens_of(model, 7, seed=2), points=points, steps=steps), model, PATIENT)
    assert explanation.remaining is None
    assert len(explanation.causes) == 1
    cause = explanation.causes[0]
    alike = [cause.named, *cause.equivalent]  # at the default points it is twice the limit: others fit as well
    assert ("head-norm-epsilon", 1e-4, (2,)) in [(named.fault, named.parameters.get("eps"), named.layers) for named in alike]


@pytest.mark.parametrize(("kind", "storage"), [("f16", False), ("bf16", True), ("q8", False)])
def test_right_engines_in_lower_arithmetic_are_not_accused(engine: Faulty, kind: str, storage: bool) -> None:
    """Products of routed experts are products, and ids of experts are no activations."""
    tokens = tokens_of(engine.model, 7, seed=2)
    dump = unstated(engine.dump(Planted(()), tokens, steps=rounded(engine.right, kind, storage=storage)))
    explanation = explain(dump, engine.model, PATIENT)
    assert explanation
    assert kind in {explanation.precision_only, *explanation.precision_alike}
    assert "q8" not in explanation.precision_alike, "BF16 and 8-bit activations can be told apart here"
    assert explanation.causes == ()


@pytest.mark.parametrize(
    ("name", "weights", "seed", "count", "kind", "storage"),
    [
        # Weights of experts that all but tie cost our other way of rounding 40 times as much.
        ("bailingmoe", "f32", 60000, 8, "bf16", False),
        ("glm-dsa", "f16", 60001, 8, "q8", False),  # rows of zeros, which no arithmetic changes
        ("mellum", "f32", 60010, 8, "q8", False),  # two experts that exchange places
        ("glm-dsa", "f16", 60001, 8, "bf16", True),  # an expert that replaces another, and all that follows from it
        ("bailingmoe", "q6_k", 70437, 4, "bf16", True),  # our other way of rounding chooses other experts, and costs far more
        ("grovemoe", "f16", 70041, 7, "q8", False),  # other experts in the first layer, and other groups of them
    ],
)
def test_right_engines_in_lower_arithmetic_are_not_accused_at_any_point(
    reference: Reference,
    stories: Path,
    tmp_path: Path,
    name: str,
    weights: str,
    seed: int,
    count: int,
    kind: str,
    storage: bool,
) -> None:
    """With every point recorded no cause, place or law is named: they are right in their arithmetic."""
    model = tmp_path / "m.gguf"
    make_by_recipe(model, RECIPES[name], shape_of(RECIPES[name]), {}, kind=weights, seed=seed, tokenizer=stories)
    engine = Faulty(model, reference.graph(model))
    tokens = tokens_of(model, count, seed=seed)
    dump = unstated(engine.dump(Planted(()), tokens, points="*", steps=rounded(engine.right, kind, storage=storage)))
    explanation = explain(dump, model, PATIENT)
    assert (explanation.causes, explanation.placed, explanation.law) == ((), None, "")
    assert kind in {explanation.precision_only, *explanation.precision_alike}
    assert explanation


def _largest_ones(x: Array) -> Array:
    """Values whose two largest columns of the first ten, of which most of the rounding's error is, are off by a thousandth."""
    changed = x.copy()
    changed[:, np.argsort(np.abs(x[:, :10]).max(axis=0))[-2:]] *= x.dtype.type(1.001)
    return changed


def test_uneven_rows_have_uneven_rounding(reference: Reference, stories: Path, tmp_path: Path) -> None:
    """Two elements of SiLU(gate) × up that are far larger than the others have most of F16's rounding error, too; a fault in them alone
    is none."""
    model = tmp_path / "m.gguf"
    make_by_recipe(
        model, RECIPES["llama-embed"], shape_of(RECIPES["llama-embed"]), {}, kind="f32", seed=5000, tokenizer=stories
    )
    engine, tokens = Faulty(model, reference.graph(model)), tokens_of(model, 5, seed=5000)
    wrong = [
        replace(step, op=lambda *inputs, _op=step.op, **params: _largest_ones(_op(*inputs, **params)))
        if step.makes == "blk.3.ffn_swiglu"
        else step
        for step in engine.right
    ]
    for steps, explained in ((rounded(engine.right, "f16", storage=False), True), (wrong, False)):
        dump = engine.dump(Planted(()), tokens, points="blk.*.ffn_swiglu", size=10, bare=False, steps=steps)
        case = Case(unstated(dump), model, ExplainOptions())
        measured = floor("f16", case.entries, case.transformer.steps, case.replay, case.make, case.positions)
        assert any(in_two_elements(entry) is not None for entry in case.entries)
        assert (fits(measured, case.entries) is not None) == explained


def _later_ones(x: Array) -> Array:
    """Rows after the first with noise that no fault makes."""
    changed = x.copy()
    changed[1:] += np.random.default_rng(6).standard_normal(changed[1:].shape).astype(x.dtype) * np.abs(x).mean()
    return changed


@pytest.mark.parametrize(
    ("name", "acts"),
    [
        ("qwen3", "queries, keys, RoPE, scale, mask or cache"),
        ("mamba2", "the state that earlier positions leave (a recurrence, a convolution, a token shift)"),
    ],
)
@pytest.mark.usefixtures("computed")
def test_what_earlier_positions_leave_is_named_as_the_model_has_it(
    name: str, acts: str, reference: Reference, small_model: Callable[..., Path]
) -> None:
    """Only the first position is right: attention is in question where the model has it, a state where it has that."""
    model = small_model(name)
    engine = Faulty(model, reference.graph(model))
    steps = [
        replace(step, op=lambda *inputs, _op=step.op, **params: _later_ones(_op(*inputs, **params)))
        if step.makes == "blk.1.l_out"
        else step
        for step in engine.right
    ]
    spoiled = engine.dump(Planted(()), tokens_of(model, 7, seed=2), points="embd,blk.*.l_out,logits", steps=steps)
    explanation = explain(spoiled, model, replace(STEPS, budget=4000))
    assert f"position 0 is right, all later ones wrong: {acts}" in [lead.sentence for lead in explanation.leads]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("eps", [None, 1e-4])
def test_a_fault_smaller_than_what_the_table_of_gelu_costs(
    reference: Reference, small_model: Callable[..., Path], exact: bool, eps: float | None
) -> None:
    """A wrong ε hides behind ggml's table of float16, in an engine with that table and in one with the function itself: it is named."""
    model = small_model("gemma")
    engine = Faulty(model, reference.graph(model))
    steps = list(engine.right)
    if eps is not None:
        steps = plant(steps, CATALOGUE["norm-epsilon"], eps=eps, at=("attn_norm", "ffn_norm", "output_norm"))
    if exact:
        steps = without_tables(steps)
    dump = engine.dump(Planted(()), tokens_of(model, 8, seed=3), steps=steps)
    explanation = explain(dump, model, PATIENT)
    assert bool(explanation) is (eps is None)
    assert [cause.named.fault for cause in explanation.causes] == ([] if eps is None else ["norm-epsilon"])
    assert explanation.remaining is None


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_an_epsilon_that_changes_less_than_other_entries_of_the_table(
    reference: Reference, small_model: Callable[..., Path], tmp_path: Path, eps: float
) -> None:
    """A llama.cpp whose file has ten times gemma3's ε is named though one row met another entry of the table; a right one is right."""
    model = small_model("gemma3", kind="f32")
    tokens = tokens_of(model, 16, seed=9)
    other = faulty_engines.Case("another ε", faulty_engines.number("attention.layer_norm_rms_epsilon", eps), ("norm-epsilon",))
    dump = faulty_engines.dump_of(other, model, tokens, reference, tmp_path)
    answer = explain(dump, model, replace(PATIENT, tokens=tokens))
    assert [(cause.named.fault, cause.named.parameters["eps"]) for cause in answer.causes] == [("norm-epsilon", eps)] * (
        eps > 1e-6
    )
    assert answer.remaining is None


def test_a_last_layer_whose_output_has_another_name(reference: Reference, small_model: Callable[..., Path]) -> None:
    """A small ramp in the last layer's V of step35, where no point is called l_out: it is placed, and nothing breaks."""
    model = small_model("step35")
    engine = Faulty(model, reference.graph(model))
    assert "blk.3.l_out" not in {step.makes for step in engine.right}

    def ramp(step: Step) -> Step:
        def op(*inputs: Array, **params: Any) -> Array:
            value = step.op(*inputs, **params)
            return value * (1 + np.float32(2e-4) * np.linspace(0, 1, value.shape[-1], dtype=np.float32))

        return replace(step, op=op)

    steps = [ramp(step) if step.makes == "blk.3.v_read" else step for step in engine.right]
    dump = engine.dump(Planted(()), tokens_of(model, 6, seed=1), points="all", size=1 << 20, steps=steps)
    answer = explain(dump, model, PATIENT)
    assert answer.first is not None
    assert answer.first.checkpoint == "blk.3.v_read"
    assert not answer.causes


def test_a_missing_residual_is_that_in_either_order_of_the_operands(engine: Faulty) -> None:
    """llama.cpp adds the branch to the stream or the stream to the branch: without the residual the branch is left, never the stream."""
    for point, stream in (("l_out", "ffn_inp"), ("ffn_inp", "l_out")):
        changed = plant(engine.right, CATALOGUE["residual-missing"], None, at=(point,))
        sums = [step for step in changed if step.makes.startswith("blk.") and step.makes.endswith(f".{point}")]
        assert len(sums) > 1
        for step in sums:
            (read,) = step.names
            assert not read.endswith((f".{stream}", "embd")), (step.makes, read)


def test_token_faults_where_the_row_is_scaled(reference: Reference, small_model: Callable[..., Path]) -> None:
    """Gemma scales the embedding: a doubled BOS and the row of the next id change the row, which has a name of its own."""
    path = small_model("gemma3")
    engine = Faulty(path, reference.graph(path))
    for name in ("bos", "embedding-row"):
        right, wrong = engine.transformer.steps, plant(engine.transformer.steps, CATALOGUE[name])
        assert [step.makes for step, other in zip(wrong, right, strict=True) if step != other] == ["node.embd"]


def test_a_search_with_one_more_fault_allowed_ends(reference: Reference, stories: Path, tmp_path: Path) -> None:
    """A shifted cache with 8-bit activations that nothing states: no pairs are left to try, and the search ended in an error."""
    model, chosen = tmp_path / "model.gguf", RECIPES["gpt2"]
    make_by_recipe(model, chosen, shape_of(chosen), {}, kind="f16", seed=9601, tokenizer=stories, running=reference)
    engine, tokens = Faulty(model, reference.graph(model)), tokens_of(model, 7, seed=9601)
    steps = Planted((("cache-shifted", {"by": 1, "at": ("k_read", "v_read")}, None),)).steps(engine.right)
    dump = engine.dump(Planted(()), tokens, points="*", size=1 << 20, steps=rounded(steps, "q8", storage=True), bare=False)
    assert not explain(unstated(dump), model, PATIENT)


def test_logits_that_are_much_too_small_have_a_cause(reference: Reference, small_model: Callable[..., Path]) -> None:
    """Beside the right logits those that are multiplied by 1/16 twice are as small as noise of 8 bits; what makes them so is named."""
    path = small_model("command-r", kind="f16")
    engine, tokens = Faulty(path, reference.graph(path)), tokens_of(path, 6, seed=3)
    steps = Planted((("multiplier", {"how": "applied twice", "at": ("logits",)}, None),)).steps(engine.right)
    dump = engine.dump(Planted(()), tokens, steps=rounded(steps, "q8", storage=False))
    explanation = explain(unstated(dump), path, replace(PATIENT, compute="q8"))
    assert [cause.named.fault for cause in explanation.causes] == ["multiplier"]
