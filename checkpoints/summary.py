"""Slice, statistics and sketch of an activation: the one definition that every writer uses.

Everything is accumulated in float64. Non-finite elements are counted in `nonfinite` and are zero to everything else.
The sketch is a seeded random projection (Johnson-Lindenstrauss with ±1 entries: Achlioptas 2003; as an estimator of the
distance of two vectors: Alon, Matias and Szegedy 1996, "AMS sketch"). Its signs come from MurmurHash3's finaliser.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from .points import of_scores, parse
from .record import SKETCH_SIZE, Rows

_BLOCK = 8192  # elements that a block of signs covers: 2 MiB as float64, so that a block stays in a core's cache
_SMALL = 1 << 16  # elements above which a value's own work outweighs the cost of a call (0.15 ms, 2 ns an element)

_SummaryArrays = tuple[
    tuple[tuple[int, ...], ...], NDArray[np.float32], NDArray[np.int64], dict[str, NDArray[np.float64]], NDArray[np.float32]
]


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
    """Cut elements start…stop at block borders: (from, to, their signs)."""
    while start < stop:
        index, offset = divmod(start, _BLOCK)
        end = min(stop, (index + 1) * _BLOCK)
        yield start, end, _sign_block(index)[offset : offset + end - start]
        start = end


def sketch(rows: NDArray[np.float32] | NDArray[np.float64]) -> NDArray[np.float64]:
    """The 32 projections of each row: [R, n] -> float64 [R, 32]. Rows must be finite."""
    total = np.zeros((rows.shape[0], SKETCH_SIZE))
    for start, stop, block in _blocks(0, rows.shape[1]):
        total += rows[:, start:stop].astype(np.float64, copy=False) @ block
    return total


def _partial_sketches(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each row's share of the sketch of all rows laid end to end: [R, n] -> float64 [R, 32]."""
    n = rows.shape[1]
    shares = np.zeros((rows.shape[0], SKETCH_SIZE))
    for r, row in enumerate(rows):
        for start, stop, block in _blocks(r * n, (r + 1) * n):
            shares[r] += row[start - r * n : stop - r * n] @ block
    return shares


def _statistics(rows: NDArray[np.float32]) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """The rows with non-finite elements zeroed, and the statistics of each: [R, n] -> [R, n], name -> float64 [R]."""
    with np.errstate(invalid="ignore"):  # signalling NaN; infinities of both signs
        wide = rows.astype(np.float64)
        total = wide.sum(axis=1)
    if not np.isfinite(total).all():  # float64 holds every sum of finite float32
        return _statistics_of_garbage(rows)
    stats = {
        "n": np.full(len(rows), float(rows.shape[1])),
        "sum": total,
        "l2": np.sqrt(np.einsum("ij,ij->i", wide, wide)),
        "min": wide.min(axis=1),
        "max": wide.max(axis=1),
        "nonfinite": np.zeros(len(rows)),
        "absmax_at": np.abs(wide).argmax(axis=1).astype(np.float64),
    }
    return wide, stats


def _statistics_of_garbage(rows: NDArray[np.float32]) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """`_statistics` of rows with elements that are not finite: minimum and maximum are those of the finite ones, 0 if there are none."""
    finite = np.isfinite(rows)
    empty = ~finite.any(axis=1)
    clean, stats = _statistics(np.where(finite, rows, np.float32(0)))
    stats["min"] = np.where(empty, 0.0, np.where(finite, rows, np.float32(np.inf)).min(axis=1).astype(np.float64))
    stats["max"] = np.where(empty, 0.0, np.where(finite, rows, np.float32(-np.inf)).max(axis=1).astype(np.float64))
    stats["nonfinite"] = (rows.shape[1] - finite.sum(axis=1)).astype(np.float64)
    return clean, stats


def _pad(rows: Sequence[NDArray[np.float32]], width: int) -> NDArray[np.float32]:
    padded = np.full((len(rows), width), np.nan, dtype=np.float32)
    for r, row in enumerate(rows):
        padded[r, : len(row)] = row
    return padded


def kept_copy(point: str, tensor: NDArray[np.float32], tokens: int, kept: NDArray[np.int64]) -> NDArray[np.float32]:
    """A copy of what the records of these rows are computed from: the rows [R, n], or the whole value if a row depends on all of
    it.

    Raises:
        TypeError: `tensor` is not float32 in host memory.
        ValueError: it does not hold one row for each of `tokens` positions.
    """
    if not isinstance(tensor, np.ndarray):
        raise TypeError(
            f"{point}: a record needs an array in host memory, not {type(tensor).__name__}: copy it to the host first"
        )
    if tensor.dtype != np.float32:
        raise TypeError(f"{point}: expected float32, got {tensor.dtype}")
    if _layout(point):
        return np.array(tensor)
    if tensor.shape[:1] != (tokens,):
        raise ValueError(f"{point}: {tensor.shape} does not hold one row for each of {tokens} positions")
    return tensor.reshape(tokens, -1).take(kept, axis=0)


