"""`parity explain` tells lower arithmetic from faults."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from explaining import PROMPT, RIGHT, STEPS, unstated
from msgspec.structs import replace
from planted import PATIENT, Faulty, half_sums, tokens_of
from slow import slow_but

from checkpoints.reading.reader import read
from checkpoints.record import Dump, Rows
from engine import ops
from engine.backend import Array
from engine.faults import CATALOGUE, plant
from engine.faults.edits import Then
from engine.graph import Step
from engine.replay.precision import rounded
from engine.replay.rounded_weights import with_rounded_weights
from engine.synth import Shape, synthesize
from parity.explain.budget import Budget
from parity.explain.case import Case
from parity.explain.explain import ExplainOptions, explain
from parity.explain.rounding.flipped import may_exchange
from parity.explain.rounding.one_element import one_element
from parity.explain.rounding.precision import floor
from parity.explain.rounding.reproduced import is_reproduced
from reference.client import Reference
from reference.jobs import DumpJob
from reports.explanation import lines


def test_an_engine_that_sums_in_f16_is_not_accused(engine: Faulty) -> None:
    """Arithmetic that our own estimate of F16 does not copy is told from a fault, and the first words say that it is assumed."""
    right: list[Step] = [replace(step, op=half_sums) if step.op is ops.linear else step for step in engine.right]
    dump = unstated(engine.dump(RIGHT, PROMPT, steps=right))
    explanation = explain(dump, engine.model)
    assert explanation.precision_only in ("f16", "tf32")
    assert explanation.causes == ()
    assert "which is assumed: nothing states it" in next(lines(explanation, 300)).plain


def _followed(engine: Faulty, steps: list[Step], tokens: tuple[int, ...]) -> str:
    """Which element or head an engine's errors follow at the first place that differs."""
    case = Case(unstated(engine.dump(RIGHT, tokens, steps=steps)), engine.model, ExplainOptions())
    first = next(entry for entry in case.entries if (entry.base > entry.limit).any())
    right = first.taken(case.replay.on_host[first.point], case.positions)
    return one_element(case, first, first.values - right, first.present)


@pytest.mark.parametrize(
    ("name", "part", "what"),
    [
        ("blk.0.v", slice(7, 8), "element 7 of blk.0.v_read"),
        ("blk.0.kqv_out", slice(8, 16), "head 1 of blk.0.kqv_out"),
        ("blk.0.ffn_swiglu", slice(7, 8), "element 7 of blk.0.ffn_swiglu"),
        ("blk.0.ffn_norm", slice(7, 8), "element 7 of blk.0.ffn_norm"),
        ("blk.0.ffn_swiglu", slice(0, 71), "elements 0 to 70 of blk.0.ffn_swiglu"),
        ("blk.0.ffn_swiglu", slice(33, None), "the elements after 32 of blk.0.ffn_swiglu"),
        ("blk.0.ffn_swiglu", slice(64, 96), "quarter 2 of blk.0.ffn_swiglu"),
    ],
)
def test_errors_that_follow_one_element_are_no_arithmetic(engine: Faulty, name: str, part: slice, what: str) -> None:
    """One element, one head or one part of a row 0.3 % too large makes errors of F16's size, along one direction that is known."""

    def off(x: Array) -> Array:
        changed = x.copy()
        changed[:, part] *= np.float32(1.003)
        return changed

    steps = [replace(step, op=Then(step.op, off)) if step.makes == name else step for step in engine.right]
    assert _followed(engine, steps, PROMPT) == f"{what} were off"


@pytest.mark.parametrize("seed", range(4))
def test_rounding_follows_no_element(engine: Faulty, seed: int) -> None:
    """Neither F16's nor BF16's rounding, of products or of all activations, nor sums in F16 follow an element or a head."""
    tokens = tokens_of(engine.model, 4, seed)
    lower = [rounded(engine.right, kind, storage=storage) for kind in ("f16", "bf16", "q8") for storage in (False, True)]
    sums = [replace(step, op=half_sums) if step.op is ops.linear else step for step in engine.right]
    assert [_followed(engine, steps, tokens) for steps in (*map(list, lower), sums)] == [""] * 7


