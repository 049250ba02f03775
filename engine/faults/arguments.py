"""Whether a changed step fits in place of the right one: it takes the same arguments, or those that it is given."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from inspect import Signature, signature
from typing import Any

from ..graph import Step


def alike(changed: Sequence[Step], step: Step) -> bool:
    """Whether the replacement of a step differs only in values: it is one step that takes the same arguments from the same places."""
    return (
        len(changed) == 1
        and changed[0].op is step.op
        and changed[0].reads == step.reads
        and len(changed[0].weights) == len(step.weights)
        and changed[0].params.keys() == step.params.keys()
        and changed[0].makes == step.makes
    )


@lru_cache(maxsize=1 << 12)
def takes(op: Callable[..., Any], count: int, names: frozenset[str]) -> bool:
    """Whether an operation accepts so many positional arguments and these keywords.

    An operation that wraps another shows the signature of that one, but may need more itself, so both are checked.
    """
    keywords = dict.fromkeys(names)
    try:
        signature(op).bind(*[None] * count, **keywords)
        _of_calls(type(op).__call__).bind(op, *[None] * count, **keywords)
    except TypeError:
        return False
    return True


@lru_cache(maxsize=1 << 8)
def _of_calls(call: Callable[..., Any]) -> Signature:
    """What the objects of a type take, given how that type is called."""
    return signature(call)
