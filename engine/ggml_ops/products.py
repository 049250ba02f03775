"""Products of matrices. The first operand is the weight, [out, in], whose rows are multiplied with the second's rows."""

import numpy as np

from ..backend import Array, module_of
from .params import OpParams, Shape, as_floats, on_host


def mul_mat(weight: Array, x: Array, *, params: OpParams, shape: Shape) -> Array:
    """x · weightᵀ: [a3, a2, out, in], [b3, b2, T, in] -> [b3, b2, T, out]; b2 and b3 are multiples of a2 and a3.

    Matrix h of the second operand takes matrix h // (b2 / a2) of the first. Mirrors ggml_compute_forward_mul_mat with float32
    operands; `engine.replay` rounds the activations where the weights have another type.
    """
    weight, x = as_floats(weight, x)
    (a3, a2, out, columns), (b3, b2, rows, _) = weight.shape, x.shape
    if (a3, a2) == (b3, b2):
        return np.matmul(x, weight.swapaxes(-1, -2))
    if a3 == b3:
        grouped = x.reshape(b3, a2, b2 // a2 * rows, columns)
        return np.matmul(grouped, weight.swapaxes(-1, -2)).reshape(b3, b2, rows, out)
    split = x.reshape(a3, b3 // a3, a2, b2 // a2 * rows, columns)
    return np.matmul(split, weight.swapaxes(-1, -2)[:, None]).reshape(b3, b2, rows, out)


def mul_mat_id(weights: Array, x: Array, ids: Array, *, params: OpParams, shape: Shape) -> Array:
    """The product with the chosen experts' weights: [1, E, out, in], [1, T, U or 1, in], ids [1, 1, T, U] -> [1, T, U, out].

    Row u of a token takes row u (or the only one) of its activations. Only `weights[0, e]` of chosen experts are read, so
    that each can be dequantised on demand. Mirrors ggml_compute_forward_mul_mat_id.
    """
    (x,) = as_floats(x)
    chosen = ids[0, 0].astype(np.int64)
    tokens, used = chosen.shape
    rows = module_of(x).broadcast_to(x[0], (tokens, used, x.shape[-1])) if x.shape[2] == 1 else x[0]
    product = module_of(x).empty(shape, dtype=x.dtype)
    for expert in np.unique(on_host(chosen)).tolist():
        token, slot = np.nonzero(chosen == expert)
        product[0, token, slot] = np.matmul(rows[token, slot], weights[0, expert].astype(x.dtype, copy=False).T)
    return product


def outer_product(x: Array, y: Array, *, params: OpParams, shape: Shape) -> Array:
    """Σ over rows of x ⊗ y: [a3, a2, K, n], [b3, b2, K, m] -> [b3, b2, m, n]. Mirrors ggml_compute_forward_out_prod_f32."""
    x, y = as_floats(x, y)
    x = np.repeat(np.repeat(x, y.shape[0] // x.shape[0], axis=0), y.shape[1] // x.shape[1], axis=1)
    return np.matmul(y.swapaxes(-1, -2), x)


def solve_triangular(a: Array, b: Array, *, params: OpParams, shape: Shape) -> Array:
    """X of A · X = B with A lower triangular, by forward substitution: [·, ·, n, n], [·, ·, n, k] -> [·, ·, n, k].

    Mirrors ggml_compute_forward_solve_tri_f32.
    """
    a, b = as_floats(a, b)
    solved = module_of(b).zeros_like(b)
    for row in range(a.shape[-1]):
        known = np.matmul(a[..., row : row + 1, :row], solved[..., :row, :])[..., 0, :]
        solved[..., row, :] = (b[..., row, :] - known) / a[..., row, row, None]
    return solved
