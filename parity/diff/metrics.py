"""How far two aligned records are apart. Returns arrays, one element a record; formats nothing.

NMSE is Σ(a−b)²/Σb², b the reference. Everything is accumulated in float64.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod

import numpy as np
from numpy.typing import NDArray

from checkpoints.record import Rows

from .align import Pair

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# The slice's NMSE is taken over no less than this share of the energy that a slice of its size has on average: a few
# values can be all but zero while their noise is the row's. Measured on the embedded model, all 459 points at 17 positions,
# right engine: leading 16 values hold at least 0.7 % of their share (ffn_swiglu), 4 values 3e-7, one value 1.5e-9 of it. The
# worst NMSE of slices of 16 / 4 / 2 / 1 values is then 4e-12 / 1e-11 / 2e-11 / 2e-11; with 0.01 it is 1.6e-10 for 2, over the limit.
SLICE_FLOOR = 0.1
_BLOCK = 1 << 21  # values measured at once: 16 MiB an intermediate


@dataclass(frozen=True)
class Measures:
    """One element a record, [R]; NaN (or -1 for an index) where it is not known.

    `nmse` is the larger of `nmse_slice` and `nmse_row`, infinite where one side has a non-finite value that the other has
    not. `bound` is True where `nmse_row` is a lower bound made of `l2` and `sum` only.
    """

    nmse: Floats
    nmse_slice: Floats
    nmse_row: Floats
    bound: NDArray[np.bool_]
    max_abs: Floats
    index: Ints
    cosine: Floats
    relative: Floats
    relative_index: Ints
    ulp: Floats
    ulp_index: Ints
    nonfinite_ours: Ints
    nonfinite_ref: Ints
    future_mass: Floats

    def __len__(self) -> int:
        return len(self.nmse)

    def known(self) -> NDArray[np.bool_]:
        """bool [R]: records of which anything could be compared."""
        return ~np.isnan(self.nmse)


def measure(pairs: Sequence[Pair]) -> Measures:
    """The measures of all records, pair after pair. Records are stacked, so that many small pairs cost as few large ones."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    prepared = [_prepare(pair) for pair in pairs]
    for number, values in enumerate(prepared):
        groups[values.a.shape[1], number if values.index is not None else -1].append(number)
    starts = np.concatenate([[0], np.cumsum([len(pair.ours) for pair in pairs])])
    parts: list[Measures] = []
    places: list[Ints] = []
    for (width, _), members in groups.items():
        # Wide rows are measured a few at a time.
        for chunk in _chunks(members, [len(prepared[number].a) * max(width, 1) for number in members]):
            with np.errstate(over="ignore", invalid="ignore"):  # garbage has sketches and statistics beyond their types
                parts.append(_measure([pairs[number] for number in chunk], [prepared[number] for number in chunk]))
            places += [np.arange(starts[number], starts[number + 1]) for number in chunk]
    if not parts:
        return _measure([], [])
    order = np.argsort(np.concatenate(places), kind="stable")
    joined = {field.name: np.concatenate([getattr(part, field.name) for part in parts])[order] for field in fields(Measures)}
    return Measures(**joined)


def sizes(rows: Rows) -> Floats:
    """The length of each record's whole activation: from `stats.n`, else from its shape, else NaN."""
    n = rows.stats.get("n")
    if n is not None and not np.isnan(n).any():
        return n
    known = {shape: float(prod(shape)) if shape else np.nan for shape in set(rows.shapes)}
    shaped = np.fromiter((known[shape] for shape in rows.shapes), np.float64, len(rows))
    return shaped if n is None else np.where(np.isnan(n), shaped, n)


@dataclass(frozen=True)
class _Values:
    """The values that both sides have of each record: float32 [R, k], `present` of them; elements `index` of the row."""

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    counts: Ints | None  # leading values that both have
    index: Ints | None  # None: leading values
    present: NDArray[np.bool_] | None
    quantum: Floats | None


def _chunks(members: list[int], sizes: list[int]) -> list[list[int]]:
    chunks: list[list[int]] = [[]]
    filled = 0
    for member, size in zip(members, sizes, strict=True):
        if chunks[-1] and filled + size > _BLOCK:
            chunks.append([])
            filled = 0
        chunks[-1].append(member)
        filled += size
    return chunks


def _prepare(pair: Pair) -> _Values:
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
    return _Values(ours.values[:, :width], ref.values[:, :width], np.minimum(ours.counts, ref.counts), None, None, quantum)


