"""Rotary position embedding with all of ggml's options: YaRN, frequency factors, sections of several positions.

Parameters: int 1 how many elements are rotated, 2 the mode, 4 the original context, 15 the first rotated element; float 5 the base,
6 the scale of frequencies, 7 how much of YaRN's ramp is mixed in, 8 the magnitude, 9 and 10 YaRN's β fast and slow; ints 11 to
14 the sections.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..backend import Array, module_of
from .params import OpParams, Shape, as_floats, on_host

NEOX, MROPE, VISION, IMROPE = 2, 8, 24, 40  # GGML_ROPE_TYPE_*; 0 is NORMAL


def rope(x: Array, positions: Array, factors: Array | None = None, *, params: OpParams, shape: Shape) -> Array:
    """Pairs of elements rotated by the position's angles: [·, T, H, d], positions [T] or [4 · T], factors [dims / 2].

    NORMAL pairs element 2i with 2i + 1, the other modes i with i + dims/2. Mirrors ggml_compute_forward_rope_flt.
    """
    return _rotated(x, positions, factors, params, 1.0)


def rope_back(x: Array, positions: Array, factors: Array | None = None, *, params: OpParams, shape: Shape) -> Array:
    """The inverse rotation. Mirrors ggml_compute_forward_rope_back."""
    return _rotated(x, positions, factors, params, -1.0)


def rope_by_table(
    x: Array, positions: Array, factors: Array | None = None, *, params: OpParams, keep: Callable[[Array], Array]
) -> Array:
    """The rotation of an engine that keeps its cosines and sines in another type, which `keep` rounds them to: as `rope`."""
    return _rotated(x, positions, factors, params, 1.0, keep)


def _rotated(
    x: Array,
    positions: Array,
    factors: Array | None,
    params: OpParams,
    sign: float,
    keep: Callable[[Array], Array] = lambda table: table,
) -> Array:
    xp = module_of(x)
    (x,) = as_floats(x)
    mode = params.int(2)
    dims = params.int(1)
    pairs = dims if mode == VISION else dims // 2
    host_positions = on_host(positions).reshape(-1)
    host_factors = None if factors is None else on_host(factors).reshape(-1).astype(np.float32)
    cos, sin = cosine_and_sine(host_positions, host_factors, pairs, x.shape[1], params)
    cos = keep(xp.asarray(cos.astype(x.dtype)))[None, :, None, :]
    sin = keep(xp.asarray((sign * sin).astype(x.dtype)))[None, :, None, :]
    start = 0 if mode == VISION else params.int(15)
    if mode == 0:
        first, second = slice(start, start + dims, 2), slice(start + 1, start + dims, 2)
    else:
        first, second = slice(start, start + pairs), slice(start + pairs, start + 2 * pairs)
    a, b = x[..., first], x[..., second]
    rotated = x.copy()
    rotated[..., first] = a * cos - b * sin
    rotated[..., second] = a * sin + b * cos
    return rotated


@np.errstate(over="ignore", invalid="ignore")  # an angle beyond float32 has no cosine: NaN, as in ggml
def cosine_and_sine(
    positions: NDArray[np.integer], factors: NDArray[np.float32] | None, pairs: int, count: int, params: OpParams
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cosine and sine of every rotation, times the magnitude: two float64 [count, pairs], on the host.

    The angles are ggml's float32 numbers by definition (`theta *= theta_scale`, one multiplication after the other), whatever
    the rotation is computed in. Mirrors ggml_rope_cache_init, ggml_mrope_cache_init and rope_yarn.
    """
    theta = _angles(positions, pairs, count, params)
    if factors is not None:
        theta = theta / factors[None, :pairs]
    scale, mix = np.float32(params.float(6)), np.float32(params.float(7))
    magnitude = np.float32(params.float(8))
    angles = scale * theta
    if mix != 0:
        ramp = _ramp(pairs, params) * mix
        angles = angles * (1 - ramp) + theta * ramp
        magnitude *= np.float32(1) + np.float32(0.1) * np.log(np.float32(1) / scale)
    wide = angles.astype(np.float64)
    return np.cos(wide) * float(magnitude), np.sin(wide) * float(magnitude)


def _angles(positions: NDArray[np.integer], pairs: int, count: int, params: OpParams) -> NDArray[np.float32]:
    """position · base^(−2i/dims) by repeated multiplication: float32 [count, pairs]."""
    dims, mode = params.int(1), params.int(2)
    step = np.float32(np.float64(np.float32(params.float(5))) ** np.float64(np.float32(-2.0) / np.float32(dims)))
    if not mode & MROPE:
        return _products(positions[:count].astype(np.float32), step, pairs)
    sections = [params.int(index) for index in range(11, 15)]
    sector = np.arange(pairs) % sum(sections)
    kind = _kind_of_sector(sector, sections, interleaved=mode == IMROPE)
    each = positions.reshape(4, -1)[:, :count].astype(np.float32)
    if mode != VISION:
        powers = np.stack([_products(row, step, pairs) for row in each])
        return powers[kind, :, np.arange(pairs)].T
    # A vision encoder starts anew at each section's first element.
    starts = np.concatenate([[0], np.cumsum(sections)[:3]])
    since = sector - starts[kind]
    powers = np.stack([_products(row, step, int(since.max()) + 1) for row in each])
    return powers[kind, :, since].T


def _products(start: NDArray[np.float32], step: np.float32, count: int) -> NDArray[np.float32]:
    powers = np.full((len(start), count), step, dtype=np.float32)
    powers[:, 0] = start
    accumulated: NDArray[np.float32] = np.multiply.accumulate(powers, axis=1)
    return accumulated


def _kind_of_sector(sector: NDArray[np.integer], sections: list[int], *, interleaved: bool) -> NDArray[np.integer]:
    """Which of the four positions (time, height, width, extra) turns each pair."""
    if interleaved:
        kind = np.full(sector.shape, 3)
        for remainder in range(3):
            kind[(sector % 3 == remainder) & (sector < 3 * sections[remainder])] = remainder
        return kind
    return np.searchsorted(np.cumsum(sections)[:3], sector, side="right")


def _ramp(pairs: int, params: OpParams) -> NDArray[np.float32]:
    """rope_yarn_ramp: 1 where a pair keeps its frequency, 0 where it is interpolated."""
    low = max(0, math.floor(_correction(params, 9)))
    high = min(params.int(1) - 1, math.ceil(_correction(params, 10)))
    y = (np.arange(pairs, dtype=np.float32) - np.float32(low)) / np.float32(max(0.001, high - low))
    kept: NDArray[np.float32] = 1 - np.clip(y, 0, 1)
    return kept


def _correction(params: OpParams, index: int) -> float:
    """ggml_rope_yarn_corr_dim, in float32 as there."""
    turns = np.float32(params.float(index))
    base = np.float32(params.float(5))
    inside = np.float32(params.int(4)) / (turns * np.float32(2) * np.float32(math.pi))
    return float(np.float32(params.int(1)) * np.log(inside) / (np.float32(2) * np.log(base)))
