"""Whether one side's values are the other's, rounded to a lower type: then they differ by the type, not by an operation."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.record import Rows

from ..measured.slices import without_infinities

Floats = NDArray[np.float32]

_BLOCK = 32  # of Q8_0
# Bits of float32's mantissa that a simple number (1, 0.75, 3) has not, and how many others show a type: any has F16's bits by chance once
# in 8,192 draws.
_SIMPLE, _FEWEST = 19, 3
# Error of a right engine in proportion to a row's root mean square, the root of the limit of NMSE; and the share of values that it may
# round the other way: those near a tie, and those so small that their steps are no larger than the error.
_NOISE, _NEAR_TIES = 1e-5, 0.05
# The share of values printed with few digits that have to show a type: those which it moves by more than a whole step of the digits, so
# that the right value was printed otherwise. With four digits F16 moves one in four so far; the share is a choice.
_SEEN = 0.1
# Bits of mantissa after the first one, and the exponent of the smallest step.
_MANTISSA = {"F16": (10, -24), "BF16": (7, -133), "TF32": (10, -136)}


def rounded_to(ours: Rows, ref: Rows) -> str:
    """The type ("F16 or TF32", "BF16", "8 bits per block") to which the reference's values round to give ours, everywhere; else empty.

    Only leading values count; if the slice ends inside a block, that block is left out. Ours may have been printed with fewer digits than
    the type has.
    """
    values = _compared(ours, ref)
    if values is None:
        return ""
    if fitting := _fitting(*values, _types()) or _printed(*values, ours):
        return fitting
    least = int(np.minimum(ours.counts, ref.counts).min())
    return "8 bits per block" if _steps(values[0][:, :least], values[1][:, :least]) else ""


def cut_to(ours: Rows, ref: Rows) -> str:
    """The same for the types to which the reference's further digits are cut off: "F16", "BF16", "TF32"."""
    values = _compared(ours, ref)
    return "" if values is None else _fitting(*values, _cutting())


def _compared(ours: Rows, ref: Rows) -> tuple[Floats, Floats, int] | None:
    """The leading values of both sides and how many they are; None if they show no type."""
    if ours.indices is not None or ref.indices is not None or not len(ours):
        return None
    counts = np.minimum(ours.counts, ref.counts)
    width = int(counts.max())
    inside = np.arange(width) < counts[:, None]
    # Rows of attention's scores grow with the position: what a shorter one lacks counts as 0, which every type has.
    a, b = without_infinities(*(np.where(inside, side.values[:, :width], np.float32(0)) for side in (ours, ref)))
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or _too_simple(a) or np.array_equal(a, b):
        return None
    return a, b, int(counts.sum())


def _fitting(a: Floats, b: Floats, number: int, types: Iterator[tuple[str, Callable[[Floats], Floats]]]) -> str:
    """The types of which `a` is `b`."""
    with np.errstate(over="ignore"):  # what F16 cannot hold becomes infinite, and fits nothing
        return " or ".join(name for name, rounding in types if _rounds(a, b, rounding, number))


def _printed(a: Floats, b: Floats, number: int, ours: Rows) -> str:
    """The types of which `a` is `b`, printed with few digits: `ours` knows their steps."""
    if ours.quantum is None:
        return ""
    half = ours.quantum[:, : a.shape[1]] / 2 + np.spacing(np.abs(a))
    with np.errstate(over="ignore", invalid="ignore"):
        return " or ".join(name for name, rounding in _types() if _printed_as(a, b, rounding(b), half, number))


def _printed_as(a: Floats, b: Floats, rounded: Floats, half: NDArray[np.float64], number: int) -> bool:
    """Whether `a` is `rounded` but for half a step of its digits, which hide too little for it to be `b`; near ties as in `_rounds`."""
    wide = b.astype(np.float64)
    noise = _NOISE * np.sqrt(np.mean(wide**2, axis=1, keepdims=True))
    apart, moved = np.abs(a - rounded.astype(np.float64)), np.abs(rounded - wide)
    if (apart > half).sum() > _NEAR_TIES * number or not (np.abs(a - wide) <= moved + half + 2 * noise).all():
        return False
    return int((moved > 2 * half).sum()) >= max(_FEWEST, _SEEN * number)


