"""Mixed precision: where one part of an engine is rounded and what lies before it is not, no operation is called wrong."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from explaining import unstated
from msgspec.structs import replace
from planted import Faulty, Planted, half_sums, tokens_of

from checkpoints.points import parse
from checkpoints.reading.reader import read
from checkpoints.record import Dump
from engine import ops
from engine.faults.edits import Then
from engine.graph import Step
from engine.replay.kept import kept
from engine.replay.precision import rounded, stored
from engine.synth.recipe import shape_of
from engine.synth.recipes import RECIPES
from parity.diff.compare import Options, compare
from parity.diff.verdict.first import BLAMED
from parity.explain.explain import ExplainOptions, explain
from parity.explain.on_model import compared_on
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference
from reference.jobs import DumpJob

pytestmark = pytest.mark.usefixtures("step_clock")

Sides = tuple[Faulty, Dump]
PATIENT = ExplainOptions(budget=20)


@pytest.fixture(scope="module")
def sides(reference: Reference, small_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Sides:
    """A small qwen3's engine and llama.cpp's dump of it, every value of the first two layers."""
    path, out = small_model("qwen3"), tmp_path_factory.mktemp("ref") / "ref.jsonl"
    reference.dump(DumpJob(path, out, tokens_of(path, 5, 1), points="blk.{0..1}.*", slice_size=4096))
    return Faulty(path, reference.graph(path)), read(out)


def dump_of(sides: Sides, steps: Sequence[Step]) -> Dump:
    """The dump of an engine that runs these steps and does not say in which arithmetic."""
    engine, ref = sides
    assert ref.header is not None
    dump = engine.dump(Planted(()), ref.header.tokens, points="blk.{0..1}.*", size=4096, bare=False, steps=steps)
    assert dump.header is not None
    return replace(dump, header=replace(dump.header, compute="", source="an engine"))


def from_layer_1(steps: Sequence[Step], kind: str) -> list[Step]:
    """An engine whose first layer is float32, and all others lower."""
    lower = rounded(steps, kind, storage=False)
    return [b if (parse(a.makes).layer or 0) >= 1 else a for a, b in zip(steps, lower, strict=True)]


def times(steps: Sequence[Step], point: str, factor: float) -> list[Step]:
    """The steps with one result too large or too small."""

    def scaled(*inputs: np.ndarray, op: Callable[..., np.ndarray], **params: object) -> np.ndarray:
        return op(*inputs, **params) * np.float32(factor)

    return [replace(step, op=partial(scaled, op=step.op)) if step.makes == point else step for step in steps]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_layers_in_a_lower_arithmetic_blame_no_operation(sides: Sides, kind: str) -> None:
    """The second layer rounds before its products, the first one does not: diff and explain say so, and how to allow for it."""
    engine, ref = sides
    ours = dump_of(sides, from_layer_1(engine.right, kind))
    verdict = compared_on(ours, ref, Options(), engine.model).verdict
    assert verdict.first_divergence is not None
    assert verdict.pattern is not None
    assert "mixed precision" in verdict.pattern.sentence
    assert f"--compute {kind} allows for it" in verdict.pattern.sentence
    assert BLAMED not in verdict.operation
    answer = explain(ours, engine.model, PATIENT)
    assert "mixed precision" in answer.law
    assert not answer.causes
    assert answer.placed is None


@pytest.mark.slow
def test_a_large_fault_behind_mixed_precision_is_named(sides: Sides) -> None:
    """Layers in F16 and, behind their first products, a feed-forward 1.3 times too large: the cause beyond what F16 costs is named."""
    engine = sides[0]
    steps = times(from_layer_1(engine.right, "f16"), "blk.1.ffn_out", 1.3)
    answer = explain(dump_of(sides, steps), engine.model, PATIENT)
    assert [(cause.named.fault, cause.named.layers) for cause in answer.causes] == [("multiplier", (1,))]
    assert "blk.1.ffn_out is off by more than it costs there" in answer.judged_as


@pytest.mark.slow
def test_a_large_fault_without_a_cause_behind_mixed_precision_is_said(sides: Sides) -> None:
    """The same with a feed-forward of other numbers, which no cause gives: the arithmetic is said, and that operation is placed."""
    engine = sides[0]

    def other(*inputs: np.ndarray, op: Callable[..., np.ndarray], **params: object) -> np.ndarray:
        right = op(*inputs, **params)
        return right + np.random.default_rng(0).normal(size=right.shape).astype(np.float32) * np.float32(0.1) * np.abs(right)

    steps = [
        replace(step, op=partial(other, op=step.op)) if step.makes == "blk.1.ffn_out" else step
        for step in from_layer_1(engine.right, "f16")
    ]
    answer = explain(dump_of(sides, steps), engine.model, PATIENT)
    assert not answer.causes
    assert "blk.1.ffn_out is off by more than it costs there" in answer.judged_as
    assert answer.placed is not None
    assert answer.placed.operations == ("blk.1.ffn_out",)


@pytest.mark.slow
def test_a_small_fault_is_not_called_mixed_precision(sides: Sides) -> None:
    """The same layers with a product that is 1.0004 times too large, an error of the same size: the operation is placed."""
    engine, ref = sides
    ours = dump_of(sides, times(from_layer_1(engine.right, "f16"), "blk.1.q", 1.0004))
    verdict = compared_on(ours, ref, Options(), engine.model).verdict
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.1.q"
    assert BLAMED in verdict.operation
    answer = explain(ours, engine.model, PATIENT)
    assert not answer
    assert "mixed precision" not in answer.law


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "first", "said"),
    [
        ("f16 cache", "blk.0.kq", "the cache keeps keys and values in F16"),
        ("q8 cache", "blk.0.kq", "the cache keeps keys and values in Q8_0"),
        ("bf16 vectors", "blk.0.attn_norm", "norms' weights and biases are kept in BF16"),
        ("bf16 angles", "blk.0.q_rope", "RoPE's cosines and sines are kept in BF16"),
    ],
)
def test_a_part_that_is_kept_in_a_lower_type(sides: Sides, kind: str, first: str, said: str) -> None:
    """Keys and values, vectors, or angles rounded where they are kept, which nothing states: diff and explain name that and blame no
    operation; an operation 1.05 times too large beside it is found.
    """
    engine, ref = sides
    lower = kept(engine.right, kind)

    def shown(steps: Sequence[Step]) -> Dump:
        ours = dump_of(sides, steps)
        assert ours.header is not None
        points = {name: rows for name, rows in ours.points.items() if parse(name).kind not in ("k_read", "v_read")}
        return replace(ours, header=replace(ours.header, kv_type=""), points=points)

    ours = shown(lower)
    verdict = compared_on(ours, ref, Options(), engine.model).verdict
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == first
    assert verdict.pattern is not None
    assert verdict.pattern.code == "undecided"
    assert BLAMED not in verdict.operation
    answer = explain(ours, engine.model, PATIENT)
    if kind.endswith("vectors"):  # weights are named one by one
        assert [cause.named.fault for cause in answer.causes] == ["weights-rounded"]
        assert answer.remaining is None
    else:
        assert said in answer.law
        assert not answer.causes
    assert answer.placed is None
    answer = explain(shown(times(lower, "blk.1.ffn_out", 1.05)), engine.model, PATIENT)
    assert not answer
    assert said not in answer.law or any("blk.1.ffn_out" in note for note in answer.notes)


@pytest.mark.slow
def test_sums_in_f16_in_one_layer(sides: Sides) -> None:
    """One layer sums in F16, unlike ours: noise blames no operation, with the model or without; an epsilon beside it is named."""
    engine, ref = sides
    sums = [
        replace(step, op=half_sums) if step.op is ops.linear and parse(step.makes).layer == 1 else step for step in engine.right
    ]
    ours = dump_of(sides, sums)
    for verdict in (compare(ours, ref), compared_on(ours, ref, Options(), engine.model).verdict):
        assert verdict.first_divergence is not None
        assert verdict.first_divergence.checkpoint == "blk.1.q"
        assert verdict.pattern is not None
        assert verdict.pattern.code == "undecided"
        assert BLAMED not in verdict.operation
    answer = explain(ours, engine.model, PATIENT)
    assert "noise in all elements" in answer.law
    assert answer.placed is None
    steps = [replace(step, params={**step.params, "eps": 1e-4}) if step.makes == "blk.1.attn_norm" else step for step in sums]
    answer = explain(dump_of(sides, steps), engine.model, PATIENT)
    assert [cause.named.fault for cause in answer.causes] == ["norm-epsilon"]
    assert answer.placed is None
    for size in (1.0004, 1.002):
        one_head = [_head_scaled(step, size) if step.makes == "blk.1.q" else step for step in engine.right]
        verdict = compare(dump_of(sides, one_head), ref)
        assert BLAMED in verdict.operation


def _head_scaled(step: Step, by: float) -> Step:
    """A step whose first 16 elements are too large."""

    def changed(*inputs: np.ndarray, **params: object) -> np.ndarray:
        out = step.op(*inputs, **params).copy()
        out[:, :16] *= np.float32(by)
        return out

    return replace(step, op=changed)


def in_thirds(value: np.ndarray) -> np.ndarray:
    """Rounded to F16 in other places than ours rounds, as sums in F16 are."""
    return (value / np.float32(3)).astype(np.float16).astype(np.float32) * np.float32(3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "undecided"),
    [
        (in_thirds, True),
        (lambda value: value * np.float32(1.0002), False),
        (lambda value: in_thirds(value) * np.float32(1.01), False),
    ],
)
def test_attention_whose_inside_was_not_recorded_may_be_in_f16(
    sides: Sides, change: Callable[[np.ndarray], np.ndarray], undecided: bool
) -> None:
    """A flash attention with sums in F16 shows its result alone: no operation is blamed, and nothing is acquitted. A factor is a fault
    all the same, be it as small as that rounding."""
    engine, ref = sides

    def flash(step: Step) -> Step:
        if not step.makes.endswith(".kqv_out"):
            return step
        return replace(step, op=lambda *given, **params: change(step.op(*given, **params)))

    ours = dump_of(sides, [flash(step) for step in engine.right])
    inside = ("k_read", "v_read", "kq", "kq_soft_max", "kqv_out")
    seen = {name: rows for name, rows in ours.points.items() if parse(name).kind not in inside}
    verdict = compared_on(replace(ours, points=seen, end=None), ref, Options(), engine.model).verdict
    assert not verdict
    assert verdict.pattern is not None
    assert (verdict.pattern.code == "undecided") == undecided
    if undecided:
        assert not verdict.operation
        assert "flash attention" in verdict.pattern.sentence


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "storage", "factor"), [("f16", False, 1.002), ("bf16", True, 1.005), ("bf16", False, 1.02)])
def test_a_fault_below_the_noise_stands_out_beside_our_own_rounding(
    sides: Sides, kind: str, storage: bool, factor: float
) -> None:
    """An engine in one lower arithmetic is right, with a factor next to 1, too; a product a little too large is placed."""
    engine, right = sides[0], rounded(sides[0].right, kind, storage=storage)
    answer = explain(dump_of(sides, right), engine.model, PATIENT)
    assert answer
    assert answer.precision_only == kind
    assert explain(dump_of(sides, times(right, "blk.1.ffn_out", 1 + 0.9 * 2.0**-11)), engine.model, PATIENT)
    answer = explain(dump_of(sides, times(right, "blk.1.ffn_out", factor)), engine.model, PATIENT)
    assert not answer
    assert answer.law.startswith(f"every element is {factor:g} times the right one")
    assert answer.placed is not None
    assert answer.placed.operations == ("blk.1.ffn_out",)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_a_large_fault_in_a_lower_arithmetic_is_named(sides: Sides, kind: str) -> None:
    """A feed-forward 1.3 times too large, in an engine in one arithmetic everywhere: the factor is named, nothing is called mixed."""
    engine = sides[0]
    steps = times(rounded(engine.right, kind, storage=False), "blk.1.ffn_out", 1.3)
    answer = explain(dump_of(sides, steps), engine.model, PATIENT)
    assert [(cause.named.fault, cause.named.layers) for cause in answer.causes] == [("multiplier", (1,))]
    assert "mixed precision" not in answer.law


@pytest.mark.slow
def test_what_other_experts_cost_is_no_noise(small_model: Callable[..., Path], reference: Reference) -> None:
    """Weights of experts with the wrong sign, seen at the layers' outputs: half of a row is wrong, which other experts could cost as well,
    and no lower arithmetic's noise: the operations are placed."""
    path = small_model("bailingmoe2")
    engine = Faulty(path, reference.graph(path))
    steps = times(times(engine.right, "blk.2.ffn_moe_weights_norm", -1.0), "blk.3.ffn_moe_weights_norm", -1.0)
    tokens = tokens_of(path, 6, 3000352)
    dump = engine.dump(Planted(()), tokens, points="default", size=10, bare=False, steps=steps)
    assert dump.header is not None
    dump = replace(dump, header=replace(dump.header, compute="", source="an engine"))
    answer = explain(dump, path, PATIENT)
    assert "noise in all elements" not in answer.law
    assert answer.placed is not None
    assert "blk.2.ffn_moe_weights_norm" in answer.placed.operations or "blk.3.ffn_moe_weights_norm" in answer.placed.operations


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "kind"), [(ops.attention_scores, "f16"), (ops.attention_scores, "bf16"), (ops.causal_soft_max, "bf16")]
)
def test_one_kind_of_operation_in_a_lower_type(sides: Sides, op: Callable[..., np.ndarray], kind: str) -> None:
    """Layers' outputs alone of an engine in float32 that keeps scores or soft max in a lower type: no operation is blamed; a product 1.05
    times too large beside it is no such arithmetic.
    """
    engine, ref = sides
    lower = [b if a.op is op else a for a, b in zip(engine.right, stored(engine.right, kind), strict=True)]

    def answers(steps: Sequence[Step]) -> tuple[str, str]:
        ours = dump_of(sides, steps)
        ours = replace(ours, points={name: rows for name, rows in ours.points.items() if parse(name).kind == "l_out"})
        verdict = compared_on(ours, ref, Options(), engine.model).verdict
        assert verdict.first_divergence is not None
        answer = explain(ours, engine.model, PATIENT)
        assert not answer.causes
        return "" if verdict.pattern is None else verdict.pattern.sentence, answer.law

    assert all("arithmetic rounds it" in sentence for sentence in answers(lower))
    assert not any("arithmetic rounds it" in sentence for sentence in answers(times(lower, "blk.0.attn_out", 1.05)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("points", "place", "factor"),
    [
        *((points, *of) for points in ("default", "*") for of in (("", 1.0), ("logits", 1.03), ("blk.3.ffn_moe_out", 30.0))),
        ("*", "blk.3.ffn_moe_out", 1.1),
    ],
)
def test_what_other_experts_cost_excuses_no_factor(
    reference: Reference, stories: Path, tmp_path: Path, points: str, place: str, factor: float
) -> None:
    """BF16 alone chooses other experts at some positions, which costs a fifth of their logits; every record is our own run's all the same,
    and a factor behind it is not called right.
    """
    model = tmp_path / "m.gguf"
    make_by_recipe(model, RECIPES["qwen3moe"], shape_of(RECIPES["qwen3moe"]), {}, kind="f32", seed=5, tokenizer=stories)
    engine = Faulty(model, reference.graph(model))
    steps = [
        replace(step, op=Then(step.op, lambda x: x * np.float32(factor))) if step.makes == place else step
        for step in engine.right
    ]
    tokens = tokens_of(model, 24, seed=1)
    dump = unstated(engine.dump(Planted(()), tokens, points=points, steps=rounded(steps, "bf16", storage=False)))
    explanation = explain(dump, model, PATIENT)
    assert bool(explanation) is (factor == 1.0)
    assert explanation.precision_only == ("bf16" if factor == 1.0 else "")