@lru_cache(maxsize=4096)  # more points than a model has
def _layout(point: str) -> str:
    """What a value's rows are: "causal" [H, T, S], "cached" [S, …], or nothing special, one row per position."""
    known = parse(point).known
    row = known.row if known is not None else ()
    return "causal" if of_scores(point) else "cached" if row[:1] == ("t+1",) else ""


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
    causal: bool = True,
) -> Rows:
    """The records of one point in one forward pass.

    Args:
        point: canonical name; the vocabulary tells the layout of `tensor`.
        tensor: float32, host memory. [T, …] one row per position; for `kq`, `kq_soft_max` and their like [H, T, S] with one
            column a cached position; for `k_read` and `v_read` [S, …], the cached rows. S may exceed the last position + 1 (padding).
        token_idx: int64 [T], the positions of the T rows.
        slice_size: leading values in each record; None for all of them.
        keep: indices into 0…T−1 of the rows to record; None for all.
        first: the position of the first cached row, where a sequence does not begin at 0.
        causal: False if every position sees all S cached positions, as in an encoder; otherwise each sees those up to itself.

    Raises:
        TypeError: `tensor` is not float32 in host memory.
        ValueError: the tensor's shape contradicts `token_idx`.
    """
    kept = np.arange(len(token_idx)) if keep is None else keep
    copy = kept_copy(point, tensor, len(token_idx), kept)
    (rows,) = summarise_pass(
        [(point, copy)], token_idx, kept, step=step, decode=decode, slice_size=slice_size, first=first, causal=causal
    )
    return replace(rows, seq=np.full(len(kept), seq, dtype=np.int64), dtype=dtype)


def summarise_pass(
    copies: Sequence[tuple[str, NDArray[np.float32]]],
    token_idx: NDArray[np.int64],
    kept: NDArray[np.int64],
    *,
    step: int,
    decode: bool,
    slice_size: int | None,
    first: int,
    causal: bool = True,
) -> list[Rows]:
    """The records of several points of one forward pass, in their order.

    The arguments are those of `summarise`; a copy is what `kept_copy` gave. Small values of one width are summarised in
    one call: its fixed cost, some 0.3 ms with cold caches, is more than the work on a row of a small model.
    """
    summaries: dict[int, _SummaryArrays] = {}
    widths: dict[tuple[int, int], list[int]] = {}
    for number, (point, copy) in enumerate(copies):
        layout = _layout(point)
        if layout == "causal":
            seen = token_idx - first + 1 if causal else np.full(len(token_idx), copy.shape[-1])
            summaries[number] = _causal(point, copy, seen, kept, slice_size)
        elif layout == "cached":
            seen = token_idx - first + 1 if causal else np.full(len(token_idx), copy.shape[0])
            summaries[number] = _cached(point, copy, seen, kept, slice_size)
        else:
            alone = number if copy.size > _SMALL else -1
            widths.setdefault((copy.shape[1], alone), []).append(number)
    for numbers in widths.values():
        rows = [copies[number][1] for number in numbers]
        together = _plain(rows[0] if len(rows) == 1 else np.concatenate(rows), slice_size)
        summaries.update(zip(numbers, _split(together, len(rows)), strict=True))
    positions = token_idx[kept]
    zero, steps, phase = np.zeros(len(kept), np.int64), np.full(len(kept), step, np.int64), np.full(len(kept), decode)
    return [Rows(point, zero, positions, steps, phase, *summaries[number]) for number, (point, _) in enumerate(copies)]


def _plain(rows: NDArray[np.float32], size: int | None) -> _SummaryArrays:
    wide, stats = _statistics(rows)
    count = rows.shape[1] if size is None else min(size, rows.shape[1])
    # A row of the vocabulary is flat: [H*d], whatever the array's own shape is.
    shapes = ((rows.shape[1],),) * len(rows)
    return shapes, rows[:, :count].copy(), np.full(len(rows), count, dtype=np.int64), stats, _rounded(sketch(wide))


def _rounded(sketches: NDArray[np.float64]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # garbage of 1e38 has a sketch beyond float32
        return sketches.astype(np.float32)


def _split(summary: _SummaryArrays, parts: int) -> list[_SummaryArrays]:
    """The records of each of several values, which have equally many rows and were laid one after the other."""
    shapes, values, counts, stats, sketches = summary
    size = len(shapes) // parts
    cuts = [slice(start * size, (start + 1) * size) for start in range(parts)]
    return [
        (shapes[cut], values[cut], counts[cut], {name: column[cut] for name, column in stats.items()}, sketches[cut])
        for cut in cuts
    ]


def _causal(
    point: str, tensor: NDArray[np.float32], sees: NDArray[np.int64], kept: NDArray[np.int64], size: int | None
) -> _SummaryArrays:
    """`sees` [T]: how many of the S columns each position sees."""
    most = int(sees.max(initial=0))
    if tensor.ndim != 3 or tensor.shape[1] != len(sees) or tensor.shape[2] < most:
        raise ValueError(f"{point}: {tensor.shape} is not [heads, {len(sees)}, at least {most}]")
    heads = tensor.shape[0]
    shapes: list[tuple[int, ...]] = []
    values: list[NDArray[np.float32]] = []
    stats: list[dict[str, NDArray[np.float64]]] = []
    sketches = np.zeros((len(kept), SKETCH_SIZE))
    for r, i in enumerate(kept):
        seen = int(sees[i])
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
    return tuple(shapes), _pad(values, int(counts.max(initial=0))), counts, columns, _rounded(sketches)


def _cached(
    point: str, tensor: NDArray[np.float32], seen: NDArray[np.int64], kept: NDArray[np.int64], size: int | None
) -> _SummaryArrays:
    """`seen` [T]: how many of the S rows each position sees."""
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
    of_rows = {name: column[last] for name, column in cumulative.items()}
    return shapes, _pad(values, int(counts.max(initial=0))), counts, of_rows, _rounded(sketches)
