"""How many digits engines printed, determined for many records at once."""

import re
from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from .arrays import Text

# A float32 needs up to 9 significant digits. A text whose values all stop at 7 or fewer was rounded for print.
_PRINTED_DIGITS = 7
_SURE = 64, 1024  # bytes of the values' text whose digits are looked at first; of random ones, 64 are too few in 2 %
_PLAIN = re.compile(rb"[-+0-9.eE,]*")  # numbers alone: no blanks; nothing where a word stood
_FEW = 256  # numbers that are looked at one by one in the time that arrays take to be made
_DECIMAL = re.compile(r"[+-]?(\d*)(?:\.(\d*))?(?:[eE]([+-]?\d+))?")
_BLANKS = b" \t\r\n"
_EXPONENT, _HUGE = 8, 10_000  # digits of an exponent that are looked at, and one beyond every float64
_SAMPLES = 8  # lines whose digits are looked at one by one; one printf writes all lines of a file …
_LEADING = 32  # … and all values of a line: whether the rest fits is seen from the values themselves

Floats = NDArray[np.float64]


def quanta(texts: Sequence[Text], values: Floats) -> Floats | None:
    """`quantum` of many records at once, from their values as text [R] and as numbers [R, k]: [R, k], or None if all are exact.

    Words that stand for numbers are left out of the texts (`checkpoints.reading.arrays.Numbers`). A few lines show how the file
    is printed, and the values of the others show whether they are printed in the same way. If not, the line's own text decides.
    """
    rows, width = values.shape
    if not rows or not width:
        return None
    picked = sorted({i * (rows - 1) // max(_SAMPLES - 1, 1) for i in range(_SAMPLES)})
    samples = [bytes(texts[i]) for i in picked]
    if all(surely_exact(text) for text in samples):
        return None
    unsure = np.ones(rows, dtype=np.bool_)
    steps = np.zeros((rows, width))
    step = _step(samples, values[picked])
    known: dict[int, Floats | None] = {}
    if step is None:
        known = {i: quantum(text, values[i]) for text, i in zip(samples, picked, strict=True)}
        if all(own is None for own in known.values()):
            return None
    else:
        with np.errstate(invalid="ignore", over="ignore"):
            scaled = values / step
            # float64 holds a printed decimal to 1e-16 of itself; what is not finite is decided by its text.
            unsure = ~np.all(np.abs(scaled - np.rint(scaled)) <= 1e-9 + 4e-16 * np.abs(scaled), axis=1)
        unsure |= ~np.isfinite(values).all(axis=1)
        steps[~unsure] = step
    rest = np.flatnonzero(unsure)
    if len(rest) > 1:
        together = _many(b",".join(bytes(texts[r]).strip(b"[] ") for r in rest.tolist()), values[rest])
        if together is not None:
            steps[rest], rest = together, rest[:0]
    for r in rest.tolist():
        own = known[r] if r in known else quantum(bytes(texts[r]), values[r])
        if own is not None:
            steps[r] = own
    return steps if steps.any() else None


def _step(texts: list[bytes], values: Floats) -> float | None:
    """The step that the leading values of all these texts share; None if they differ, or are exact."""
    count = min(values.shape[1], _LEADING)
    steps: set[float] = set()
    for text, row in zip(texts, values, strict=True):
        sample = quantum(b",".join(text.split(b",", count)[:count]), row[:count])
        steps |= {-1.0} if sample is None else set(sample.tolist())
    step = steps.pop() if len(steps) == 1 else 0.0
    return step if step > 0 else None


def surely_exact(text: bytes) -> bool:
    """Whether the first of these JSON numbers suffice to show that the text gives every float32 exactly: then `quantum` is None."""
    return any(_shows_all_digits(text[1:size].split(b",")[:-1]) for size in _SURE)


def _shows_all_digits(numbers: list[bytes]) -> bool:
    mantissas = [number.strip().partition(b"e")[0] for number in numbers]
    digits = max((len(number.replace(b".", b"").strip(b"-0")) for number in mantissas), default=0)
    return digits > _PRINTED_DIGITS and len({len(number.partition(b".")[2]) for number in mantissas}) > 1


class _Decimals(Struct, frozen=True):
    """How k numbers are printed: decimals after the point, significant digits, exponent; `printed` are finite and no words."""

    places: NDArray[np.int64]
    digits: NDArray[np.int64]
    exponents: NDArray[np.int64]
    printed: NDArray[np.bool_]


def quantum(text: bytes, values: Floats) -> Floats | None:
    """The step of the last printed decimal of each of `values` [k], or None where the text gives every float32 exactly.

    `%f` prints the same number of decimals everywhere; `%g` stops at a number of significant digits. Words have no step.
    """
    decimals = _decimals(text.strip(b"[] "), values)
    if decimals is None or not decimals.printed.any():
        return None
    steps = _steps(decimals, values, (1, len(values)))
    return steps[0] if steps.any() else None


def _many(text: bytes, values: Floats) -> Floats | None:
    """`quantum` of the rows [R, k] laid end to end in a text; 0 for a row whose text gives every float32 exactly."""
    text = text.translate(None, _BLANKS)
    every = _of_numbers(text, values.ravel()) if _PLAIN.fullmatch(text) else None
    return None if every is None else _steps(every, values, values.shape)


def _steps(decimals: _Decimals, values: Floats, shape: tuple[int, ...]) -> Floats:
    """The steps of rows: by their decimals if all values have equally many, otherwise by the last of the most digits that a value has."""
    places, digits, printed = decimals.places.reshape(shape), decimals.digits.reshape(shape), decimals.printed.reshape(shape)
    size = np.abs(values).reshape(shape)
    most = np.where(printed, digits, 0).max(axis=1, keepdims=True)
    highest = np.where(printed, places, 0).max(axis=1, keepdims=True)
    alike = ((places == highest) | ~printed).all(axis=1, keepdims=True)
    with np.errstate(divide="ignore", over="ignore"):
        last = np.where(size > 0, 10.0 ** (np.floor(np.log10(size)) - most + 1), 0.0)
        fixed = 10.0 ** (decimals.exponents.reshape(shape) - places).astype(np.float64)
    steps = np.where(alike & (highest > 0), fixed, last)
    steps[((most > _PRINTED_DIGITS) & ~alike)[:, 0]] = 0.0
    return np.where(printed & np.isfinite(steps), steps, 0.0)


def _decimals(text: bytes, values: Floats) -> _Decimals | None:
    """The printed decimals; None unless there are as many numbers or words as values."""
    if not len(values):
        return None
    text = text.translate(None, _BLANKS)
    if len(values) > _FEW and _PLAIN.fullmatch(text):
        return _of_numbers(text, values)
    words = [word.strip('"') for word in text.decode("ascii", "replace").split(",")]
    if len(words) != len(values):
        return None
    matches = [match if (match := _DECIMAL.fullmatch(word)) and (match[1] or match[2]) else None for word in words]
    return _Decimals(
        np.array([len(match[2] or "") if match else 0 for match in matches]),
        np.array([len(((match[1] or "") + (match[2] or "")).strip("0")) if match else 0 for match in matches]),
        np.array([max(-_HUGE, min(int((match[3] or "0")[:_EXPONENT]), _HUGE)) if match else 0 for match in matches]),
        np.array([match is not None for match in matches]) & np.isfinite(values),
    )


def _of_numbers(text: bytes, values: Floats) -> _Decimals | None:
    """`_decimals` of numbers without words, all at once."""
    data = np.frombuffer(text + b",", np.uint8)
    ends = np.flatnonzero(data == ord(","))
    count = len(values)
    if len(ends) != count:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    number = np.repeat(np.arange(count, dtype=np.int32), ends - starts + 1)  # which one a byte belongs to

    def seen(marks: NDArray[np.bool_]) -> NDArray[np.int32]:
        """How many of these bytes came before each byte of its own number, itself included."""
        total = np.cumsum(marks, dtype=np.int32)
        before: NDArray[np.int32] = (total[starts] - marks[starts])[number]
        return total - before

    is_exponent = (data == ord("e")) | (data == ord("E"))
    in_exponent = seen(is_exponent) > 0
    digit = (data >= ord("0")) & (data <= ord("9"))
    mantissa = digit & ~in_exponent
    place = np.where(mantissa, seen(mantissa), 0)
    telling = mantissa & (data != ord("0"))
    last = np.maximum.reduceat(np.where(telling, place, 0), starts)
    first = np.minimum.reduceat(np.where(telling, place, len(data)), starts)
    exponents = np.zeros(count, dtype=np.int64)
    if is_exponent.any():
        power = digit & in_exponent
        following = ends[number] - np.arange(len(data)) - 1  # digits that follow this one, in an exponent
        worth = np.where(power, (data - float(ord("0"))) * 10.0 ** np.minimum(following, _EXPONENT), 0.0)
        below = np.logical_or.reduceat(in_exponent & (data == ord("-")), starts)
        size = np.minimum(np.add.reduceat(worth, starts), _HUGE).astype(np.int64)
        exponents = np.where(below, -size, size)
    return _Decimals(
        np.add.reduceat(mantissa & (seen(data == ord(".")) > 0), starts, dtype=np.int64),
        np.where(last > 0, last - first + 1, 0),
        exponents,
        (np.add.reduceat(mantissa, starts, dtype=np.int64) > 0) & np.isfinite(values),
    )
