"""`parity explain` neither acquits the guilty nor accuses the innocent: cases that once got a misleading answer, with the right one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from explaining import PROMPT, RIGHT, small_engine, unstated
from planted import Faulty, Planted, tokens_of

from checkpoints.answers.explain import Explanation, Place, TruthAt
from checkpoints.record import Dump
from engine.backend import Array
from engine.faults import plant
from engine.faults.fitted import FITTED
from engine.graph import Step
from engine.replay.precision import rounded
from engine.synth import Shape, synthesize
from parity.diff.compare import compare
from parity.explain.explain import ExplainOptions, explain
from parity.models import embedded
from reports.explanation import lines

_PATIENT = ExplainOptions(budget=300.0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """A small qwen2 with groups of 7 query heads."""
    return small_engine(tmp_path_factory.mktemp("answers"))


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


def edited(engine: Faulty, name: str, change: Callable[[Array], Array], points: str = "*", size: int = 1 << 20) -> Dump:
    """The dump of an engine in which the result of one step is changed."""

    def wrong(step: Step) -> Step:
        return replace(step, op=lambda *inputs, **params: change(step.op(*inputs, **params)))

    steps = [wrong(step) if step.makes == name else step for step in engine.right]
    return engine.dump(RIGHT, PROMPT, points=points, size=size, steps=steps)


def names(found: Explanation) -> list[str]:
    """The causes' names."""
    return [cause.named.fault for cause in found.causes]


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
def test_what_is_exactly_right_is_not_of_lower_arithmetic(engine: Faulty) -> None:
    """An error of F16's size that spares position 0 is not due to F16."""

    def late(x: Array) -> Array:
        noise = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)
        noise[0] = 0
        return x * (1 + np.float32(3e-4) * noise)

    explanation = explain(
        unstated(edited(engine, "blk.0.attn_out", late, "default", 16)), engine.model, ExplainOptions(budget=3)
    )
    assert not explanation
    assert explanation.precision_only == ""


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
    explanation = explain(dump, stories.model, ExplainOptions(budget=20.0))
    assert names(explanation) == []
    assert explanation.law.startswith("every recorded element is NaN")
    assert explanation.complete
    assert explanation.first is not None
    assert explanation.first.checkpoint == "blk.7.ffn_out"


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


def test_queries_that_are_rotated_too_far_are_named(engine: Faulty) -> None:
    """An offset of the queries' positions is a number of its own: not "rotates backwards", which takes 96 % of the error away."""
    explanation = explain(faulty(engine, "rope-position", position=5.0, at=("q_rope",)), engine.model, _PATIENT)
    assert explanation.remaining is None
    assert explanation.causes[0].named.fault == "rope-position"
    assert explanation.causes[0].named.parameters["position"] in (5.0, -5.0)


@pytest.mark.slow
def test_a_fault_that_amplifies_rounding_has_no_second_cause(stories: Faulty) -> None:
    """Without the residual rounding grows over the limit from layer to layer: that is no second fault."""
    tokens = tokens_of(stories.model, 6, seed=3)
    dump = stories.dump(Planted((("residual-missing", {"at": ("l_out",)}, None),)), tokens)
    values = {
        name: replace(rows, values=rows.values * (1 + np.float32(2e-3) * (name == "blk.23.l_out")))
        for name, rows in dump.points.items()
    }
    explanation = explain(dump, stories.model, _PATIENT)
    assert (names(explanation), explanation.remaining) == (["residual-missing"], None)
    more = explain(replace(dump, points=values), stories.model, ExplainOptions(budget=10.0))
    assert more.remaining is not None, "an error of 4e-6 that is not the fault's own rounding stays"


def _swapped(x: Array) -> Array:
    made = x.copy()
    made[:, [3, 7]] = x[:, [7, 3]]
    return made


def _blocks(x: Array) -> Array:
    made = x.copy()
    made[:, ::32] += np.float32(0.5)
    return made


def _head(x: Array) -> Array:
    made = x.copy()
    made[:, 24:32] *= np.float32(1.5)
    return made


def _negated(x: Array) -> Array:
    made = x.copy()
    made[:, 5] *= np.float32(-1)
    return made


def _cut(x: Array) -> Array:
    made = x.copy()
    made[:, 50:] = 0
    return made


