"""A factor below lower arithmetic's noise is found by what all positions share: rounding is scattered."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dumps import dump as dumped
from explaining import RIGHT, unstated
from msgspec.structs import replace
from numpy.typing import NDArray
from planted import Faulty, tokens_of

from checkpoints.answers.diff import Verdict
from checkpoints.points import parse
from checkpoints.reading.reader import read
from checkpoints.record import Dump
from engine.backend import Array
from engine.faults.edits import Then
from engine.replay.precision import rounded
from engine.replay.rounded_weights import with_rounded_weights
from engine.synth import Shape, synthesize
from engine.synth.recipe import shape_of
from engine.synth.recipes import RECIPES
from parity.diff.compare import Options, compare
from parity.diff.verdict.one_factor import Allowed, shared_factor, shared_summand
from parity.explain.on_model import compared_on
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference
from reference.jobs import DumpJob

PROMPT, PLACE = (1, 17, 40, 99, 5, 80), "blk.1.ffn_up"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """A qwen2 of two layers."""
    path = tmp_path_factory.mktemp("factor") / "small.gguf"
    synthesize(path, Shape("qwen2", 2, 96, 4, 2, 0, 128, 100), weight_type="f32", seed=11)
    return Faulty(path)


def in_f16(engine: Faulty, change: Callable[[Array], Array] | None = None, *, storage: bool = False) -> Dump:
    """The whole dump of the engine in F16, one of whose results is changed."""
    steps = rounded(engine.right, "f16", storage=storage)
    steps = [replace(step, op=Then(step.op, change)) if change is not None and step.makes == PLACE else step for step in steps]
    return unstated(engine.dump(RIGHT, PROMPT, points="all", size=4096, steps=steps))


def right_of(engine: Faulty) -> Dump:
    """What the engine dumps in float32."""
    dump = engine.dump(RIGHT, PROMPT, points="all", size=4096)
    assert dump.header is not None
    return replace(dump, header=replace(dump.header, compute="f32"))


def times(factor: float, some: slice = slice(None)) -> Callable[[Array], Array]:
    """Multiplies some elements of each row."""

    def change(x: Array) -> Array:
        changed = x.copy()
        changed[:, some] *= np.float32(factor)
        return changed

    return change


def sentence(verdict: Verdict) -> str:
    """Where a divergence is, and its pattern."""
    assert verdict.first_divergence is not None
    assert verdict.pattern is not None
    return f"{verdict.first_divergence.checkpoint} {verdict.pattern.code}: {verdict.pattern.sentence}"


def test_a_factor_of_1_003_beside_f16_is_a_divergence(engine: Faulty) -> None:
    """The arithmetic is stated, and its limits allow ten times that error; the same engine without the factor agrees."""
    right, stated = right_of(engine), Options(compute="f16")
    assert compare(in_f16(engine, storage=True), right, stated)
    found = compare(in_f16(engine, times(1.003), storage=True), right, stated)
    assert not found
    assert f"{PLACE} one-factor: {PLACE}: 1.00" in sentence(found)
    assert found.first_divergence is not None
    assert found.first_divergence.nmse is not None
    assert found.first_divergence.nmse < found.first_divergence.limit


def test_digits_that_are_cut_off_are_no_factor(engine: Faulty) -> None:
    """Every value of a BF16 engine that does not round is smaller, by more from layer to layer: right, and 1.1 times is none of it."""

    def cut(x: Array) -> Array:
        return np.asarray((np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))

    right = right_of(engine)
    for change in (cut, lambda x: cut(times(1.1)(x))):
        steps = [replace(step, op=Then(step.op, change if step.makes == PLACE else cut)) for step in engine.right]
        ours = unstated(engine.dump(RIGHT, PROMPT, points="all", size=4096, steps=steps))
        assert bool(compare(ours, right, Options(compute="bf16"))) is (change is cut)


def test_a_factor_below_1_is_no_digits_cut_off(engine: Faulty) -> None:
    """0.997 in F16 is three spacings of its numbers: cut digits leave noise of their own beside that, and products before it round."""
    right, stated = right_of(engine), Options(compute="f16")
    for storage in (False, True):
        found = compare(in_f16(engine, times(0.997), storage=storage), right, stated)
        assert not found
        assert f"{PLACE} one-factor: {PLACE}: 0.99" in sentence(found)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_an_engine_may_cut_digits_off_in_some_operations(engine: Faulty, kind: str) -> None:
    """Products that round, and results of some other operations cut off to F16 or BF16: right, at every point."""
    bits = {"f16": 13, "bf16": 16}[kind]

    def cut(x: Array) -> Array:
        mask = np.uint32(0xFFFFFFFF << bits & 0xFFFFFFFF)
        return np.asarray((np.ascontiguousarray(x).view(np.uint32) & mask).view(np.float32))

    right = right_of(engine)
    for kinds in (
        ("l_out", "ffn_inp"),
        ("attn_norm", "ffn_norm"),
        ("v", "kqv_out", "attn_out"),
        ("ffn_gate", "ffn_up", "ffn_swiglu"),
    ):
        steps = [
            replace(step, op=Then(step.op, cut)) if parse(step.makes).kind in kinds else step
            for step in rounded(engine.right, kind, storage=False)
        ]
        ours = unstated(engine.dump(RIGHT, PROMPT, points="all", size=4096, steps=steps))
        assert compare(ours, right, Options(compute=kind)), kinds


def test_noise_tells_cut_digits_from_a_factor() -> None:
    """As much smaller as cutting makes values is a factor beside the noise of rounding once, and none beside that of cutting as often."""
    random = np.random.default_rng(3)
    right: NDArray[np.float64] = random.normal(size=(6, 256))
    spacing, size = 2.0**-10, np.exp2(np.floor(np.log2(np.abs(right))))

    def lost(times: int) -> NDArray[np.float64]:
        return -np.sign(right) * size * spacing * np.asarray(random.uniform(size=(times, *right.shape)).sum(axis=0))

    cut = lost(9)
    assert shared_factor(cut, right, Allowed.of("f16", 1)) is None
    smaller = float((cut * right).sum() / (right * right).sum())
    once = lost(1) + 0.5 * np.sign(right) * size * spacing
    found = shared_factor(once + smaller * right, right, Allowed.of("f16", 1))
    assert found is not None
    assert abs(found.factor - 1 - smaller) < 4 * found.error


def test_digits_cut_off_beyond_the_limit_are_undecided() -> None:
    """The table's limit is one for all models: an engine that cuts digits off may be over it, and no operation is blamed."""
    random = np.random.default_rng(3)
    right = random.normal(size=(6, 64)).astype(np.float32)
    size = np.exp2(np.floor(np.log2(np.abs(right)))) * 2.0**-10
    cut = -np.sign(right) * size * random.uniform(size=(12, *right.shape)).sum(axis=0)
    for errors, undecided in ((cut, True), (-0.004 * right, False)):
        points = {"embd": right, "blk.0.l_out": (right + errors).astype(np.float32)}
        found = compare(dumped(points), dumped({**points, "blk.0.l_out": right}), Options(compute="f16"))
        assert not found
        assert ("undecided" in sentence(found)) is undecided
    cut[-1] *= 0.3  # a position that is below the limit
    points = {"embd": right, "blk.0.l_out": (right + cut).astype(np.float32)}
    found = compare(dumped(points), dumped({**points, "blk.0.l_out": right}), Options(compute="f16"))
    assert "undecided" in sentence(found)


