"""ggml's operations as the engine computes them, each compared with libggml itself on random operands."""

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from libggml import LibGgml
from node_by_node import nmse

from checkpoints.errors import ModelError
from engine.ggml_ops import OPERATIONS, OpParams, operation, strided
from engine.ggml_ops.activations import GLU_KINDS, UNARY_KINDS
from engine.ggml_ops.error_function import erf

LIMIT = 1e-12  # NMSE: float32's rounding leaves 1e-14 on sums of a hundred terms
ORDERS = ("ARGSORT", "TOP_K", "ARGMAX", "COUNT_EQUAL")


@pytest.fixture(scope="module")
def libggml() -> LibGgml:
    return LibGgml()


def packed(*values: float) -> tuple[int, ...]:
    """Parameters as ggml stores them: an int as it is, a float as the int of its bits."""
    return tuple(struct.unpack("<i", struct.pack("<f", v))[0] if isinstance(v, float) else v for v in values)


RNG = np.random.default_rng(13)


def normal(*shape: int, scale: float = 1.0) -> Any:
    full = (1,) * (4 - len(shape)) + shape
    return (RNG.standard_normal(full) * scale).astype(np.float32)


def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Any:
    return RNG.uniform(low, high, (1,) * (4 - len(shape)) + shape).astype(np.float32)


def ids(*shape: int, below: int, dtype: Any = np.int32) -> Any:
    return RNG.integers(0, below, (1,) * (4 - len(shape)) + shape).astype(dtype)


def rope_params(  # one value a parameter of ggml_rope_multi
    dims: int, mode: int, *, ext: float = 0.0, scale: float = 1.0, sections: Sequence[int] = (0, 0, 0, 0), offset: int = 0
) -> tuple[int, ...]:
    return packed(0, dims, mode, 0, 64, 10000.0, scale, ext, 1.1, 32.0, 1.0, *sections, offset)


# Name, operands, shape of the result, parameters.
Case = tuple[str, list[Any], tuple[int, int, int, int], tuple[int, ...]]
T, H, D = 5, 4, 32
POSITIONS = np.arange(3, 3 + T, dtype=np.int32).reshape(1, 1, 1, T)
FOUR_POSITIONS = RNG.integers(0, 50, (1, 1, 1, 4 * T)).astype(np.int32)
CAUSAL = np.where(np.arange(8) > np.arange(T)[:, None] + 3, -np.inf, 0).astype(np.float32)[None, None]
TRIANGLE = np.tril(normal(2, 6, 6)) + 3 * np.eye(6, dtype=np.float32)

