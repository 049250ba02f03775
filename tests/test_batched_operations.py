"""ggml's operations that work element by element or row by row, computed for several versions at once, and their derivatives."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from explaining import RIGHT, unstated
from planted import TOKENS, Faulty, tokens_of
from slow import slow_but

from engine.graph import POSITIONS, History, alone, compute, leading_to, made_from
from engine.lift.node import GgmlOperation
from engine.replay.adjoint import derivatives
from engine.replay.batched import by_rows, can_batch, compute_batch, elementwise
from engine.replay.precision import rounded
from engine.replay.replay import Replay
from engine.replay.wide import Variant, values_of
from engine.synth.recipe import shape_of
from engine.synth.recipes import recipe
from parity.diff.compare import Options
from parity.explain.on_model import compared_on
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference

# GELU from a table, and scaled embeddings; GELU without a gate; tanh of scores, which are [H, T, S]; a squared ReLU.
# Rotations by ggml's own operation: of parts of a fused product, with frequency factors; and by positions of several sections.
RECIPES = ("gemma3", "starcoder2", "gemma2", "nemotron", "phi3-longrope", "qwen2vl")
_ROW, _ELEMENTS = len(TOKENS) - 1, np.array([0, 5, 60])


@pytest.fixture(scope="module", params=RECIPES)
def lifted(request: pytest.FixtureRequest, reference: Reference, small_model: Callable[..., Path]) -> Faulty:
    """A small model whose steps are read from llama.cpp's graph."""
    path = small_model(request.param)
    return Faulty(path, reference.graph(path))


def test_versions_together_are_each_by_itself(lifted: Faulty) -> None:
    """To the bit, for every such step of a model, tables of float16 included."""
    computed = lifted.transformer.weights, lifted.transformer.backend
    right = Replay(lifted.right, TOKENS, range(len(TOKENS)), [0] * len(TOKENS), *computed)
    steps = [step for step in lifted.right if elementwise(step)]
    assert steps or any(step.op == GgmlOperation("ROPE") for step in lifted.right)
    for step in steps:
        versions = [[right.values[name] * np.float32(factor) for name in step.names] for factor in (1, -0.7, 3)]
        together = compute_batch(step, [np.concatenate(each) for each in zip(*versions, strict=True)], 3, computed[0])
        alone = [compute(step, inputs, computed[0]) for inputs in versions]
        np.testing.assert_array_equal(together.reshape(3, *alone[0].shape), np.stack(alone), err_msg=step.makes)


def test_derivatives_are_the_slopes_of_small_steps(lifted: Faulty) -> None:
    """Of a layer's output by the layer's before it, in float64: what a small step along some direction changes there, to four digits."""
    _are_the_slopes(lifted, "blk.1.l_out", "blk.2.l_out")


# Latent attention, whose values have positions in the middle; chosen experts, weighed by a soft max of all or by rows that are repeated;
# norms without weights; values that are padded; norms of one of several streams.
_WHOLE = {
    "deepseek2": ("blk.1.l_out", "blk.2.ffn_inp"),
    "qwen3moe": ("blk.1.l_out", "blk.2.l_out"),
    "llama4": ("blk.1.l_out", "blk.2.l_out"),
    "gemma4": ("blk.1.l_out", "blk.2.l_out"),
    "gemma3n": ("blk.1.attn_ffw_laurel_gated", "blk.2.attn_norm"),
    "olmo": ("blk.1.l_out", "blk.2.l_out"),
    "talkie": ("blk.1.l_out", "blk.2.l_out"),
    "rwkv7": ("blk.2.time_mix_key", "blk.2.mul.3"),
}


