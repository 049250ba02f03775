"""Lines as text: which of them are objects, and their long lists of values, cut out so that the JSON parser need not walk through them."""

from collections.abc import Sequence

import numpy as np

from .arrays import Text
from .lenient import trimmed

_BEHIND_BRACE = (b'"', b"}")
_BREAK, _OPEN, _CLOSE, _BRACKET = b"\n{}["


def objects_alone(block: bytes) -> int | None:
    """How many lines there are, if each runs from brace to brace: if they hold as many objects, every line is exactly one."""
    data = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(data == _BREAK)
    if not block.startswith(b"{") or (data[ends - 1] != _CLOSE).any() or (data[ends[:-1] + 1] != _OPEN).any():
        return None
    return len(ends)


def objects_of(block: bytes) -> tuple[list[int], list[bytes], int]:
    """The numbers of the lines that may be objects, those lines from their first brace on, and how many others are not blank.
    An object's brace is followed by a quoted name or by its end; braces of log text are recognised without a parser.
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
    """Lines without their lists of values, and those lists with their brackets, empty for a line that has none.
    None if what was cut out may not be the record's own values.
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
    """`cut_block` for one line; the text is None if nothing was cut out."""
    opened, closed = _values(line, 0, len(line))
    if closed < 0:
        return line, None
    rest = line[: opened + 1] + line[closed:]
    return (line, None) if _may_be_others(rest, 1) else (rest, line[opened : closed + 1])


def _values(block: bytes, begin: int, end: int) -> tuple[int, int]:
    """Where the list of values of a line begins and ends; negative if it has none."""
    at = block.find(b'"values"', begin, end)
    opened = block.find(b"[", at, end) if at >= 0 else -1
    return opened, block.find(b"]", opened, end) if opened >= 0 else -1


def _may_be_others(rest: bytes, count: int) -> bool:
    """Whether what was cut out of `count` lines may not be the record's values: there is a second "values", or one spelt with
    escapes."""
    return b"\\" in rest or rest.count(b'"values"') != count


def nested(texts: Sequence[Text]) -> bool:
    """Whether an array holds further brackets: what was cut out ends at the first closing one."""
    return bool(np.count_nonzero(np.frombuffer(b"".join(texts), np.uint8) == _BRACKET) > len(texts))
