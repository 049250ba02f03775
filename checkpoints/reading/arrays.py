"""Many JSON arrays of numbers as one NumPy array: simdjson reads numbers, words for non-finite ones are put in afterwards.

What counts as a number here is what `checkpoints.reading.fields.number` takes, as far as engines print it by the million.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import simdjson
from numpy.typing import NDArray

Text = msgspec.Raw | memoryview | bytes

_WORD = re.compile(
    rb'(?<=[\[,\s])(?:"[+-]?nan(?:\(\w*\))?"|"[+-]?inf(?:inity)?"|-?nan(?:\(\w*\))?|[+-]?inf(?:inity)?|(?-i:null))(?=[\],\s])',
    re.IGNORECASE,
)
_NUMBER = rb"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?"
_QUOTED = re.compile(rb'"(' + _NUMBER + rb')"')
_BARE_NUMBER = re.compile(rb"(?<=[\[,])" + _NUMBER + rb"(?=[\],])")
_BLANKS = b" \t\r\n"
_LONGEST = 1000  # characters of a number that is not simdjson's to read; Python reads integers of up to 4,300
_BYTES = 1 << 26  # of such numbers as fixed-width texts

_SEPARATOR = np.zeros(256, dtype=np.bool_)
_SEPARATOR[list(b"[], \t\r\n")] = True
_IS_WORD = np.zeros(256, dtype=np.bool_)
_IS_WORD[list(b"nNiI")] = True


@dataclass(frozen=True)
class Numbers:
    """The numbers of R arrays.

    Attributes:
        flat: float64 [N], laid end to end.
        counts: how many each array has.
        texts: the arrays' texts, empty where a word stood for a number: what was printed as decimals.
    """

    flat: NDArray[np.float64]
    counts: list[int]
    texts: Sequence[Text]


class NumberParser:
    """Reads arrays of numbers; it holds the buffers of simdjson. Arrays in arrays are not told from longer ones."""

    def __init__(self) -> None:
        self._simdjson = simdjson.Parser()

    def read(self, texts: Sequence[Text]) -> Numbers | None:
        """The numbers of these arrays, each with its brackets; None where something else stands in one of them."""
        array = _joined(texts)
        plain = self._plain(array)
        return Numbers(*plain, texts) if plain is not None else self._with_words(array)

    def _plain(self, array: bytes) -> tuple[NDArray[np.float64], list[int]] | None:
        """Of arrays in an array that hold nothing but numbers."""
        parsed: Any = None
        try:
            parsed = self._simdjson.parse(array)
            counts = list(map(len, parsed))
            flat = np.frombuffer(parsed.as_buffer(of_type="d"), np.float64) if any(counts) else np.zeros(0)
        except (ValueError, TypeError, RuntimeError):  # the library's way to say that there is something else
            return None
        finally:
            del parsed  # the parser is used again only when nothing of it is held
        return (flat, counts) if len(flat) == sum(counts) else None

    def _with_words(self, array: bytes) -> Numbers | None:
        """The same with words for numbers, numbers in quotes and numbers beyond float64."""
        if b'"' in array:
            array = _QUOTED.sub(rb"\1", array)
        zeroed, words = _WORD.subn(b"0", array)
        plain = self._plain(zeroed) or _huge(zeroed)
        if plain is None:
            return None
        flat, counts = plain
        texts = _WORD.sub(b"", array) if words else array
        if words:
            at, meant = _words(array)
            if len(at) != words or len(flat) <= int(at[-1]):
                return None
            flat = flat.copy()
            flat[at] = meant
        parts = texts[1:-1].split(b"],[")
        return Numbers(flat, counts, [part.strip(b"[]" + _BLANKS) for part in parts]) if len(parts) == len(counts) else None


def without_words(text: bytes) -> bytes:
    """The text of one array with nothing where words stand for numbers."""
    return _WORD.sub(b"", _QUOTED.sub(rb"\1", text) if b'"' in text else text)


def _joined(texts: Sequence[Text]) -> bytes:
    """The texts as elements of one array, copied once: they are most of a file."""
    pieces: list[Text] = [b","] * (2 * len(texts) + 1)
    pieces[1::2] = texts
    pieces[0], pieces[-1] = b"[", b"]"
    return b"".join(pieces)


def _words(array: bytes) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Which elements are words [W], and what they mean [W]."""
    data = np.frombuffer(array, np.uint8)
    inside = ~_SEPARATOR[data]
    starts = np.flatnonzero(inside[1:] & ~inside[:-1]) + 1
    starts_unquoted = starts + (data[starts] == ord('"'))
    first = data[starts_unquoted]
    negative = first == ord("-")
    letter = data[starts_unquoted + (negative | (first == ord("+")))]
    at = np.flatnonzero(_IS_WORD[letter])
    infinite = (letter[at] | 0x20) == ord("i")
    return at, np.where(infinite, np.where(negative[at], -np.inf, np.inf), np.nan)


def _huge(array: bytes) -> tuple[NDArray[np.float64], list[int]] | None:
    """Numbers that simdjson refuses since no float64 or 64-bit integer holds them: infinite, as Python reads them."""
    text = array.translate(None, _BLANKS)
    if len(_BARE_NUMBER.sub(b"", text).translate(None, b",[]")):
        return None
    rows = text[2:-2].split(b"],[")
    elements = [b"0" if number == b"-0" else number for row in rows if row for number in row.split(b",")]  # an integer
    longest = max(map(len, elements), default=0)
    if not all(elements) or longest > _LONGEST or longest * len(elements) > _BYTES:
        return None
    return np.array(elements, dtype="S").astype(np.float64), [row.count(b",") + 1 if row else 0 for row in rows]
