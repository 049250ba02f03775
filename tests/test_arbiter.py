"""The arbiter: the same steps in float64 say which of two sides is right, and how far float32 itself is from the truth."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from explaining import PROMPT, RIGHT, only, small_engine
from msgspec.structs import replace
from planted import Faulty

from checkpoints.record import Rows
from engine import ops
from engine.backend import Array, choose
from engine.graph import Step, compute
from engine.replay.wide import Variant, WideWeights, entry_errors, is_looked_up, values_of
from engine.synth import Shape, synthesize
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.arbiter.arbiter import Arbiter
from parity.diff.limits import EXACT_FLOOR
from parity.diff.tolerances.truth import COARSE_MULTIPLE, MULTIPLE, Above, raised
from reference.client import Reference


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """A small qwen2 with groups of 7 query heads."""
    return small_engine(tmp_path_factory.mktemp("arbiter"))


def _other_order(x: Array, weight: Array, bias: Array | None = None) -> Array:
    product = np.einsum("ti,oi->to", x[:, ::-1], weight[:, ::-1], optimize=False)
    return product if bias is None else product + bias


def _values(transformer: Transformer, steps: list[Step] | None = None) -> dict[str, Array]:
    chosen, count = steps or list(transformer.steps), len(PROMPT)
    names = {step.makes for step in chosen}
    computed = transformer.weights, transformer.backend, names
    return values_of(Variant.WIDE, chosen, PROMPT, range(count), [0] * count, *computed)


def _nmse(ours: Array, other: Array) -> float:
    return float(((ours - other) ** 2).sum() / (other**2).sum())


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_every_operation_stays_in_float64(architecture: str, tmp_path: Path) -> None:
    """No operation falls back to float32, and products summed in another order move the truth by float64's noise only."""
    shape = Shape(architecture, 2, 96, 4, 2, 32, 160, 300, biases=architecture == "qwen2", rope_factors=architecture == "llama")
    synthesize(tmp_path / "m.gguf", shape, weight_type="q8_0", seed=5)
    transformer = Transformer(GgufModel(tmp_path / "m.gguf"), choose("numpy"))
    truth = _values(transformer)
    assert {value.dtype for value in truth.values()} == {np.dtype(np.float64)}
    other = _values(
        transformer, [replace(step, op=_other_order) if step.op is ops.linear else step for step in transformer.steps]
    )
    worst = max(_nmse(other[name], value) for name, value in truth.items())
    assert 0 < worst < 1e-26


def test_one_operation_in_float64_is_what_a_plain_formula_gives(engine: Faulty) -> None:
    """RMS norm, soft max, RoPE and SwiGLU of float64 operands equal their formulas, written a second time."""
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(5, 16)), rng.normal(size=16)
    assert _nmse(ops.rms_norm(x, w, eps=1e-6), x / np.sqrt((x**2).mean(1, keepdims=True) + float(np.float32(1e-6))) * w) < 1e-30
    gate, up = rng.normal(size=(5, 16)), rng.normal(size=(5, 16))
    assert _nmse(ops.swiglu(gate, up), gate * up / (1 + np.exp(-gate))) < 1e-30
    scores, at = rng.normal(size=(2, 5, 5)), np.arange(5)
    masked = np.where(at[None, :] > at[:, None], -np.inf, scores * 0.5)
    weights = np.exp(masked) / np.exp(masked).sum(-1, keepdims=True)
    assert _nmse(ops.causal_soft_max(scores, at, at, scale=0.5), weights) < 1e-30
    turned = ops.rope(x, at, heads=1, dims=16, base=1e4, scale=1.0, pairs="neox")
    cos, sin = ops.rope_angles(at, 16, base=1e4, dtype=np.float64)
    assert _nmse(turned[:, :8], x[:, :8] * cos - x[:, 8:] * sin) < 1e-30
    assert _nmse(np.concatenate([cos, sin]), np.concatenate(ops.rope_angles(at, 16, base=1e4)).astype(np.float64)) > 1e-18
    assert WideWeights(engine.transformer.weights).get("output.weight").dtype == np.float64


def test_a_right_engine_is_near_the_truth_and_a_wrong_one_is_not(engine: Faulty) -> None:
    """Float32's own distance is far below the limit at every point; a wrong epsilon's is far above it, from its point on."""
    arbiter = Arbiter.of(engine.transformer, PROMPT)
    engine.transformer.steps = engine.right
    right = arbiter.distances(only(engine, points="*").points)
    assert all((distance < 0.1 * EXACT_FLOOR.operations).all() for distance in right.values())
    assert max(distance.max() for distance in right.values()) > 1e-16
    wrong = arbiter.distances(only(engine, ("norm-epsilon", {"eps": 1e-3, "at": ("ffn_norm",)}, (1,)), points="*").points)
    assert (wrong["blk.1.ffn_norm"] > 1e3 * EXACT_FLOOR.operations).all()
    assert (wrong["blk.1.ffn_inp"] < 0.1 * EXACT_FLOOR.operations).all()


