"""What the fields of one JSON line may hold, and what they become. Errors are TypeError or ValueError with a sentence.

Foreign engines print numbers as words, shapes as text and decimals that were rounded: all that is understood here.
"""

import re
from dataclasses import fields
from math import prod
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..record import FORMAT, Header, ModelInfo, Token
from . import words

POSITIONS = 1 << 40  # positions and steps lie below this
SEQUENCES = 1 << 22  # sequences below this: both together make one 63-bit key
_WORDS = {
    "NaN": np.nan,
    "nan": np.nan,
    "-nan": np.nan,
    "Infinity": np.inf,
    "inf": np.inf,
    "-Infinity": -np.inf,
    "-inf": -np.inf,
}
_VALUES = re.compile(rb'"values"\s*:\s*(\[[^\]]*\])')
_LEADING = 64, 1024  # bytes of the values' text whose digits are looked at first; of random ones, 64 are too few in 2 %
_DECIMAL = re.compile(r"[+-]?(\d*)(?:\.(\d*))?(?:[eE]([+-]?\d+))?")
# A float32 needs up to 9 significant digits. A text whose values all stop at 7 or fewer was rounded for print.
_PRINTED_DIGITS = 7


def integer(found: Any, name: str, limit: int = POSITIONS) -> int:
    """A whole number from 0 to `limit` − 1."""
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < limit:
        raise ValueError(f'"{name}" must be a whole number from 0, not {found!r:.40}')
    return found


def number(value: Any) -> float:
    """A number, or one of the words that stand for non-finite ones; null is NaN."""
    if isinstance(value, (bool, list, dict)):
        raise TypeError(f"{value!r:.40} is no number")
    if isinstance(value, str):
        word = value.split("(")[0].lower()
        if word in ("-nan", "nan"):
            return np.nan
        return _WORDS[value] if value in _WORDS else float(word)
    return np.nan if value is None else float(value)


def check_numbers(found: Any, name: str) -> None:
    """Raises where a list is none, or holds something that is no number. Plain numbers cost next to nothing."""
    if not isinstance(found, list):
        raise TypeError(f"{name} must be a list of numbers, not {found!r:.40}")
    if not {type(value) for value in found} <= {float, int}:
        for value in found:
            number(value)


def statistics(found: Any) -> dict[str, Any]:
    """The statistics of a record, numbers by name."""
    if not isinstance(found, dict):
        raise TypeError(f'"stats" must be an object, not {found!r:.40}')
    check_numbers(list(found.values()), '"stats"')
    return found


def indices(found: Any, count: int) -> list[int]:
    """The elements that `count` scattered values are, each once."""
    if not isinstance(found, list) or len(found) != count or not count:
        raise ValueError(f'"indices" must be a list of one index for each of {count} values')
    listed = [integer(index, "indices") for index in found]
    if len(set(listed)) != count:
        raise ValueError('"indices" names an element twice')
    return listed


def steps(found: Any, count: int) -> NDArray[np.float64]:
    """The steps of the decimals that `count` values were printed with, given as one number for all or as one each."""
    listed = found if isinstance(found, list) else [found]
    check_numbers(listed, '"quantum"')
    given = np.array([number(step) for step in listed], dtype=np.float64)
    if len(given) not in (1, count) or not np.isfinite(given).all() or (given < 0).any():
        raise ValueError(f'"quantum" must be a step from 0, or one for each of {count} values')
    return np.broadcast_to(given, (count,)).copy()


def shape(found: Any) -> tuple[int, ...]:
    """A shape as a list or as text ("[1,151936]"); leading ones are dropped, since a record is one position's row."""
    numbers = [int(text) for text in re.findall(r"-?\d+", found)] if isinstance(found, str) else (found or [])
    if not isinstance(numbers, (list, tuple)):
        raise TypeError(f'"shape" must be a list, not {found!r:.40}')
    sizes = tuple(integer(size, "shape") for size in numbers)
    while len(sizes) > 1 and sizes[0] == 1:
        sizes = sizes[1:]
    if prod(sizes) >= POSITIONS:
        raise ValueError(f'"shape" is beyond any activation: {list(sizes)}')
    return sizes


def token(found: dict[str, Any]) -> Token:
    """A generated token."""
    top = found.get("top") or []
    if not isinstance(top, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in top):
        raise TypeError('"top" must be a list of pairs, id and logit')
    return Token(
        token_idx=integer(found.get("token_idx"), "token_idx"),
        id=integer(found.get("id"), "id"),
        text=str(found.get("text") or ""),
        top=tuple((integer(which, "top"), number(value)) for which, value in top),
        seq=integer(found.get("seq", 0), "seq", SEQUENCES),
    )


_TEXTS = ("source", "mode", "compute", "kv_type", "created", "prompt")


