"""`parity explain` neither acquits the guilty nor accuses the innocent: cases that once got a misleading answer, with the right one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explaining import PROMPT, RIGHT, STEPS, edited, names, unstated
from msgspec.structs import replace
from planted import Faulty, Planted, tokens_of

from checkpoints.record import Dump
from engine.backend import Array
from engine.faults import plant
from engine.faults.fitted import FITTED
from engine.graph import Step
from engine.replay.precision import rounded
from engine.synth import Shape, synthesize
from engine.synth.recipe import shape_of
from engine.synth.recipes import recipe
from parity.explain.budget import Budget
from parity.explain.case import Case
from parity.explain.explain import ExplainOptions, explain
from parity.explain.findings.leads import believed
from parity.explain.search.search import Search
from parity.explain.search.state import Candidate
from parity.models import embedded
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference
from reports.explanation import as_json, lines

_PATIENT = ExplainOptions(budget=300.0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """A small llama whose heads are larger than width by heads."""
    path = tmp_path_factory.mktemp("answers") / "llama.gguf"
    synthesize(path, Shape("llama", 3, 128, 4, 2, 48, 160, 300, biases=False), weight_type="f32", seed=8)
    return Faulty(path)


@pytest.fixture(scope="module")
def stories() -> Faulty:
    """The embedded model: trained, 24 layers."""
    return Faulty(embedded.path())


def faulty(
    engine: Faulty, name: str, points: str = "default", layers: tuple[int, ...] | None = None, **parameters: Any
) -> Dump:
    """The dump of an engine with one fault of the catalogue, or one with a fitted number."""
    number = next((fit.fault for fit in FITTED if fit.fault.name == name and fit.parameter in parameters), None)
    if number is None:
        return engine.dump(Planted(((name, parameters, layers),)), PROMPT, points=points)
    return engine.dump(RIGHT, PROMPT, points=points, steps=plant(engine.right, number, layers, **parameters))


@pytest.mark.slow
def test_a_base_that_is_almost_right_is_fitted_for_queries_alone(llama: Faulty) -> None:
    """RoPE's base 1.001 times too large for queries and right for keys, all points recorded: the fit begins beside the right number."""
    dump = faulty(llama, "rope-base", points="all", base=1.001e6, at=("q_rope",))
    explanation = explain(dump, llama.model, _PATIENT)
    assert explanation.remaining is None
    [cause] = explanation.causes
    assert (cause.named.fault, cause.named.parameters["at"]) == ("rope-base", ("q_rope",))
    assert cause.named.parameters["base"] == pytest.approx(1.001e6, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize(
    ("name", "parameters", "sentence"),
    [
        ("attn-scale", {"scale": 128**-0.5 * 2}, "0.1768 = 1/√32, this model wants 0.1443 = 1/√48"),
        ("norm-epsilon", {"eps": 5e-6, "at": ("attn_norm", "ffn_norm", "output_norm")}, "this model wants 1e-06"),
        (
            "norm-epsilon",
            {"eps": 1e-4, "at": ("attn_norm", "ffn_norm", "output_norm")},
            "the nearest that others have is 1e-05",
        ),
        ("multiplier", {"by": 0.999, "part": "the result", "at": ("attn_out",)}, "0.999 times"),
        ("multiplier", {"by": 0.999, "part": "the result", "at": ("v",)}, "0.999 times"),
    ],
)
def test_a_number_that_is_a_little_wrong_is_fitted_and_no_lower_arithmetic(
    llama: Faulty, name: str, parameters: dict[str, Any], sentence: str, stated: bool
) -> None:
    """From the default points, whether the dump states f32 or nothing: the answer gives the value and the one that the model wants."""
    dump = faulty(llama, name, **parameters)
    explanation = explain(dump if stated else unstated(dump), llama.model, _PATIENT)
    assert not explanation
    assert explanation.remaining is None
    classes = [explanation.causes[0].named, *explanation.causes[0].equivalent]
    assert name in [named.fault for named in classes]
    assert sentence in next(named.sentence for named in classes if named.fault == name)


def _recorded(dump: Dump, point: str, change: Callable[[Array], Array]) -> Dump:
    """The dump of an engine that computes right and records one point otherwise."""
    rows = dump.points[point]
    return replace(dump, points={**dump.points, point: replace(rows, values=change(rows.values))})


@pytest.mark.parametrize(
    ("point", "change"),
    [
        ("blk.2.q", lambda x: x * np.where(np.arange(x.shape[1]) == 5, -1, 1).astype(np.float32)),
        ("blk.2.q_rope", lambda x: x * np.float32(1.002)),
        ("blk.1.ffn_norm", lambda x: x + np.float32(0.01)),
        ("blk.3.k", lambda x: np.where(np.arange(len(x))[:, None] == 6, x[::-1], x)),
    ],
)
def test_a_record_that_alone_is_wrong_blames_no_operation(engine: Faulty, point: str, change: Callable[[Array], Array]) -> None:
    """Everything computed from the record agrees and would not if it were what the engine computed: no operation is named as wrong."""
    dump = engine.dump(RIGHT, PROMPT, points="*", size=1 << 20)
    explanation = explain(_recorded(dump, point, change), engine.model, _PATIENT)
    assert names(explanation) == []
    assert [suspect.checkpoint for suspect in explanation.suspects] == [point]
    assert explanation.placed is None
    text = " ".join(line.plain for line in lines(explanation, 1000))
    assert f"{point} alone differs" in text
    assert "this operation is wrong" not in text
    assert as_json(explanation)["record_suspect"][0]["checkpoint"] == point
    assert as_json(explanation)["operations"] == []


def test_a_fault_behind_a_record_that_alone_is_wrong_is_found(engine: Faulty) -> None:
    """The engine's own fault, in a later layer, is named as if that record were not there, and the record beside it."""
    dump = engine.dump(Planted((("residual-missing", {"at": ("l_out",)}, (3,)),)), PROMPT, points="*", size=1 << 20)
    explanation = explain(_recorded(dump, "blk.2.q", np.negative), engine.model, _PATIENT)
    assert names(explanation) == ["residual-missing"]
    assert [suspect.checkpoint for suspect in explanation.suspects] == ["blk.2.q"]


def test_a_second_fault_that_undoes_the_first_is_none(engine: Faulty) -> None:
    """Right scores of a right engine are recorded twice as large: that keys are doubled and attention's scale is halved is no answer."""
    dump = engine.dump(RIGHT, PROMPT, points="blk.*.{kq,kqv_out}")
    entries = explain(_recorded(dump, "blk.2.kq", lambda x: x * np.float32(2)), engine.model, _PATIENT)
    assert names(entries) == []
    assert [suspect.checkpoint for suspect in entries.suspects] == ["blk.2.kq"]


def test_a_fault_that_spoils_what_agrees_is_not_believed(engine: Faulty) -> None:
    """Of two faults that cancel each other neither is a cause, though both together leave nothing."""
    dump = _recorded(engine.dump(RIGHT, PROMPT, points="blk.*.{kq,kqv_out}"), "blk.2.kq", lambda x: x * np.float32(2))
    case = Case(dump, engine.model, _PATIENT)
    search = Search(case.screening(case.entries, Budget(300)))
    start = search.screening.start()
    halved = {"scale": 0.5 * next(step.params["scale"] for step in engine.right if step.makes == "blk.2.kq_soft_max")}
    faults = (("multiplier", {"by": 2.0, "part": "the result", "at": ("k",)}), ("attn-scale", halved))
    numbers = {fit.fault.name: fit.fault for fit in FITTED}
    state = start
    for name, parameters in faults:
        planted = search.screening.reached(state, Candidate(numbers[name], parameters, (2,)))
        assert planted is not None
        state = planted
    assert state.first is None
    assert believed(case.entries, search, start, state) is start


@pytest.mark.slow
def test_f16_arithmetic_is_no_excuse_where_the_header_says_f32(engine: Faulty) -> None:
    """The same numbers count as arithmetic if the engine states nothing, but contradict a header that says f32."""
    dump = engine.dump(RIGHT, PROMPT, steps=rounded(engine.right, "f16", storage=True))
    free = explain(unstated(dump), engine.model, _PATIENT)
    bound = explain(dump, engine.model, _PATIENT)
    alike = ("f16", "tf32")  # both keep eleven bits: which of the two fits better is the processor's luck
    assert free.precision_only in alike
    assert (free.looks_like, bool(free)) == ("", True)
    assert bound.looks_like in alike
    assert (bound.precision_only, bool(bound), bound.causes) == ("", False, ())
    assert set(alike) <= {bound.looks_like, *bound.precision_alike}, "F16 and TF32 keep eleven bits: both are said"
    assert any("the header says f32" in line.plain for line in lines(bound, 300))
    again = explain(unstated(dump), engine.model, replace(_PATIENT, compute="f32"))
    assert any("--compute f32 was given" in line.plain for line in lines(again, 300))
    assert again.precision_only == ""
    assert again.looks_like in alike


@pytest.mark.slow
@pytest.mark.usefixtures("computed")
def test_what_is_exactly_right_is_not_of_lower_arithmetic(engine: Faulty) -> None:
    """An error of F16's size that spares position 0 is not due to F16."""

    def late(x: Array) -> Array:
        noise = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)
        noise[0] = 0
        return x * (1 + np.float32(3e-4) * noise)

    explanation = explain(unstated(edited(engine, "blk.0.attn_out", late, "default", 16)), engine.model, STEPS)
    assert not explanation
    assert (explanation.precision_only, explanation.looks_like) == ("", "")


