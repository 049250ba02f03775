"""Contradictions within a record: values against statistics and sketch, attention rows against their sum."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from checkpoints.points import parse
from checkpoints.record import SKETCH_SIZE, Rows
from checkpoints.short_rows import reduced
from checkpoints.summary import sketch as sketch_of

from .rule import Hit, Subject, by_point, kind, positions_of

# Statistics and sketch are accumulated in float64 and stored as float64 and float32; an engine that sums in float32 is off by
# n · 6e-8 at worst, far less in practice.
_ROUNDING = 1e-4
# mean(s²) of 32 ±1 projections is ‖x‖² with a relative deviation of 25 % (it follows a χ² with 32 degrees of freedom over 32 where
# no element dominates): outside 0.15 … 4 once in 10^12.
_SKETCH_RANGE = (0.15, 4.0)
_SUM = 2**-7  # weights that were truncated to bfloat16 each lose less than this share


def statistics(subject: Subject) -> Iterator[Hit]:
    """Statistics or sketch that contradict the values."""
    for name, rows in subject.points.items():
        reasons: dict[str, list[int]] = {}
        for reason, bad in _contradictions(rows):
            if bad.any():
                reasons.setdefault(reason, bad.nonzero()[0].tolist())
        for reason, members in list(reasons.items())[:2]:
            yield Hit(name, int(rows.token_idx[members[0]]), f"{name}: {reason}, {positions_of(rows, members)}")


def _contradictions(rows: Rows) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    width, stats = rows.values.shape[1], rows.stats
    usable = (np.arange(width)[None, :] < rows.counts[:, None]) & np.isfinite(rows.values)
    values = (rows.values if usable.all() else np.where(usable, rows.values, np.float32(0))).astype(np.float64)
    slack = np.zeros(len(rows)) if rows.quantum is None else rows.quantum.max(axis=1, initial=0.0)
    whole = rows.full()
    with np.errstate(invalid="ignore"):
        if "min" in stats and "max" in stats:
            low, high = _extremes(rows.values, usable)
            room = slack + _ROUNDING * np.where(low <= high, np.maximum(np.abs(low), np.abs(high)), 0.0)
            yield "values lie outside stats.min … stats.max", (low < stats["min"] - room) | (high > stats["max"] + room)
        if "l2" in stats:
            root = np.sqrt(np.einsum("ij,ij->i", values, values))
            allowed = np.sqrt(width) * slack + _ROUNDING * root
            yield "stats.l2 is less than the norm of the values alone", stats["l2"] + allowed < root
            yield "stats.l2 is not the root of the values' squares", whole & (np.abs(stats["l2"] - root) > allowed)
        if "sum" in stats and whole.any():
            scale = np.sum(np.abs(values), axis=1)
            off = np.abs(stats["sum"] - values.sum(axis=1)) > _ROUNDING * scale + width * slack
            yield "stats.sum is not the values' sum", whole & off
        if "n" in stats:
            yield "stats.n contradicts the shape", (rows.sizes >= 0) & (np.abs(stats["n"] - rows.sizes) > 0)
            if "sum" in stats and "l2" in stats:
                # Cauchy-Schwarz: no row has a larger sum.
                most = np.sqrt(np.maximum(stats["n"], 0)) * stats["l2"]
                yield (
                    "stats.sum is larger than n and l2 allow",
                    np.abs(stats["sum"]) > most * (1 + _ROUNDING) + slack * stats["n"],
                )
        if rows.sketch is not None and "l2" in stats:
            yield from _sketch(rows, values, whole & (rows.counts == usable.sum(axis=1)))


def _extremes(values: NDArray[np.float32], usable: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The smallest and the largest usable value of each row, [R]; inf and -inf for a row without any."""
    if not values.shape[1]:
        return np.full(len(values), np.inf), np.full(len(values), -np.inf)
    low, high = (values, values) if usable.all() else (np.where(usable, values, sign * np.inf) for sign in (1, -1))
    return reduced(np.minimum, low).astype(np.float64), reduced(np.maximum, high).astype(np.float64)


