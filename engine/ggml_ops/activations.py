"""Activations: UNARY and GLU, whose first parameter says which function it is (`ggml_unary_op`, `ggml_glu_op`)."""

from collections.abc import Callable

import numpy as np

from checkpoints.dataflow import LOOKED_UP

from ..backend import Array
from .error_function import erf
from .params import OpParams, Shape, as_floats, to_half

_SQRT_2_OVER_PI = 0.79788456080286535587989211986876  # vec.h
_GELU_COEF_A = 0.044715
_GELU_QUICK_COEF = -1.702
_SQRT_2_INV = 0.70710678118654752440084436210484


def exponential(x: Array) -> Array:
    """expf(x): infinite or 0 where it leaves the range of float32, as in C."""
    with np.errstate(over="ignore", under="ignore"):
        return np.exp(x)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(−x)). Mirrors op_sigmoid of unary-ops.cpp."""
    return 1 / (1 + exponential(-x))


def silu(x: Array) -> Array:
    """x / (1 + exp(−x)). Mirrors ggml_silu_f32."""
    return x / (1 + exponential(-x))


def softplus(x: Array) -> Array:
    """log(1 + exp(x)), and x above 20. Mirrors ggml_compute_softplus_f32.

    Where exp(x) is small, another last digit of it may round 1 + exp(x) to another number, a thousandth of the result away. Between −10 and
    0 NumPy's float32 power gives glibc's 1 + expf(x) in 97.3 % of cases, that of float64, rounded once, in 99.997 %.
    """
    power = exponential(np.minimum(x, 20).astype(np.float64)).astype(x.dtype)
    return np.where(x > 20, x, np.log(1 + power))


def gelu(x: Array, params: OpParams) -> Array:
    """GELU by tanh, looked up in a table of float16: 0 up to −10, x from 10 on. Mirrors ggml_vec_gelu_f32.

    The table holds ggml_gelu_f32 of every float16, rounded to float16; here its entries are computed, to the same bits. In float64
    nothing is rounded: the formula itself.
    """
    if not params.rounded(x):
        return _gelu_by_tanh(x)
    looked_up = to_half(_gelu_by_tanh(to_half(np.clip(x, -10, 10))))
    return np.where(x <= -10, x.dtype.type(0), np.where(x >= 10, x, looked_up))


def _gelu_by_tanh(x: Array) -> Array:
    """0.5 · x · (1 + tanh(√(2/π) · x · (1 + 0.044715 · x · x))), mirrors ggml_gelu_f32.

    The compiler contracts the inner sum to a fused multiply-add; it and tanhf are computed in float64 here and rounded once.
    """
    inner = ((x * x.dtype.type(_GELU_COEF_A)).astype(np.float64) * x + 1).astype(x.dtype)
    bent = np.tanh((x.dtype.type(_SQRT_2_OVER_PI) * x * inner).astype(np.float64)).astype(x.dtype)
    return 0.5 * x * (1 + bent)


def gelu_quick(x: Array, params: OpParams) -> Array:
    """x · sigmoid(1.702 x), looked up in a table of float16. Mirrors ggml_vec_gelu_quick_f32."""
    if not params.rounded(x):
        return _gelu_by_sigmoid(x)
    return to_half(_gelu_by_sigmoid(to_half(x)))


def _gelu_by_sigmoid(x: Array) -> Array:
    return x * (1 / (1 + exponential((x * x.dtype.type(_GELU_QUICK_COEF)).astype(np.float64)).astype(x.dtype)))


def gelu_erf(x: Array, params: OpParams) -> Array:
    """GELU by the error function, without a table. Mirrors ggml_vec_gelu_erf_f32."""
    return 0.5 * x * (1 + erf(x * _SQRT_2_INV).astype(x.dtype, copy=False))


def xielu(x: Array, params: OpParams) -> Array:
    """xIELU with α of the negative and positive side, β and ε in floats 1 to 4. Mirrors op_xielu of unary-ops.cpp."""
    alpha_n, alpha_p, beta, eps = (params.float(index) for index in range(1, 5))
    below = (np.expm1(np.minimum(x, x.dtype.type(eps))) - x) * alpha_n + beta * x
    return np.where(x > 0, alpha_p * x * x + beta * x, below)


def _hard_sigmoid(x: Array) -> Array:
    return np.minimum(1, np.maximum(0, (x + 3) / 6))


def _rounded_away(x: Array) -> Array:
    """roundf: halves away from zero, where NumPy rounds them to even."""
    return np.copysign(np.floor(np.abs(x) + x.dtype.type(0.5)), x)


def _as(x: Array, condition: Array) -> Array:
    return condition.astype(x.dtype)


# In the order of ggml_unary_op (ggml.h).
_UNARY: tuple[Callable[[Array, OpParams], Array], ...] = (
    lambda x, _: np.abs(x),
    lambda x, _: _as(x, x > 0) - _as(x, x < 0),
    lambda x, _: -x,
    lambda x, _: _as(x, x > 0),
    lambda x, _: np.tanh(x),
    lambda x, _: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    lambda x, _: np.where(x > 0, x, x.dtype.type(0)),
    lambda x, _: sigmoid(x),
    gelu,
    gelu_quick,
    lambda x, _: silu(x),
    lambda x, _: x * _hard_sigmoid(x),
    lambda x, _: _hard_sigmoid(x),
    lambda x, _: exponential(x),
    lambda x, _: exponential(x) - 1,
    lambda x, _: softplus(x),
    gelu_erf,
    xielu,
    lambda x, _: np.floor(x),
    lambda x, _: np.ceil(x),
    lambda x, _: _rounded_away(x),
    lambda x, _: np.trunc(x),
)
UNARY_KINDS = (
    *("ABS", "SGN", "NEG", "STEP", "TANH", "ELU", "RELU", "SIGMOID", "GELU", "GELU_QUICK", "SILU", "HARDSWISH", "HARDSIGMOID"),
    *("EXP", "EXPM1", "SOFTPLUS", "GELU_ERF", "XIELU", "FLOOR", "CEIL", "ROUND", "TRUNC"),
)


def unary(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """One of `UNARY_KINDS`, by integer 0. Mirrors ggml_compute_forward_unary.

    Raises:
        IndexError: a kind that is not known here.
    """
    (x,) = as_floats(x)
    return _UNARY[params.int(0)](x, params)


def looked_up(name: str, params: OpParams) -> bool:
    """Whether ggml's CPU backend looks this operation up in a table of float16, which rounds its argument and its result."""
    kinds = {"UNARY": UNARY_KINDS, "GLU": GLU_KINDS}.get(name, ())
    return bool(kinds) and kinds[params.int(0)] in LOOKED_UP


