"""Errors of the recorded values, leading or scattered ones, element by element. float64 throughout."""

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.record import Rows
from checkpoints.short_rows import reduced

from .align import Pair
from .whole_rows import ratio

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# The divisor of a slice's NMSE is at least this share of the energy that a slice of its size has on average: a few
# values can be nearly zero while their noise is the row's. Measured on the embedded model, all 459 points at 17 positions,
# right engine: leading 16 values have at least 0.7 % of their share (ffn_swiglu), 4 values 3e-7, one value 1.5e-9 of it. The
# worst NMSE of slices of 16 / 4 / 2 / 1 values is then 4e-12 / 1e-11 / 2e-11 / 2e-11; with 0.01 it is 1.6e-10 for 2, over the limit.
SLICE_FLOOR = 0.1


# The smallest normal float32. Below it numbers are whole steps of 2^-149, and devices and compilers may take them for 0.
_NORMAL = float(np.finfo(np.float32).tiny)


def without_subnormal(delta: Floats) -> Floats:
    """Differences, 0 where they are smaller than any normal float32: arithmetic that flushes such numbers to zero is also right."""
    return np.where(np.abs(delta) < _NORMAL, 0.0, delta)


class Values(Struct, frozen=True):
    """The values that both sides have of each record: float32 [R, k]; `present` says which exist, `index` which elements they are."""

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    counts: Ints | None  # leading values that both have
    index: Ints | None  # None: leading values
    present: NDArray[np.bool_] | None
    quantum: Floats | None


def prepare(pair: Pair) -> Values:
    """The values that both sides have of each record of a pair."""
    ours, ref = pair.ours, pair.ref
    if ours.indices is not None or ref.indices is not None:
        return _scattered(ours, ref)
    width = min(ours.values.shape[1], ref.values.shape[1])
    quantum = None
    if ours.quantum is not None or ref.quantum is not None:
        quantum = np.zeros((len(ours), width))
        for side in (ours, ref):
            if side.quantum is not None:
                quantum += side.quantum[:, :width] / 2
    return Values(ours.values[:, :width], ref.values[:, :width], np.minimum(ours.counts, ref.counts), None, None, quantum)


