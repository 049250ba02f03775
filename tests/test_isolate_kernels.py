"""What kernels round inside: isolate calls no right operation wrong for it, and a fault beside it is found."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from eight_bit_floats import eight_bit_cache, eight_bit_floats
from msgspec.structs import replace
from planted import Faulty
from test_isolate_mixed import judged

from engine import ops
from engine.graph import Step
from engine.replay.precision import ROUNDINGS
from reference.client import Reference

_INSIDE = ("kq", "kq_soft_max", "k_read", "v_read")


def flash(steps: Sequence[Step], kind: str) -> list[Step]:
    """Attention whose weights are rounded before they are divided by their sum, and whose values are rounded."""
    low = ROUNDINGS[kind]

    def mixed(weights: np.ndarray, values: np.ndarray, kv_heads: int) -> np.ndarray:
        largest = weights.max(axis=-1, keepdims=True)
        total = (weights / largest).sum(axis=-1, dtype=np.float32)
        mix = ops.weighted_values(low(weights / largest), low(values), kv_heads=kv_heads)
        return mix / np.repeat(total.T, mix.shape[1] // len(total), axis=1)

    return [replace(step, op=mixed) if step.op is ops.weighted_values else step for step in steps]


def times(steps: Sequence[Step], name: str, factor: float) -> list[Step]:
    """The steps with one result too large."""
    return [
        replace(step, op=lambda *x, op=step.op, **params: op(*x, **params) * np.float32(factor)) if step.makes == name else step
        for step in steps
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "neo-bert"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_flash_attention_in_a_lower_type(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path, kind: str, name: str
) -> None:
    """Attention that rounds its weights and values to F16 or BF16, causal or not, in an engine that states nothing: neither wrong nor
    proven; 1.001 times its result (1.004 times in BF16 where no row has a single key), and 1.2 times its scores are wrong.
    """
    engine, out = Faulty(path := small_model(name, kind="f32"), reference.graph(path)), tmp_path / "ours.jsonl"
    steps = flash(engine.right, kind)
    wrong, open_ = judged(engine, reference, out, steps, _INSIDE)
    assert not wrong
    assert "blk.1.kqv_out" in open_
    for changed, factor in (("kqv_out", 1.004 if (kind, name) == ("bf16", "neo-bert") else 1.001), ("kq", 1.2)):
        assert "blk.1.kqv_out" in judged(engine, reference, out, times(steps, f"blk.1.{changed}", factor), _INSIDE)[0]


@pytest.mark.slow
def test_one_head_too_large_in_flash_attention(small_model: Callable[..., Path], reference: Reference, tmp_path: Path) -> None:
    """One head 1.01 times too large is wrong beside attention in BF16 that is not causal: rounding leaves no head a factor."""
    engine, out = Faulty(path := small_model("neo-bert", kind="f32"), reference.graph(path)), tmp_path / "ours.jsonl"
    scores, attended = (next(step for step in engine.right if step.makes == f"blk.1.{name}") for name in ("kq", "attn_out"))
    width = engine.transformer.model.tensors[str(attended.weights[0])].shape[1]
    one = np.ones((scores.params["heads"], width // scores.params["heads"]), dtype=np.float32)
    one[1] = 1.01

    def too_large(*inputs: np.ndarray, op: Callable[..., np.ndarray], **params: object) -> np.ndarray:
        return op(*inputs, **params) * one.ravel()

    steps = [
        replace(step, op=partial(too_large, op=step.op)) if step.makes == "blk.1.kqv_out" else step
        for step in flash(engine.right, "bf16")
    ]
    assert "blk.1.kqv_out" in judged(engine, reference, out, steps, _INSIDE)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "neo-bert"])
def test_a_small_fault_is_no_rounding_of_attention(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path, name: str
) -> None:
    """Errors of the size that a lower type makes, in float32: 1.0005 times attention's result and 1.003 times its scores are wrong."""
    engine, out = Faulty(path := small_model(name, kind="f32"), reference.graph(path)), tmp_path / "ours.jsonl"
    for changed, factor in (("kqv_out", 1.0005), ("kq", 1.003)):
        assert "blk.1.kqv_out" in judged(engine, reference, out, times(engine.right, f"blk.1.{changed}", factor), _INSIDE)[0]


@pytest.mark.slow
@pytest.mark.parametrize("without", [(), ("k_read", "v_read"), _INSIDE])
def test_a_cache_in_fp8(small_model: Callable[..., Path], reference: Reference, tmp_path: Path, without: Sequence[str]) -> None:
    """A cache in FP8, of which nothing says anything: what reads it is neither wrong nor proven, and nothing else is wrong; where the cache
    itself is recorded, 1.01 times what is made of it is.
    """
    engine, out = Faulty(path := small_model("qwen3", kind="f32"), reference.graph(path)), tmp_path / "ours.jsonl"
    steps = eight_bit_cache(engine.right)
    wrong, open_ = judged(engine, reference, out, steps, without, "")
    assert not wrong
    assert ("blk.1.kqv_out" if "kq" in without else "blk.1.kq" if without else "blk.1.k_read") in open_
    for name in () if without else ("kq", "kqv_out", "attn_out"):
        assert judged(engine, reference, out, times(steps, f"blk.1.{name}", 1.01), without, "")[0] == {f"blk.1.{name}"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["k_read", "v_read", "kqv_out"])
def test_noise_of_that_size_in_one_layer_is_no_cache(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path, name: str
) -> None:
    """Noise of FP8's size in what one layer reads of its cache, or makes of it, while the other layers read theirs exactly: wrong."""
    engine, out = Faulty(path := small_model("qwen3", kind="f32"), reference.graph(path)), tmp_path / "ours.jsonl"
    noisy = [
        replace(step, op=lambda *x, op=step.op, **params: eight_bit_floats(op(*x, **params)))
        if step.makes == f"blk.1.{name}"
        else step
        for step in engine.right
    ]
    assert judged(engine, reference, out, noisy, (), "")[0] == {f"blk.1.{name}"}