def _scattered(ours: Rows, ref: Rows) -> _Values:
    """The values of elements that both sides recorded, in our order. Record by record: few dumps scatter their values."""
    width = ours.values.shape[1]
    a, b = ours.values, np.full(ours.values.shape, np.nan, dtype=np.float32)
    index = np.full(ours.values.shape, -1, dtype=np.int64)
    quantum = np.zeros(ours.values.shape)
    for r in range(len(ours)):
        mine, theirs = _elements(ours, r), _elements(ref, r)
        _, at_mine, at_theirs = np.intersect1d(mine, theirs, return_indices=True)
        b[r, at_mine] = ref.values[r, at_theirs]
        index[r, at_mine] = mine[at_mine]
        if ours.quantum is not None:
            quantum[r, at_mine] += ours.quantum[r, at_mine] / 2
        if ref.quantum is not None:
            quantum[r, at_mine] += ref.quantum[r, at_theirs] / 2
    exact = ours.quantum is None and ref.quantum is None
    return _Values(a, b, np.full(len(ours), width), index, index >= 0, None if exact else quantum)


def _elements(rows: Rows, r: int) -> Ints:
    count = int(rows.counts[r])
    if rows.indices is None or rows.indices[r, 0] < 0:
        return np.arange(count)
    return rows.indices[r, :count]


def _column(pairs: Sequence[Pair], side: str, name: str) -> Floats:
    return _joined([getattr(p, side).stats.get(name, np.full(len(p.ours), np.nan)) for p in pairs], 0)


def _joined(arrays: Sequence[NDArray[np.generic]], width: int) -> Floats:
    if not arrays:
        return np.zeros((0, width) if width else 0)
    return (arrays[0] if len(arrays) == 1 else np.concatenate(arrays)).astype(np.float64, copy=False)


def _measure(pairs: list[Pair], values: list[_Values]) -> Measures:
    a32 = np.concatenate([v.a for v in values]) if values else np.zeros((0, 0), np.float32)
    b32 = np.concatenate([v.b for v in values]) if values else np.zeros((0, 0), np.float32)
    present = _present(values, a32.shape)
    finite = np.isfinite(a32) & np.isfinite(b32)
    usable = present & finite
    a, b = np.where(usable, a32, 0).astype(np.float64), np.where(usable, b32, 0).astype(np.float64)
    delta = a - b
    if any(v.quantum is not None for v in values):
        quantum = np.concatenate([np.zeros(v.a.shape) if v.quantum is None else v.quantum for v in values])
        # Read as float32: the printed digits themselves were rounded once more.
        delta[(quantum > 0) & (np.abs(delta) <= quantum + np.spacing(np.abs(b32)))] = 0.0
        # Of what is seen half a step may be the printing's: noise that turns a digit over is no more than noise.
        sure = np.sign(delta) * np.maximum(np.abs(delta) - quantum, 0.0)
    else:
        sure = delta
    size = np.abs(delta)
    index = values[0].index if values and values[0].index is not None else None
    max_abs, at = _largest(size, index)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative, relative_at = _largest(np.where(b != 0, size / np.abs(b), 0.0), index)
        energy_a, energy_b = np.einsum("ij,ij->i", a, a), np.einsum("ij,ij->i", b, b)
        cosine = np.einsum("ij,ij->i", a, b) / np.sqrt(energy_a * energy_b)
    ulp, ulp_at = _largest(np.where(delta != 0, _ulps(a32, b32), 0.0), index)
    count = present.sum(axis=1)
    n = _joined([np.where(np.isnan(sizes(p.ref)), sizes(p.ours), sizes(p.ref)) for p in pairs], 0)
    l2 = _column(pairs, "ref", "l2")
    energy = np.fmax(energy_b, SLICE_FLOOR * count / n * l2**2)
    # Where both sides have NaN everywhere nothing was compared, and nothing agrees.
    nmse_slice = np.where(usable.any(axis=1), _ratio(np.einsum("ij,ij->i", sure, sure), energy), np.nan)
    full = _joined([p.ours.full() & p.ref.full() for p in pairs], 0) > 0
    exact_text = _joined([np.full(len(p.ours), p.ours.quantum is None and p.ref.quantum is None) for p in pairs], 0) > 0
    nmse_row, bound = _whole_rows(pairs, n, l2)
    nmse_row = np.where(full, nmse_slice, np.where(exact_text, nmse_row, np.nan))
    nonfinite = [
        _count_nonfinite(_column(pairs, side, "nonfinite"), present & ~np.isfinite(x))
        for side, x in (("ours", a32), ("ref", b32))
    ]
    counted = ~np.isnan(_column(pairs, "ours", "nonfinite")) & ~np.isnan(_column(pairs, "ref", "nonfinite"))
    odd = present & ~finite & ~((a32 == b32) | (np.isnan(a32) & np.isnan(b32)))
    if odd.any():
        first, first_at = _largest(odd.astype(np.float64), index)
        max_abs, at = np.where(first > 0, np.inf, max_abs), np.where(first > 0, first_at, at)
    one_sided = odd.any(axis=1) | (counted & (nonfinite[0] != nonfinite[1]))
    nmse = np.where(one_sided, np.inf, np.fmax(nmse_slice, nmse_row))
    return Measures(
        nmse=nmse,
        nmse_slice=nmse_slice,
        nmse_row=nmse_row,
        bound=bound & ~full & exact_text,
        max_abs=max_abs,
        index=at,
        cosine=cosine,
        relative=relative,
        relative_index=relative_at,
        ulp=ulp,
        ulp_index=ulp_at,
        nonfinite_ours=nonfinite[0],
        nonfinite_ref=nonfinite[1],
        future_mass=_future(_column(pairs, "ours", "future_mass"), _column(pairs, "ref", "future_mass")),
    )


