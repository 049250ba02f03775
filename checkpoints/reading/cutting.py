"""Lines as text: which of them are objects, and the long lists of values cut out of them, which a JSON parser need not walk through."""

from collections.abc import Sequence

import numpy as np

from .arrays import Text
from .lenient import trimmed

_BEHIND_BRACE = (b'"', b"}")
_BREAK, _OPEN, _CLOSE, _BRACKET = b"\n{}["


def objects_alone(block: bytes) -> int | None:
    """How many lines there are if each is from a brace to a brace: with as many objects in them, each line is one."""
    data = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(data == _BREAK)
    if not block.startswith(b"{") or (data[ends - 1] != _CLOSE).any() or (data[ends[:-1] + 1] != _OPEN).any():
        return None
    return len(ends)


def objects_of(block: bytes) -> tuple[list[int], list[bytes], int]:
    """Numbers of the lines that may be objects, those lines from their first brace on, and how many others are not blank.

    After an object's brace there is a name in quotes, or its end: a log's other braces need no parser.
    """
    numbers, objects, skipped = [], [], 0
    for number, line in enumerate(block.split(b"\n")[:-1]):
        start = line.find(b"{")
        if start >= 0 and line[start + 1 :].lstrip()[:1] in _BEHIND_BRACE:
            numbers.append(number)
            objects.append(trimmed(line[start:]))
        else:
            skipped += bool(line.strip())
    return numbers, objects, skipped


def cut_block(block: bytes) -> tuple[bytes, list[Text]] | None:
    """Lines without the numbers of their values, and those numbers with their brackets, empty where a line has none.

    None where these may not be the record's own values.
    """
    view = memoryview(block)
    rest: list[bytes] = []
    texts: list[Text] = []
    begin = count = 0
    while begin < len(block):
        end = block.index(b"\n", begin) + 1
        opened, closed = _values(block, begin, end)
        if closed < 0:
            rest.append(block[begin:end])
            texts.append(view[:0])
        else:
            rest += block[begin : opened + 1], block[closed:end]
            texts.append(view[opened : closed + 1])
            count += 1
        begin = end
    joined = b"".join(rest)
    return None if _may_be_others(joined, count) else (joined, texts)


def cut_line(line: bytes) -> tuple[bytes, Text | None]:
    """The same of one line; the text is None where nothing was cut out."""
    opened, closed = _values(line, 0, len(line))
    if closed < 0:
        return line, None
    rest = line[: opened + 1] + line[closed:]
    return (line, None) if _may_be_others(rest, 1) else (rest, line[opened : closed + 1])


def _values(block: bytes, begin: int, end: int) -> tuple[int, int]:
    """Where the list of values of a line begins and ends; below 0 where it has none."""
    at = block.find(b'"values"', begin, end)
    opened = block.find(b"[", at, end) if at >= 0 else -1
    return opened, block.find(b"]", opened, end) if opened >= 0 else -1


def _may_be_others(rest: bytes, count: int) -> bool:
    """Whether what was cut out of `count` lines may belong to something else: a second "values", or one spelt with escapes."""
    return b"\\" in rest or rest.count(b'"values"') != count


def nested(texts: Sequence[Text]) -> bool:
    """Whether there are more brackets than one per array. What was cut out ends at its first closing one."""
    return bool(np.count_nonzero(np.frombuffer(b"".join(texts), np.uint8) == _BRACKET) > len(texts))
