"""What engines print, as JSON: bare nan and inf, log text before the brace, shapes as text, digits that were rounded for print."""

import re
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

_WORDS = {
    "NaN": np.nan,
    "nan": np.nan,
    "-nan": np.nan,
    "Infinity": np.inf,
    "inf": np.inf,
    "-Infinity": -np.inf,
    "-inf": -np.inf,
}
_BARE = re.compile(r'(?<![\w"])(-?nan(?:\(\w*\))?|[+-]?inf(?:inity)?|-?NaN|[+-]?Infinity)(?![\w"])', re.IGNORECASE)
_VALUES = re.compile(rb'"values"\s*:\s*\[([^\]]*)\]')
_DECIMAL = re.compile(r"[+-]?(\d*)(?:\.(\d*))?(?:[eE]([+-]?\d+))?")
# A float32 needs up to 9 significant digits. A text whose values all stop at 7 or fewer was rounded for print.
_PRINTED_DIGITS = 7
_SAMPLES = 8  # lines whose digits are looked at one by one; one printf writes all lines of a file

Floats = NDArray[np.float64]


def loads(text: str | bytes) -> Any:
    """One line's JSON; text before the first brace and bare nan/inf are tolerated.

    Raises:
        ValueError: the line is not JSON even so.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        line = text if isinstance(text, str) else text.decode("utf-8", "replace")
    start = line.find("{")
    if start < 0:
        raise ValueError("no JSON object in this line")
    return orjson.loads(_BARE.sub(r'"\1"', line[start:].rstrip().rstrip("\0")))


def number(value: Any) -> float:
    """A number, or a word for one that JSON lacks; null is NaN.

    Raises:
        ValueError, TypeError: it is neither.
    """
    if isinstance(value, str):
        word = value.split("(")[0].lower()
        if word in ("-nan", "nan"):
            return np.nan
        return _WORDS[value] if value in _WORDS else float(word)
    return np.nan if value is None else float(value)


def shape(found: Any) -> tuple[int, ...]:
    """A shape as a list or as text ("[1,151936]"); leading ones are dropped, since a record is one position's row.

    Raises:
        ValueError, TypeError: it is none.
    """
    numbers = re.findall(r"-?\d+", found) if isinstance(found, str) else (found or [])
    row = tuple(int(size) for size in numbers)
    if any(size < 0 for size in row):
        raise ValueError(f'"shape" has a negative number: {list(row)}')
    while len(row) > 1 and row[0] == 1:
        row = row[1:]
    return row


def quantum(line: bytes, count: int) -> Floats | None:
    """The step of the last printed decimal of each value, or None where the text gives every float32 exactly.

    `%f` prints the same number of decimals everywhere; `%g` stops at a number of significant digits.
    """
    match = _VALUES.search(line)
    texts = [text.strip().strip('"') for text in match[1].decode("ascii", "replace").split(",")] if match else []
    return quantum_of(texts) if len(texts) == count and count else None


def quantum_of(texts: list[str]) -> Floats | None:
    """`quantum` of the values' texts."""
    parsed = [_DECIMAL.fullmatch(text) for text in texts]
    decimals, digits = [], []
    for found in parsed:
        if found is None or not (found[1] or found[2]):
            continue  # nan, inf
        decimals.append((len(found[2] or ""), int(found[3] or 0)))
        digits.append(len(((found[1] or "") + (found[2] or "")).strip("0")))
    if not decimals or (max(digits) > _PRINTED_DIGITS and len({places for places, _ in decimals}) > 1):
        return None
    if len({places for places, _ in decimals}) == 1 and any(places for places, _ in decimals):
        steps = [10.0 ** (max(exponent, -400) - places) for places, exponent in decimals]
    else:
        steps = [_last_digit(found, max(digits)) for found in parsed if found is not None and (found[1] or found[2])]
    quanta = np.zeros(len(texts))
    quanta[[i for i, found in enumerate(parsed) if found is not None and (found[1] or found[2])]] = steps
    return quanta


def _last_digit(found: re.Match[str], digits: int) -> float:
    """The step of the last of `digits` significant digits of a printed number."""
    value = abs(float(found[0]))
    return 0.0 if value == 0 or not np.isfinite(value) else float(10.0 ** (np.floor(np.log10(value)) - digits + 1))


def quanta(lines: list[bytes], values: Floats) -> Floats | None:
    """`quantum` of many records at once: lines [R] and their values [R, k] -> [R, k], or None where all are exact.

    A few lines tell how the file is printed; the values themselves show which others are printed so. Where they don't fit,
    the line's own text decides.
    """
    rows, width = values.shape
    if not rows or not width:
        return None
    picked = sorted({i * (rows - 1) // max(_SAMPLES - 1, 1) for i in range(_SAMPLES)})
    samples = [quantum(lines[i], width) for i in picked]
    if all(sample is None for sample in samples):
        return None
    found = np.zeros((rows, width))
    unsure = np.ones(rows, dtype=np.bool_)
    steps = {float(step) for sample in samples if sample is not None for step in sample}
    if len(steps) == 1 and None not in [None if sample is None else 0 for sample in samples]:
        step = steps.pop()
        if step > 0:
            scaled = values / step
            # float64 holds a printed decimal to 1e-16 of itself.
            unsure = ~np.all(np.abs(scaled - np.rint(scaled)) <= 1e-9 + 4e-16 * np.abs(scaled), axis=1)
            found[~unsure] = step
    for r in np.flatnonzero(unsure).tolist():
        own = quantum(lines[r], width)
        if own is not None:
            found[r] = own
    return found if found.any() else None
