"""JSON whose nesting is bounded before it is parsed."""

import json
import re
from itertools import accumulate
from typing import Any

DEEPEST = 100  # levels; a completion with log-probabilities of each token's candidates has seven, Python's parser stops at about 1,000

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)  # an unended one goes to the end: no text is read twice
_BRACKET = re.compile(rb"[\[{\]}]")


def shallow_json(data: bytes) -> Any:
    """`data`, UTF-8, parsed; NaN and Infinity are numbers, as in Python's `json`.

    Python's parser calls itself for each level. Close to its limit whatever the garbage collector finalises in
    between fails as well, and says so on stderr; so text that is nested too deeply is refused before it is parsed.

    Raises:
        ValueError: it is not UTF-8, not JSON, or nested more than `DEEPEST` levels deep.
    """
    brackets = _BRACKET.findall(_STRING.sub(b"", data))
    if max(accumulate(1 if bracket in b"[{" else -1 for bracket in brackets), default=0) > DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} levels deep")
    return json.loads(data.decode("utf-8-sig"))