def _sketch(rows: Rows, values: NDArray[np.float64], whole: NDArray[np.bool_]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    if rows.sketch is None:
        return
    l2 = rows.stats["l2"]
    sketch = rows.sketch.astype(np.float64)
    energy = np.einsum("ij,ij->i", sketch, sketch)  # NaN if there is no sketch
    ratio = energy / SKETCH_SIZE / np.where(l2 > 0, l2, 1.0) ** 2
    low, high = _SKETCH_RANGE
    # With fewer elements than projections the signs repeat themselves and the ratio scatters more.
    # Sums of values near the largest float32 are beyond it.
    judged = (l2 > 0) & (rows.sizes >= SKETCH_SIZE) & np.isfinite(energy)
    yield "the sketch belongs to another row than stats.l2", judged & ((ratio < low) | (ratio > high))
    checked = np.flatnonzero(whole & ~np.isnan(energy))
    if not len(checked):
        return
    wrong = np.zeros(len(rows), dtype=np.bool_)
    for count in set(rows.counts[checked].tolist()):
        same = checked[rows.counts[checked] == count]
        sketches = sketch_of(values[same, :count].astype(np.float32))
        sketches = sketches.astype(np.float32)  # as it is stored: sums may be beyond it
        slack = 0.0 if rows.quantum is None else rows.quantum[same].max(axis=1, initial=0.0) * np.sqrt(count) * 4
        off = np.where(sketches == rows.sketch[same], 0.0, np.abs(sketches - rows.sketch[same]))
        far = off.max(axis=1) > _ROUNDING * np.maximum(l2[same], 1e-30) + slack
        wrong[same] = far
    yield "the sketch is not that of the values", wrong


def _has_sinks(subject: Subject, name: str) -> bool:
    """Whether sinks take a share of the attention (`attn_sinks.weight`, an additional score of each head)."""
    origin, layer = subject.computation(name), parse(name).layer
    if origin is not None and any("sinks" in weight for weight in origin.weights):
        return True
    if subject.model is None:
        header = subject.dump.header
        stated = None if header is None else (header.hparams or {}).get("attention_sinks")
        return bool(_looks_like_sinks(subject.points[name]) if stated is None and origin is None else stated)
    return f"blk.{layer}.attn_sinks.weight" in subject.model.model.tensors


def _looks_like_sinks(rows: Rows) -> bool:
    """Whether every record has a head whose weights sum to less than 1, and none whose sum is more, where nothing says what the model has.

    A softmax that is not divided by its sum exceeds 1, and one that lacks keys has 1 where it sees all that there are. A sum of 0 is of no
    softmax, but of a row that was read past its end.
    """
    sums = [each for r in range(len(rows)) if _judged(rows, r) and len(each := _sums(rows, r))]
    if not sums or np.ptp(np.concatenate(sums)) <= _SUM:
        return False  # one factor for all heads and positions is no sink
    return all(0 < each.min() < 1 - _SUM and each.max() <= 1 + _SUM for each in sums)


def _judged(rows: Rows, r: int) -> bool:
    """Whether a record has the weights [heads, positions] from the first on."""
    shape = rows.shapes[r]
    scattered = rows.indices is not None and rows.indices[r, 0] >= 0
    return len(shape) == 2 and min(shape) >= 1 and not scattered


def _sums(rows: Rows, r: int) -> NDArray[np.float64]:
    """The sums of the weights of the heads that are recorded as a whole, and the mean sum of all if a statistic has it."""
    heads = rows.shapes[r][0]
    total = rows.stats["sum"][r] if "sum" in rows.stats else np.nan
    of_whole = _whole_heads(rows, r).sum(axis=1)
    return np.append(of_whole, total / heads) if np.isfinite(total) else of_whole


def _whole_heads(rows: Rows, r: int) -> NDArray[np.float64]:
    """float64 [heads, positions]: the weights of the heads that are recorded as a whole."""
    row, seen = rows.values[r, : int(rows.counts[r])].astype(np.float64), rows.shapes[r][1]
    return row[: len(row) // seen * seen].reshape(-1, seen)


def attention_rows(subject: Subject) -> Iterator[Hit]:
    """Attention weights that do not sum to 1, or that are the same for every position."""
    sums: dict[str, list[int]] = {}
    even: dict[str, list[int]] = {}
    evidence: dict[str, str] = {}
    for name, rows in subject.points.items():
        if kind(name) != "kq_soft_max":
            continue
        sinks = _has_sinks(subject, name)
        for r in range(len(rows)):
            if not _judged(rows, r):
                continue
            whole, seen = _whole_heads(rows, r), rows.shapes[r][1]
            off = [float(x) for x in _sums(rows, r) if not (abs(x - 1) <= _SUM or (sinks and 0 <= x < 1))]
            if off:
                sums.setdefault(name, []).append(r)
                evidence.setdefault(name, f"{off[0]:.4g}")
            elif (
                seen > 2
                and len(whole)
                and float(np.abs(whole - 1 / seen).max()) < 1e-6 / seen
                and int(rows.token_idx[r]) >= subject.uniform_until  # without rotation, keys of one token have one score
            ):
                even.setdefault(name, []).append(r)

    def not_one(name: str, bad: list[int]) -> str:
        return f"{name}: a head's weights sum to {evidence[name]} instead of 1, {positions_of(subject.points[name], bad)}"

    def uniform(name: str, bad: list[int]) -> str:
        return f"{name}: every position has the same weight, {positions_of(subject.points[name], bad)}"

    yield from by_point(sums, subject, not_one)
    yield from by_point(even, subject, uniform)
