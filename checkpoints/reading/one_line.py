"""One line of a dump, of any kind, with every check and its message."""

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..record import DECODE, SKETCH_SIZE, End, Header, Token
from . import digits as printed
from . import fields, lenient
from .arrays import without_words
from .labels import Labels
from .line_order import UNNUMBERED
from .slabs import Slab

RECORD = "checkpoint"


def item(line: bytes, labels: Labels, serial: int, *, digits: bool) -> Header | Token | End | Slab | None:
    """What one line holds; None if it does not belong to a dump. `serial` is the number of the line in the file.

    With `digits`, the printed digits are taken into account.

    Raises:
        TypeError, ValueError, KeyError, OverflowError: it contradicts itself; the text says how.
    """
    line = lenient.trimmed(line[max(line.find(b"{"), 0) :])  # a logger's words may stand before it
    try:
        content = lenient.loads(line)
    except ValueError:
        return None
    kind = content.get("type", RECORD) if isinstance(content, dict) else None
    if kind == "header":
        return fields.header(content)
    if kind == "token":
        return fields.token(content)
    if kind == "end":
        return fields.end(content)
    if kind is not None and "checkpoint" in content and "values" in content:
        return _record(content, line, labels, serial, digits=digits)
    return None


def _record(content: dict[str, Any], line: bytes, labels: Labels, serial: int, *, digits: bool) -> Slab:
    """One record, with words for numbers and scattered values."""
    label, values = content["checkpoint"], content["values"]
    if not isinstance(label, str) or not isinstance(values, list):
        raise TypeError('"checkpoint" must be a name and "values" a list of numbers')
    token_idx = fields.integer(content["token_idx"], "token_idx") if "token_idx" in content else UNNUMBERED
    step = fields.integer(content.get("step", 0), "step")
    seq = fields.integer(content.get("seq", 0), "seq", fields.SEQUENCES)
    shape = fields.shape(content.get("shape"))
    if shape and prod(shape) < len(values):
        raise ValueError(f"{label} has {len(values)} values, more than its shape {list(shape)} holds")
    numbers = fields.numbers(values, '"values"')
    sketch, indices = content.get("sketch"), content.get("indices")
    if sketch is not None:
        sketch = fields.numbers(sketch, '"sketch"')
        if len(sketch) != SKETCH_SIZE:
            raise ValueError(f"{label} has a sketch of {len(sketch)} numbers instead of {SKETCH_SIZE}")
    scattered = None if indices is None else np.array([fields.indices(indices, len(values))], dtype=np.int64)
    stats = {name: np.array([fields.number(x)]) for name, x in fields.statistics(content.get("stats") or {}).items()}
    if content.get("quantum") is not None:  # of what was printed in some other format
        steps = fields.steps(content["quantum"], len(values))
        quantum: NDArray[np.float64] | None = steps
        if fields.beyond_values(steps[None, :], numbers[None, :]).any():
            raise ValueError(f'"quantum" of {label} is larger than all of its values')
    else:
        quantum = printed.quantum(without_words(fields.values_text(line)), numbers) if digits else None
    with np.errstate(over="ignore"):
        return Slab(
            np.array(labels.numbers([label])),
            np.array([serial]),
            np.array([(seq, token_idx, step, content.get("phase") == DECODE)], dtype=np.int64),
            [shape],
            numbers.astype(np.float32).reshape(1, len(values)),
            [str(content.get("dtype", "f32"))],
            stats,
            None if sketch is None else sketch.astype(np.float32)[None, :],
            None if quantum is None else quantum[None, :],
            scattered,
        )