def test_what_was_not_recorded_of_this_sequence_is_not_judged(engine: Faulty) -> None:
    """Points that no step makes are left out; positions without a token and other sequences are NaN; one NaN is infinitely far."""
    arbiter = Arbiter.of(engine.transformer, PROMPT)
    rows = engine.dump(RIGHT, PROMPT).points["blk.0.l_out"]
    values = rows.values.copy()
    values[1, 3] = np.nan
    odd = replace(rows, values=values, token_idx=rows.token_idx + np.array([0] * 7 + [5]), seq=np.array([1] + [0] * 7))
    distances = arbiter.distances({"blk.0.l_out": odd, "blk.0.unknown": rows})
    assert list(distances) == ["blk.0.l_out"]
    distance = distances["blk.0.l_out"]
    assert np.isnan(distance[[0, 7]]).all()
    assert np.isinf(distance[1])
    assert (distance[2:7] < 1e-11).all()


def test_the_sketch_tells_of_what_the_slice_does_not_show(engine: Faulty) -> None:
    """A row that is wrong only beyond its recorded values is far from the truth if it has a sketch."""
    rows = engine.dump(RIGHT, PROMPT, points="logits", bare=False).points["logits"]
    assert rows.sketch is not None
    wrong: Rows = replace(rows, sketch=rows.sketch + np.float32(1))
    arbiter = Arbiter.of(engine.transformer, PROMPT)
    assert arbiter.distances({"logits": rows})["logits"].max() < 1e-11
    assert arbiter.distances({"logits": wrong})["logits"].min() > 1e-7


def test_a_limit_is_raised_at_the_position_where_the_reference_is_far_from_the_truth() -> None:
    """From the point on at which its own rounding is amplified, at that position alone, and never below the table's limit."""
    point = np.array([0, 0, 1, 1, 2, 2])
    token_idx = np.array([0, 1, 0, 1, 0, 1])
    distance = np.array([1e-14, 1e-13, 3e-14, 2e-11, np.nan, 1e-13])
    limit = np.array([1e-10, 1e-10, 1e-10, 1e-10, 1e-9, 1e-10])
    nmse, fine = np.full(6, 5e-10), np.zeros(6, np.bool_)
    limits = raised(nmse, limit, distance, point, np.zeros(6, np.int64), token_idx, fine)
    assert limits.tolist() == [1e-10, 1e-10, 1e-10, MULTIPLE * 2e-11, 1e-9, MULTIPLE * 2e-11]


def test_a_limit_is_raised_by_what_a_point_is_made_from() -> None:
    """A point that is made from the first alone keeps its limit whatever stands between; an encoder's rows act on every position."""
    point, token_idx = np.array([0, 1, 1, 2, 3]), np.array([0, 0, 1, 0, 0])
    distance = np.array([1e-14, 1e-14, 2e-11, 1e-14, 1e-14])
    limit, nmse, fine = np.full(5, 1e-10), np.full(5, 5e-10), np.zeros(5, np.bool_)
    above = Above(((), (0,), (0,), (1, 2)), frozenset({1}))
    limits = raised(nmse, limit, distance, point, np.zeros(5, np.int64), token_idx, fine, above=above)
    assert limits.tolist() == [1e-10, 1e-10, MULTIPLE * 2e-11, 1e-10, MULTIPLE * 2e-11]


def test_a_coarse_reference_raises_limits_by_less_and_further_up() -> None:
    """After a table of float16 four times the reference's own distance passes; elsewhere an error of that size is not rounding."""
    point, token_idx = np.array([0, 1, 2]), np.zeros(3, np.int64)
    distance, limit = np.array([1e-14, 2e-7, 3e-7]), np.full(3, 1e-10)
    nmse = np.full(3, 6e-7)
    limits = raised(nmse, limit, distance, point, token_idx, token_idx, np.array([False, True, True]))
    assert limits.tolist() == [1e-10, COARSE_MULTIPLE * 2e-7, COARSE_MULTIPLE * 3e-7]
    assert raised(nmse, limit, distance, point, token_idx, token_idx, np.zeros(3, np.bool_)).tolist() == limit.tolist()


def test_the_neighbouring_entry_of_a_table(reference: Reference, small_model: Callable[..., Path]) -> None:
    """A gated GELU looked up one float16 beside its argument lies within `entry_errors`, whose NMSE is a few millionths at most."""
    model = small_model("gemma3", layers=1)
    engine = Transformer(GgufModel(model), choose("numpy"), recorded=reference.graph(model))
    step = next(step for step in engine.steps if is_looked_up(step))
    rng = np.random.default_rng(5)
    gate = rng.uniform(-2.5, 6, (3, 192))  # where the table has normal numbers
    up = rng.standard_normal((3, 192))
    allowed = entry_errors(step, [gate, up], engine.weights)
    as_ggml = replace(step, params={**step.params, "params": replace(step.params["params"], rounds=True)})
    here = compute(as_ggml, [gate, up], engine.weights)
    for beside in (gate * (1 + 2**-11), gate * (1 - 2**-11)):
        assert (abs(compute(as_ggml, [beside, up], engine.weights) - here) <= allowed).all()
    assert 1e-7 < np.square(allowed).sum() / np.square(here).sum() < 1e-5
