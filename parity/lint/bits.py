"""Values whose bits are another type's: F16 read as BF16 or F32, the reverse, and addresses read as F32.

A row of a transformer spans few powers of two: the logarithms (base 2) of Gaussian values have a deviation of 1.6. Bits of
one type read as another show in two ways: the row's deviation is far from that, and, reread as the
other type, close to it.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from .rule import Hit, Subject, kind, leading, positions_of

_ENOUGH = 10  # values a row must have
_BATCH = 1 << 20  # values examined together: 4 MiB
# F16 bits read as BF16 (or as the upper half of an F32) have eight times the deviation: 13; a right row with outlier channels,
# some powers of two away, stays below 5.
_TOO_WIDE = 8.0
_PLAUSIBLE = (0.5, 5.0)
_LARGEST = 1e6  # largest value of a plausible row: ten times the largest scores seen (`parity.lint.numbers`)
# BF16 bits read as F16: magnitudes below 2 all land in [1, 2). A Gaussian row of ten values has a ratio of smallest to
# largest above 0.4 once in 10^7; what tanh saturates has often, and stays below 1.
_TOO_NARROW = 0.4
_LARGEST_UPPER = 0xFFFF  # upper half of an address of 48 bits: as a float32 at most 9.2e-41, which no activation is

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def _spread(rows: NDArray[np.floating]) -> Floats:
    """[R]: the deviation of log2|x| in each row; infinite if a value is zero or not finite."""
    size = np.abs(rows.astype(np.float64))
    usable = np.all(np.isfinite(size) & (size > 0), axis=1) & (rows.shape[1] >= _ENOUGH // 2)
    spreads = np.full(len(rows), np.inf)
    spreads[usable] = np.std(np.log2(size[usable]), axis=1)
    return spreads


def _wide(rows: NDArray[np.floating]) -> Bools:
    """[R]: whether values span more powers of two than a right row's, or are not finite; zeros, as of quantised weights, do not count."""
    size = np.abs(rows.astype(np.float64))
    counted = np.isfinite(size) & (size > 0)
    logs = np.log2(np.where(counted, size, 1.0))
    count = np.maximum(counted.sum(axis=1), 1)
    mean = (logs * counted).sum(axis=1) / count
    spread = np.sqrt((((logs - mean[:, None]) ** 2) * counted).sum(axis=1) / count)
    wide: Bools = (spread > _TOO_WIDE) | ~np.isfinite(size).all(axis=1)
    return wide if rows.shape[1] >= _ENOUGH // 2 else np.zeros(len(rows), dtype=np.bool_)


def _plausible(rows: NDArray[np.floating]) -> Bools:
    spread = _spread(rows)
    plausible_rows: Bools = (spread > _PLAUSIBLE[0]) & (spread < _PLAUSIBLE[1])
    plausible_rows[plausible_rows] = np.abs(rows[plausible_rows].astype(np.float64)).max(axis=1) < _LARGEST
    return plausible_rows


def _signed(rows: NDArray[np.floating]) -> Bools:
    """[R]: whether values of both signs are among them. Decays, exp(−exp(x)), span as many powers of two as garbage and are positive."""
    signed: Bools = np.any(rows > 0, axis=1) & np.any(rows < 0, axis=1)
    return signed


def _narrow(rows: NDArray[np.floating]) -> Bools:
    size = np.abs(rows.astype(np.float64))
    narrow: Bools = np.isfinite(size).all(axis=1) & (size.min(axis=1) >= _TOO_NARROW * size.max(axis=1))
    narrow &= _signed(rows)
    narrow &= size.max(axis=1) > 1
    return narrow


