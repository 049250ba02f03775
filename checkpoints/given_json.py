"""JSON texts from outside. What Python's parser raises beyond ValueError, or lets through though nobody can write it, is refused."""

import json
import sys
from typing import Any


def decoded(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: as `loads`; or it contains half of a surrogate pair, which no UTF-8 file can hold.
    """
    value = loads(text)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def loads(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has a number that Python does not read; all in words of ours.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError:
        raise ValueError(f"it has a number of more than {sys.get_int_max_str_digits():,} digits") from None
