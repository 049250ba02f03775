"""Why a file has no record, as far as its first lines tell."""

from json import JSONDecodeError
from pathlib import Path

from ..printable import printable
from . import lenient

_HEAD = 1 << 16
_KEYS = ("checkpoint", "values")


def reason(path: Path) -> str:
    """What the first line with a brace lacks to be a record; empty where there is none, or the file cannot be read again."""
    try:
        if not path.is_file():  # a pipe was read already
            return ""
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return ""
    if head.startswith(b"GGUF"):
        return "It is a model: give it as --model. "
    if b"\0" in head:
        return "It is not a text file. "
    for number, line in enumerate(head.split(b"\n"), 1):
        if b"{" not in line:
            continue
        try:
            content = lenient.loads(line)
        except JSONDecodeError as error:
            return f"Line {number} is not JSON: {error.msg.lower()} at character {error.pos} after the brace. "
        except ValueError as error:
            return f"Line {number} is not JSON: {error}. "
        if isinstance(content, dict) and "type" not in content:
            lacking = ", ".join(f'"{key}"' for key in _KEYS if key not in content)
            named = ", ".join(str(key)[:20] for key in list(content)[:6])
            return f"Line {number} lacks {lacking}; it has {printable(named)}. " if lacking else ""
    return ""