def is_rounding(values: NDArray[Any], right: NDArray[Any]) -> bool:
    """Whether values are exactly the right ones, rounded to a lower type, however few bits they have."""
    a, b = (np.asarray(side, dtype=np.float32) for side in (values, right))
    with np.errstate(over="ignore"):
        return any(np.array_equal(a, rounding(b)) for _, rounding in _types())


def _too_simple(values: Floats) -> bool:
    """Whether too few of the values have more bits than any type has."""
    return int(np.count_nonzero(_mantissa(values, _SIMPLE) != values)) < _FEWEST


def type_of(values: Floats) -> str:
    """The lowest type ("F16", "BF16", "TF32") that has all of these values exactly; empty if none has, or if they are too few to tell."""
    if np.isnan(values).any() or _too_simple(values):
        return ""
    with np.errstate(over="ignore"):
        fitting = [name for name, rounding in _types() if np.array_equal(rounding(values), values)]
    return min(fitting, key=lambda name: _MANTISSA[name][0], default="")


def beyond_rounding(values: Floats, rounded: Floats, name: str) -> Floats:
    """`rounded`, values of a type that `type_of` names, plus what `values` are further from it than half a step of that type."""
    bits, least = _MANTISSA[name]
    half = np.ldexp(0.5, np.maximum(np.frexp(rounded)[1] - 1 - bits, least))
    apart = values.astype(np.float64) - rounded
    with np.errstate(invalid="ignore"):
        return np.asarray((rounded + np.sign(apart) * np.maximum(np.abs(apart) - half, 0.0)).astype(np.float32))


def _rounds(a: Floats, b: Floats, rounding: Callable[[Floats], Floats], number: int) -> bool:
    """Whether `a` is `b` rounded, except for a few of `number` values near the middle of two steps, where the last bits decide."""
    rounded = rounding(b)
    if not np.array_equal(rounding(a), a) or (a != rounded).sum() > _NEAR_TIES * number:
        return False
    noise = _NOISE * np.sqrt(np.mean(b.astype(np.float64) ** 2, axis=1, keepdims=True))
    return bool((np.abs(a - b) <= np.abs(rounded - b) + 2 * noise).all())


def _types() -> Iterator[tuple[str, Callable[[Floats], Floats]]]:
    yield "F16", lambda x: x.astype(np.float16).astype(np.float32)
    yield "BF16", lambda x: _mantissa(x, 16)
    yield "TF32", lambda x: _mantissa(x, 13)


def _cutting() -> Iterator[tuple[str, Callable[[Floats], Floats]]]:
    yield "F16", _cut_to_f16
    yield "BF16", lambda x: _without_digits(x, 16)
    yield "TF32", lambda x: _without_digits(x, 13)


def _cut_to_f16(x: Floats) -> Floats:
    half = x.astype(np.float16)
    beyond = np.abs(half.astype(np.float32)) > np.abs(x)
    return np.where(beyond, np.nextafter(half, np.float16(0)), half).astype(np.float32)


def _without_digits(x: Floats, dropped: int) -> Floats:
    """The values without so many bits of mantissa."""
    return (np.ascontiguousarray(x).view(np.uint32) >> np.uint32(dropped) << np.uint32(dropped)).view(np.float32)


def _mantissa(x: Floats, dropped: int) -> Floats:
    """The values rounded to nearest even, with `dropped` bits less of mantissa."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    half = np.uint32((1 << (dropped - 1)) - 1) + ((bits >> np.uint32(dropped)) & np.uint32(1))
    mask = np.uint32(0xFFFFFFFF ^ ((1 << dropped) - 1))
    return np.asarray(((bits + half) & mask).view(np.float32))


def _steps(a: Floats, b: Floats) -> bool:
    """Whether each block of `a` consists of multiples of one step, 127 at most, with every `b` within a step of them."""
    blocks = a.shape[1] // _BLOCK
    if not blocks:
        return False
    cut = a[:, : blocks * _BLOCK].reshape(-1, _BLOCK).astype(np.float64)
    other = b[:, : blocks * _BLOCK].reshape(-1, _BLOCK).astype(np.float64)
    step = np.abs(cut).max(axis=1, keepdims=True) / 127
    if not step.all():
        return False
    levels = cut / step
    # The step itself is stored in F16, so the largest value need not be exactly 127 steps.
    return bool(
        (np.abs(levels - np.rint(levels)) < 0.02).all() and (np.abs(cut - other) <= 0.51 * step * (1 + 2.0**-10) + 1e-12).all()
    )