@pytest.mark.slow
def test_what_stands_out_of_our_own_rounding_is_a_divergence(engine: Faulty) -> None:
    """An eighth of a row is 1.001 times too large, below F16's own error of each value; with the model, our run in F16 shows it."""
    right = right_of(engine)
    assert compared_on(in_f16(engine), right, Options(), engine.model).verdict
    part = times(1.001, slice(0, 16))
    assert compare(in_f16(engine, part), right, Options(compute="f16"))
    found = compared_on(in_f16(engine, part), right, Options(), engine.model).verdict
    assert not found
    assert f"{PLACE} own-rounding" in sentence(found)


def test_only_what_all_positions_share_is_a_part() -> None:
    """Noise, a factor of each position's own, and one that may be a rounded constant are none; a factor and a summand beside noise are."""
    random = np.random.default_rng(3)
    right: NDArray[np.float64] = random.normal(size=(6, 64))
    noise = 4e-4 * random.normal(size=right.shape) * right
    own = 1e-3 * random.normal(size=(6, 1)) * right
    for errors in (noise, noise + own, noise + 9e-4 * right):
        assert shared_factor(errors, right, Allowed.of("f16", 1)) is None
        assert shared_summand(errors, right) is None
    factor = shared_factor(noise + 2.5e-3 * right, right, Allowed.of("f16", 1))
    assert factor is not None
    assert abs(factor.factor - 1.0025) < 4 * factor.error < 4e-4
    summand = shared_summand(noise + 2e-3, right)
    assert summand is not None
    assert abs(summand.summand - 2e-3) < 4 * summand.error
    assert shared_factor(np.zeros_like(right), right) is None
    for width in (0, 11):  # too few numbers of a row
        assert shared_factor(right[:, :width], right[:, :width]) is None
        assert shared_summand(right[:, :width], right[:, :width]) is None


def test_digits_cut_off_positive_values_are_no_summand() -> None:
    """Values of a gate are smaller by a step's part, so is their mean: right, but a summand that such values can't have is found."""
    right = 1 / (1 + np.exp(-0.5 * np.random.default_rng(3).normal(size=(6, 64))))
    noise = -np.random.default_rng(4).uniform(0, 2.0**-8, size=right.shape) * right
    assert shared_summand(noise, right) is not None
    assert shared_summand(noise, right, Allowed.of("bf16", 1)) is None
    assert shared_summand(-noise + 4e-3, right, Allowed.of("bf16", 1)) is not None
    wide: NDArray[np.float64] = np.random.default_rng(5).normal(size=(6, 64))
    for summand in (-0.01, 0.01):
        found = shared_summand(
            2e-3 * np.random.default_rng(6).normal(size=wide.shape) * wide + summand, wide, Allowed.of("bf16", 24)
        )
        assert found is not None
        assert abs(found.summand - summand) < 0.1 * abs(summand)