CASES: list[Case] = [
    ("ADD", [normal(2, 3, 8), normal(1, 3, 4)], (1, 2, 3, 8), ()),
    ("SUB", [normal(2, 3, 8), normal(2, 3, 8)], (1, 2, 3, 8), ()),
    ("MUL", [normal(2, 4, 8), normal(2, 2, 8)], (1, 2, 4, 8), ()),
    ("DIV", [normal(2, 3, 8), normal(1, 1, 1)], (1, 2, 3, 8), ()),
    ("ADD1", [normal(3, 8), normal(1)], (1, 1, 3, 8), ()),
    ("ADD_ID", [normal(T, 2, 8), normal(6, 8), ids(T, 2, below=6)], (1, T, 2, 8), ()),
    ("ACC", [normal(4, 8), normal(2, 8)], (1, 1, 4, 8), packed(32, 128, 128, 32, 0)),
    ("SET", [normal(4, 8), normal(2, 8)], (1, 1, 4, 8), packed(32, 128, 128, 64, 0)),
    ("SQR", [normal(3, 8)], (1, 1, 3, 8), ()),
    ("SQRT", [uniform(3, 8)], (1, 1, 3, 8), ()),
    ("LOG", [uniform(3, 8, low=0.1)], (1, 1, 3, 8), ()),
    ("SIN", [normal(3, 8, scale=20)], (1, 1, 3, 8), ()),
    ("COS", [normal(3, 8, scale=20)], (1, 1, 3, 8), ()),
    ("SUM", [normal(2, 3, 8)], (1, 1, 1, 1), ()),
    ("SUM_ROWS", [normal(2, 3, 80)], (1, 2, 3, 1), ()),
    ("MEAN", [normal(2, 3, 80)], (1, 2, 3, 1), ()),
    ("CUMSUM", [normal(2, 3, 80)], (1, 2, 3, 80), ()),
    ("ARGMAX", [ids(6, 9, below=4).astype(np.float32)], (1, 1, 1, 6), ()),
    ("COUNT_EQUAL", [ids(6, 9, below=3), ids(6, 9, below=3)], (1, 1, 1, 1), ()),
    ("REPEAT", [normal(2, 3, 4), normal(4, 6, 8)], (1, 4, 6, 8), ()),
    ("REPEAT_BACK", [normal(4, 6, 8)], (1, 2, 3, 4), ()),
    *[("CONCAT", [normal(2, 3, 4, 5), normal(2, 3, 4, 5)], shape, (dimension,)) for dimension, shape in enumerate(
        [(2, 3, 4, 10), (2, 3, 8, 5), (2, 6, 4, 5), (4, 3, 4, 5)]
    )],
    ("RMS_NORM", [normal(2, 3, 80)], (1, 2, 3, 80), packed(1e-6)),
    ("NORM", [normal(2, 3, 80) + 2], (1, 2, 3, 80), packed(1e-5)),
    ("L2_NORM", [normal(2, 3, 80)], (1, 2, 3, 80), packed(1e-6)),
    ("GROUP_NORM", [normal(2, 7, 3, 8)], (2, 7, 3, 8), packed(3, 1e-5)),
    ("MUL_MAT", [normal(7, 64), normal(T, 64)], (1, 1, T, 7), ()),
    ("MUL_MAT", [normal(2, 7, 64), normal(6, T, 64)], (1, 6, T, 7), ()),
    ("MUL_MAT", [normal(2, 2, 7, 64), normal(4, 6, T, 64)], (4, 6, T, 7), ()),
    ("MUL_MAT", [normal(1, 2, 7, 64), normal(4, 2, T, 64)], (4, 2, T, 7), ()),
    ("MUL_MAT_ID", [normal(6, 7, 64), normal(T, 1, 64), ids(T, 3, below=6)], (1, T, 3, 7), ()),
    ("MUL_MAT_ID", [normal(6, 7, 64), normal(T, 3, 64), ids(T, 3, below=6)], (1, T, 3, 7), ()),
    ("OUT_PROD", [normal(1, 5, 8), normal(2, 5, 6)], (1, 2, 6, 8), ()),
    ("SOLVE_TRI", [TRIANGLE, normal(2, 6, 5)], (1, 2, 6, 5), ()),
    ("SCALE", [normal(3, 8)], (1, 1, 3, 8), packed(0.3, 0.0)),
    ("SCALE", [normal(3, 8)], (1, 1, 3, 8), packed(0.3, -1.5)),
    ("CLAMP", [normal(3, 8)], (1, 1, 3, 8), packed(-0.5, 0.7)),
    ("CONT", [normal(3, 8)], (1, 2, 3, 4), ()),
    ("CPY", [normal(3, 8)], (1, 1, 3, 8), ()),
    ("DUP", [normal(3, 8)], (1, 1, 3, 8), ()),
    ("GET_ROWS", [normal(9, 8), ids(T, below=9)], (1, 1, T, 8), ()),
    ("GET_ROWS", [normal(2, 3, 9, 8), ids(2, 3, T, below=9)], (2, 3, T, 8), ()),
    ("SET_ROWS", [normal(2, 3, 8), np.array([[[[4, 0, 5]]]], np.int64), normal(2, 6, 8)], (1, 2, 6, 8), ()),
    ("DIAG", [normal(2, 1, 6)], (1, 2, 6, 6), ()),
    ("DIAG_MASK_INF", [normal(2, 4, 6)], (1, 2, 4, 6), (2,)),
    ("DIAG_MASK_ZERO", [normal(2, 4, 6)], (1, 2, 4, 6), (2,)),
    *[("TRI", [normal(2, 6, 6)], (1, 2, 6, 6), (kind,)) for kind in range(4)],
    ("SOFT_MAX", [normal(H, T, 8)], (1, H, T, 8), packed(0.25, 0.0)),
    ("SOFT_MAX", [normal(H, T, 8), CAUSAL], (1, H, T, 8), packed(0.25, 0.0)),
    ("SOFT_MAX", [normal(H, T, 8), CAUSAL.astype(np.float16)], (1, H, T, 8), packed(0.25, 0.0)),
    ("SOFT_MAX", [normal(6, T, 8), CAUSAL - uniform(T, 8)], (1, 6, T, 8), packed(0.25, 8.0)),
    ("SOFT_MAX", [normal(H, T, 8), CAUSAL, normal(H)], (1, H, T, 8), packed(0.25, 0.0)),
    ("ROPE", [normal(T, H, D), POSITIONS], (1, T, H, D), rope_params(D, 0)),
    ("ROPE", [normal(T, H, D), POSITIONS, uniform(D // 2, low=1, high=8)], (1, T, H, D), rope_params(D, 2)),
    ("ROPE", [normal(T, H, D), POSITIONS], (1, T, H, D), rope_params(16, 2, ext=1.0, scale=0.25, offset=8)),
    ("ROPE", [normal(T, H, D), POSITIONS], (1, T, H, D), rope_params(16, 0, ext=0.7, scale=0.25, offset=16)),
    ("ROPE_BACK", [normal(T, H, D), POSITIONS], (1, T, H, D), rope_params(D, 2)),
    ("ROPE", [normal(T, H, D), FOUR_POSITIONS], (1, T, H, D), rope_params(D, 8, sections=(6, 5, 3, 2))),
    ("ROPE", [normal(T, H, D), FOUR_POSITIONS], (1, T, H, D), rope_params(D, 8, sections=(3, 2, 2, 0))),
    ("ROPE", [normal(T, H, D), FOUR_POSITIONS], (1, T, H, D), rope_params(D, 40, sections=(6, 5, 5, 0))),
    ("ROPE", [normal(T, H, D), FOUR_POSITIONS], (1, T, H, D), rope_params(D // 2, 24, sections=(8, 8, 0, 0))),
    ("IM2COL", [normal(1, 4, 3), normal(4, 16)], (1, 1, 14, 12), packed(1, 0, 0, 0, 1, 0, 0)),
    ("IM2COL", [normal(1, 4, 3), normal(4, 16)], (1, 1, 9, 12), packed(2, 0, 3, 0, 2, 0, 0)),
    ("IM2COL", [normal(5, 4, 2, 3), normal(2, 4, 6, 7)], (2, 5, 4, 24), packed(2, 1, 1, 0, 1, 1, 1)),
    ("POOL_1D", [normal(3, 9)], (1, 1, 3, 5), packed(1, 3, 2, 1)),
    ("POOL_1D", [normal(3, 9)], (1, 1, 3, 5), packed(0, 3, 2, 1)),
    ("POOL_2D", [normal(2, 6, 8)], (1, 2, 3, 4), packed(1, 2, 2, 2, 2, 0, 0)),
    ("POOL_2D", [normal(2, 6, 8)], (1, 2, 4, 5), packed(0, 2, 2, 2, 2, 1, 1)),
    ("PAD", [normal(2, 3, 4)], (1, 4, 4, 7), packed(1, 2, 0, 1, 2, 0, 0, 0, 0)),
    ("PAD", [normal(2, 3, 4)], (1, 2, 4, 7), packed(1, 2, 0, 1, 0, 0, 0, 0, 1)),
    ("PAD_REFLECT_1D", [normal(2, 3, 8)], (1, 2, 3, 13), packed(3, 2)),
    ("ROLL", [normal(2, 3, 8)], (1, 2, 3, 8), packed(3, -1, 1, 0)),
    ("ARANGE", [], (1, 1, 1, 7), packed(1.0, 3.1, 0.3)),
    ("TIMESTEP_EMBEDDING", [uniform(T, high=900)], (1, 1, T, 9), packed(9, 10000)),
    ("ARGSORT", [normal(3, 100)], (1, 1, 3, 100), (0,)),
    ("ARGSORT", [normal(3, 100)], (1, 1, 3, 100), (1,)),
    ("ARGSORT", [ids(6, 16, below=4).astype(np.float32)], (1, 1, 6, 16), (1,)),
    ("TOP_K", [normal(3, 100)], (1, 1, 3, 7), ()),
    ("TOP_K", [normal(3, 100)], (1, 1, 3, 1), ()),
    ("TOP_K", [np.maximum(normal(40, 33), 0)], (1, 1, 40, 20), ()),  # as many are 0 as not
    ("TOP_K", [ids(40, 33, below=5).astype(np.float32)], (1, 1, 40, 7), ()),
    ("LEAKY_RELU", [normal(3, 8)], (1, 1, 3, 8), packed(0.1)),
    ("FILL", [normal(3, 8)], (1, 1, 3, 8), packed(-2.5)),
    ("SSM_CONV", [normal(2, 8, 9), normal(8, 4)], (1, 2, 6, 8), ()),
    *[
        (
            "SSM_SCAN",
            [normal(3, heads, dim, 16, scale=0.0 if small else 1.0), normal(2, T, heads, dim), normal(2, T, heads) - small,
             -uniform(heads, width, low=0.5, high=2), normal(2, T, groups, 16), normal(2, T, groups, 16), np.array([[[[2, 0]]]], np.int32)],
            (1, 1, 1, 2 * T * heads * dim + kept * 2 * heads * dim * 16),
            (kept,),
        )
        # Small time steps as well, as trained models have them: float32's softplus has few digits of those.
        for small in (0, 8)
        for heads, dim, width, groups, kept in ((8, 1, 16, 1, 1), (4, 8, 1, 2, 1), (4, 8, 1, 2, 3))
    ],
    *[
        (
            "GATED_DELTA_NET",
            [normal(2, T, 2, 16, scale=0.3), normal(2, T, 2, 16, scale=0.3), normal(2, T, H, 16),
             -uniform(2, T, H, width), uniform(2, T, H, 1), normal(2, H, 16, 16)],
            (1, 1, 2 * T + kept * 2 * 16, H * 16),
            (kept,),
        )
        for width, kept in ((1, 1), (16, 1), (1, 3))
    ],
    (
        "RWKV_WKV6",
        [normal(6, H, 16), normal(6, H, 16), normal(6, H, 16), normal(H, 16), uniform(6, H, 16), normal(2, H * 16 * 16)],
        (1, 1, 6 + 2 * 16, H * 16),
        (),
    ),
    (
        "GATED_LINEAR_ATTN",
        [normal(6, H, 16), normal(6, H, 16), normal(6, H, 16), uniform(6, H, 16), normal(2, H * 16 * 16)],
        (1, 1, 6 + 2 * 16, H * 16),
        packed(0.25),
    ),
    (
        "RWKV_WKV7",
        [*(normal(6, H, 64, scale=0.2) for _ in range(6)), normal(2, H * 64 * 64)],
        (1, 1, 6 + 2 * 64, H * 64),
        (),
    ),
    (
        "LIGHTNING_INDEXER",
        [normal(2, T, H, 32), normal(2, 8, 1, 32), normal(2, 1, T, H), np.tile(CAUSAL, (2, 1, 1, 1)).astype(np.float16)],
        (2, 1, T, 8),
        (),
    ),
    ("DSV4_HC_COMB", [normal(T, 24), normal(3), normal(24)], (1, T, 4, 4), packed(1e-6, 20)),
    ("DSV4_HC_PRE", [normal(T, 4, 32), normal(T, 4)], (1, 1, T, 32), packed(0.5, 0)),
    ("DSV4_HC_PRE", [normal(T, 4, 32), normal(T, 4, 32)], (1, 1, T, 32), packed(0.5, 1)),
    ("DSV4_HC_POST", [normal(T, 32), normal(T, 4, 32), normal(T, 4), normal(T, 4, 4)], (1, T, 4, 32), ()),
    ("DSV4_HC_POST", [normal(T, 32), normal(T, 4, 32), normal(T, 4)], (1, T, 4, 32), ()),
    *[("UNARY", [normal(3, 80, scale=4)], (1, 1, 3, 80), packed(kind, 0.8, 0.9, 0.5, -1e-6)) for kind in range(len(UNARY_KINDS))],
    *[("GLU", [normal(3, 160, scale=4)], (1, 1, 3, 80), packed(kind, 0, 1.702, 7.0)) for kind in range(len(GLU_KINDS))],
    *[("GLU", [normal(3, 160, scale=4)], (1, 1, 3, 80), packed(kind, 1, 1.702, 2.0)) for kind in range(len(GLU_KINDS))],
    *[("GLU", [normal(3, 80), normal(3, 80)], (1, 1, 3, 80), packed(kind, 0, 1.702, 0.5)) for kind in range(len(GLU_KINDS))],
]  # fmt: skip


def _name(case: Case) -> str:
    name, _, _, params = case
    kinds = {"UNARY": UNARY_KINDS, "GLU": GLU_KINDS}.get(name)
    return name if kinds is None else f"{name}-{kinds[params[0]]}"


def _computed(case: Case, dtype: Any = None) -> Any:
    name, operands, shape, params = case
    given = [o.astype(dtype) if dtype is not None and o.dtype == np.float32 else o for o in operands]
    return OPERATIONS[name](*given, params=OpParams(params), shape=shape)


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_each_operation_computes_what_libggml_computes(libggml: LibGgml, case: Case) -> None:
    """Every operation gives libggml's numbers on random operands, and places of equal values fall alike."""
    name, operands, shape, params = case
    result = {"ARGSORT": np.int32, "TOP_K": np.int32, "ARGMAX": np.int32, "COUNT_EQUAL": np.int64}.get(name, np.float32)
    reference = libggml.compute(name, operands, shape, params, result)
    ours = _computed(case)
    assert ours.shape == shape
    assert ours.dtype == reference.dtype
    if name in ORDERS:
        np.testing.assert_array_equal(ours, reference)
    else:
        assert nmse(ours, reference) <= LIMIT


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_each_operation_stays_in_the_dtype_of_its_operands(case: Case) -> None:
    """Float64 operands give a float64 result without a float32 in between: it differs from the float32 one by rounding only."""
    name, operands, _, _ = case
    if name in ORDERS or not operands:
        pytest.skip("the result is of integers, or there is nothing to compute from")
    narrow, wide = _computed(case), _computed(case, np.float64)
    assert wide.dtype == np.float64
    # Float16 tables, and a softplus that rounds 1 + exp(x).
    coarse = _name(case) in ("UNARY-GELU", "UNARY-GELU_QUICK", "GLU-GEGLU", "GLU-GEGLU_QUICK", "SSM_SCAN")
    assert nmse(narrow, wide) <= (1e-6 if coarse else LIMIT)


def test_every_operation_of_the_table_is_compared() -> None:
    """An operation that is entered without a case here would be compared with nothing."""
    assert set(OPERATIONS) == {name for name, *_ in CASES}


def test_the_table_of_gelu_is_mirrored_to_the_bit(libggml: LibGgml) -> None:
    """Every float16 between −10 and 10 gives what stands in ggml's tables of GELU and quick GELU."""
    halves = np.arange(65536).astype(np.uint16).view(np.float16)
    inside = np.isfinite(halves) & (np.abs(halves) < 10)
    x = halves[inside].astype(np.float32).reshape(1, 1, 1, -1)
    for kind, table in (("GELU", "ggml_table_gelu_f16"), ("GELU_QUICK", "ggml_table_gelu_quick_f16")):
        ours = OPERATIONS["UNARY"](x, params=OpParams((UNARY_KINDS.index(kind),)), shape=x.shape)
        np.testing.assert_array_equal(ours.reshape(-1), libggml.table(table)[inside].astype(np.float32))


def test_rounding_by_definition_can_be_asked_for_and_left_out() -> None:
    """GELU is rounded to the table's float16 in float32 and not in float64, and either way where it is asked for."""
    x = normal(3, 80)
    gelu = UNARY_KINDS.index("GELU")

    def computed(values: Any, *, rounds: bool | None = None) -> Any:
        return OPERATIONS["UNARY"](values, params=OpParams((gelu,), rounds=rounds), shape=x.shape)

    truth = computed(x.astype(np.float64))
    assert 1e-9 < nmse(computed(x), truth) < 1e-6
    assert nmse(computed(x, rounds=False), truth) < 1e-13
    difference = np.abs(computed(x.astype(np.float64), rounds=True) - computed(x))
    # Not to the bit: float32's last digit may put a result on the other side of a float16's border.
    assert np.all(difference <= np.spacing(np.abs(computed(x)).astype(np.float16)))
    assert np.mean(difference > 0) < 0.1


def test_a_copy_is_rounded_to_the_type_of_its_result() -> None:
    """CPY to F16 and BF16 rounds to nearest even, as NumPy's float16 and a shift of the bits do."""
    x = normal(4, 8)
    half = OPERATIONS["CPY"](x, params=OpParams(kind="f16"), shape=(1, 1, 8, 4))
    np.testing.assert_array_equal(half, x.astype(np.float16).astype(np.float32).reshape(1, 1, 8, 4))
    brain = OPERATIONS["CPY"](x, params=OpParams(kind="bf16"), shape=x.shape)
    assert not (brain.view(np.uint32) & 0xFFFF).any()
    assert np.abs(brain - x).max() <= np.abs(x).max() * 2.0**-8


def test_the_error_function_is_that_of_libm() -> None:
    """erf agrees with math.erf over its whole range, at 0 and far outside."""
    x = np.concatenate([np.linspace(-7, 7, 4001), [0.0, 1e-300, -1e-9, 40.0, -np.inf, np.inf]])
    np.testing.assert_allclose(erf(x), [math.erf(value) for value in x], rtol=0, atol=5e-15)


def test_a_view_reads_the_memory_that_its_strides_say() -> None:
    """A view with an offset and permuted strides gives the elements that ggml would read, also of another dtype than ggml's."""
    memory = np.arange(24, dtype=np.float64)
    view = strided(memory, ne=(3, 2, 2, 1), nb=(16, 4, 48, 96), offset=4, item=4)
    expected = [[[memory[1 + 4 * i + j + 12 * k] for i in range(3)] for j in range(2)] for k in range(2)]
    np.testing.assert_array_equal(view[0], expected)


def test_an_operation_that_is_lacking_is_refused_by_its_name_and_place() -> None:
    """An unknown operation is one line with the operation and the node."""
    with pytest.raises(ModelError, match=r"WIN_PART of blk\.3\.node_7"):
        operation("WIN_PART", "blk.3.node_7")