@pytest.mark.parametrize(
    ("point", "change", "said"),
    [
        ("blk.2.ffn_up", _swapped, "elements 3 and 7 are exchanged; the others are right"),
        ("blk.2.v", lambda x: np.roll(x, 8, axis=1), "heads 0 and 1 are exchanged"),
        ("blk.2.ffn_up", _blocks, "every 32nd element from 0 on is the right one plus 0.5; the others are right"),
        ("blk.2.q", _head, "head 3 alone is 1.5 times the right one; the others are right"),
        ("blk.2.ffn_norm", _negated, "element 5 alone has the wrong sign; the others are right"),
        ("blk.2.ffn_out", _cut, "everything from element 50 on is 0; the others are right"),
        ("blk.2.ffn_gate", lambda x: np.roll(x, 1, axis=1), "element i is the right element i − 1: the row is rolled"),
        ("blk.2.attn_out", lambda x: np.roll(x, 1, axis=0), "position t holds the right values of position t − 1"),
    ],
)
def test_what_the_numbers_say_is_said_in_a_sentence(
    engine: Faulty, point: str, change: Callable[[Array], Array], said: str
) -> None:
    """An operation with an error that no entry describes is named, with the law of its numbers; no fault is named, and the search ends."""
    explanation = explain(edited(engine, point, change), engine.model, ExplainOptions(budget=600.0))
    assert explanation.first is not None
    assert (explanation.first.checkpoint, explanation.law, names(explanation)) == (point, said, [])
    assert explanation.placed is not None
    assert (explanation.placed.operations, explanation.placed.sure) == ((point,), True)
    assert explanation.complete
    assert explanation.variants < 1000


@pytest.mark.parametrize(
    ("change", "name"),
    [(lambda x: x * np.float32(1.002), "multiplier"), (lambda x: x + np.float32(0.01), "constant-added")],
)
def test_a_number_at_one_operation_is_a_cause(engine: Faulty, change: Callable[[Array], Array], name: str) -> None:
    """A result that is scaled or shifted reproduces every record behind it: its number is fitted."""
    explanation = explain(edited(engine, "blk.2.ffn_up", change), engine.model, _PATIENT)
    assert (names(explanation), explanation.remaining) == ([name], None)
    assert explanation.causes[0].named.parameters["by"] in (1.002, 0.01)


@pytest.mark.slow
def test_a_number_of_the_first_layer_is_not_said_of_all(engine: Faulty) -> None:
    """Keys scaled in layer 0 alone: what explains that layer in all layers explains a part, and no part is a cause."""
    explanation = explain(edited(engine, "blk.0.k_rope", lambda x: x * np.float32(0.65), "default"), engine.model, _PATIENT)
    assert explanation.remaining is None
    assert [cause.named.layers for cause in explanation.causes] == [(0,)]


@pytest.mark.slow
def test_what_two_elements_hold_is_no_lower_arithmetic(engine: Faulty) -> None:
    """Two small elements are exchanged in all layers: an error of the size of 8-bit noise that lies in two of all elements."""

    def swapped(step: Step) -> Step:
        def op(*inputs: Any, **params: Any) -> Array:
            made = step.op(*inputs, **params)
            made[:, [3, 5]] += np.float32(0.01) * np.array([1, -1], np.float32)
            return made

        return replace(step, op=op) if step.makes.endswith("ffn_out") else step

    explanation = explain(
        unstated(engine.dump(RIGHT, PROMPT, steps=[swapped(step) for step in engine.right])),
        engine.model,
        ExplainOptions(budget=5.0),
    )
    assert not explanation
    assert (explanation.precision_only, names(explanation)) == ("", [])


def test_what_was_not_seen_is_not_said_to_agree(engine: Faulty) -> None:
    """Zero behind the recorded values: the next point differs, and the one in front of it was seen in part."""
    explanation = explain(edited(engine, "blk.1.ffn_out", _cut, size=16), engine.model, ExplainOptions(budget=5.0))
    assert names(explanation) == []
    assert explanation.first is not None
    assert explanation.first.checkpoint == "blk.2.attn_norm"
    assert explanation.placed is not None
    assert (explanation.placed.sure, explanation.placed.seen) == (False, (16, 112))


def _operand(steps: Sequence[Step], name: str, operand: str) -> list[Step]:
    return [replace(step, reads=(operand, *step.reads[1:])) if step.makes == name else step for step in steps]


def test_heads_of_which_one_is_recorded_are_heads(engine: Faulty) -> None:
    """Eight values of the first key head are those of the second: no row is said to be rolled."""
    explanation = explain(
        edited(engine, "blk.2.v", lambda x: np.roll(x, 8, axis=1), size=8), engine.model, ExplainOptions(budget=600.0)
    )
    assert explanation.law == "head 0 is the right head 1 (1 of 2 heads recorded)"


