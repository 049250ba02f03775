"""Slice, statistics and sketch of an activation: the one definition that every writer uses.

Everything is accumulated in float64. Non-finite elements are counted in `nonfinite` and are zero to everything else.
The sketch is a seeded random projection (Johnson-Lindenstrauss with ±1 entries: Achlioptas 2003; as an estimator of the
distance of two vectors: Alon, Matias and Szegedy 1996, "AMS sketch"). Its signs come from MurmurHash3's finaliser.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .points import parse
from .record import SKETCH_SIZE, Rows

_BLOCK = 8192  # elements a block of signs covers: 2 MiB as float64, so that a block stays in a core's cache


def fmix32(h: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """MurmurHash3's 32-bit finaliser (`fmix32` in MurmurHash3.cpp), elementwise."""
    h = h ^ (h >> np.uint32(16))
    h = h * np.uint32(0x85EBCA6B)
    h = h ^ (h >> np.uint32(13))
    h = h * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def signs(start: int, stop: int) -> NDArray[np.float64]:
    """The sketch's signs of elements start…stop: float64 [stop − start, 32]; bit j of fmix32(i + 1) set means +1."""
    hashed = fmix32(np.arange(start + 1, stop + 1, dtype=np.uint32))
    bits = (hashed[:, None] >> np.arange(SKETCH_SIZE, dtype=np.uint32)) & np.uint32(1)
    return bits.astype(np.float64) * 2 - 1


@lru_cache(maxsize=64)
def _sign_block(index: int) -> NDArray[np.float64]:
    return signs(index * _BLOCK, (index + 1) * _BLOCK)


def _blocks(start: int, stop: int) -> Iterator[tuple[int, int, NDArray[np.float64]]]:
    """Cut elements start…stop at block borders: (from, to, signs of them)."""
    while start < stop:
        index, offset = divmod(start, _BLOCK)
        end = min(stop, (index + 1) * _BLOCK)
        yield start, end, _sign_block(index)[offset : offset + end - start]
        start = end


def sketch(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """The 32 projections of each row: [R, n] -> float64 [R, 32]. Rows must be finite."""
    total = np.zeros((rows.shape[0], SKETCH_SIZE))
    for start, stop, block in _blocks(0, rows.shape[1]):
        total += rows[:, start:stop].astype(np.float64) @ block
    return total


def _partial_sketches(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Each row's share of the sketch of all rows laid end to end: [R, n] -> float64 [R, 32]."""
    n = rows.shape[1]
    shares = np.zeros((rows.shape[0], SKETCH_SIZE))
    for r, row in enumerate(rows):
        for start, stop, block in _blocks(r * n, (r + 1) * n):
            shares[r] += row[start - r * n : stop - r * n].astype(np.float64) @ block
    return shares


def _statistics(rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float64]]]:
    """The rows with non-finite elements zeroed, and the statistics of each: [R, n] -> [R, n], name -> float64 [R]."""
    finite = np.isfinite(rows)
    whole = bool(finite.all())
    clean = rows if whole else np.where(finite, rows, np.float32(0))
    n = rows.shape[1]
    wide = clean.astype(np.float64)
    empty = ~finite.any(axis=1)
    low = clean.min(axis=1) if whole else np.where(finite, rows, np.float32(np.inf)).min(axis=1)
    high = clean.max(axis=1) if whole else np.where(finite, rows, np.float32(-np.inf)).max(axis=1)
    stats = {
        "n": np.full(len(rows), float(n)),
        "sum": wide.sum(axis=1),
        "l2": np.sqrt(np.einsum("ij,ij->i", wide, wide)),
        "min": np.where(empty, 0.0, low.astype(np.float64)),
        "max": np.where(empty, 0.0, high.astype(np.float64)),
        "nonfinite": (n - finite.sum(axis=1)).astype(np.float64),
        "absmax_at": np.abs(clean).argmax(axis=1).astype(np.float64),
    }
    return clean, stats


def _pad(rows: Sequence[NDArray[np.float32]], width: int) -> NDArray[np.float32]:
    padded = np.full((len(rows), width), np.nan, dtype=np.float32)
    for r, row in enumerate(rows):
        padded[r, : len(row)] = row
    return padded


def summarise(
    point: str,
    tensor: NDArray[np.float32],
    token_idx: NDArray[np.int64],
    *,
    step: int = 0,
    decode: bool = False,
    slice_size: int | None = 16,
    keep: NDArray[np.int64] | None = None,
    first: int = 0,
    seq: int = 0,
    dtype: str = "f32",
) -> Rows:
    """The records of one point in one forward pass.

    Args:
        point: canonical name; the vocabulary tells the layout of `tensor`.
        tensor: float32, host memory. [T, …] one row a position; for `kq` and `kq_soft_max` [H, T, S] with one column a
            cached position; for `k_read` and `v_read` [S, …], the cached rows. S may exceed the last position + 1 (padding).
        token_idx: int64 [T], the positions of the T rows.
        slice_size: leading values a record carries; None for all of them.
        keep: indices into 0…T−1 of the rows to record; None for all.
        first: the position of the first cached row, where a sequence does not begin at 0.

    Raises:
        TypeError: `tensor` is not float32 in host memory.
        ValueError: the tensor's shape contradicts `token_idx`.
    """
    if not isinstance(tensor, np.ndarray):
        raise TypeError(f"{point}: a record is made of host memory, got {type(tensor).__name__}; copy it to the host first")
    if tensor.dtype != np.float32:
        raise TypeError(f"{point}: expected float32, got {tensor.dtype}")
    kept = np.arange(len(token_idx)) if keep is None else keep
    known = parse(point).known
    layout = known.row if known is not None else ()
    if layout == ("H", "t+1"):
        made = _causal(point, tensor, token_idx - first, kept, slice_size)
    elif layout[:1] == ("t+1",):
        made = _cached(point, tensor, token_idx - first, kept, slice_size)
    else:
        made = _plain(point, tensor, token_idx, kept, slice_size)
    shapes, values, counts, stats, sketches = made
    with np.errstate(over="ignore"):  # garbage of 1e38 has a sketch beyond float32
        small = sketches.astype(np.float32)
    return Rows(
        point=point,
        seq=np.full(len(kept), seq, dtype=np.int64),
        token_idx=token_idx[kept],
        step=np.full(len(kept), step, dtype=np.int64),
        decode=np.full(len(kept), decode, dtype=np.bool_),
        shapes=shapes,
        values=values,
        counts=counts,
        stats=stats,
        sketch=small,
        dtype=dtype,
    )


