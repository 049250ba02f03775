"""Element by element: sums, products, scales, limits, roots and sines.

The second operand of a sum or product is repeated to the shape of the first (ggml_can_repeat), which allows more than NumPy's
broadcasting of dimensions of size 1.
"""

import numpy as np

from ..backend import Array
from .params import OpParams, Shape, as_floats
from .shape import repeated


def add(x: Array, y: Array, *, params: OpParams, shape: Shape) -> Array:
    """x + y. Mirrors ggml_compute_forward_add."""
    x, y = as_floats(x, y)
    return x + repeated(y, shape)


def subtract(x: Array, y: Array, *, params: OpParams, shape: Shape) -> Array:
    """x − y. Mirrors ggml_compute_forward_sub."""
    x, y = as_floats(x, y)
    return x - repeated(y, shape)


def multiply(x: Array, y: Array, *, params: OpParams, shape: Shape) -> Array:
    """x · y. Mirrors ggml_compute_forward_mul."""
    x, y = as_floats(x, y)
    return x * repeated(y, shape)


def divide(x: Array, y: Array, *, params: OpParams, shape: Shape) -> Array:
    """x / y. Mirrors ggml_compute_forward_div."""
    x, y = as_floats(x, y)
    with np.errstate(divide="ignore", invalid="ignore"):
        return x / repeated(y, shape)


def add_id(x: Array, rows: Array, ids: Array, *, params: OpParams, shape: Shape) -> Array:
    """x + rows[ids], the bias of each chosen expert: [1, T, U, n], [1, 1, E, n], [1, 1, T, U] -> [1, T, U, n].

    Mirrors ggml_compute_forward_add_id_f32.
    """
    x, rows = as_floats(x, rows)
    return x + rows[0, 0][ids[0, 0].astype(np.int64)][None]


def add_one_value(x: Array, y: Array, *, params: OpParams, shape: Shape) -> Array:
    """x + y for a single value y. Mirrors ggml_compute_forward_add1."""
    x, y = as_floats(x, y)
    return x + y.reshape(1, 1, 1, 1)


def scale(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """x · s + b: floats 0 and 1. Mirrors ggml_compute_forward_scale_f32, where b is not added if it is 0."""
    (x,) = as_floats(x)
    bias = params.float(1)
    scaled = x * params.float(0)
    return scaled + bias if bias else scaled


def clamp(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """max(min(x, float 1), float 0). Mirrors ggml_compute_forward_clamp."""
    (x,) = as_floats(x)
    return np.maximum(np.minimum(x, x.dtype.type(params.float(1))), x.dtype.type(params.float(0)))


def square(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """x · x. Mirrors ggml_compute_forward_sqr."""
    (x,) = as_floats(x)
    return x * x


def square_root(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """√x. Mirrors ggml_compute_forward_sqrt."""
    (x,) = as_floats(x)
    with np.errstate(invalid="ignore"):
        return np.sqrt(x)


def logarithm(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """The natural logarithm. Mirrors ggml_compute_forward_log."""
    (x,) = as_floats(x)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(x)


def sine(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """sin x; computed in float64, since float32 versions differ between libraries. Mirrors ggml_compute_forward_sin."""
    (x,) = as_floats(x)
    return np.sin(x.astype(np.float64)).astype(x.dtype, copy=False)


def cosine(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """cos x; computed in float64, since float32 versions differ between libraries. Mirrors ggml_compute_forward_cos."""
    (x,) = as_floats(x)
    return np.cos(x.astype(np.float64)).astype(x.dtype, copy=False)
