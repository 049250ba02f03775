"""JSON texts from outside. What Python's parser raises beyond ValueError, or lets through though nobody can write it, is refused."""

import json
from typing import Any

from .nesting import parsed


def decoded(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or contains half of a surrogate pair, which no UTF-8 file can hold.
    """
    value = parsed(json.loads, text)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value