@pytest.mark.parametrize("kind", slow_but(["F16", "BF16", "Q8_0", "Q4_0"], "BF16", "Q8_0"))
def test_llama_cpp_with_native_weights_is_not_accused(reference: Reference, tmp_path: Path, kind: str) -> None:
    """llama.cpp rounds activations to the weights' partner type: a right engine, and no fault of the catalogue."""
    plain, model, out = tmp_path / "f32.gguf", tmp_path / "native.gguf", tmp_path / "native.jsonl"
    synthesize(plain, Shape("qwen2", 3, 128, 4, 2, 0, 128, 320), weight_type="f32", seed=5)
    reference.quantize(plain, kind, model)
    reference.dump(DumpJob(model=model, out=out, tokens=PROMPT, mode="native"))
    explanation = explain(read(out), model)
    assert explanation
    assert explanation.precision_only
    assert explanation.causes == ()


def test_a_fault_of_an_f16_engine_is_found_above_its_noise(engine: Faulty) -> None:
    """With --compute the noise of that arithmetic is measured, and the fault stands out from it."""
    steps = rounded(plant(engine.right, CATALOGUE["no-qkv-bias"]), "f16", storage=False)
    dump = engine.dump(RIGHT, PROMPT, steps=steps)
    explanation = explain(dump, engine.model, ExplainOptions(compute="f16"))
    assert explanation.remaining is None
    classes = [{cause.named.fault, *(other.fault for other in cause.equivalent)} for cause in explanation.causes]
    assert classes
    assert "no-qkv-bias" in classes[0]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """A small qwen2 whose rows are whole blocks of 32."""
    path = tmp_path_factory.mktemp("precision") / "blocks.gguf"
    synthesize(path, Shape("qwen2", 3, 128, 4, 2, 0, 128, 320), weight_type="f32", seed=5)
    return Faulty(path)


def _smaller(x: Array) -> Array:
    changed = x.copy()
    changed[:, 5] *= x.dtype.type(0.7)
    return changed


@pytest.mark.slow
@pytest.mark.usefixtures("computed")
def test_one_unit_that_is_wrong_everywhere_is_no_rounding(blocks: Faulty) -> None:
    """Errors as large as BF16's, but one vector at every position, each times a number."""
    steps = [replace(step, op=Then(step.op, _smaller)) if step.makes == "blk.0.ffn_gate" else step for step in blocks.right]
    dump = unstated(blocks.dump(RIGHT, PROMPT, steps=steps))
    case = Case(dump, blocks.model, ExplainOptions())
    cost = floor("bf16", case.entries, case.transformer.steps, case.replay, case.make, case.positions).cost()
    sizes = [
        float(entry.base.mean()) / float(costs) for entry, costs in zip(case.entries, cost, strict=True) if entry.base.any()
    ]
    assert all(0.3 < size < 3 for size in sizes)
    explanation = explain(dump, blocks.model, STEPS)
    assert explanation.first is not None
    assert (explanation.first.checkpoint, bool(explanation)) == ("blk.0.l_out", False)
    assert (explanation.precision_only, explanation.looks_like) == ("", "")


