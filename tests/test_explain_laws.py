"""What the numbers say is said in a sentence: which elements are wrong, and how they come from the right ones."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from explaining import PROMPT, RIGHT, STEPS, edited, names, unstated
from msgspec.structs import replace
from planted import Faulty

from engine.backend import Array
from engine.faults import Planting
from engine.graph import Step
from engine.replay.replay import Replay
from parity.diff.compare import compare
from parity.explain.explain import ExplainOptions, explain
from parity.explain.findings.apart import Probe
from parity.laws.beside import Beside
from parity.laws.laws import law

_PATIENT = ExplainOptions(budget=300.0)


def _swapped(x: Array) -> Array:
    changed = x.copy()
    changed[:, [3, 7]] = x[:, [7, 3]]
    return changed


def _blocks(x: Array) -> Array:
    changed = x.copy()
    changed[:, ::32] += np.float32(0.5)
    return changed


def _head(x: Array) -> Array:
    changed = x.copy()
    changed[:, 24:32] *= np.float32(1.5)
    return changed


def _negated(x: Array) -> Array:
    changed = x.copy()
    changed[:, 5] *= np.float32(-1)
    return changed


def _cut(x: Array) -> Array:
    changed = x.copy()
    changed[:, 50:] = 0
    return changed


@pytest.mark.parametrize(
    ("point", "change", "law"),
    [
        ("blk.2.ffn_norm", lambda x: 1.1 * x + np.float32(0.02), "every element is 1.1 times the right one plus 0.02"),
        (
            "blk.2.ffn_swiglu",
            lambda x: x * (np.arange(len(x)) != 2)[:, None].astype(np.float32),
            "at position 2 alone every element is 0",
        ),
        ("blk.2.ffn_up", _swapped, "elements 3 and 7 are exchanged; the others are right"),
        ("blk.2.v", lambda x: np.roll(x, 8, axis=1), "heads 0 and 1 are exchanged"),
        ("blk.2.ffn_up", _blocks, "every 32nd element from 0 on is the right one plus 0.5; the others are right"),
        pytest.param("blk.2.q", _head, "head 3 alone is 1.5 times the right one; the others are right", marks=pytest.mark.slow),
        ("blk.2.ffn_norm", _negated, "element 5 alone has the wrong sign; the others are right"),
        ("blk.2.ffn_out", _cut, "everything from element 50 on is 0; the others are right"),
        ("blk.2.ffn_gate", lambda x: np.roll(x, 1, axis=1), "element i is the right element i − 1: the row is rolled"),
        (
            "blk.2.ffn_norm",
            lambda x: x * np.linspace(1, 1.5, 11, dtype=np.float32)[np.arange(x.shape[1]) % 11],
            "every element is off by a factor of its own at every position (1 to 1.5): a norm's weight, or scales of channels",
        ),
        pytest.param("blk.2.ffn_up", np.abs, "every element is the right one without its sign", marks=pytest.mark.slow),
        pytest.param(
            "blk.2.attn_out",
            lambda x: np.roll(x, 1, axis=0),
            "position t holds the right values of position t − 1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_the_numbers_say_is_said_in_a_sentence(
    engine: Faulty, point: str, change: Callable[[Array], Array], law: str
) -> None:
    """An operation with an error that no entry describes is named, with the law of its numbers; no fault is named, and the search ends."""
    explanation = explain(edited(engine, point, change), engine.model, ExplainOptions(budget=600.0))
    assert explanation.first is not None
    assert (explanation.first.checkpoint, explanation.law, names(explanation)) == (point, law, [])
    assert explanation.placed is not None
    assert (explanation.placed.operations, explanation.placed.sure) == ((point,), True)
    assert explanation.complete
    assert explanation.variants < 1000


@pytest.mark.parametrize(
    ("change", "name", "number"),
    [
        (lambda x: x * np.float32(1.002), "multiplier", 1.002),
        pytest.param(lambda x: x * np.float32(1.00504), "multiplier", 1.00504, marks=pytest.mark.slow),
        pytest.param(lambda x: x + np.float32(0.01), "constant-added", 0.01, marks=pytest.mark.slow),
    ],
)
def test_a_number_at_one_operation_is_a_cause(
    engine: Faulty, change: Callable[[Array], Array], name: str, number: float
) -> None:
    """A result that is scaled or shifted reproduces every record after it: its number is fitted, and not cut to fewer digits."""
    explanation = explain(edited(engine, "blk.2.ffn_up", change), engine.model, _PATIENT)
    assert (names(explanation), explanation.remaining) == ([name], None)
    assert explanation.causes[0].named.parameters["by"] == number


@pytest.mark.slow
def test_a_number_of_the_first_layer_is_not_said_of_all(engine: Faulty) -> None:
    """Keys scaled in layer 0 alone: what explains that layer in all layers explains a part, and no part is a cause."""
    explanation = explain(edited(engine, "blk.0.k_rope", lambda x: x * np.float32(0.65), "default"), engine.model, _PATIENT)
    assert explanation.remaining is None
    assert [cause.named.layers for cause in explanation.causes] == [(0,)]


@pytest.mark.slow
@pytest.mark.usefixtures("computed")
def test_what_two_elements_hold_is_no_lower_arithmetic(engine: Faulty) -> None:
    """Two small elements are exchanged in all layers: an error of the size of 8-bit noise that lies in two of all elements."""

    def swapped(step: Step) -> Step:
        def op(*inputs: Any, **params: Any) -> Array:
            result = step.op(*inputs, **params)
            result[:, [3, 5]] += np.float32(0.01) * np.array([1, -1], np.float32)
            return result

        return replace(step, op=op) if step.makes.endswith("ffn_out") else step

    explanation = explain(
        unstated(engine.dump(RIGHT, PROMPT, steps=[swapped(step) for step in engine.right])),
        engine.model,
        STEPS,
    )
    assert not explanation
    assert (explanation.precision_only, explanation.looks_like, names(explanation)) == ("", "", [])


@pytest.mark.slow
@pytest.mark.usefixtures("computed")
def test_what_was_not_seen_is_not_said_to_agree(engine: Faulty) -> None:
    """Zero after the recorded values: the next point differs, and the one before it was seen in part."""
    explanation = explain(edited(engine, "blk.1.ffn_out", _cut, size=16), engine.model, STEPS)
    assert names(explanation) == []
    assert explanation.first is not None
    assert explanation.first.checkpoint == "blk.2.attn_norm"
    assert explanation.placed is not None
    assert (explanation.placed.sure, explanation.placed.seen) == (False, (16, 112))


@pytest.mark.slow
def test_heads_of_which_one_is_recorded_are_heads(engine: Faulty) -> None:
    """Eight values of the first key head are those of the second: no row is said to be rolled."""
    explanation = explain(
        edited(engine, "blk.2.v", lambda x: np.roll(x, 8, axis=1), size=8), engine.model, ExplainOptions(budget=600.0)
    )
    assert explanation.law == "head 0 is the right head 1 (1 of 2 heads recorded)"


def _not_finite(x: Array) -> Array:
    changed = x.copy()
    changed[3, :2] = np.inf
    return changed


def test_infinities_are_said_where_they_are(engine: Faulty) -> None:
    """Two infinite elements of one position: the law says which, and that the others are right."""
    explanation = explain(edited(engine, "blk.2.q", _not_finite), engine.model, ExplainOptions(budget=600.0))
    assert explanation.law.startswith("at position 3 alone everything up to element 1 is ∞")
    assert explanation.law.endswith("the others are right")
    assert names(explanation) == []


def test_nan_under_the_mask_is_no_second_fault(engine: Faulty) -> None:
    """Values that are NaN at position 3 make attention's result NaN at the positions before as well, since 0 · NaN is NaN."""

    def late(x: Array) -> Array:
        changed = x.copy()
        changed[3] = np.nan
        return changed

    right = engine.dump(RIGHT, PROMPT, points="*", size=1 << 20)
    verdict = compare(edited(engine, "blk.1.v", late), right)
    assert [(origin.first.checkpoint, origin.positions) for origin in verdict.origins] == [("blk.1.v", (3,))]