def _not_finite(x: Array) -> Array:
    made = x.copy()
    made[3, :2] = np.inf
    return made


def test_infinities_are_said_where_they_are(engine: Faulty) -> None:
    """Two infinite elements of one position: the law says which, and that the others are right."""
    explanation = explain(edited(engine, "blk.2.q", _not_finite), engine.model, ExplainOptions(budget=600.0))
    assert explanation.law.startswith("everything up to element 1 is ∞")
    assert explanation.law.endswith("the others are right")
    assert names(explanation) == []


def test_nan_under_the_mask_is_no_second_fault(engine: Faulty) -> None:
    """Values that are NaN at position 3 make attention's result NaN at the positions before as well, since 0 · NaN is NaN."""

    def late(x: Array) -> Array:
        made = x.copy()
        made[3] = np.nan
        return made

    right = engine.dump(RIGHT, PROMPT, points="*", size=1 << 20)
    verdict = compare(edited(engine, "blk.1.v", late), right)
    assert [(origin.first.checkpoint, origin.positions) for origin in verdict.origins] == [("blk.1.v", (3,))]


@pytest.mark.slow
def test_an_error_that_grows_is_no_edge(engine: Faulty) -> None:
    """An error in proportion to the position passes the limit somewhere: no window begins there, and no element alone is wrong."""

    def grows(x: Array) -> Array:
        signs = np.where(np.arange(x.shape[1]) % 2, 1, -1)
        return x * (1 + np.float32(4e-6) * np.arange(len(x), dtype=np.float32)[:, None] * signs.astype(np.float32))

    dump = edited(engine, "blk.0.attn_out", grows)
    verdict = compare(dump, engine.dump(RIGHT, PROMPT, points="*", size=1 << 20))
    assert verdict.pattern is not None
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.token_idx > 1
    assert "window" not in verdict.pattern.sentence
    assert "alone" not in explain(dump, engine.model, ExplainOptions(budget=5.0)).law


def test_zeros_behind_an_unseen_infinity_are_not_attention(engine: Faulty) -> None:
    """An infinity outside of the slice makes the next norm 0 from position 1 on: nothing there joins positions."""

    def late(x: Array) -> Array:
        made = x.copy()
        made[1:, 100] = np.inf
        return made

    dump = edited(engine, "blk.1.ffn_out", late, size=16)
    right = engine.dump(RIGHT, PROMPT, points="*", size=16)
    pattern = compare(dump, right).pattern
    assert pattern is not None
    assert "all values are 0" in pattern.sentence
    assert "RoPE" not in pattern.sentence


def test_another_operand_is_named(engine: Faulty) -> None:
    """K made from another layer's norm: the value that it is made from is said."""
    dump = engine.dump(RIGHT, PROMPT, points="*", size=1 << 20, steps=_operand(engine.right, "blk.2.k", "blk.0.ffn_norm"))
    explanation = explain(dump, engine.model, _PATIENT)
    assert explanation.law == "is what this operation makes of blk.0.ffn_norm instead of blk.2.attn_norm"
    assert names(explanation) == []


@pytest.mark.slow
def test_a_lead_takes_the_error_away_everywhere(engine: Faulty) -> None:
    """Queries of the position before, in the upper half of each head: many entries take most of one record's error away, none all."""

    def half(x: Array) -> Array:
        made = x.reshape(len(x), -1, 8).copy()
        made[1:, :, 4:] = made[:-1, :, 4:].copy()
        return made.reshape(x.shape)

    explanation = explain(edited(engine, "blk.0.q_rope", half, "default", 16), engine.model, ExplainOptions(budget=10.0))
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


def test_a_right_engine_in_lower_arithmetic_is_coarser_not_wrong(engine: Faulty) -> None:
    """The sentence on float64 agrees with the verdict: where precision explains all, it says coarser, where a fault is left, wrong."""
    rounding = Explanation(1, 1, None, None, precision_only="f16", truth=TruthAt(4.5e-8, 1e-14))
    assert "yours is coarser" in " ".join(line.plain for line in lines(rounding, 200))
    place = Place("blk.0.attn_norm", 0, 4.5e-8, 1e-10)
    left = replace(rounding, first=place, precision_only="", remaining=place)
    assert "yours is wrong" in " ".join(line.plain for line in lines(left, 200))


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
def test_a_fault_outside_of_the_slice_is_not_a_factor_of_one(engine: Faulty) -> None:
    """One logit far behind the slice is wrong and the sketch shows it: no law of the 16 values, which are right."""

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
