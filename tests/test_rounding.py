"""Our rounding of activations against libggml's own from_float, and against its dot products."""

import ctypes
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.errors import ModelError
from engine.weights.dequantize import dequantize
from engine.weights.rounding import VEC_DOT_TYPES, q8_1_correction, round_activations, vec_dot_type

N = 1024
# One weight type for each way of rounding.
ROUNDINGS = {"F32": Kind.F32, "F16": Kind.F16, "BF16": Kind.BF16, "Q8_0": Kind.Q4_0, "Q8_1": Kind.Q4_1, "Q8_K": Kind.Q4_K}
Q8_1_BYTES, Q8_K_BYTES = 36, 4 + 256 + 32  # gguf-py's sizes: d, s, 32 steps; d, 256 steps, 16 sums
PRODUCTS = [
    "F32",
    "F16",
    "BF16",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
]


class Traits(ctypes.Structure):
    """ggml_type_traits_cpu of ggml-cpu.h."""

    _fields_ = (
        ("from_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        (
            "vec_dot",
            ctypes.CFUNCTYPE(
                None,
                ctypes.c_int,
                ctypes.c_void_p,
                ctypes.c_size_t,
                ctypes.c_void_p,
                ctypes.c_size_t,
                ctypes.c_void_p,
                ctypes.c_size_t,
                ctypes.c_int,
            ),
        ),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    )


@pytest.fixture(scope="module")
def cpu() -> Any:
    """libggml-cpu, its float16 tables initialised."""
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-cpu.so"))
    library.ggml_cpu_init()
    library.ggml_get_type_traits_cpu.restype = ctypes.POINTER(Traits)
    return library


def traits(cpu: Any, kind: int) -> Traits:
    type_traits: Traits = cpu.ggml_get_type_traits_cpu(int(kind)).contents
    return type_traits


def from_float(cpu: Any, x: np.ndarray, kind: int) -> np.ndarray:
    """The bytes that ggml makes of activations."""
    if kind == Kind.F32:
        return x.view(np.uint8).copy()
    out = np.zeros(4 * x.size + 4096, dtype=np.uint8)
    x = np.ascontiguousarray(x)
    traits(cpu, kind).from_float(x.ctypes.data, out.ctypes.data, x.size)
    return out