def without_infinities(a: NDArray[np.float32], b: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Both with 0 where they have the same infinity, as masks have in a type that cannot hold them: these have no difference."""
    same = np.isinf(a) & (a == b)
    if not same.any():
        return a, b
    return np.where(same, np.float32(0), a), np.where(same, np.float32(0), b)


def _scattered(ours: Rows, ref: Rows) -> Values:
    """The values of elements that both sides recorded, in our order. Record by record: few dumps scatter their values."""
    width = ours.values.shape[1]
    a, b = ours.values, np.full(ours.values.shape, np.nan, dtype=np.float32)
    index = np.full(ours.values.shape, -1, dtype=np.int64)
    quantum = np.zeros(ours.values.shape)
    for r in range(len(ours)):
        our_index, ref_index = _recorded(ours, r), _recorded(ref, r)
        _, at_ours, at_ref = np.intersect1d(our_index, ref_index, return_indices=True)
        b[r, at_ours] = ref.values[r, at_ref]
        index[r, at_ours] = our_index[at_ours]
        if ours.quantum is not None:
            quantum[r, at_ours] += ours.quantum[r, at_ours] / 2
        if ref.quantum is not None:
            quantum[r, at_ours] += ref.quantum[r, at_ref] / 2
    exact = ours.quantum is None and ref.quantum is None
    return Values(a, b, np.full(len(ours), width), index, index >= 0, None if exact else quantum)


def _recorded(rows: Rows, r: int) -> Ints:
    count = int(rows.counts[r])
    if rows.indices is None or rows.indices[r, 0] < 0:
        return np.arange(count)
    return rows.indices[r, :count]


class SliceErrors(Struct, frozen=True):
    """The errors of the values that both sides have, [R]; elements that are not finite on both sides are left out."""

    nmse: Floats
    max_abs: Floats
    index: Ints
    cosine: Floats
    relative: Floats
    relative_index: Ints
    ulp: Floats
    ulp_index: Ints


def slice_errors(
    values: list[Values],
    ours: NDArray[np.float32],
    ref: NDArray[np.float32],
    present: NDArray[np.bool_],
    usable: NDArray[np.bool_],
    n: Floats,
    l2: Floats,
) -> SliceErrors:
    """The errors of the recorded values [R, k]; `n` and `l2` are the size and the norm of the reference's whole rows.

    `present`: values that both sides recorded; `usable`: those of them that are finite on both sides.
    """
    all_usable = bool(usable.all())
    a, b = ((side if all_usable else np.where(usable, side, 0)).astype(np.float64) for side in (ours, ref))
    delta = without_subnormal(a - b)
    if any(v.quantum is not None for v in values):
        quantum = np.concatenate([np.zeros(v.a.shape) if v.quantum is None else v.quantum for v in values])
        # Read as float32: the printed digits themselves were rounded once more.
        delta[(quantum > 0) & (np.abs(delta) <= quantum + np.spacing(np.abs(ref)))] = 0.0
        # Half a step of an error may come from the printing: noise that flips a digit is still only noise.
        sure = np.sign(delta) * np.maximum(np.abs(delta) - quantum, 0.0)
    else:
        sure = delta
    size = np.abs(delta)
    index = elements(values)
    max_abs, at = largest(size, index)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative, relative_at = largest(np.where(b != 0, size / np.abs(b), 0.0), index)
        energy_a, energy_b = np.einsum("ij,ij->i", a, a), np.einsum("ij,ij->i", b, b)
        cosine = np.einsum("ij,ij->i", a, b) / np.sqrt(energy_a * energy_b)
    ulp, ulp_at = largest(np.where(delta != 0, _ulps(ours, ref), 0.0), index)
    energy = np.fmax(energy_b, SLICE_FLOOR * present.sum(axis=1) / n * l2**2)
    # If both sides have NaN everywhere nothing was compared, and nothing agrees.
    nmse = np.where(reduced(np.logical_or, usable), ratio(np.einsum("ij,ij->i", sure, sure), energy), np.nan)
    return SliceErrors(nmse, max_abs, at, cosine, relative, relative_at, ulp, ulp_at)


def elements(values: list[Values]) -> Ints | None:
    """Which elements of the rows scattered values are (those are measured one point at a time); None for leading values."""
    return values[0].index if values else None


def present_in(values: list[Values], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """bool [R, k]: values that both sides recorded."""
    if values and values[0].present is not None:
        return values[0].present
    counts = np.concatenate([v.counts for v in values if v.counts is not None]) if values else np.zeros(0, np.int64)
    present: NDArray[np.bool_] = np.arange(shape[1])[None, :] < counts[:, None]
    return present


def largest(size: Floats, index: Ints | None) -> tuple[Floats, Ints]:
    """The largest element of each row, and its index in the activation."""
    if not size.shape[1]:
        return np.full(len(size), np.nan), np.full(len(size), -1, dtype=np.int64)
    at = size.argmax(axis=1)
    rows = np.arange(len(size))
    return size[rows, at], at if index is None else index[rows, at]


def _ulps(a: NDArray[np.float32], b: NDArray[np.float32]) -> Floats:
    """How many float32 numbers lie between a and b: the difference of their bit patterns as integers that sort like the numbers."""
    apart = np.subtract(_ordered(a), _ordered(b), dtype=np.int64)
    return np.abs(apart, out=apart).astype(np.float64)


def _ordered(x: NDArray[np.float32]) -> NDArray[np.int32]:
    """The bits as integers that sort like the numbers: −magnitude if the sign is set, by two's complement of the other bits."""
    bits = np.ascontiguousarray(x).view(np.int32)
    sign = bits >> 31  # -1 or 0
    return (bits ^ (sign & 0x7FFFFFFF)) - sign
