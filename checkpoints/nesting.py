"""Texts from outside whose parsers call themselves for each level of nesting, up to Python's limit of recursion."""

import gc
from collections.abc import Callable
from typing import Any, TypeVar

Text = TypeVar("Text", str, bytes)


class NestedTooDeeply(ValueError):
    """A text has more levels than its parser can enter."""

    def __init__(self) -> None:
        super().__init__("it is nested too deeply")


def parsed(parse: Callable[[Text], Any], text: Text) -> Any:
    """What a parser makes of a text: `parse` is `json.loads`, for example.

    The garbage collector waits meanwhile: a finaliser that it calls close to the limit fails, and says so on stderr.

    Raises:
        NestedTooDeeply: and whatever else `parse` raises.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        return parse(text)
    except RecursionError:
        raise NestedTooDeeply from None
    finally:
        if collecting:
            gc.enable()