def _bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def confusion(rows: NDArray[np.float32]) -> dict[str, Bools]:
    """What the bits of rows [R, k] really are, as the end of a sentence -> bool [R]; false where they may well be as declared."""
    width = rows.shape[1]
    if width < _ENOUGH:
        return {}
    bits = np.ascontiguousarray(rows).view(np.uint32)
    high, low = (bits >> np.uint32(16)).astype(np.uint16), (bits & np.uint32(0xFFFF)).astype(np.uint16)
    with np.errstate(over="ignore", invalid="ignore"):
        half = rows.astype(np.float16)
        is_f16 = np.all((half.astype(np.float32) == rows) | np.isnan(rows), axis=1)
    is_bf16: Bools = low.max(axis=1) == 0
    words = half.view(np.uint16)
    wide = _wide(rows)
    pairs = np.stack([low, high], axis=2).reshape(len(rows), -1)
    every_second = "every second value is the lower half of a float"
    even = _where(is_bf16, lambda members: _wide(rows[members, 0::2]) & _signed(rows[members, 0::2]))
    small: Bools = np.abs(_bf16(low)).max(axis=1) < _LARGEST  # next to no random bits are
    candidates = {
        "F16 bits read as BF16": _where(
            is_bf16 & wide & _signed(rows), lambda members: _plausible(high[members].view(np.float16))
        ),
        f"F32 bits read as BF16 ({every_second})": _where(even, lambda members: _plausible(rows[members, 1::2])),
        "BF16 bits read as F16": _where(is_f16, lambda members: _narrow(rows[members]) & _plausible(_bf16(words[members]))),
        "pairs of F16 read as F32": _where(~is_bf16 & wide, lambda members: _plausible(pairs[members].view(np.float16))),
        "pairs of BF16 read as F32": _where(
            ~is_bf16 & small, lambda members: _plausible(rows[members]) & _plausible(_bf16(low[members]))
        ),
    }
    if width >= 2 * _ENOUGH - 4:  # half of the values must be enough
        candidates[f"F32 bits read as F16 ({every_second})"] = _where(
            is_f16,
            lambda members: (
                _narrow(rows[members, 1::2]) & ~_narrow(rows[members, 0::2]) & _plausible(_bf16(words[members, 1::2]))
            ),
        )
    return candidates


def _where(condition: Bools, check: Callable[[Bools], Bools]) -> Bools:
    """A condition [R] combined with a slower check, which is computed only for the rows that meet the condition."""
    chosen = condition.copy()
    if condition.any():
        chosen[condition] = check(condition)
    return chosen


def wrong_type(subject: Subject) -> Iterator[Hit]:
    """A record's dtype contradicts its values."""
    for names, width in _batches(subject):
        candidates = confusion(np.concatenate([subject.points[name].values[:, :width] for name in names]))
        stop = 0
        for name in names:
            rows = subject.points[name]
            start, stop = stop, stop + len(rows)
            for evidence, wrong in candidates.items():
                # One row in a million looks like another type's by chance; a wrong type is wrong in every row of a point.
                bad = wrong[start:stop].nonzero()[0].tolist()
                if len(bad) * 2 > len(rows):
                    shown = ", ".join(f"{x:.4g}" for x in leading(rows, bad[0])[:4])
                    text = f"{name} says {rows.dtype}, its values ({shown}, …) are {evidence}, {positions_of(rows, bad)}"
                    yield Hit(name, int(rows.token_idx[bad[0]]), text)
                    break


def addresses(subject: Subject) -> Iterator[Hit]:
    """Every second value has the same few bits, those of a denormal: the upper halves of 64-bit addresses in one region of memory."""
    for name, rows in subject.points.items():
        width = int(rows.counts.min(initial=rows.values.shape[1]))
        if width < _ENOUGH or rows.dtype.startswith("i"):
            continue
        words = np.ascontiguousarray(rows.values[:, : width - width % 2], dtype=np.float32).view(np.uint32).astype(np.int64)
        for upper, lower in ((words[:, 1::2], words[:, 0::2]), (words[:, 0::2], words[:, 1::2])):
            one_region = (np.ptp(upper, axis=1) <= 1) & (upper.min(axis=1) > 0) & (upper.max(axis=1) <= _LARGEST_UPPER)
            bad = (one_region & (np.ptp(lower, axis=1) > 0)).nonzero()[0].tolist()
            if bad:
                shown = ", ".join(f"{x:.4g}" for x in leading(rows, bad[0])[:4])
                at = f"0x{(int(upper[bad[0], 0]) << 32) + int(lower[bad[0], 0]):x}"
                text = f"{name} holds 64-bit addresses ({shown}, …: {at}, …), {positions_of(rows, bad)}"
                yield Hit(name, int(rows.token_idx[bad[0]]), text)
                break


def _batches(subject: Subject) -> Iterator[tuple[list[str], int]]:
    """Groups of points whose rows have the same width, with that width, so that many small points are as fast as few large ones."""
    waiting: dict[int, tuple[list[str], int]] = {}
    for name, rows in subject.points.items():
        if rows.quantum is not None or "kq" in kind(name):
            continue  # rounded text has lost the bits; attention weights may span any range
        width = int(rows.counts.min(initial=rows.values.shape[1]))
        names, filled = waiting.get(width, ([], 0))
        names.append(name)
        waiting[width] = names, filled + len(rows) * width
        if waiting[width][1] > _BATCH:
            yield waiting.pop(width)[0], width
    for width, (names, _) in waiting.items():
        yield names, width
