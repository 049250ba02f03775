"""`parity diff --model` of a mixture that begins with our own rounding: other experts excuse no fault, and are none."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from explaining import RIGHT, unstated
from msgspec.structs import replace
from planted import Faulty, tokens_of

from checkpoints.reading.reader import read
from checkpoints.record import Dump
from engine import ops
from engine.backend import Array
from engine.faults.edits import Then, ggml
from engine.replay.precision import ROUNDINGS, rounded
from engine.synth.recipe import shape_of
from engine.synth.recipes import RECIPES
from parity.diff.compare import Options
from parity.explain.on_model import compared_on
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference
from reference.jobs import DumpJob


@pytest.fixture(scope="module")
def engine(reference: Reference, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """A qwen3moe which BF16 lets choose other experts at one of 24 positions: half a row, and 30 times that is no limit."""
    model, recipe = tmp_path_factory.mktemp("mixture") / "m.gguf", RECIPES["qwen3moe"]
    make_by_recipe(model, recipe, shape_of(recipe), {}, kind="f32", seed=71, tokenizer=stories, running=reference)
    return Faulty(model, reference.graph(model))


@pytest.fixture(scope="module")
def right(engine: Faulty, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Dump:
    """What llama.cpp computes."""
    out = tmp_path_factory.mktemp("right") / "ref.jsonl"
    reference.dump(DumpJob(engine.model, out, tokens_of(engine.model, 24, 71)))
    return read(out)


def _last_row(x: Array) -> Array:
    changed = x.copy()
    changed[-1] *= np.float32(1.2)
    return changed


@pytest.mark.slow
@pytest.mark.parametrize("storage", [False, True])
@pytest.mark.parametrize(
    ("place", "change", "says"),
    [
        ("", None, ""),
        ("blk.2.ffn_moe_out", lambda x: x * np.float32(1.1), "undecided: blk.3.l_out"),
        ("logits", lambda x: x * np.float32(1.03), "own-rounding: logits: every element is 1.03 times the right one"),
        ("logits", _last_row, "own-rounding: logits: every element is 1.2 times the right one"),
    ],
)
def test_other_experts_excuse_no_fault(
    engine: Faulty, right: Dump, place: str, change: Callable[[Array], Array] | None, says: str, storage: bool
) -> None:
    """A tenth of a layer's experts, 3 % of the logits, a fifth of one row of them: none is as large as what other experts cost."""
    steps = [
        replace(step, op=Then(step.op, change)) if change is not None and step.makes == place else step
        for step in rounded(engine.right, "bf16", storage=storage)
    ]
    ours = replace(unstated(engine.dump(RIGHT, tokens_of(engine.model, 24, 71), steps=steps)), header=None)
    verdict = compared_on(ours, right, Options(), engine.model).verdict
    assert bool(verdict) is (not place)
    assert verdict.precision is not None
    assert verdict.precision.arithmetic == "bf16"
    if place:
        assert verdict.pattern is not None
        assert says in f"{verdict.pattern.code}: {verdict.pattern.sentence}"


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "agrees"), [(1.0, True), (1.02, False)])
def test_experts_in_another_order_are_no_other_numbers(
    reference: Reference, stories: Path, tmp_path: Path, factor: float, agrees: bool
) -> None:
    """A gpt-oss in BF16 whose scores all but tie lists experts in another order than our run; before the choice a factor shows."""
    model, recipe = tmp_path / "m.gguf", RECIPES["gpt-oss"]
    make_by_recipe(model, recipe, shape_of(recipe), {}, kind="f16", seed=65011, tokenizer=stories, running=reference)
    mixture, tokens, out = Faulty(model, reference.graph(model)), tokens_of(model, 8, 65011), tmp_path / "ref.jsonl"
    reference.dump(DumpJob(model, out, tokens, points="all", slice_size=None))
    steps = [
        replace(step, op=Then(step.op, lambda x: x * np.float32(factor))) if step.makes == "blk.1.attn_out" else step
        for step in rounded(mixture.right, "bf16", storage=True)
    ]
    ours = replace(unstated(mixture.dump(RIGHT, tokens, points="all", size=1 << 20, steps=steps)), header=None)
    assert bool(compared_on(ours, read(out), Options(), model).verdict) is agrees