def header(found: dict[str, Any]) -> Header:
    """The first line. Unknown fields are left out, null ones take their defaults."""
    version = found.get("format", FORMAT)
    if not isinstance(version, int) or version > FORMAT:
        raise ValueError(f"format {version!r} is newer than this parity, which reads format {FORMAT}")
    names = {field.name for field in fields(Header)}
    taken = {name: value for name, value in found.items() if name in names and value is not None}
    for name in _TEXTS:
        if not isinstance(taken.get(name, ""), str):
            raise TypeError(f'"{name}" must be a text, not {taken[name]!r:.40}')
    for name in ("hparams", "build", "dataflow", "columns"):
        if not isinstance(taken.get(name, {}), dict):
            raise TypeError(f'"{name}" must be an object, not {taken[name]!r:.40}')
    for name in ("tokens", "pieces"):
        if not isinstance(taken.get(name, []), list):
            raise TypeError(f'"{name}" must be a list, not {taken[name]!r:.40}')
    if "slice" in taken:
        integer(taken["slice"], "slice")
    for name, known in (("mode", words.mode), ("compute", words.compute), ("kv_type", words.kv_type)):
        if name in taken:
            taken[name] = known(taken[name])
    taken["model"] = _model(taken.get("model", {}))
    taken["tokens"] = tuple(integer(which, "tokens") for which in taken.get("tokens", []))
    taken["pieces"] = tuple(str(piece) for piece in taken.get("pieces", []))
    return Header(**{"source": "unknown", **taken})


def _model(found: Any) -> ModelInfo:
    found = {"name": found} if isinstance(found, str) else found
    if not isinstance(found, dict):
        raise TypeError(f'"model" must be a name or an object, not {found!r:.40}')
    names = {field.name for field in fields(ModelInfo)}
    taken = {name: value for name, value in found.items() if name in names and value is not None}
    for name, value in taken.items():
        if name == "layers":
            integer(value, name)
        elif not isinstance(value, str):
            raise TypeError(f'"{name}" of the model must be a text, not {value!r:.40}')
    if "file_type" in taken:
        taken["file_type"] = words.file_type(taken["file_type"])
    return ModelInfo(**taken)


class _Values(msgspec.Struct):
    values: msgspec.Raw


def values_text(line: bytes) -> bytes:
    """The text of a line's values, with its brackets; empty where there is none."""
    try:
        return bytes(msgspec.json.decode(line, type=_Values).values)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):  # bare nan, an infinite number
        match = _VALUES.search(line)
        return match[1] if match else b""


def surely_exact(text: bytes) -> bool:
    """Whether the first of these JSON numbers alone show that their text gives every float32: then `quantum` is None."""
    return any(_shows_all_digits(text[1:size].split(b",")[:-1]) for size in _LEADING)


def _shows_all_digits(numbers: list[bytes]) -> bool:
    mantissas = [number.strip().partition(b"e")[0] for number in numbers]
    digits = max((len(number.replace(b".", b"").strip(b"-0")) for number in mantissas), default=0)
    return digits > _PRINTED_DIGITS and len({len(number.partition(b".")[2]) for number in mantissas}) > 1


def quantum(text: bytes, count: int) -> NDArray[np.float64] | None:
    """The step of the last printed decimal of each of `count` values, or None where the text gives every float32 exactly.

    `%f` prints the same number of decimals everywhere; `%g` stops at a number of significant digits.
    """
    texts = [text.strip().strip('"') for text in text.decode("ascii", "replace").strip("[] ").split(",")]
    parsed = [_DECIMAL.fullmatch(text) for text in texts]
    if len(texts) != count or not count:
        return None
    decimals, digits = [], []
    for found in parsed:
        if found is None or not (found[1] or found[2]):
            continue  # nan, inf
        decimals.append((len(found[2] or ""), int(found[3] or 0)))
        digits.append(len(((found[1] or "") + (found[2] or "")).strip("0")))
    if not decimals or (max(digits) > _PRINTED_DIGITS and len({places for places, _ in decimals}) > 1):
        return None
    if len({places for places, _ in decimals}) == 1 and any(places for places, _ in decimals):
        steps = [10.0 ** (exponent - places) for places, exponent in decimals]
    else:
        steps = [_last_digit(found, max(digits)) for found in parsed if found is not None and (found[1] or found[2])]
    quanta = np.zeros(count)
    quanta[[i for i, found in enumerate(parsed) if found is not None and (found[1] or found[2])]] = steps
    return quanta


def _last_digit(found: re.Match[str], digits: int) -> float:
    """The step of the last of `digits` significant digits of a printed number."""
    value = abs(float(found[0]))
    return 0.0 if value == 0 else float(10.0 ** (np.floor(np.log10(value)) - digits + 1))
