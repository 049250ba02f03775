"""Many JSON arrays of numbers as one NumPy array: simdjson reads the numbers, and words for non-finite ones are filled in
afterwards.

A number is what `checkpoints.reading.fields.number` accepts, except for forms that no engine prints by the million.
"""

import re
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import simdjson
from msgspec import Struct
from numpy.typing import NDArray

Text = msgspec.Raw | memoryview | bytes

# Patterns of what few dumps have: they are compiled by whoever first needs them, since that takes 10 ms.
_WORD = rb'(?i:"[+-]?nan(?:\(\w*\))?"|"[+-]?inf(?:inity)?"|-?nan(?:\(\w*\))?|[+-]?inf(?:inity)?|(?-i:null))'
_NUMBER = rb"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?"
_QUOTED = rb'"(' + _NUMBER + rb')"'
_INSIDE = rb'"(?<![\[\], \t\r\n]")(?![\[\], \t\r\n])'  # a quote that neither begins nor ends an element, as in "4"1
_BLANKS = b" \t\r\n"
_TWO = rb"[^\[\], \t\r\n][ \t\r\n]+[^\[\], \t\r\n]"  # numbers with no comma between them
_LONGEST = 300  # characters of an integer that float64 surely holds; longer ones are read, or refused, line by line
_FAR = rb"[eE]\+?0*[1-9]\d\d"  # an exponent that may be beyond float64's
_INTEGER = 18  # characters of which every integer fits 64 bits

_SEPARATOR = np.zeros(256, dtype=np.bool_)
_SEPARATOR[list(b"[], \t\r\n")] = True
_TO_COMMAS = bytes(ord(",") if _SEPARATOR[i] else i for i in range(256))
_IS_WORD = np.zeros(256, dtype=np.bool_)
_IS_WORD[list(b"nNiI")] = True


class Numbers(Struct, frozen=True):
    """The numbers of R arrays.

    Attributes:
        flat: float64 [N], laid end to end.
        counts: how many each array has.
        texts: the arrays as they were printed, without words that stood for numbers.
    """

    flat: NDArray[np.float64]
    counts: list[int]
    texts: Sequence[Text]


class NumberParser:
    """Reads arrays of numbers; keeps simdjson's buffers. A nested array counts as part of the outer one."""

    def __init__(self) -> None:
        self._simdjson = simdjson.Parser()

    def read(self, texts: Sequence[Text]) -> Numbers | None:
        """The numbers of these arrays, each given with its brackets; None if one of them holds anything else."""
        array = _joined(texts)
        plain = self._plain(array)
        if plain is not None:
            return Numbers(*plain, texts)
        return self._with_words(array) if all(bytes(text).startswith(b"[") for text in texts) else None

    def _plain(self, array: bytes) -> tuple[NDArray[np.float64], list[int]] | None:
        """`read` for arrays in an array that hold nothing but numbers."""
        parsed: Any = None
        try:
            parsed = self._simdjson.parse(array)
            counts = list(map(simdjson.Array.__len__, parsed))  # a text or an object has a length, too
            flat = np.frombuffer(parsed.as_buffer(of_type="d"), np.float64) if any(counts) else np.zeros(0)
        except (ValueError, TypeError, RuntimeError):  # the library's way to say that there is something else
            return None
        finally:
            del parsed  # the parser is used again only when nothing of it is held
        return (flat, counts) if len(flat) == sum(counts) else None

    def _with_words(self, array: bytes) -> Numbers | None:
        """`read` for arrays with words, numbers in quotes, or numbers beyond float64."""
        if b'"' in array:
            if re.search(_INSIDE, array):
                return None
            array = re.sub(_QUOTED, rb"\1", array)
        words = _words(array)
        plain = None if words is None else self._plain(words.zeroed) or self._with_huge(words.zeroed)
        if plain is None or words is None:
            return None
        flat, counts = plain
        if len(words.at):
            if len(flat) <= int(words.at[-1]):
                return None
            flat = flat.copy()
            flat[words.at] = words.values
        parts = words.dropped[1:-1].split(b"],[")
        return Numbers(flat, counts, [part.strip(b"[]" + _BLANKS) for part in parts]) if len(parts) == len(counts) else None

    def _with_huge(self, array: bytes) -> tuple[NDArray[np.float64], list[int]] | None:
        """`read` for numbers too large for a float64 or a 64-bit integer, which simdjson refuses: they become infinite, as in Python."""
        if re.search(_TWO, array):
            return None
        rows = array.translate(None, _BLANKS)[2:-2].split(b"],[")
        elements = [number for row in rows if row for number in row.split(b",")]
        special = {text for text in set(elements) if len(text) > _INTEGER or re.search(_FAR, text)}
        if not all(re.fullmatch(_NUMBER, text) for text in special) or any(
            len(x) > _LONGEST and x.strip(b"-").isdigit() for x in special
        ):
            return None
        values = {text: float(text) for text in special}
        rare = [i for i, text in enumerate(elements) if text in special]
        texts = [elements[i] for i in rare]
        for i in rare:
            elements[i] = b"0"
        plain = self._plain(b"[[" + b",".join(elements) + b"]]")
        if plain is None:
            return None
        flat = plain[0].copy()
        flat[rare] = [values[text] for text in texts]
        return flat, [row.count(b",") + 1 if row else 0 for row in rows]


def without_words(text: bytes) -> bytes:
    """The text of one array without the words that stand for numbers."""
    words = _words(re.sub(_QUOTED, rb"\1", text) if b'"' in text else text)
    return text if words is None else words.dropped


class _Words(Struct, frozen=True):
    """Words among the numbers of a text: which elements they are [W], what they mean [W], and the text with zeros or nothing there."""

    at: NDArray[np.int64]
    values: NDArray[np.float64]
    zeroed: bytes
    dropped: bytes


def _words(array: bytes) -> _Words | None:
    """The words in arrays of numbers; None if one is unknown."""
    data = np.frombuffer(array, np.uint8)
    inside = ~_SEPARATOR[data]
    begins = inside.copy()
    begins[1:] &= ~inside[:-1]
    starts = np.flatnonzero(begins)
    if not len(starts):
        return _Words(starts, np.zeros(0), array, array)
    after_quote = np.minimum(starts + (data[starts] == ord('"')), len(data) - 1)
    first = data[after_quote]
    negative = first == ord("-")
    letter = data[np.minimum(after_quote + (negative | (first == ord("+"))), len(data) - 1)]
    is_word = _IS_WORD[letter]
    at = np.flatnonzero(is_word)
    of_word = inside & is_word[np.maximum(np.cumsum(begins, dtype=np.int32) - 1, 0)]
    each = of_word.copy()
    each[:-1] |= of_word[1:]  # with what separates it from the one before
    different = set(data[each].tobytes().translate(_TO_COMMAS).split(b",")) - {b""}
    if not all(re.fullmatch(_WORD, text) for text in different):
        return None
    zeroed, kept = data.copy(), ~of_word
    zeroed[starts[at]] = ord("0")
    dropped = data[kept].tobytes()
    kept[starts[at]] = True
    infinite = (letter[at] | 0x20) == ord("i")
    meant = np.where(infinite, np.where(negative[at], -np.inf, np.inf), np.nan)
    return _Words(at, meant, zeroed[kept].tobytes(), dropped)


def _joined(texts: Sequence[Text]) -> bytes:
    """The texts as elements of one array, copied only once because they make up most of a file."""
    pieces: list[Text] = [b","] * (2 * len(texts) + 1)
    pieces[1::2] = texts
    pieces[0], pieces[-1] = b"[", b"]"
    return b"".join(pieces)