@pytest.mark.parametrize("name", slow_but(_WHOLE, "deepseek2", "olmo", "gemma3n"))
def test_derivatives_go_through_whole_values(name: str, reference: Reference, small_model: Callable[..., Path]) -> None:
    """Where positions are not the slowest dimension, and through ggml's products, joins and norms: the same slopes, to four digits."""
    path = small_model(name)
    _are_the_slopes(Faulty(path, reference.graph(path)), *_WHOLE[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3next", "rwkv7", "mamba2", "deepseek2", "kimi-linear", "lfm2"])
def test_derivatives_in_part_are_of_rows(name: str, reference: Reference, small_model: Callable[..., Path]) -> None:
    """Where some operations let no derivative through: what is known is known of a row of each value, whatever shape lies in between."""
    path = small_model(name)
    engine = Faulty(path, reference.graph(path))
    computed = engine.transformer.weights, engine.transformer.backend
    values = Replay(engine.right, TOKENS, range(len(TOKENS)), [0] * len(TOKENS), *computed).values
    names = [step.makes for step in engine.right]
    steps = engine.right[names.index("blk.0.l_out") + 1 : names.index("blk.3.l_out") + 1]
    answers = derivatives(steps, "blk.3.l_out", _ELEMENTS, _ROW, values, computed[0], partial=True)
    assert "blk.0.l_out" in answers
    assert all(answer.shape == (len(_ELEMENTS), *values[at].shape[1:]) for at, answer in answers.items())


def _are_the_slopes(engine: Faulty, start: str, point: str) -> None:
    names = [step.makes for step in engine.right]
    steps = leading_to({point}, engine.right[names.index(start) + 1 : names.index(point) + 1])
    made = made_from(start, steps)
    steps = [step for step in steps if step.makes in made]
    computed = engine.transformer.weights, engine.transformer.backend
    numbers = range(len(TOKENS)), [0] * len(TOKENS)
    wide = values_of(Variant.WIDE, engine.right, TOKENS, *numbers, *computed, wanted=frozenset(names))
    wide[POSITIONS] = np.arange(len(TOKENS))
    answers = derivatives(steps, point, _ELEMENTS, _ROW, wide, computed[0])[start]
    direction = np.random.default_rng(1).standard_normal(answers.shape[1]) * np.abs(wide[start][_ROW]).mean()
    given = {name: wide[name] for step in steps for name in step.names if name not in made}
    ends = []
    for sign in (1e-5, -1e-5):
        moved = wide[start].copy()
        moved[_ROW] += sign * direction
        end = values_of(Variant.WIDE, steps, TOKENS, *numbers, *computed, {point}, given | {start: moved})[point]
        ends.append(end[_ROW, _ELEMENTS])
    np.testing.assert_allclose(answers @ direction, (ends[0] - ends[1]) / 2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    slow_but(
        ["qwen3moe", "deepseek2", "gpt-oss", "llama4", "phi3-longrope", "qwen2moe", "mamba2", "qwen2vl", "minicpm3", "mpt"],
        "qwen3moe",
        "qwen2vl",
    ),
)
def test_rows_of_several_runs_together_are_those_of_each(
    name: str, reference: Reference, small_model: Callable[..., Path]
) -> None:
    """Rotations, routing, experts, parts of rows: each step that works row by row gives for three prompts what it gives for each."""
    path = small_model(name)
    engine = Faulty(path, reference.graph(path))
    computed = engine.transformer.weights, engine.transformer.backend
    prompts = [tokens_of(path, len(TOKENS), seed=seed) for seed in (1, 2, 3)]
    runs = [Replay(engine.right, prompt, range(len(prompt)), [0] * len(prompt), *computed) for prompt in prompts]
    steps = [step for step in engine.right if by_rows(step) and not any(isinstance(read, History) for read in step.reads)]
    assert all(can_batch(step) for step in steps)
    assert name == "mamba2" or {"MUL_MAT_ID", "SUM_ROWS", "ROPE", "CONT"} & {getattr(step.op, "name", "") for step in steps}
    for step in steps:
        stacked = [np.concatenate([run.values[name] for run in runs]) for name in step.names]
        together = compute_batch(step, stacked, len(runs), computed[0])
        alone = np.stack([run.values[step.makes] for run in runs])
        # A product over more rows may be added up in another order.
        np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5 * float(np.abs(alone).max()), err_msg=step.makes)


@pytest.mark.parametrize(
    "name", slow_but(["deepseek2", "t5", "modern-bert", "rwkv7", "olmo", "llama4", "deepseek32"], "deepseek2", "deepseek32")
)
def test_every_step_that_can_be_computed_for_several_runs_gives_what_it_gives_for_each(
    name: str, reference: Reference, small_model: Callable[..., Path]
) -> None:
    """Values whose positions lie in the middle, too: versions of each input, which differ in all elements, together and alone."""
    path = small_model(name)
    engine = Faulty(path, reference.graph(path))
    tokens = tokens_of(path, 6, seed=1)
    numbers = range(len(tokens)), [0] * len(tokens), engine.transformer.weights, engine.transformer.backend
    encoder = engine.transformer.encoder
    right = Replay(alone(encoder) if encoder else engine.right, tokens, *numbers)
    steps = [step for step in right.steps if can_batch(step) and step.names]
    assert {"deepseek2": "MUL_MAT", "olmo": "NORM", "llama4": "RMS_NORM"}.get(name, "") in {
        "",
        *(getattr(step.op, "name", "") for step in steps),
    }
    for step in steps:
        inputs = [right.values[name] for name in step.names]
        versions = [[x if (x == np.rint(x)).all() else x * x.dtype.type(f) for x in inputs] for f in (1, 0.5, 2)]
        together = compute_batch(step, [np.concatenate(each) for each in zip(*versions, strict=True)], 3, numbers[2])
        each = np.stack([compute(step, version, numbers[2]) for version in versions])
        np.testing.assert_allclose(
            together, each, rtol=0, atol=1e-5 * float(np.abs(each[np.isfinite(each)]).max(initial=0)), err_msg=step.makes
        )


@pytest.mark.slow
def test_an_edit_that_leaves_other_axes_is_computed_by_itself(reference: Reference, stories: Path, tmp_path: Path) -> None:
    """MiniMax-01's decay of a number per head: an edited scale has an axis less, and goes beside versions that have it."""
    path, chosen = tmp_path / "small.gguf", recipe("minimax-01")
    make_by_recipe(path, chosen, shape_of(chosen), {}, kind="q4_0", seed=65024, tokenizer=stories)
    engine = Faulty(path, reference.graph(path))
    prompt = tokens_of(path, 5, 65024)
    ours = unstated(engine.dump(RIGHT, prompt, steps=rounded(engine.right, "tf32", storage=False)))
    right = engine.dump(RIGHT, prompt)
    assert compared_on(ours, right, Options(), path, third_side=False).verdict.compared