def test_a_channel_that_dwarfs_a_row_is_one_number() -> None:
    """A sum in BF16 keeps 1000 where 1 is taken off it layer by layer: one element is too large at all positions, the others not."""
    random = np.random.default_rng(3)
    right: NDArray[np.float64] = random.normal(size=(6, 64))
    right[:, 3] = 976
    errors = 2e-3 * random.normal(size=right.shape) * right
    errors[:, 3] = 8
    assert shared_factor(errors, right, Allowed.of("bf16", 1)) is None
    ours, ref = (dumped({"embd": side.astype(np.float32)}) for side in (right + errors, right))
    assert compare(ours, ref, Options(compute="bf16"))
    found = shared_factor(errors + 0.01 * right, right, Allowed.of("bf16", 1))
    assert found is not None
    assert abs(found.factor - 1.01) < 4 * found.error


def test_a_constant_in_bf16_beside_f16_is_undecided(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """Embeddings times the root of 1152, which BF16 has as 34, have the factor that a fault of 1.0017 would leave: both are said."""
    engine, out = Faulty(model := small_model("gemma"), reference.graph(model)), tmp_path / "ref.jsonl"
    reference.dump(DumpJob(model, out, PROMPT, points="all", slice_size=4096))
    steps = [
        replace(step, op=Then(step.op, times(float(34 / np.sqrt(1152))))) if step.makes == "embd" else step
        for step in rounded(engine.right, "f16", storage=True)
    ]
    ours = unstated(engine.dump(RIGHT, PROMPT, points="all", size=4096, steps=steps))
    assert "embd undecided: embd: 1.0017" in sentence(compare(ours, read(out), Options(compute="f16")))


def test_eight_bits_beside_constants_in_bf16() -> None:
    """Products in 8 bits, and everything else in BF16: an embedding times the root of 1152, which BF16 has as 34; 1.006 is none."""
    right = np.random.default_rng(3).normal(size=(6, 64)).astype(np.float32)
    for factor, agrees in ((float(34 / np.sqrt(1152)), True), (1.006, False)):
        ours = dumped({"embd": (factor * right).astype(np.float32)})
        assert bool(compare(ours, dumped({"embd": right}), Options(compute="q8"))) is agrees


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("factor", "agrees"), [(1.0, True), (1.05, False)])
def test_a_time_step_s_bias_in_bf16_is_a_factor_of_a_head(
    reference: Reference, stories: Path, tmp_path: Path, seed: int, factor: float, agrees: bool
) -> None:
    """A plamo2 that keeps its time steps' biases in BF16 scales heads by 0.986 (seed 1) or 1.0057 (seed 2) after the scan: no fault."""
    model, out, recipe = tmp_path / "m.gguf", tmp_path / "ref.jsonl", RECIPES["plamo2"]
    make_by_recipe(model, recipe, shape_of(recipe), {}, kind="f32", seed=seed, tokenizer=stories, running=reference)
    mamba, tokens = Faulty(model, reference.graph(model)), tokens_of(model, 9, seed)
    reference.dump(DumpJob(model, out, tokens, points="all", slice_size=None))
    kept = with_rounded_weights(mamba.right, "bf16", lambda _, name: "dt" in name and name.endswith("bias"))
    steps = [replace(step, op=Then(step.op, times(factor))) if step.makes.endswith("mamba_y_view") else step for step in kept]
    ours = replace(unstated(mamba.dump(RIGHT, tokens, points="all", size=1 << 20, steps=steps)), header=None)
    assert bool(compare(ours, read(out), Options())) is agrees


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "agrees"), [(1.0, True), (1.006, False)])
def test_before_a_scan_no_time_step_excuses_a_factor(
    reference: Reference, stories: Path, tmp_path: Path, factor: float, agrees: bool
) -> None:
    """A mamba in BF16 whose embedding is 1.006 times too large: no time step's bias lies before it."""
    model, out, recipe = tmp_path / "m.gguf", tmp_path / "ref.jsonl", RECIPES["mamba"]
    make_by_recipe(model, recipe, shape_of(recipe), {}, kind="bf16", seed=1, tokenizer=stories, running=reference)
    mamba, tokens = Faulty(model, reference.graph(model)), tokens_of(model, 9, 1)
    reference.dump(DumpJob(model, out, tokens))
    steps = [
        replace(step, op=Then(step.op, times(factor))) if step.makes == "embd" else step
        for step in rounded(mamba.right, "bf16", storage=True)
    ]
    ours = replace(unstated(mamba.dump(RIGHT, tokens, steps=steps)), header=None)
    assert bool(compare(ours, read(out), Options())) is agrees