@pytest.mark.slow
@pytest.mark.usefixtures("computed")
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
    assert "alone" not in explain(dump, engine.model, STEPS).law


def test_no_weight_is_blamed_where_positions_are_right(engine: Faulty) -> None:
    """A product that is wrong at one position has the right weight, which acts at every position: which row it holds is said."""
    right = engine.dump(RIGHT, PROMPT, points="*", size=1 << 20)
    pattern = compare(edited(engine, "blk.2.ffn_up", _one_of_another), right).pattern
    assert pattern is not None
    assert pattern.code == "operation"
    assert pattern.sentence.endswith("position 5 holds the right values of position 0")
    pattern = compare(edited(engine, "blk.2.ffn_up", lambda x: np.roll(x, 1)), right).pattern
    assert pattern is not None
    assert "transposed, or another layer's" in pattern.sentence


def test_a_laws_number_has_as_many_digits_as_are_known() -> None:
    """1.005 would hold within the limit as well, but leaves far more error than 1.00504."""
    whole = np.random.default_rng(1).normal(size=(9, 16))
    for factor in (1.00504, 1.005):
        compared = Beside(whole * factor, whole, np.arange(16), np.full(9, 1e-7), np.zeros(9), np.arange(9), whole)
        assert law(compared) == f"every element is {factor} times the right one"


def test_zeros_after_an_unseen_infinity_are_not_attention(engine: Faulty) -> None:
    """An infinity outside of the slice makes the next norm 0 from position 1 on: nothing there joins positions."""

    def late(x: Array) -> Array:
        changed = x.copy()
        changed[1:, 100] = np.inf
        return changed

    dump = edited(engine, "blk.1.ffn_out", late, size=16)
    right = engine.dump(RIGHT, PROMPT, points="*", size=16)
    pattern = compare(dump, right).pattern
    assert pattern is not None
    assert "all values are 0" in pattern.sentence
    assert "RoPE" not in pattern.sentence