def as_values(data: np.ndarray, kind: int, n: int) -> np.ndarray:
    """What those bytes stand for, by gguf-py where it knows the type, else by the layout in ggml-common.h."""
    if kind == Kind.Q8_1:
        blocks = data[: n // 32 * Q8_1_BYTES].reshape(-1, Q8_1_BYTES)
        d = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
        return (blocks[:, 4:].view(np.int8).astype(np.float32) * d).ravel()
    if kind == Kind.Q8_K:
        blocks = data[: n // 256 * Q8_K_BYTES].reshape(-1, Q8_K_BYTES)
        d = np.ascontiguousarray(blocks[:, :4]).view(np.float32)
        return (blocks[:, 4:260].view(np.int8).astype(np.float32) * d).ravel()
    block, size = gguf.GGML_QUANT_SIZES[Kind(kind)]
    if kind in (Kind.F32, Kind.F16):
        return data[: n * size].view(np.float32 if kind == Kind.F32 else np.float16).astype(np.float32)
    return np.asarray(gguf.quants.dequantize(data[: n // block * size].reshape(-1, size), Kind(kind))).ravel()


def hard_activations() -> dict[str, np.ndarray]:
    """Rows that rounding gets wrong where it is wrong: zeros, ties, outliers, ties of the largest, tiny and huge values."""
    rng = np.random.default_rng(11)
    normal = rng.standard_normal(N).astype(np.float32)
    outliers = normal.copy()
    outliers[::97] *= 300
    ties = (rng.integers(-254, 255, N) / 2).astype(np.float32)
    ties[::32], ties[::256] = 127, -127
    largest_twice = np.clip(normal, -1, 1)
    half_zero = normal.copy()
    half_zero[: N // 2] = 0
    return {
        "normal": normal,
        "outliers": outliers,
        "ties": ties,
        "largest twice": largest_twice,
        "zeros": half_zero,
        "negative zeros": -half_zero,
        "tiny": normal * np.float32(1e-6),
        "subnormal steps": normal * np.float32(1e-38),
        "large": normal * np.float32(1e4),
        "heavy tails": rng.standard_cauchy(N).astype(np.float32),
    }


# In Q8_K −127 / x of subnormal steps overflows, and ggml converts an infinity to an integer, which C does not define.
CASES = [(way, case) for way in ROUNDINGS for case in hard_activations() if (way, case) != ("Q8_K", "subnormal steps")]


@pytest.mark.parametrize(("way", "case"), CASES)
def test_rounding_equals_from_float(cpu: Any, way: str, case: str) -> None:
    """Activations rounded by us are, to the bit, those that libggml's from_float wrote."""
    kind, x = ROUNDINGS[way], hard_activations()[case]
    partner = vec_dot_type(kind)
    assert partner == Kind[way]
    expected = as_values(from_float(cpu, x, partner), partner, N)
    ours = round_activations(x.reshape(2, -1), kind)
    assert ours.shape == (2, N // 2)
    np.testing.assert_array_equal(ours.ravel(), expected)


@given(st.integers(0, 2**32 - 1), st.floats(-30, 20), st.sampled_from(list(ROUNDINGS)))
@settings(max_examples=150, deadline=None)
def test_rounding_of_any_scale_equals_from_float(cpu: Any, seed: int, exponent: float, way: str) -> None:
    """Random blocks of any scale whose step float16 can hold come out of us and of libggml the same, to the bit."""
    kind = ROUNDINGS[way]
    x = (np.random.default_rng(seed).standard_normal(N) * 2.0**exponent).astype(np.float32)
    partner = vec_dot_type(kind)
    np.testing.assert_array_equal(round_activations(x, kind), as_values(from_float(cpu, x, partner), partner, N))


def test_the_table_of_partners_is_ggmls(cpu: Any) -> None:
    """Every type of gguf-py that libggml can multiply has the partner that libggml names."""
    theirs = {int(kind): t.vec_dot_type for kind in Kind if (t := traits(cpu, kind)).vec_dot}
    assert {kind: VEC_DOT_TYPES.get(kind) for kind in theirs} == theirs


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_that_of_ggml(cpu: Any, name: str) -> None:
    """Dequantised weights times rounded activations are libggml's dot products, but for the order of summation.

    1e-12 is the square of a few ulps of float32, which is what ggml accumulates in.
    """
    kind, rows = Kind[name], 64
    rng = np.random.default_rng(7)
    x = rng.standard_normal(N).astype(np.float32)
    x[::101] *= 50
    raw = quantized(rng.standard_normal((rows, N)).astype(np.float32), kind)
    partner = from_float(cpu, x, vec_dot_type(kind))
    theirs = np.empty(rows, dtype=np.float32)
    for row in range(rows):
        traits(cpu, kind).vec_dot(N, theirs[row:].ctypes.data, 0, raw[row].ctypes.data, 0, partner.ctypes.data, 0, 1)
    rounded = round_activations(x[None], kind).astype(np.float64)
    ours = rounded @ dequantize(raw, kind, N).astype(np.float64).T
    if kind in (Kind.Q4_1, Kind.Q5_1):
        ours += q8_1_correction(x[None], raw, kind)
    assert np.sum((ours[0] - theirs) ** 2) / np.sum(theirs.astype(np.float64) ** 2) < 1e-12


def quantized(weight: np.ndarray, kind: Kind) -> np.ndarray:
    """A weight in blocks, by libggml (gguf-py cannot make K-quants)."""
    base = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    base.ggml_quantize_chunk.argtypes = (
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    )
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, n = weight.shape
    out = np.zeros((rows, n // block * size), dtype=np.uint8)
    base.ggml_quantize_chunk(int(kind), weight.ctypes.data, out.ctypes.data, 0, rows, n, None)
    return out


def test_rows_that_do_not_fit_are_refused() -> None:
    """Activations that ggml could not round in blocks, and types it cannot multiply, are one clear error each."""
    with pytest.raises(ModelError, match="multiple of 256, the block"):
        round_activations(np.zeros((1, 96), dtype=np.float32), Kind.Q4_K)
    with pytest.raises(ModelError, match="type 999"):
        round_activations(np.zeros((1, 96), dtype=np.float32), 999)
