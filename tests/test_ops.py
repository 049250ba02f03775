"""The engine's operations against plain float64 versions written another way."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import ops


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def test_rms_norm_is_the_formula_in_float64(rng: np.random.Generator) -> None:
    """RMSNorm equals x / sqrt(mean(x²) + ε) · w computed in float64, to float32's rounding."""
    x, weight = floats(rng, 5, 96), floats(rng, 96)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-6) * weight
    np.testing.assert_allclose(ops.rms_norm(x, weight, eps=1e-6), expected, rtol=4e-7)


def test_linear_multiplies_by_the_transposed_weight(rng: np.random.Generator) -> None:
    """A projection is x · Wᵀ + b with W of shape (out, in)."""
    x, weight, bias = floats(rng, 3, 40), floats(rng, 17, 40), floats(rng, 17)
    expected = np.array(
        [[math.fsum(a * b for a, b in zip(row, w, strict=True)) for w in weight.tolist()] for row in x.tolist()]
    )
    np.testing.assert_allclose(ops.linear(x, weight, bias), expected + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pairs", ["neox", "norm"])
def test_rope_is_a_rotation_by_the_position(rng: np.random.Generator, pairs: str) -> None:
    """Each pair is a complex number times exp(i · position · base^(-2j/dims)); what lies beyond dims is left alone."""
    heads, size, dims, base = 3, 12, 8, 10000.0
    x, positions = floats(rng, 4, heads * size), np.array([0, 1, 7, 300])
    turned = ops.rope(x, positions, None, heads=heads, dims=dims, base=base, scale=1.0, pairs=pairs).reshape(4, heads, size)
    split = x.reshape(4, heads, size).astype(np.float64)
    for t, position in enumerate(positions):
        for j in range(dims // 2):
            a, b = (j, j + dims // 2) if pairs == "neox" else (2 * j, 2 * j + 1)
            expected = (split[t, :, a] + 1j * split[t, :, b]) * np.exp(1j * position * base ** (-2 * j / dims))
            np.testing.assert_allclose(turned[t, :, a] + 1j * turned[t, :, b], expected, atol=2e-4 if position == 300 else 1e-6)
    np.testing.assert_array_equal(turned[:, :, dims:], split[:, :, dims:].astype(np.float32))


def test_rope_multiplies_the_angle_step_by_step_in_float32() -> None:
    """The angle is ggml's chain of float32 products, not position · base^(-2i/d), which differs by ulps at 32,000."""
    dims, base = 64, 1e6
    cos, sin = ops.rope_angles(np.array([31999]), dims, base=base)
    theta, step = np.float32(31999), np.float32(np.power(np.float32(base), np.float32(-2 / dims)))
    for j in range(dims // 2):
        assert cos[0, j] == np.float32(math.cos(float(theta)))
        assert sin[0, j] == np.float32(math.sin(float(theta)))
        theta = np.float32(theta * step)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 3), (7, 1)])
def test_attention_is_the_textbook_loop(rng: np.random.Generator, heads: int, kv_heads: int) -> None:
    """Scores, causal softmax and weighted values equal a loop over heads and positions in float64, for every grouping."""
    t, past, size = 3, 2, 8
    s = t + past
    q, k, v = floats(rng, t, heads * size), floats(rng, s, kv_heads * size), floats(rng, s, kv_heads * size)
    positions, keys = np.arange(past, s), np.arange(s)
    scores = ops.attention_scores(q, k, heads=heads, kv_heads=kv_heads)
    weights = ops.causal_soft_max(scores, positions, keys, scale=size**-0.5)
    out = ops.weighted_values(weights, v, kv_heads=kv_heads).reshape(t, heads, size)
    for i in range(t):
        for h in range(heads):
            g = h // (heads // kv_heads)
            query = q[i, h * size : (h + 1) * size].astype(np.float64)
            row = np.array([query @ k[j, g * size : (g + 1) * size] for j in range(past + i + 1)]) * size**-0.5
            chance = np.exp(row - row.max())
            chance /= chance.sum()
            np.testing.assert_allclose(weights[h, i, : past + i + 1], chance, rtol=1e-5)
            assert (weights[h, i, past + i + 1 :] == 0).all()
            np.testing.assert_allclose(out[i, h], chance @ v[: past + i + 1, g * size : (g + 1) * size], rtol=1e-4, atol=1e-6)


@given(st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=8))
def test_swiglu_is_finite_for_any_gate(gate: list[float]) -> None:
    """SiLU(gate) · up has the right value and no overflow, also where exp(-gate) is infinite."""
    x = np.array([gate], dtype=np.float32)
    wide = x.astype(np.float64)
    expected = wide / (1 + np.exp(-wide)) * 2
    # Where float32's exp overflows, below -88.72, the result is zero and the true value under 88.72 · exp(-88.72) · 2 < 1e-36.
    np.testing.assert_allclose(ops.swiglu(x, np.full_like(x, 2)), expected, rtol=1e-6, atol=1e-36)
