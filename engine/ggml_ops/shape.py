"""Operations that move values without computing: copies, repetitions, joining, padding, triangles, and constants."""

import math

import numpy as np

from ..backend import Array, module_of
from .params import OpParams, Shape, as_floats, to_brain, to_half


def repeated(x: Array, shape: Shape) -> Array:
    """`x` repeated to a shape whose dimensions are multiples of its own (ggml_can_repeat); `x` itself if broadcasting suffices."""
    counts = tuple(wanted // there for wanted, there in zip(shape, x.shape, strict=True))
    if all(count == 1 or there == 1 for count, there in zip(counts, x.shape, strict=True)):
        return x
    return np.tile(x, counts)


def copy(x: Array, target: Array | None = None, *, params: OpParams, shape: Shape) -> Array:
    """The elements in another shape, rounded to the result's type. Mirrors ggml_compute_forward_dup (CONT, CPY, DUP).

    The target of a CPY gives only shape and type, which are in `shape` and `params.kind`.
    """
    xp = module_of(x)
    return stored(xp.ascontiguousarray(x).reshape(shape), params)


def stored(x: Array, params: OpParams) -> Array:
    """A value as the node's type holds it: F16 and BF16 rounded, in the dtype of `x`; integers as integers."""
    if params.kind in ("i32", "i64"):
        return x.astype(np.int32 if params.kind == "i32" else np.int64)
    if x.dtype.kind != "f" or not params.rounded(x):
        return x
    return {"f16": to_half, "bf16": to_brain}.get(params.kind, lambda same: same)(x)


def repeat(x: Array, target: Array | None = None, *, params: OpParams, shape: Shape) -> Array:
    """The value repeated to the result's shape. Mirrors ggml_compute_forward_repeat."""
    xp = module_of(x)
    return xp.broadcast_to(repeated(x, shape), shape)


def repeat_back(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """The sum of all repetitions of the result's shape. Mirrors ggml_compute_forward_repeat_back_f32."""
    (x,) = as_floats(x)
    split: list[int] = []
    for there, wanted in zip(x.shape, shape, strict=True):
        split += [there // wanted, wanted]
    return x.reshape(split).sum(axis=(0, 2, 4, 6))


def concat(x: Array, y: Array, *, params: OpParams, shape: Shape) -> Array:
    """Both operands joined along ggml's dimension `int 0`. Mirrors ggml_compute_forward_concat."""
    return np.concatenate((x, y), axis=3 - params.int(0))


def fill(target: Array | None = None, *, params: OpParams, shape: Shape) -> Array:
    """float 0 everywhere, on the target's device. Mirrors ggml_compute_forward_fill."""
    xp = np if target is None else module_of(target)
    dtype = target.dtype if target is not None and target.dtype.kind == "f" else np.float32
    return xp.full(shape, params.float(0), dtype=dtype)


def arange(*, params: OpParams, shape: Shape) -> Array:
    """float 0, and float 2 more each step: [1, 1, 1, n], on the host. Mirrors ggml_compute_forward_arange_f32."""
    start, step = np.float32(params.float(0)), np.float32(params.float(2))
    return (start + step * np.arange(shape[-1]).astype(np.float32)).reshape(shape)


def pad(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """The value padded with zeros, or with its own other end where int 8 (circular) is set.

    Ints 0 to 7: how many before and after, for each of ggml's dimensions. Mirrors ggml_compute_forward_pad_f32.
    """
    xp = module_of(x)
    widths = [(params.int(2 * dimension), params.int(2 * dimension + 1)) for dimension in (3, 2, 1, 0)]
    return xp.pad(x, widths, mode="wrap" if params.int(8) else "constant")


def pad_reflect_1d(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """Each row reflected at its ends, int 0 elements before and int 1 after. Mirrors ggml_compute_forward_pad_reflect_1d."""
    xp = module_of(x)
    return xp.pad(x, [(0, 0)] * 3 + [(params.int(0), params.int(1))], mode="reflect")


def roll(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """Rolled by ints 0 to 3, one for each of ggml's dimensions. Mirrors ggml_compute_forward_roll_f32."""
    return np.roll(x, tuple(params.int(dimension) for dimension in (3, 2, 1, 0)), axis=(0, 1, 2, 3))


def triangle(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """One side of the diagonal, the rest 0: int 0 is ggml_tri_type (upper with and without diagonal, lower with and without).

    Mirrors ggml_compute_forward_tri_f32.
    """
    xp = module_of(x)
    row, column = xp.arange(x.shape[-2])[:, None], xp.arange(x.shape[-1])[None, :]
    kept = (column >= row, column > row, column <= row, column < row)[params.int(0)]
    return np.where(kept, x, x.dtype.type(0))


def diagonal(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """Each row as the diagonal of a matrix: [·, ·, 1, n] -> [·, ·, n, n]. Mirrors ggml_compute_forward_diag_f32."""
    return x * module_of(x).eye(x.shape[-1], dtype=x.dtype)


def diagonal_mask(value: float, x: Array, *, params: OpParams, shape: Shape) -> Array:
    """`value` where the column is beyond int 0 plus the row. Mirrors ggml_compute_forward_diag_mask_f32."""
    xp = module_of(x)
    row, column = xp.arange(x.shape[-2])[:, None], xp.arange(x.shape[-1])[None, :]
    return np.where(column > params.int(0) + row, x.dtype.type(value), x)


def set_part(x: Array, part: Array, *, params: OpParams, shape: Shape) -> Array:
    """`x` overwritten with `part` at its place: ints 0 to 3 are ggml's strides 1, 2, 3 and the offset, in bytes.

    Mirrors ggml_compute_forward_set.
    """
    whole, view = _view_of_part(x, part, params)
    view[...] = part
    return whole


def add_part(x: Array, part: Array, *, params: OpParams, shape: Shape) -> Array:
    """`x` with `part` added in its place, given as in `set_part`. Mirrors ggml_compute_forward_acc_f32."""
    whole, view = _view_of_part(x, part, params)
    view += part
    return whole


def _view_of_part(x: Array, part: Array, params: OpParams) -> tuple[Array, Array]:
    xp = module_of(x)
    item = 4  # bytes of ggml's float32 and int32: the unit of the strides, whatever dtype is computed in here
    whole = xp.ascontiguousarray(x).copy()
    strides = [params.int(index) // item for index in (2, 1, 0)]
    view = xp.lib.stride_tricks.as_strided(
        whole.reshape(-1)[params.int(3) // item :],
        part.shape,
        tuple(stride * whole.itemsize for stride in (*strides, 1)),
    )
    return whole, view


def timestep_embedding(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """cos and sin of each time at falling frequencies: int 0 the width, int 1 the longest period.

    Mirrors ggml_compute_forward_timestep_embedding_f32.
    """
    xp = module_of(x)
    width, period = params.int(0), params.int(1)
    half = width // 2
    (x,) = as_floats(x)
    exponents = np.float32(-math.log(period)) * xp.arange(half).astype(np.float32) / np.float32(half)
    frequencies = xp.exp(exponents.astype(np.float64)).astype(np.float32)  # the angles are float32 by definition, as RoPE's
    angles = (x.astype(np.float32).reshape(-1, 1) * frequencies).astype(np.float64)
    parts = [np.cos(angles), np.sin(angles)] + ([xp.zeros_like(angles[:, :1])] if width % 2 else [])
    return np.concatenate(parts, axis=1).astype(x.dtype).reshape(shape)


def image_to_columns(kernel: Array, x: Array, *, params: OpParams, shape: Shape) -> Array:
    """The patch under each place of a convolution's kernel as a row, so that the convolution is a product.

    Ints 0 to 6: strides, padding and dilation (columns, rows), and whether it is two-dimensional; of the kernel only the shape
    matters. 1-D: [1, N, C, W] -> [1, N, OW, C·KW]; 2-D: [N, C, H, W] -> [N, OH, OW, C·KH·KW]. Mirrors ggml_compute_forward_im2col.
    """
    xp = module_of(x)
    s0, s1, p0, p1, d0, d1, flat = (params.int(index) for index in range(7))
    image = x if flat else x[0][:, :, None, :]
    kernel_rows, kernel_columns = (kernel.shape[2] if flat else 1), kernel.shape[3]
    out_rows, out_columns = (shape[1] if flat else 1), shape[2]
    if not flat:
        s1, p1, d1 = 1, 0, 1
    reach_rows, reach_columns = d1 * kernel_rows + s1 * out_rows, d0 * kernel_columns + s0 * out_columns
    padded = xp.pad(image, [(0, 0), (0, 0), (p1, p1 + reach_rows), (p0, p0 + reach_columns)])
    patches = [
        padded[:, :, row * d1 :: s1, column * d0 :: s0][:, :, :out_rows, :out_columns]
        for row in range(kernel_rows)
        for column in range(kernel_columns)
    ]
    stacked = np.stack(patches, axis=-1).transpose(0, 2, 3, 1, 4)  # [N, OH, OW, C, KH·KW]
    return stored(xp.ascontiguousarray(stacked).reshape(shape), params)
