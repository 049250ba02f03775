"""JSON lines as engines print them: bare nan and inf, log text before the brace."""

import json
import re
from typing import Any

import orjson

from ..nesting import NestedTooDeeply, parsed

# A word for a number that is not finite, and nothing of a longer word or of a text.
_WORD = r'(?:-?nan(?:\(\w*\))?|[+-]?inf(?:inity)?)(?![\w"])'
# Words in a row are one match: a substitution for each of millions takes seconds.
_WORDS = re.compile(rf'(?<![\w"]){_WORD}(?:\s*,\s*{_WORD})*+', re.IGNORECASE)
_COLOURS = re.compile(rb"(?:\s*\x1b\[[0-9;]*[mK])+\Z")  # with which a coloured log ends a line
_TAIL = 64  # bytes of a line in which they are looked for
_WORDS_BYTES = re.compile(_WORDS.pattern.encode(), re.IGNORECASE)


def trimmed(line: bytes) -> bytes:
    """A line without the blanks at its end, and without the escape sequences that end a coloured log's line."""
    line = line.rstrip()
    return line[:-_TAIL] + _COLOURS.sub(b"", line[-_TAIL:]) if line.endswith((b"m", b"K")) else line


def quoted(line: bytes) -> bytes:
    """A line with its bare nan and inf in quotes, so that it may be JSON."""
    return _WORDS_BYTES.sub(lambda words: b'"%b"' % b'","'.join(word.strip() for word in words[0].split(b",")), line)


def _quoted_text(line: str) -> str:
    return _WORDS.sub(lambda words: '"' + '","'.join(word.strip() for word in words[0].split(",")) + '"', line)


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
    mended = _quoted_text(line[start:].rstrip().rstrip("\0"))
    try:
        return orjson.loads(mended)
    except orjson.JSONDecodeError:
        pass
    try:
        return parsed(json.loads, mended)  # numbers beyond float64, which orjson refuses, are infinite here
    except (json.JSONDecodeError, NestedTooDeeply):
        raise
    except ValueError:
        raise ValueError("a whole number has more than 4,300 digits") from None


def whole(line: bytes) -> bool:
    """Whether this is blank or a line's complete JSON, rather than a line that was cut short."""
    try:
        return not line.strip() or loads(trimmed(line)) is not None
    except ValueError:
        return False
