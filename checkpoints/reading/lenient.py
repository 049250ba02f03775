"""JSON lines as engines print them: bare nan and inf, log text before the brace."""

import json
import re
from typing import Any

import orjson

_BARE = re.compile(r'(?<![\w"])(-?nan(?:\(\w*\))?|[+-]?inf(?:inity)?|-?NaN|[+-]?Infinity)(?![\w"])', re.IGNORECASE)


_BARE_BYTES = re.compile(_BARE.pattern.encode(), re.IGNORECASE)


def quoted(line: bytes) -> bytes:
    """A line with its bare nan and inf in quotes, so that it may be JSON."""
    return _BARE_BYTES.sub(rb'"\1"', line)


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
    mended = _BARE.sub(r'"\1"', line[start:].rstrip().rstrip("\0"))
    try:
        return orjson.loads(mended)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(mended)  # numbers beyond float64, which orjson refuses, are infinite here
    except RecursionError:
        raise ValueError("the line is nested too deeply") from None


def whole(line: bytes) -> bool:
    """Whether this is blank or a line's complete JSON, rather than a line that was cut short."""
    try:
        return not line.strip() or loads(line) is not None
    except ValueError:
        return False
