"""Mixed precision through isolate: operations of a lower arithmetic are neither wrong nor proven, and faults beside them are wrong."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from planted import Faulty, Planted, half_sums, tokens_of

from checkpoints.answers.isolate import NOT_OBSERVABLE, WRONG
from checkpoints.jsonl import write
from checkpoints.points import parse
from engine import ops
from engine.graph import Step
from engine.replay.kept import kept
from engine.replay.precision import rounded
from engine.synth.recipe import shape_of
from engine.synth.recipes import recipe
from parity.diff.readings.rounding import is_rounding
from parity.diff.verdict.scatter import is_scaled, is_scatter, one_is_scaled, recurs
from parity.isolate.isolate import IsolateRequest, isolate
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference

Judged = tuple[set[str], set[str]]
_SHOWN = ("k_read", "v_read")  # what the cache gave: most engines cannot record it


def judged(
    engine: Faulty, reference: Reference, path: Path, steps: Sequence[Step], without: Collection[str] = (), kv_type: str = "f32"
) -> Judged:
    """What is wrong, and what is not observable, in an engine that does not state its arithmetic and writes every value."""
    tokens = tokens_of(engine.model, 7, seed=1)
    dump = engine.dump(Planted(()), tokens, points="all", size=1 << 20, bare=False, steps=steps)
    assert dump.header is not None
    header = replace(dump.header, compute="", source="an engine", mode="", kv_type=kv_type)
    points = {name: rows for name, rows in dump.points.items() if parse(name).kind not in without}
    write(replace(dump, header=header, points=points), path, header)
    answer = isolate(IsolateRequest(engine.model, tokens=tokens, dump=path, mode="exact"), reference)
    wrong = {item.name for item in answer.operations if item.status == WRONG}
    return wrong | set(answer.findings), {item.name for item in answer.operations if item.status == NOT_OBSERVABLE}


def wrong_column(value: np.ndarray) -> np.ndarray:
    """One element of every row 1 % too large."""
    factors = np.ones(value.shape[1], dtype=np.float32)
    factors[5] = 1.01
    return value * factors


def wrong_row(value: np.ndarray) -> np.ndarray:
    """The last row off by noise of F16's size."""
    factors = np.ones(value.shape, dtype=np.float32)
    factors[-1] += 1e-3 * np.random.default_rng(1).standard_normal(value.shape[1], dtype=np.float32)
    return value * factors


def wrong_everywhere(value: np.ndarray) -> np.ndarray:
    """Noise of half a percent, an NMSE of 2.5e-5: more than sums in F16 make."""
    return value * (1 + np.float32(5e-3) * np.random.default_rng(1).standard_normal(value.shape, dtype=np.float32))


def where(test: Callable[[Step], bool], steps: Sequence[Step], lower: Sequence[Step]) -> list[Step]:
    """The steps, those that a test chooses in a lower arithmetic."""
    return [b if test(a) else a for a, b in zip(steps, lower, strict=True)]


def faulty(steps: Sequence[Step]) -> dict[str, list[Step]]:
    """The steps with a product 1.002 times too large, and with an epsilon of 1e-4 in a norm; each with the point that is wrong."""

    def scaled(step: Step) -> Step:
        return replace(step, op=lambda *x, **params: step.op(*x, **params) * np.float32(1.002))

    def with_epsilon(step: Step) -> Step:
        return replace(step, params={**step.params, "eps": 1e-4})

    changes = {"blk.1.attn_out": scaled, "blk.1.attn_norm": with_epsilon}
    return {name: [change(step) if step.makes == name else step for step in steps] for name, change in changes.items()}


