"""JSON texts from outside. What Python's parser raises beyond ValueError, or lets through though nobody can write it, is refused."""

import json
from typing import Any


def decoded(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or contains half of a surrogate pair, which no UTF-8 file can hold.
    """
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value