@pytest.mark.slow
def test_nan_agrees_with_nothing(stories: Faulty) -> None:
    """NaN at every position from one point on is reported as NaN: a fault that also gives NaN proves nothing."""
    tokens = tokens_of(stories.model, 6, seed=1)
    steps = [
        replace(step, op=lambda *inputs, op=step.op, **params: op(*inputs, **params) * np.float32(np.nan))
        if step.makes == "blk.7.ffn_out"
        else step
        for step in stories.right
    ]
    dump = stories.dump(RIGHT, tokens, points="blk.{5..9}.*", steps=steps)
    explanation = explain(dump, stories.model, _PATIENT)
    assert names(explanation) == []
    assert explanation.law.startswith("every recorded element is NaN")
    assert explanation.complete
    assert explanation.first is not None
    assert explanation.first.checkpoint == "blk.7.ffn_out"


@pytest.mark.slow
def test_nothing_is_searched_where_all_that_differs_is_nan(stories: Faulty) -> None:
    """A soft max that overflows in layer 17 leaves NaN everywhere, as one in layer 14 does: the points to record are said at once."""
    explanation = explain(faulty(stories, "softmax-f16-overflow", layers=(17,)), stories.model, _PATIENT)
    assert explanation.law.startswith("every recorded element is NaN")
    assert (names(explanation), explanation.variants, explanation.next) == ([], 0, "blk.{11..23}.l_out")