def _present(values: list[_Values], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    if values and values[0].present is not None:
        return values[0].present
    counts = np.concatenate([v.counts for v in values if v.counts is not None]) if values else np.zeros(0, np.int64)
    present: NDArray[np.bool_] = np.arange(shape[1])[None, :] < counts[:, None]
    return present


def _largest(size: Floats, index: Ints | None) -> tuple[Floats, Ints]:
    """The largest element of each row and the element of the activation that it is."""
    if not size.shape[1]:
        return np.full(len(size), np.nan), np.full(len(size), -1, dtype=np.int64)
    at = size.argmax(axis=1)
    rows = np.arange(len(size))
    return size[rows, at], at if index is None else index[rows, at]


def _ulps(a: NDArray[np.float32], b: NDArray[np.float32]) -> Floats:
    """How many float32 numbers lie between a and b: their bit patterns, read as integers that order as the numbers do."""
    return np.asarray(np.abs(_ordered(a) - _ordered(b)), dtype=np.float64)


def _ordered(x: NDArray[np.float32]) -> Ints:
    bits = np.ascontiguousarray(x).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _ratio(error: Floats, energy: Floats) -> Floats:
    """error / energy; no error is 0 and an error where nothing should be is infinite."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(error == 0, 0.0, error / energy)


def _whole_rows(pairs: list[Pair], n: Floats, l2: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """NMSE of the whole rows [R], and where it is a bound.

    With sketches: mean of the squared differences of the 32 projections, an unbiased estimate of ‖a−b‖² (relative
    deviation 25 %). Without: | ‖a‖−‖b‖ | ≤ ‖a−b‖ and |Σa−Σb| ≤ √n‖a−b‖, so both give a lower bound, which never blames a
    right engine. What an accumulation in float32 may cost (a few √n ulps) is taken for nothing there.
    """
    count = len(n)
    estimate = np.full(count, np.nan)
    start = 0
    for pair in pairs:
        if pair.ours.sketch is not None and pair.ref.sketch is not None:
            difference = pair.ours.sketch.astype(np.float64) - pair.ref.sketch
            estimate[start : start + len(pair.ours)] = np.mean(difference**2, axis=1)
        start += len(pair.ours)
    ours_l2, ours_sum = _column(pairs, "ours", "l2"), _column(pairs, "ours", "sum")
    bound = np.fmax((ours_l2 - l2) ** 2, (ours_sum - _column(pairs, "ref", "sum")) ** 2 / n)
    energy = l2**2
    bound = np.where(bound <= n * (4 * 2.0**-24) ** 2 * np.maximum(energy, ours_l2**2), 0.0, bound)
    is_bound = np.isnan(estimate)
    error = np.where(is_bound, bound, estimate)
    return np.where(np.isnan(error) | np.isnan(energy), np.nan, _ratio(error, energy)), is_bound & ~np.isnan(bound)


def _count_nonfinite(stated: Floats, seen: NDArray[np.bool_]) -> Ints:
    return np.asarray(np.fmax(stated, seen.sum(axis=1)), dtype=np.int64)


def _future(ours: Floats, ref: Floats) -> Floats:
    """How much more weight ours gives to later positions than the reference does; NaN where ours does not say."""
    return np.abs(ours - np.where(np.isnan(ref), 0.0, ref))