@pytest.fixture(scope="module")
def dense(reference: Reference, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """A small gpt2."""
    model, recipe = tmp_path_factory.mktemp("dense") / "m.gguf", RECIPES["gpt2"]
    make_by_recipe(model, recipe, shape_of(recipe), {}, kind="f32", seed=1, tokenizer=stories, running=reference)
    return Faulty(model, reference.graph(model))


def _of_dense(dense: Faulty, kind: str, change: Callable[[Array], Array], compute: str = "") -> Dump:
    """The whole dump of an arithmetic, with one result changed."""
    steps = [
        replace(step, op=Then(step.op, change)) if step.makes == "blk.1.attn_out" else step
        for step in (rounded(dense.right, kind, storage=False) if compute else dense.right)
    ]
    made = dense.dump(RIGHT, tokens_of(dense.model, 9, 1), points="all", size=1 << 20, steps=steps)
    assert made.header is not None
    return replace(unstated(made), header=replace(made.header, compute=compute or "f32"))


def _in_half_steps(x: Array) -> Array:
    """Each element times a weight that is kept in BF16."""
    weight = np.linspace(1, 2, x.shape[-1], dtype=np.float32)
    kept = ((weight.view(np.uint32) + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.asarray(x * (kept / weight))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "q8"])
@pytest.mark.parametrize(
    ("change", "agrees"),
    [
        (lambda x: x, True),
        (_in_half_steps, True),
        (lambda x: x * np.float32(1.002), False),
        (lambda x: x + np.float32(0.01) * np.sqrt(np.mean(x * x)), False),
    ],
    ids=["right", "weights in BF16", "times 1.002", "plus 0.01"],
)
def test_an_arithmetic_that_is_stated_hides_no_factor(
    dense: Faulty, kind: str, change: Callable[[Array], Array], agrees: bool
) -> None:
    """An engine that rounds as ours does is held beside our own run where it states its arithmetic, too; limits allow for far more."""
    right = _of_dense(dense, "f32", lambda x: x)
    verdict = compared_on(_of_dense(dense, kind, change, kind), right, Options(), dense.model).verdict
    assert bool(verdict) is agrees
    if not agrees:
        assert verdict.first_divergence is not None
        assert verdict.first_divergence.checkpoint == "blk.1.attn_out"


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "agrees"), [(1 + 0.9 * 2.0**-8, True), (1 + 1.2 * 2.0**-8, False)])
def test_a_constant_may_be_kept_in_bf16(
    reference: Reference, stories: Path, tmp_path: Path, factor: float, agrees: bool
) -> None:
    """A granite multiplies by constants, which BF16 moves by half a step at most; a product has none."""
    model, recipe = tmp_path / "m.gguf", RECIPES["granite"]
    make_by_recipe(model, recipe, shape_of(recipe), {}, kind="f32", seed=3, tokenizer=stories, running=reference)
    engine, tokens = Faulty(model, reference.graph(model)), tokens_of(model, 9, 3)
    place = next(step.makes for step in engine.right if ggml(step, "SCALE"))
    steps = [
        replace(step, op=Then(step.op, lambda x: x * np.float32(factor))) if step.makes == place else step
        for step in rounded(engine.right, "bf16", storage=False)
    ]
    right, ours = (
        unstated(engine.dump(RIGHT, tokens, points="all", size=1 << 20, steps=some)) for some in (engine.right, steps)
    )
    assert right.header is not None
    right = replace(right, header=replace(right.header, compute="f32"))
    ours = replace(ours, header=replace(right.header, compute="bf16"))
    assert bool(compared_on(ours, right, Options(), model).verdict) is agrees