def _by_rows(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """A product whose activations have 8 bits and one scale per row, as W8A8 kernels have, unlike llama.cpp's blocks of 32."""
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    return ops.linear(np.rint(x / scale) * scale, weight, bias)


@pytest.mark.slow
@pytest.mark.usefixtures("computed")
def test_eight_bits_that_are_not_declared_are_told_as_such(blocks: Faulty) -> None:
    """Errors of that size may hide a fault: they acquit nothing, and no fault is named. If declared, they are noise."""
    steps = [replace(step, op=_by_rows) if step.op is ops.linear else step for step in blocks.right]
    dump = unstated(blocks.dump(RIGHT, PROMPT, steps=steps))
    explanation = explain(dump, blocks.model, STEPS)
    assert (bool(explanation), explanation.causes, explanation.precision_only) == (False, (), "")
    assert explanation.looks_like == "q8"
    assert any("--compute q8 treats them as noise" in line.plain for line in lines(explanation, 300))
    assert explain(dump, blocks.model, ExplainOptions(compute="q8"))


def _kept_in_f16(dump: Dump, layer: int) -> Dump:
    """The dump of a recorder that keeps one layer's values in F16."""

    def kept(name: str, rows: Rows) -> Rows:
        half = replace(rows, values=rows.values.astype(np.float16).astype(np.float32))
        return half if name.startswith(f"blk.{layer}.") else rows

    return replace(dump, points={name: kept(name, rows) for name, rows in dump.points.items()})


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_recorded_in_f16_is_no_fault(engine: Faulty, layer: int) -> None:
    """Right values that a recorder rounded are told as such, though float32 is stated: what is made from them agrees."""
    explanation = explain(_kept_in_f16(engine.dump(RIGHT, PROMPT, points="*"), layer), engine.model)
    assert explanation
    assert (explanation.causes, explanation.suspects, explanation.precision_only) == ((), (), "")
    assert any(note.startswith(f"captured in a lower type: blk.{layer}.attn_norm") for note in explanation.notes)


@pytest.mark.slow
def test_a_fault_in_a_layer_recorded_in_f16_is_placed_at_its_operation(engine: Faulty) -> None:
    """The recorder's rounding of the operations before it is not held against them."""
    wrong = [
        replace(step, op=Then(step.op, lambda x: x * np.float32(1.02))) if step.makes == "blk.2.ffn_out" else step
        for step in engine.right
    ]
    explanation = explain(_kept_in_f16(engine.dump(RIGHT, PROMPT, points="*", steps=wrong), 2), engine.model)
    assert explanation.first is not None
    assert explanation.first.checkpoint == "blk.2.ffn_out"


@pytest.mark.slow
@pytest.mark.usefixtures("computed")
def test_an_engine_that_computes_in_f16_is_no_recorder(engine: Faulty) -> None:
    """Its first values are the right ones rounded, too, but the rounding goes into everything that follows."""
    dump = unstated(engine.dump(RIGHT, PROMPT, points="*", steps=rounded(engine.right, "f16", storage=True)))
    explanation = explain(dump, engine.model, STEPS)
    assert not any(note.startswith("captured") for note in explanation.notes)


@pytest.mark.parametrize("kind", ["k_rope", "v"])
@pytest.mark.usefixtures("computed")
def test_what_a_cache_keeps_in_f16_is_the_engines(engine: Faulty, kind: str) -> None:
    """The cache's rows are rounded as well, but they are copies: the products that read them are not right."""
    name = f"blk.1.{kind}"
    half = [
        replace(step, op=Then(step.op, lambda x: x.astype(np.float16).astype(np.float32))) if step.makes == name else step
        for step in engine.right
    ]
    dump = unstated(engine.dump(RIGHT, PROMPT, points="*", steps=half))
    explanation = explain(dump, engine.model, ExplainOptions(budget=1))
    assert explanation.first is not None
    assert explanation.first.checkpoint == name
    assert not any(note.startswith("captured") for note in explanation.notes)


@pytest.mark.usefixtures("computed")
def test_of_a_single_position_the_sum_over_keys_is_a_copy(engine: Faulty) -> None:
    """The first position's only weight is 1, so that rounded values V make rounded sums whoever rounded them."""
    half = [
        replace(step, op=Then(step.op, lambda x: x.astype(np.float16).astype(np.float32))) if step.makes == "blk.1.v" else step
        for step in engine.right
    ]
    dump = unstated(engine.dump(RIGHT, PROMPT[:1], points="*", steps=half))
    explanation = explain(dump, engine.model, ExplainOptions(budget=1))
    assert explanation.first is not None
    assert explanation.first.checkpoint == "blk.1.v"


def test_rounded_logits_alone_do_not_show_whose_rounding_it_is(engine: Faulty) -> None:
    """Nothing is computed from logits: the note says that, and not that the recorder did it."""
    right = engine.dump(RIGHT, PROMPT, points="*")
    logits = right.points["logits"]
    half = replace(logits, values=logits.values.astype(np.float16).astype(np.float32))
    explanation = explain(replace(right, points={**right.points, "logits": half}), engine.model)
    assert any(note.endswith("says whose rounding it is") for note in explanation.notes)


@pytest.mark.parametrize("storage", [False, True])
def test_what_an_arithmetic_costs_is_measured_as_the_dump_is(engine: Faulty, storage: bool) -> None:
    """Of rows with a sketch of the whole, the cost is that of the whole row, as the error is: not of the few leading values alone."""
    lower = rounded(engine.right, "bf16", storage=storage)
    case = Case(unstated(engine.dump(RIGHT, PROMPT, points="*", size=4, steps=lower)), engine.model, ExplainOptions())
    run = case.make(lower, len(case.positions))
    for entry in case.entries:
        costs = entry.between(run.on_host[entry.point], case.replay.on_host[entry.point], case.positions)
        np.testing.assert_allclose(costs, entry.base, rtol=0.1, atol=1e-10)


def test_scores_of_experts_that_are_left_out_are_compared_as_such() -> None:
    """Minus infinity, the score outside of the chosen groups, says nothing of how near the others are; other groups are another choice."""
    right = np.array([[0.5, 0.4999, 0.1, -np.inf], [0.9, 0.5, 0.1, -np.inf], [0.9, 0.5, 0.1, -np.inf]])
    other = right + np.array([0.001, 0, 0, 0])
    other[2] = [0.9, -np.inf, 0.1, 0.5]
    assert may_exchange(right, [other], 2).tolist() == [True, False, True]


@pytest.mark.usefixtures("step_clock")
@pytest.mark.slow
def test_an_element_that_one_product_reads_wrong_is_said_at_default_points(engine: Faulty) -> None:
    """One element in a product is 1 % too small, which no entry describes: the errors of the layer's output follow it."""

    def one_smaller(*inputs: Array, op: Callable[..., Array], **params: object) -> Array:
        x = inputs[0].copy()
        x[:, 3] *= np.float32(0.99)
        return op(x, *inputs[1:], **params)

    steps = [replace(step, op=partial(one_smaller, op=step.op)) if step.makes == "blk.0.v" else step for step in engine.right]
    answer = explain(engine.dump(RIGHT, PROMPT, steps=steps), engine.model, ExplainOptions(budget=8))
    assert not answer.causes
    # The first position attends to itself alone, so that only its v depends on that element.
    assert answer.law.startswith("the errors follow one number, as if element 3 of blk.0.attn_norm")


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """A small qwen2 whose biases of queries and keys are thirty times as large as usual."""
    path = tmp_path_factory.mktemp("precision") / "biased.gguf"
    synthesize(path, Shape("qwen2", 3, 112, 14, 2, 0, 128, 300), weight_type="f32", seed=11)
    reader = gguf.GGUFReader(path, "r+")
    for tensor in reader.tensors:
        if tensor.name.endswith(("attn_k.bias", "attn_q.bias")):
            tensor.data[...] *= np.float32(30)
    reader.data.flush()
    return Faulty(path)


def _with_rounded_biases(engine: Faulty, kind: str) -> list[Step]:
    """An engine in this arithmetic that keeps its biases in that type, too."""
    kept = with_rounded_weights(engine.right, kind, lambda step, name: step.op is ops.linear and name.endswith(".bias"))
    return rounded(kept, kind, storage=False)


@pytest.mark.usefixtures("step_clock")
@pytest.mark.parametrize("kind", slow_but(["f16", "bf16"], "bf16"))
def test_an_engine_that_rounds_large_biases_too_is_right_in_its_arithmetic(biased: Faulty, kind: str) -> None:
    """What it rounds beyond products is of its type as well: our own run with that rounding has its every record."""
    dump = unstated(biased.dump(RIGHT, PROMPT, points="*", steps=_with_rounded_biases(biased, kind)))
    answer = explain(dump, biased.model, PATIENT)
    assert answer
    assert answer.precision_only == kind
    assert answer.precision_assumed
    assert (answer.causes, answer.law) == ((), "")


@pytest.mark.usefixtures("step_clock")
def test_an_engine_whose_large_biases_hide_rounding_is_right_in_its_arithmetic(biased: Faulty) -> None:
    """Queries' errors are next to float32's limit, so that other records show F16 first: no weights and no operation are blamed."""
    dump = unstated(biased.dump(RIGHT, PROMPT, points="*", steps=rounded(biased.right, "f16", storage=False)))
    answer = explain(dump, biased.model, PATIENT)
    assert answer
    assert (answer.precision_only, answer.causes, answer.law) == ("f16", (), "")


def test_no_run_begins_after_the_time_is_up(biased: Faulty) -> None:
    """Of the ways in which an engine may round, each costs a run where the embedding differs first: none is tried without time."""
    dump = unstated(biased.dump(RIGHT, PROMPT, steps=rounded(biased.right, "bf16", storage=True)))
    case = Case(dump, biased.model, ExplainOptions())
    assert [is_reproduced(case, "bf16", Budget(seconds)) for seconds in (3600.0, 0.0)] == [True, False]


@pytest.mark.usefixtures("step_clock")
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "factor"), [("f16", 1.005), ("f16", 30.0), ("bf16", 1.005), ("bf16", 1.3)])
def test_what_rounded_biases_excuse_hides_no_factor(biased: Faulty, kind: str, factor: float) -> None:
    """The same engine with a factor in one layer is not called right, whether it is as small as the rounding or far larger."""
    wrong = [
        replace(step, op=Then(step.op, lambda x: x * np.float32(factor))) if step.makes == "blk.1.ffn_out" else step
        for step in _with_rounded_biases(biased, kind)
    ]
    answer = explain(unstated(biased.dump(RIGHT, PROMPT, points="*", steps=wrong)), biased.model, ExplainOptions(budget=2))
    assert not answer