_Made = tuple[
    tuple[tuple[int, ...], ...], NDArray[np.float32], NDArray[np.int64], dict[str, NDArray[np.float64]], NDArray[np.float64]
]


def _plain(
    point: str, tensor: NDArray[np.float32], token_idx: NDArray[np.int64], kept: NDArray[np.int64], size: int | None
) -> _Made:
    if tensor.shape[:1] != (len(token_idx),):
        raise ValueError(f"{point}: {tensor.shape} does not hold one row for each of {len(token_idx)} positions")
    rows = tensor.reshape(len(token_idx), -1)[kept]
    clean, stats = _statistics(rows)
    count = rows.shape[1] if size is None else min(size, rows.shape[1])
    # A row of the vocabulary is flat: [H*d], whatever the array's own shape is.
    shapes = ((rows.shape[1],),) * len(kept)
    return shapes, rows[:, :count].copy(), np.full(len(kept), count, dtype=np.int64), stats, sketch(clean)


def _causal(
    point: str, tensor: NDArray[np.float32], token_idx: NDArray[np.int64], kept: NDArray[np.int64], size: int | None
) -> _Made:
    if tensor.ndim != 3 or tensor.shape[1] != len(token_idx) or tensor.shape[2] <= int(token_idx.max(initial=0)):
        raise ValueError(
            f"{point}: {tensor.shape} is not [heads, {len(token_idx)}, at least {int(token_idx.max(initial=0)) + 1}]"
        )
    heads = tensor.shape[0]
    shapes: list[tuple[int, ...]] = []
    values: list[NDArray[np.float32]] = []
    stats: list[dict[str, NDArray[np.float64]]] = []
    sketches = np.zeros((len(kept), SKETCH_SIZE))
    for r, i in enumerate(kept):
        seen = int(token_idx[i]) + 1
        row = np.ascontiguousarray(tensor[:, i, :seen]).reshape(1, -1)
        clean, row_stats = _statistics(row)
        if point.endswith("kq_soft_max"):
            later = np.nan_to_num(tensor[:, i, seen:], nan=0.0, posinf=0.0, neginf=0.0)
            row_stats["future_mass"] = np.array([later.sum(dtype=np.float64) / heads])
        shapes.append((heads, seen))
        values.append(row[0] if size is None else row[0, :size])
        stats.append(row_stats)
        sketches[r] = sketch(clean)[0]
    counts = np.array([len(value) for value in values], dtype=np.int64)
    columns = {name: np.concatenate([row[name] for row in stats]) for name in (stats[0] if stats else {})}
    return tuple(shapes), _pad(values, int(counts.max(initial=0))), counts, columns, sketches


def _cached(
    point: str, tensor: NDArray[np.float32], token_idx: NDArray[np.int64], kept: NDArray[np.int64], size: int | None
) -> _Made:
    seen = token_idx + 1
    if tensor.shape[0] < int(seen.max(initial=0)):
        raise ValueError(f"{point}: {tensor.shape} holds fewer than the {int(seen.max(initial=0))} rows that were read")
    rows = tensor.reshape(tensor.shape[0], -1)[: int(seen.max(initial=0))]
    clean, each = _statistics(rows)
    width = rows.shape[1]
    peak = np.abs(clean[np.arange(len(clean)), each["absmax_at"].astype(np.int64)])
    running = np.maximum.accumulate(peak)
    first = np.concatenate([[True], running[1:] > running[:-1]]) if len(peak) else np.zeros(0, dtype=np.bool_)
    winner = np.maximum.accumulate(np.where(first, np.arange(len(peak)), 0))
    cumulative = {
        "n": np.cumsum(each["n"]),
        "sum": np.cumsum(each["sum"]),
        "l2": np.sqrt(np.cumsum(each["l2"] ** 2)),
        "min": np.minimum.accumulate(each["min"]),
        "max": np.maximum.accumulate(each["max"]),
        "nonfinite": np.cumsum(each["nonfinite"]),
        "absmax_at": winner * width + each["absmax_at"][winner],
    }
    last = seen[kept] - 1
    flat = rows.reshape(-1)
    counts = seen[kept] * width if size is None else np.minimum(size, seen[kept] * width)
    values = [flat[: int(count)] for count in counts]
    sketches = np.cumsum(_partial_sketches(clean), axis=0)[last]
    shapes = tuple((int(count), width) for count in seen[kept])
    return shapes, _pad(values, int(counts.max(initial=0))), counts, {name: c[last] for name, c in cumulative.items()}, sketches