@pytest.mark.slow
def test_noise_of_one_row_is_no_other_order(reference: Reference, stories: Path, tmp_path: Path) -> None:
    """A gemma2 in 8 bits whose scores are in F16: each of 16 logits of one row is near some of the right row's 2,048."""
    model, recipe, out = tmp_path / "m.gguf", RECIPES["gemma2"], tmp_path / "ref.jsonl"
    make_by_recipe(model, recipe, shape_of(recipe), {}, kind="q8_0", seed=95052, tokenizer=stories, running=reference)
    engine, tokens = Faulty(model, reference.graph(model)), tokens_of(model, 4, 95052)
    reference.dump(DumpJob(model, out, tokens, points="all", slice_size=None))
    scores = [step.makes for step in engine.right if step.op is ops.attention_scores]
    kept = [replace(step, op=Then(step.op, ROUNDINGS["f16"])) if step.makes in scores else step for step in engine.right]
    ours = unstated(engine.dump(RIGHT, tokens, steps=rounded(kept, "q8", storage=False)))
    assert compared_on(ours, read(out), Options(compute="q8"), model).verdict


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "agrees"), [(1.0, True), (1.1, False)])
def test_a_factor_behind_what_was_recorded_is_seen_beside_our_own_run(
    reference: Reference, stories: Path, tmp_path: Path, factor: float, agrees: bool
) -> None:
    """A granitemoe in BF16 whose experts count a tenth more, layers' outputs recorded alone: no more than BF16 costs, and one number."""
    model, recipe = tmp_path / "m.gguf", RECIPES["granitemoe"]
    make_by_recipe(model, recipe, shape_of(recipe), {}, kind="f32", seed=3, tokenizer=stories, running=reference)
    engine, tokens = Faulty(model, reference.graph(model)), tokens_of(model, 5, 3)
    steps = [
        replace(step, op=Then(step.op, lambda x: x * np.float32(factor))) if step.makes.endswith("ffn_moe_out") else step
        for step in rounded(engine.right, "bf16", storage=False)
    ]
    right, ours = (engine.dump(RIGHT, tokens, points="default", size=1 << 20, steps=some) for some in (engine.right, steps))
    assert right.header is not None
    right, ours = (
        replace(made, header=replace(right.header, compute=compute)) for made, compute in ((right, "f32"), (ours, "bf16"))
    )
    verdict = compared_on(ours, right, Options(), model, third_side=False).verdict
    assert bool(verdict) is agrees
    if not agrees:
        assert verdict.pattern is not None
        assert "multiplied by 1.1" in verdict.pattern.sentence


@pytest.mark.slow
@pytest.mark.parametrize("place", ["output_norm", "logits"])
def test_the_first_operation_with_a_factor_is_named(reference: Reference, stories: Path, tmp_path: Path, place: str) -> None:
    """An olmo2 in BF16: 2 % in the last norm stand out of the noise at the logits first, and beside our own run where they are made."""
    model, recipe = tmp_path / "m.gguf", RECIPES["olmo2"]
    make_by_recipe(model, recipe, shape_of(recipe), {}, kind="f32", seed=3, tokenizer=stories, running=reference)
    engine, tokens = Faulty(model, reference.graph(model)), tokens_of(model, 9, 3)
    steps = [
        replace(step, op=Then(step.op, lambda x: x * np.float32(1.02))) if step.makes == place else step
        for step in rounded(engine.right, "bf16", storage=False)
    ]
    right, ours = (engine.dump(RIGHT, tokens, points="default", size=1 << 20, steps=some) for some in (engine.right, steps))
    assert right.header is not None
    ours = replace(ours, header=replace(right.header, compute="bf16"))
    verdict = compared_on(ours, right, Options(), model, third_side=False).verdict
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == place