@pytest.mark.slow
def test_unlikely_formulas_with_the_same_numbers_are_named_beside_a_likely_one(stories: Faulty) -> None:
    """Gate and up exchanged in one unknown layer: the activation on the wrong operand is the same, and is likely."""
    tokens = tokens_of(stories.model, 24, seed=1)
    dump = stories.dump(Planted((("gate-up-swapped", {}, (17,)),)), tokens)
    explanation = explain(dump, stories.model, replace(_PATIENT, tokens=tokens))
    assert explanation.remaining is None
    [cause] = explanation.causes
    assert cause.named.layers == (17,)
    assert "gate-up-swapped" in {cause.named.fault, *(other.fault for other in cause.equivalent)}


@pytest.mark.parametrize("by", [1, -1])
def test_the_embeddings_neighbour_is_named(engine: Faulty, by: int) -> None:
    """The row of the id above or below, and not a beginning of the sequence that happens to fit one position."""
    explanation = explain(faulty(engine, "embedding-row", by=by), engine.model, _PATIENT)
    assert (names(explanation), explanation.remaining) == (["embedding-row"], None)


@pytest.mark.parametrize("by", [1, -1])
def test_values_of_another_position_are_named(engine: Faulty, by: int) -> None:
    """V read at an offset of one position."""
    explanation = explain(faulty(engine, "cache-shifted", by=by, at=("v_read",)), engine.model, _PATIENT)
    assert (names(explanation), explanation.remaining) == (["cache-shifted"], None)


@pytest.mark.parametrize("read", [("v_read", "k_rope"), ("k_read", "v")])
def test_one_cache_for_both_is_named(engine: Faulty, read: tuple[str, str]) -> None:
    """Keys read where values are wanted, or the other way round, and no lead that takes most of one record's error away."""
    explanation = explain(faulty(engine, "cache-of-other", read=read), engine.model, _PATIENT)
    assert (names(explanation), explanation.remaining) == (["cache-of-other"], None)


@pytest.mark.slow
def test_queries_that_are_rotated_too_far_are_named(engine: Faulty) -> None:
    """An offset of the queries' positions is a number of its own: not "rotates backwards", which takes 96 % of the error away."""
    explanation = explain(faulty(engine, "rope-position", position=5.0, at=("q_rope",)), engine.model, _PATIENT)
    assert explanation.remaining is None
    assert explanation.causes[0].named.fault == "rope-position"
    assert explanation.causes[0].named.parameters["position"] in (5.0, -5.0)


