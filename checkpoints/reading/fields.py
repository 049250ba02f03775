"""The fields of one JSON line: what they may hold, and how it is converted. Errors are TypeError or ValueError with a sentence.

Foreign engines print numbers as words, shapes as text and decimals that were rounded: all of these are understood here.
"""

import json
import re
from contextlib import suppress
from math import prod
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..record import FORMAT, STATISTICS, End, Header, ModelInfo, Token
from . import lenient, words

POSITIONS = 1 << 40  # positions and steps lie below this
DIMENSIONS = 16  # of a shape, leading ones left out: ggml has 4
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


def as_written(value: Any) -> str:
    """A value as JSON writes it, the first 40 characters: for messages about a line."""
    return json.dumps(value, ensure_ascii=False)[:40]


def integer(value: Any, name: str, limit: int = POSITIONS) -> int:
    """A whole number from 0 to `limit` − 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f'"{name}" must be a whole number, 0 or more, not {as_written(value)}')
    if value >= limit:
        raise ValueError(f'"{name}" must be less than {limit:,}, not {as_written(value)}')
    return value


def number(value: Any) -> float:
    """A number, or one of the words that stand for non-finite ones; null is NaN."""
    if isinstance(value, (bool, list, dict)):
        raise TypeError(f"{as_written(value)} is not a number")
    if isinstance(value, str):
        word = value.split("(")[0].lower()
        if word in ("-nan", "nan"):
            return np.nan
        try:
            return _WORDS[value] if value in _WORDS else float(word)
        except ValueError:
            raise ValueError(f"{as_written(value)} is not a number") from None
    return np.nan if value is None else float(value)


def numbers(values: Any, name: str) -> NDArray[np.float64]:
    """A list of numbers, or of words for non-finite ones, as an array.

    Raises:
        TypeError: it is not a list, or an element is not a number; ValueError: an unknown word.
    """
    if not isinstance(values, list):
        raise TypeError(f"{name} must be a list of numbers, not {as_written(values)}")
    kinds = {type(value) for value in values}
    if not kinds <= {float, int}:
        known = {word: number(word) for word in {value for value in values if isinstance(value, str)}}
        values = [known[value] if isinstance(value, str) else number(value) for value in values]
    return np.array(values, dtype=np.float64)


def statistics(content: Any) -> dict[str, Any]:
    """The format's statistics of a record, numbers by name; those of others' own are left out."""
    if not isinstance(content, dict):
        raise TypeError(f'"stats" must be an object, not {as_written(content)}')
    numbers(list(content.values()), '"stats"')
    return {name: content[name] for name in STATISTICS if name in content}


def indices(values: Any, count: int) -> list[int]:
    """The indices of `count` scattered values in their row, each once."""
    if not isinstance(values, list) or len(values) != count or not count:
        raise ValueError(f'"indices" must be a list of one index for each of {count} values')
    if {type(index) for index in values} == {int} and min(values) >= 0 and max(values) < POSITIONS:
        listed = values
    else:
        listed = [integer(index, "indices") for index in values]
    if len(set(listed)) != count:
        raise ValueError('"indices" names an element twice')
    return listed


def steps(values: Any, count: int) -> NDArray[np.float64]:
    """The steps of the decimals with which `count` values were printed, given as one number for all or one for each."""
    given = numbers(values if isinstance(values, list) else [values], '"quantum"')
    if len(given) not in (1, count) or not np.isfinite(given).all() or (given < 0).any():
        raise ValueError(f'"quantum" must be a step size, 0 or more, or one for each of {count} values')
    return np.broadcast_to(given, (count,)).copy()


def beyond_values(steps: NDArray[np.float64], values: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Whether the step of a row's decimals is larger than all of its values, [R] of [R, k]: then no digit of them was printed."""
    largest = np.where(np.isfinite(values), np.abs(values.astype(np.float64)), 0.0).max(axis=1, initial=1.0)
    beyond: NDArray[np.bool_] = steps.max(axis=1, initial=0.0) > largest
    return beyond