@pytest.mark.slow
def test_operations_of_a_lower_arithmetic_among_those_of_float32(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """F16 logits, BF16 feed-forward, F16 attention, sums in F16 in one layer, an F16 cache: none is wrong, none is called proven; the
    product and the norm that are wrong beside them are, alone.
    """
    path, out = small_model("qwen3", kind="f32"), tmp_path / "ours.jsonl"
    engine = Faulty(path, reference.graph(path))
    right = engine.right
    f16, bf16 = (rounded(right, kind, storage=False) for kind in ("f16", "bf16"))
    sums = [replace(step, op=half_sums) if step.op is ops.linear else step for step in right]
    mixtures = {
        "logits": where(lambda step: step.makes == "logits", right, rounded(right, "f16", storage=True)),
        "ffn": where(lambda step: "ffn" in parse(step.makes).kind, right, bf16),
        "attention": where(lambda step: step.op in (ops.attention_scores, ops.weighted_values), right, f16),
        "sums": where(lambda step: parse(step.makes).layer == 2, right, sums),
    }
    for steps in mixtures.values():
        wrong, open_ = judged(engine, reference, out, steps)
        assert not wrong
        assert open_
    for name, steps in faulty(mixtures["ffn"]).items():
        assert judged(engine, reference, out, steps)[0] == {name}
    wrong, open_ = judged(engine, reference, out, kept(right, "f16 cache"), _SHOWN, "")
    assert not wrong
    assert "blk.1.kq" in open_


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "kind", "moved"),
    [
        ("qwen3", "bf16 vectors", "blk.1.attn_norm"),
        ("qwen3", "f16 angles", "blk.1.q_rope"),
        ("stablelm", "f16 biases", "blk.1.attn_norm"),
        ("stablelm", "bf16 gains", "blk.1.attn_norm"),
    ],
)
def test_vectors_or_angles_kept_in_a_lower_type(
    architecture: str, kind: str, moved: str, small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """Norms' weights, those or biases alone, or RoPE's cosines and sines, rounded in an engine that computes in float32: none is wrong or
    proven; a product 0.2 % too large, another epsilon and a norm 1.5 times too large beside them are.
    """
    path, out = small_model(architecture, kind="f32"), tmp_path / "ours.jsonl"
    engine = Faulty(path, reference.graph(path))
    lower = kept(engine.right, kind)
    wrong, open_ = judged(engine, reference, out, lower)
    assert not wrong
    assert moved in open_
    for name, steps in faulty(lower).items():
        assert judged(engine, reference, out, steps)[0] == {name}
    large = [
        replace(step, op=lambda *x, op=step.op, **params: op(*x, **params) * np.float32(1.5)) if step.makes == moved else step
        for step in lower
    ]
    assert judged(engine, reference, out, large)[0] - {"blk.1.layer"} == {moved}


@pytest.mark.slow
@pytest.mark.parametrize("change", [wrong_column, wrong_row, wrong_everywhere])
def test_an_error_that_is_no_arithmetic(
    change: Callable[[np.ndarray], np.ndarray], small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """In an engine in float32 that does not say so, a product with one wrong element a row, or one wrong row, is wrong, though its error is
    smaller than that of sums in F16; and so is one with more noise than these.
    """
    path = small_model("qwen3", kind="f32")
    engine = Faulty(path, reference.graph(path))
    for name in ("blk.1.attn_out", "logits"):
        steps = [
            replace(step, op=lambda *x, op=step.op, **params: change(op(*x, **params))) if step.makes == name else step
            for step in engine.right
        ]
        assert judged(engine, reference, tmp_path / "ours.jsonl", steps)[0] == {name}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_a_factor_beneath_the_rounding_of_an_engine_is_wrong(
    kind: str, small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """Where our rounding reproduces an engine's products, a product that is 1.002 times too large or an epsilon of 1e-4 is wrong, though
    its error is smaller than what rounding may cost; with attention in float32 beside it nothing right is wrong.
    """
    path, out = small_model("qwen3", kind="f32"), tmp_path / "ours.jsonl"
    engine = Faulty(path, reference.graph(path))
    attention = (ops.attention_scores, ops.weighted_values)
    steps = where(lambda step: step.op not in attention, engine.right, rounded(engine.right, kind, storage=False))
    assert not judged(engine, reference, out, steps)[0]
    for name, wrong in faulty(steps).items():
        assert judged(engine, reference, out, wrong)[0] == {name}


@pytest.mark.slow
def test_an_encoder_that_stores_f16_under_a_decoder_in_float32(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """No operation of either half is wrong, nor are the encoder's rounded attention weights, which do not sum to 1."""
    path = small_model("t5", kind="f32")
    engine = Faulty(path, reference.graph(path))
    encoder = engine.transformer.encoder
    assert encoder is not None
    engine.transformer.encoder = rounded(encoder, "f16", storage=True)
    wrong, open_ = judged(engine, reference, tmp_path / "ours.jsonl", engine.right)
    assert not wrong
    assert all(name.startswith("enc.") for name in open_)


@pytest.mark.slow
def test_logits_summed_in_f16_from_few_terms(small_model: Callable[..., Path], reference: Reference, tmp_path: Path) -> None:
    """Thousands of logits are sums of 64 terms: their rounding has 64 directions, one of which may be along the logits of one position."""
    path = small_model("gemma3", kind="f32")
    engine = Faulty(path, reference.graph(path))
    sums = [replace(step, op=half_sums) if step.makes == "logits" else step for step in engine.right]
    wrong, open_ = judged(engine, reference, tmp_path / "ours.jsonl", sums)
    assert not wrong
    assert "logits" in open_


def test_a_factor_is_no_noise_and_noise_is_no_factor() -> None:
    """Rows that are all 0.1 % too large, or by an epsilon, are scaled; noise, factors rounded to F16, and one wrong row in ten are not."""
    rng = np.random.default_rng(1)
    for size in (10, 64, 1000):
        right, noise = rng.standard_normal((2, 8, size))
        epsilon = rng.uniform(1e-5, 1e-4, (8, 1))
        assert is_scaled(right * 1.001 + 1e-7 * noise, right)
        assert is_scaled(right * (1 - epsilon), right)
        assert not is_scatter(right * 1.001, right)
        assert not is_scaled(right + 1e-3 * noise, right)
        assert is_scatter(right + 1e-3 * noise, right)
        assert not is_scaled(right * (1 + rng.choice([-1, 1], (8, 1)) * epsilon), right)
        assert not is_scaled(right[:3] * (1 + epsilon[:3]), right[:3])
    assert not is_scaled(np.zeros((0, 0)), np.zeros((0, 0)))


def test_the_same_errors_in_rows_of_other_values_are_no_rounding() -> None:
    """Rows of one expert that are all off by one vector recur; noise does not, nor do rows that are nearly the same by themselves."""
    rng = np.random.default_rng(2)
    for size in (10, 64):
        right, noise = rng.standard_normal((2, 8, size))
        assert not recurs(noise, right)
        noise[5] = noise[1]
        assert recurs(noise, right)
        right[5] = 1.01 * right[1]
        assert not recurs(noise, right)


def test_a_scale_that_a_type_cannot_hold_is_lost_in_rounding() -> None:
    """ALiBi's distances times 1.00001, as minimax-01 has them, are whole numbers in F16 and BF16; a thousandth is more than rounding."""
    right = np.arange(-1.0, -8.0, -1.0)[:, None] * 4.0 ** -np.arange(1, 5)
    assert is_scaled(right, right * np.float32(1.00001))
    assert is_rounding(right, right * np.float32(1.00001))
    assert is_rounding(right.astype(np.float32), right * np.float32(1.00001))
    assert not is_rounding(right * np.float32(1.001), right * np.float32(1.00001))
    assert not is_rounding(right, right * np.float32(1.005))


def test_one_wrong_scale_is_seen_in_rows_of_twelve_elements() -> None:
    """One position that is 1 % too large among positions of noise has a wrong scale; noise alone has none."""
    values, noise = np.random.default_rng(2).standard_normal((2, 8, 12))
    values, noise = np.sign(values), 1e-3 * noise
    assert not one_is_scaled(noise, values)
    noise[3] = 0.01 * values[3]
    assert one_is_scaled(noise, values)


@pytest.mark.slow
def test_eight_bits_that_nothing_states(small_model: Callable[..., Path], reference: Reference, tmp_path: Path) -> None:
    """A right engine that rounds the factors of every product to eight bits, the router's in float32 among them, is blamed for nothing;
    a router 1.05 times too large in it, and a negated column of a product, are wrong.
    """
    path, out = small_model("bailingmoe3", kind="q5_1"), tmp_path / "ours.jsonl"
    engine = Faulty(path, reference.graph(path))
    eight_bits = rounded(engine.right, "q8", storage=False)
    wrong, undecided = judged(engine, reference, out, eight_bits)
    assert not wrong
    assert "blk.1.ffn_moe_logits" in undecided

    def negated(value: np.ndarray) -> np.ndarray:
        return value * np.where(np.arange(value.shape[-1]) == 1, np.float32(-1), np.float32(1))

    changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "blk.1.ffn_moe_logits": lambda value: value * np.float32(1.05),
        "blk.2.ffn_moe_logits": negated,
    }
    for name, change in changes.items():
        steps = [
            replace(step, op=lambda *x, op=step.op, change=change, **params: change(op(*x, **params)))
            if step.makes == name
            else step
            for step in eight_bits
        ]
        assert name in judged(engine, reference, out, steps)[0]


@pytest.mark.slow
def test_a_layer_of_undeclared_eight_bits_is_llama_cpps_own(stories: Path, reference: Reference, tmp_path: Path) -> None:
    """A layer whose products round to eight bits as ggml does, one of another type but for its rounding, is compared with the one that
    llama.cpp makes of the file as it is: the right engine is blamed for nothing, and v 1.2 times too large is found.
    """
    path, out, olmo2 = tmp_path / "model.gguf", tmp_path / "ours.jsonl", recipe("olmo2")
    make_by_recipe(path, olmo2, shape_of(olmo2), {}, kind="q3_k_m", seed=2, tokenizer=stories, running=reference)
    engine = Faulty(path, reference.graph(path))
    eight_bits = rounded(engine.right, "q8", storage=False)
    wrong, undecided = judged(engine, reference, out, eight_bits)
    assert not wrong
    assert "blk.0.v" in undecided
    assert "blk.0.layer" not in undecided
    steps = [
        replace(step, op=lambda *x, op=step.op, **params: op(*x, **params) * np.float32(1.2))
        if step.makes == "blk.0.v"
        else step
        for step in eight_bits
    ]
    assert {"blk.0.v", "blk.0.layer"} & judged(engine, reference, out, steps)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "scaled"), [("rwkv6", "q5_1", "time_mix_decay_w1"), ("minimax-01", "q4_0", "qkv_diag")]
)
def test_eight_bits_of_float32_weights_that_nothing_states(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path, name: str, kind: str, scaled: str
) -> None:
    """A right engine that rounds to eight bits what products of float32 weights and ggml's own products read, some of it computed between
    recorded points, is blamed for nothing; one operation in it 1.001 times too large is wrong.
    """
    path, out = small_model(name, kind=kind), tmp_path / "ours.jsonl"
    engine = Faulty(path, reference.graph(path))
    eight_bits = rounded(engine.right, "q8", storage=False)
    assert not judged(engine, reference, out, eight_bits)[0]
    steps = [
        replace(step, op=lambda *x, op=step.op, **params: op(*x, **params) * np.float32(1.001))
        if step.makes == f"blk.2.{scaled}"
        else step
        for step in eight_bits
    ]
    assert f"blk.2.{scaled}" in judged(engine, reference, out, steps)[0]
