"""The digits that engines print, looked at for many records at once."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

# A float32 needs up to 9 significant digits. A text whose values all stop at 7 or fewer was rounded for print.
_PRINTED_DIGITS = 7
_SURE = 64, 1024  # bytes of the values' text whose digits are looked at first; of random ones, 64 are too few in 2 %
_PLAIN = re.compile(rb"[-+0-9.eE,]*")  # numbers alone: no words, no blanks
_FEW = 256  # numbers that are looked at one by one in the time that arrays take to be made
_DECIMAL = re.compile(r"[+-]?(\d*)(?:\.(\d*))?(?:[eE]([+-]?\d+))?")
_SAMPLES = 8  # lines whose digits are looked at one by one; one printf writes all lines of a file …
_LEADING = 32  # … and all values of a line: whether the rest fits is seen from the values themselves

Floats = NDArray[np.float64]
Text = msgspec.Raw | memoryview | bytes


def quanta(texts: Sequence[Text], values: Floats) -> Floats | None:
    """`quantum` of many records at once: the texts [R] of their values and these [R, k] -> [R, k], or None where all are exact.

    A few lines tell how the file is printed; the values themselves show which others are printed so. Where they don't fit,
    the line's own text decides.
    """
    rows, width = values.shape
    if not rows or not width:
        return None
    picked = [bytes(texts[i]) for i in sorted({i * (rows - 1) // max(_SAMPLES - 1, 1) for i in range(_SAMPLES)})]
    if all(surely_exact(text) for text in picked):
        return None
    unsure = np.ones(rows, dtype=np.bool_)
    found = np.zeros((rows, width))
    step = _step(picked, width)
    if step is None:
        if all(quantum(text, width) is None for text in picked):
            return None
    else:
        scaled = values / step
        # float64 holds a printed decimal to 1e-16 of itself.
        unsure = ~np.all(np.abs(scaled - np.rint(scaled)) <= 1e-9 + 4e-16 * np.abs(scaled), axis=1)
        found[~unsure] = step
    rest = np.flatnonzero(unsure).tolist()
    if (
        len(rest) > 1
        and (together := _many(b",".join(bytes(texts[r]).strip(b"[] ") for r in rest), len(rest), width)) is not None
    ):
        found[rest], rest = together, []
    for r in rest:
        own = quantum(bytes(texts[r]), width)
        if own is not None:
            found[r] = own
    return found if found.any() else None


def _step(texts: list[bytes], width: int) -> float | None:
    """The one step of the leading values of all these texts; None where they differ, or are exact."""
    count = min(width, _LEADING)
    steps: set[float] = set()
    for text in texts:
        sample = quantum(b",".join(text.split(b",", count)[:count]), count)
        steps |= {-1.0} if sample is None else set(sample.tolist())
    step = steps.pop() if len(steps) == 1 else 0.0
    return step if step > 0 else None


def surely_exact(text: bytes) -> bool:
    """Whether the first of these JSON numbers alone show that their text gives every float32: then `quantum` is None."""
    return any(_shows_all_digits(text[1:size].split(b",")[:-1]) for size in _SURE)


def _shows_all_digits(numbers: list[bytes]) -> bool:
    mantissas = [number.strip().partition(b"e")[0] for number in numbers]
    digits = max((len(number.replace(b".", b"").strip(b"-0")) for number in mantissas), default=0)
    return digits > _PRINTED_DIGITS and len({len(number.partition(b".")[2]) for number in mantissas}) > 1


@dataclass(frozen=True)
class _Decimals:
    """How k numbers are printed: decimals after the point, significant digits, exponent, and the number; `printed` are no words."""

    places: NDArray[np.int64]
    digits: NDArray[np.int64]
    exponents: NDArray[np.int64]
    values: Floats
    printed: NDArray[np.bool_]


def quantum(text: bytes, count: int) -> Floats | None:
    """The step of the last printed decimal of each of `count` values, or None where the text gives every float32 exactly.

    `%f` prints the same number of decimals everywhere; `%g` stops at a number of significant digits.
    """
    decimals = _decimals(text.strip(b"[] "), count)
    if decimals is None or not decimals.printed.any():
        return None
    places, exponents = decimals.places[decimals.printed], decimals.exponents[decimals.printed]
    most = int(decimals.digits[decimals.printed].max())
    alike = bool((places == places[0]).all())
    if most > _PRINTED_DIGITS and not alike:
        return None
    steps = np.zeros(count)
    if alike and places[0]:
        steps[decimals.printed] = 10.0 ** (exponents - places).astype(np.float64)
    else:  # the last of `most` significant digits of each
        size = np.abs(decimals.values)
        known = decimals.printed & (size > 0)
        steps[known] = 10.0 ** (np.floor(np.log10(size[known])) - most + 1)
    return steps


def _many(text: bytes, rows: int, width: int) -> Floats | None:
    """`quantum` [rows, width] of rows laid end to end, 0 where a row's text gives every float32; None where there are words in them."""
    text = text.replace(b" ", b"")
    every = _of_numbers(text, rows * width) if _PLAIN.fullmatch(text) else None
    if every is None or not every.printed.all():
        return None
    shape = rows, width
    places, digits, size = every.places.reshape(shape), every.digits.reshape(shape), np.abs(every.values).reshape(shape)
    most = digits.max(axis=1, keepdims=True)
    alike = (places == places[:, :1]).all(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        last = np.where(size > 0, 10.0 ** (np.floor(np.log10(size)) - most + 1), 0.0)
    fixed = 10.0 ** (every.exponents.reshape(shape) - places).astype(np.float64)
    steps = np.where(alike & (places[:, :1] > 0), fixed, last)
    return np.where((most > _PRINTED_DIGITS) & ~alike, 0.0, steps)


def _decimals(text: bytes, count: int) -> _Decimals | None:
    """What is printed; None where it is not `count` numbers or words."""
    if not count:
        return None
    text = text.replace(b" ", b"")
    if count > _FEW and _PLAIN.fullmatch(text):
        return _of_numbers(text, count)
    words = [word.strip().strip('"') for word in text.decode("ascii", "replace").split(",")]
    if len(words) != count:
        return None
    found = [_DECIMAL.fullmatch(word) for word in words]
    matches = [match if match is not None and (match[1] or match[2]) else None for match in found]  # not nan, inf
    return _Decimals(
        np.array([len(match[2] or "") if match else 0 for match in matches]),
        np.array([len(((match[1] or "") + (match[2] or "")).strip("0")) if match else 0 for match in matches]),
        np.array([int(match[3] or 0) if match else 0 for match in matches]),
        np.array([float(match[0]) if match else 0.0 for match in matches]),
        np.array([match is not None for match in matches]),
    )


def _of_numbers(text: bytes, count: int) -> _Decimals | None:
    """The same of numbers alone, all at once."""
    values = np.array(text.split(b","))
    if len(values) != count:
        return None
    data = np.frombuffer(text + b",", np.uint8)
    ends = np.flatnonzero(data == ord(","))
    starts = np.concatenate([[0], ends[:-1] + 1])
    number = np.repeat(np.arange(count), ends - starts + 1)  # which one a byte belongs to

    def seen(marks: NDArray[np.bool_]) -> NDArray[np.int64]:
        """How many of these bytes came before each byte of its own number, itself included."""
        total = np.cumsum(marks)
        before: NDArray[np.int64] = (total[starts] - marks[starts])[number]
        return total - before

    exponent = (data == ord("e")) | (data == ord("E"))
    mantissa = (data >= ord("0")) & (data <= ord("9")) & (seen(exponent) == 0)
    place = np.where(mantissa, seen(mantissa), 0)
    telling = mantissa & (data != ord("0"))
    last = np.maximum.reduceat(np.where(telling, place, 0), starts)
    first = np.minimum.reduceat(np.where(telling, place, len(data)), starts)
    places = np.add.reduceat(mantissa & (seen(data == ord(".")) > 0), starts, dtype=np.int64)
    exponents = np.zeros(count, dtype=np.int64)
    try:
        for i in np.unique(number[exponent]).tolist():
            exponents[i] = int(re.split(b"[eE]", bytes(values[i]))[1])
        return _Decimals(
            places,
            np.where(last > 0, last - first + 1, 0),
            exponents,
            values.astype(np.float64),
            np.add.reduceat(mantissa, starts, dtype=np.int64) > 0,
        )
    except (ValueError, OverflowError):
        return None