def leaky_relu(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """x, or float 0 times x where it is negative. Mirrors ggml_vec_leaky_relu_f32."""
    (x,) = as_floats(x)
    return np.maximum(x, 0) + params.float(0) * np.minimum(x, 0)


def _swiglu_oai(gate: Array, up: Array, params: OpParams) -> Array:
    """ggml_compute_forward_swiglu_oai_f32: α in float 2, the limit in float 3."""
    limit = gate.dtype.type(params.float(3))
    x = np.minimum(gate, limit)
    return x / (1 + exponential(params.float(2) * -x)) * (np.clip(up, -limit, limit) + 1)


def _swiglu_clamp(gate: Array, up: Array, params: OpParams) -> Array:
    """ggml_compute_forward_swiglu_clamp_f32: the limit in float 3."""
    limit = gate.dtype.type(params.float(3))
    return silu(np.minimum(gate, limit)) * np.clip(up, -limit, limit)


# In the order of ggml_glu_op (ggml.h); each takes the gate, what it gates, and the parameters.
_GLU: tuple[Callable[[Array, Array, OpParams], Array], ...] = (
    lambda gate, up, _: np.where(gate > 0, gate * up, gate.dtype.type(0)),
    lambda gate, up, params: gelu(gate, params) * up,
    lambda gate, up, _: silu(gate) * up,
    _swiglu_oai,
    lambda gate, up, params: gelu_erf(gate, params) * up,
    lambda gate, up, params: gelu_quick(gate, params) * up,
    _swiglu_clamp,
)
GLU_KINDS = ("REGLU", "GEGLU", "SWIGLU", "SWIGLU_OAI", "GEGLU_ERF", "GEGLU_QUICK", "SWIGLU_CLAMP")


def glu(x: Array, up: Array | None = None, *, params: OpParams, shape: Shape) -> Array:
    """A gated activation, one of `GLU_KINDS` by integer 0. Mirrors ggml_compute_forward_glu.

    With one operand its rows hold both halves: gate first, or second where integer 1 (`swapped`) is set.

    Raises:
        IndexError: a kind that is not known here.
    """
    if up is None:
        half = x.shape[-1] // 2
        first, second = x[..., :half], x[..., half:]
        x, up = (second, first) if params.int(1) else (first, second)
    gate, gated = as_floats(x, up)
    return _GLU[params.int(0)](gate, gated, params)