def shape(value: Any) -> tuple[int, ...]:
    """A shape as a list or as text ("[1,151936]"); leading ones are dropped, since a record is one position's row."""
    # Python converts 4300 digits at most; an axis of more than twenty is too large whatever they are.
    sizes = [int(text[:20]) for text in re.findall(r"-?\d+", value)] if isinstance(value, str) else (value or [])
    if not isinstance(sizes, (list, tuple)):
        raise TypeError(f'"shape" must be a list, not {as_written(value)}')
    ones = next((i for i, size in enumerate(sizes) if type(size) is not int or size != 1), len(sizes))
    sizes = sizes[min(ones, max(len(sizes) - 1, 0)) :]
    if len(sizes) > DIMENSIONS:
        raise ValueError(f'"shape" has {len(sizes)} dimensions, more than any activation has')
    whole = tuple(integer(size, "shape") for size in sizes)
    if prod(whole) >= POSITIONS:
        raise ValueError(f'"shape" is larger than any activation: {list(whole)}')
    return whole


def token(content: dict[str, Any]) -> Token:
    """A generated token."""
    top = content.get("top") or []
    if not isinstance(top, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in top):
        raise TypeError('"top" must be a list of pairs, id and logit')
    return Token(
        token_idx=integer(content.get("token_idx"), "token_idx"),
        id=integer(content.get("id"), "id"),
        text=str(content.get("text") or ""),
        top=tuple((integer(which, "top"), number(value)) for which, value in top),
        seq=integer(content.get("seq", 0), "seq", SEQUENCES),
    )


# What a field of the header must be, if it is there.
_KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("source", "mode", "compute", "kv_type", "created", "prompt"), (str, "a text")),
    **dict.fromkeys(("hparams", "build", "dataflow", "columns"), (dict, "an object")),
    **dict.fromkeys(("tokens", "pieces"), (list, "a list")),
}


def end(content: dict[str, Any]) -> End:
    """An end record: how many of each were written."""
    return End(*(integer(content.get(name, 0), name) for name in ("checkpoints", "tokens")))


def header(content: dict[str, Any]) -> Header:
    """The first line. Unknown fields are left out, null ones take their defaults."""
    version = content.get("format", FORMAT)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f'"format" must be the number {FORMAT}, not {as_written(version)}')
    if version > FORMAT:
        raise ValueError(f"format {as_written(version)} is newer than this parity, which reads format {FORMAT}")
    taken = {name: value for name, value in content.items() if name in Header.__struct_fields__ and value is not None}
    for name, (kind, described) in _KINDS.items():
        if name in taken and not isinstance(taken[name], kind):
            raise TypeError(f'"{name}" must be {described}, not {as_written(taken[name])}')
    if "slice" in taken:
        integer(taken["slice"], "slice")
    for name, known in (("mode", words.mode), ("compute", words.compute), ("kv_type", words.kv_type)):
        if name in taken:
            taken[name] = known(taken[name])
    taken["model"] = _model(taken.get("model", {}))
    taken["tokens"] = tuple(integer(which, "tokens") for which in taken.get("tokens", []))
    taken["pieces"] = tuple(str(piece) for piece in taken.get("pieces", []))
    return Header(**{"source": "unknown", **taken})


def _model(content: Any) -> ModelInfo:
    content = {"name": content} if isinstance(content, str) else content
    if not isinstance(content, dict):
        raise TypeError(f'"model" must be a name or an object, not {as_written(content)}')
    taken = {name: value for name, value in content.items() if name in ModelInfo.__struct_fields__ and value is not None}
    for name, value in taken.items():
        if name == "layers":
            integer(value, name)
        elif not isinstance(value, str):
            raise TypeError(f'"{name}" of the model must be a text, not {as_written(value)}')
    if "file_type" in taken:
        taken["file_type"] = words.file_type(taken["file_type"])
    return ModelInfo(**taken)


class _Values(msgspec.Struct):
    values: msgspec.Raw


def values_text(line: bytes) -> bytes:
    """A line's values as text, with their brackets; empty if there are none. Bare nan and inf may be returned in quotes."""
    for text in (line, lenient.quoted(line)):
        with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return bytes(msgspec.json.decode(text, type=_Values).values)
    return b""