def _ring(x: Array) -> Array:
    changed = x.copy()
    changed[5:] = x[:-5]
    return changed


def _one_of_another(x: Array) -> Array:
    changed = x.copy()
    changed[5] = x[0]
    return changed


def _two_of_others(x: Array) -> Array:
    changed = x.copy()
    changed[[5, 6]] = x[[0, 1]]
    return changed


def _plus_the_one_before(x: Array) -> Array:
    changed = x.copy()
    changed[1:] += x[:-1]
    return changed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_ring, "position t holds the right values of position t − 5: a ring of 5 positions, of which the older ones are read"),
        (_one_of_another, "position 5 holds the right values of position 0"),
        (_two_of_others, "position t holds the right values of position t − 5"),
        (_plus_the_one_before, "each position is the right one plus the position before it"),
        (lambda x: np.cumsum(x, axis=0), "each position is the sum of the right ones up to it"),
        (lambda x: np.cumsum(x, axis=0) / np.arange(1, 10)[:, None], "each position is the mean of the right ones up to it"),
        (np.abs, "every element is the right one without its sign"),
        (lambda x: np.minimum(x, 0.25), "every element is the right one, but none is above 0.25"),
        (lambda x: np.clip(x, -1, 1), "every element is the right one, clamped to -1 … 1"),
        (lambda x: x - x.mean(axis=1, keepdims=True), "every element is the right one minus the mean of its row"),
        (lambda x: x * 0 + 0.5, "every element is 0.5, whatever the right one is"),
        (lambda x: x + np.random.default_rng(2).normal(size=x.shape), ""),
    ],
)
def test_what_became_of_whole_rows_is_said(change: Callable[[Array], Array], said: str) -> None:
    """Of the first 16 of 40 elements of nine rows; what is noise has no law."""
    whole = np.random.default_rng(1).normal(size=(9, 40))
    dumped = change(whole)
    rows = np.flatnonzero((dumped != whole).any(axis=1))
    room = np.full(len(rows), 1e-8)
    compared = Beside(dumped[rows, :16], whole[rows, :16], np.arange(16), room, np.zeros(len(rows)), rows, whole)
    assert law(compared) == said


@pytest.mark.parametrize("limit", [1e-4, 5e-3, 3e-2])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_noise_stands_in_no_order(limit: float, count: int) -> None:
    """Under the wide limits of lower arithmetic each of some elements is near another one's right value by chance."""
    draw = np.random.default_rng(5)
    for _ in range(40):
        whole = draw.normal(size=(8, 128))
        rows, right = np.arange(count), whole[:count, :16]
        noise = draw.normal(size=right.shape)
        energy = (right**2).sum(axis=1)
        noise *= np.sqrt(draw.choice([3.0, 30.0]) * limit * energy / (noise**2).sum(axis=1))[:, None]
        compared = Beside(right + noise, right, np.arange(16), 10 * limit * energy, np.zeros(count), rows, whole)
        said = law(compared)
        assert not said or "of the 16 recorded" in said  # which of them are wrong may be said, and is true


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ([*range(3), 7, *range(4, 7), 3, *range(8, 128)], "elements 3 and 7 are exchanged; the others are right"),
        ([*range(40, 128), *range(40)], "element i is the right element i + 40 (16 of 128 elements recorded)"),
        (
            [i * 5 % 128 for i in range(128)],
            "the right values stand in another order: element 1 is the right element 5, 2 is the right",
        ),
    ],
)
def test_an_order_is_seen_through_a_lower_arithmetics_noise(order: list[int], said: str) -> None:
    """Four rows of 16 values under the limit of BF16, with noise of a tenth of it."""
    draw, limit = np.random.default_rng(6), 5e-3
    whole = draw.normal(size=(4, 128))
    right = whole[:, :16]
    energy = (right**2).sum(axis=1)
    dumped = whole[:, order][:, :16] + draw.normal(size=right.shape) * np.sqrt(limit / 10 * energy / 16)[:, None]
    compared = Beside(dumped, right, np.arange(16), 10 * limit * energy, np.zeros(4), np.arange(4), whole)
    assert law(compared).startswith(said)


def test_values_of_other_widths_are_told_apart(engine: Faulty) -> None:
    """Two faults may show rows of different lengths for a point: a late capture shows the logits there."""
    transformer = engine.transformer
    replay = Replay(engine.right, PROMPT, range(len(PROMPT)), [0] * len(PROMPT), transformer.weights, transformer.backend)
    probe = Probe("here", replay, Planting(engine.right), len(engine.right))
    values = replay.values
    assert probe.different({"embd": values["logits"]}, {"embd": values["blk.0.l_out"]}) == ["embd"]
    assert probe.different({"embd": values["logits"]}, {"embd": values["logits"]}) == []