@pytest.mark.slow
@pytest.mark.usefixtures("computed")
def test_a_fault_that_amplifies_rounding_has_no_second_cause(stories: Faulty) -> None:
    """Without the residual rounding grows over the limit from layer to layer: that is no second fault."""
    tokens = tokens_of(stories.model, 6, seed=3)
    dump = stories.dump(Planted((("residual-missing", {"at": ("l_out",)}, None),)), tokens)
    values = {
        name: replace(rows, values=rows.values * (1 + np.float32(2e-3) * (name == "blk.23.l_out")))
        for name, rows in dump.points.items()
    }
    explanation = explain(dump, stories.model, replace(STEPS, budget=1e9))
    assert (names(explanation), explanation.remaining) == (["residual-missing"], None)
    more = explain(replace(dump, points=values), stories.model, STEPS)
    assert more.remaining is not None, "an error of 4e-6 that is not the fault's own rounding stays"


def _operand(steps: Sequence[Step], name: str, operand: str) -> list[Step]:
    return [replace(step, reads=(operand, *step.reads[1:])) if step.makes == name else step for step in steps]


def test_another_operand_is_named(engine: Faulty) -> None:
    """K made from another layer's norm: the value that it is made from is said."""
    dump = engine.dump(RIGHT, PROMPT, points="*", size=1 << 20, steps=_operand(engine.right, "blk.2.k", "blk.0.ffn_norm"))
    explanation = explain(dump, engine.model, _PATIENT)
    assert explanation.law == "the value is what this operation makes of blk.0.ffn_norm instead of blk.2.attn_norm"
    assert names(explanation) == []


@pytest.mark.slow
@pytest.mark.usefixtures("computed")
def test_a_lead_takes_the_error_away_everywhere(engine: Faulty) -> None:
    """Queries of the position before, in the upper half of each head: many entries take most of one record's error away, none all."""

    def half(x: Array) -> Array:
        changed = x.reshape(len(x), -1, 8).copy()
        changed[1:, :, 4:] = changed[:-1, :, 4:].copy()
        return changed.reshape(x.shape)

    explanation = explain(edited(engine, "blk.0.q_rope", half, "default", 16), engine.model, STEPS)
    assert names(explanation) == []
    assert [lead.sentence for lead in explanation.leads if lead.removed is not None] == []


def test_the_truth_is_told_beside_both_sides(engine: Faulty) -> None:
    """With the arbiter the first place says how far the dump and a right float32 engine are from the same steps in float64."""
    dump = faulty(engine, "norm-epsilon", eps=1e-5)
    explanation = explain(dump, engine.model, replace(_PATIENT, arbiter="all"))
    assert explanation.truth is not None
    assert explanation.truth.right < 1e-12
    assert explanation.truth.ours > 1e-10
    assert explain(dump, engine.model, replace(_PATIENT, arbiter="off")).truth is None


def test_what_was_not_seen_is_not_acquitted(engine: Faulty) -> None:
    """Where all 16 recorded values of a row agree, the answer says that these are all that is known; whole rows leave nothing to say."""
    dump = engine.dump(RIGHT, PROMPT)
    slices = explain(dump, engine.model, _PATIENT)
    assert slices
    assert any("16 of " in line.plain and "no sketch" in line.plain for line in lines(slices, 200))
    assert not any(
        "of the rows" in line.plain for line in lines(explain(engine.dump(RIGHT, PROMPT, size=4096), engine.model), 200)
    )


@pytest.mark.slow
def test_a_late_capture_that_shows_a_state_is_no_candidate(tmp_path: Path, reference: Reference) -> None:
    """After the logits comes the state that a recurrence leaves, which has no rows: the search passes it by."""
    path, chosen = tmp_path / "mamba.gguf", recipe("mamba")
    make_by_recipe(path, chosen, shape_of(chosen), {}, kind="f32", seed=3, tokenizer=embedded.path())
    engine = Faulty(path, reference.graph(path))
    made = engine.dump(RIGHT, tokens_of(path, 4, 3))
    rows = made.points["logits"]
    mixed = replace(rows, values=np.sin(7 * rows.values), stats={}, sketch=None)
    answer = explain(replace(made, points={**made.points, "logits": mixed}), path, ExplainOptions(budget=10))
    assert answer.first is not None
    assert answer.first.checkpoint == "logits"
