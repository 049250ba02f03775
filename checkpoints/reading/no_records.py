"""Why a file has no record, as far as its first lines tell."""

import codecs
import re
from json import JSONDecodeError
from pathlib import Path

from ..printable import printable
from . import lenient

_HEAD = 1 << 16
_KEYS = ("checkpoint", "values")
_KINDS = (  # how files of other kinds begin, UTF-32 before UTF-16, whose mark it repeats
    (b"GGUF", "It is a model: give it as --model. "),
    (codecs.BOM_UTF32_LE, "It is UTF-32 text: convert it to UTF-8. "),
    (codecs.BOM_UTF32_BE, "It is UTF-32 text: convert it to UTF-8. "),
    (codecs.BOM_UTF16_LE, "It is UTF-16 text: convert it to UTF-8. "),
    (codecs.BOM_UTF16_BE, "It is UTF-16 text: convert it to UTF-8. "),
    (b"{\0", "It is UTF-16 text: convert it to UTF-8. "),
    (b"\0{", "It is UTF-16 text: convert it to UTF-8. "),
    (b"\x1f\x8b", "It is compressed with gzip: unpack it first. "),
    (b"\xfd7zXZ", "It is compressed with xz: unpack it first. "),
    (b"BZh", "It is compressed with bzip2: unpack it first. "),
    (b"\x28\xb5\x2f\xfd", "It is compressed with zstd: unpack it first. "),
    (b"PK\3\4", "It is a zip archive: unpack it first. "),
)


def reason(path: Path) -> str:
    """What kind of file it is, or what its first line with a brace lacks to be a record; empty if neither is known."""
    try:
        if not path.is_file():  # a pipe was read already
            return ""
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return ""
    if kind := next((text for start, text in _KINDS if head.startswith(start)), ""):
        return kind
    if b"\0" in head:
        return "It is not a text file. "
    if re.match(rb"\s*\[\s*\{", head):  # a log's line may begin with a bracket, too
        return "It is one JSON list: write each of its objects as a line. "
    for number, line in enumerate(head.split(b"\n"), 1):
        if b"{" in line:
            return _lacking(number, line)
    return "No line contains a JSON object. "


def _lacking(number: int, line: bytes) -> str:
    """What a line with a brace lacks to be a record."""
    if line.strip() == b"{":
        return f"The JSON object of line {number} is spread over several lines. "
    try:
        content = lenient.loads(line)
    except JSONDecodeError as error:
        if error.msg == "Extra data":
            return f"Line {number} goes on after its JSON object, at character {error.pos} after the brace. "
        return f"Line {number} is not JSON: {error.msg.lower()} at character {error.pos} after the brace. "
    except ValueError as error:
        return f"Line {number} is not JSON: {error}. "
    if not isinstance(content, dict) or "type" in content:
        return ""
    lacking = ", ".join(f'"{key}"' for key in _KEYS if key not in content)
    named = ", ".join(str(key)[:20] for key in list(content)[:6])
    return f"Line {number} lacks {lacking}; it has {printable(named)}. " if lacking else ""
