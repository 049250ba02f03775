"""The value cache read in another layout than it was written in: pass by pass, since each pass sees a cache of another length."""

from collections.abc import Callable
from functools import partial

import numpy as np
from msgspec.structs import replace

from ..backend import Array
from ..graph import PASSES, Step
from ..inapplicable import NotApplicable
from .base import Parameters, Steps, kind_of, parameter_of, read_of, sibling

Mix = Callable[[Array, Array], Array]  # weights [H, T, S], values [S, K · d] -> [T, H · d]


def _transposed(history: Array, *, kv_heads: int) -> Array:
    """Columns read as rows: [S, K · d], whatever the number of heads."""
    del kv_heads
    return history.T.copy().reshape(history.shape)


def _head_by_head(history: Array, *, kv_heads: int) -> Array:
    """Rows written head by head and read position by position: [S, K · d]."""
    by_head = history.reshape(history.shape[0], kv_heads, -1).transpose(1, 0, 2)
    return by_head.copy().reshape(history.shape)


_LAYOUTS = {"transposed": _transposed, "head by head": _head_by_head}


def _mixed(weights: Array, v: Array, passes: Array, *, mix: Mix, layout: str, kv_heads: int) -> Array:
    """The weighted values of each pass, over the cache as that pass reads it: [H, T, S], [S, K · d], [T] -> [T, H · d]."""
    before = len(v) - len(passes)  # the cache's rows from passes before these
    columns = []
    for number in np.unique(passes).tolist():
        rows = (passes == number).nonzero()[0]
        end = before + int(rows[-1]) + 1
        columns.append(mix(weights[:, rows, :end], _LAYOUTS[layout](v[:end], kv_heads=kv_heads)))
    return np.concatenate(columns)


def value_layout(step: Step, right: Steps, parameters: Parameters) -> Step:
    """The change of v_read, as a single pass would show it, and of kqv_out, which reads the cache itself in the same way."""
    layout, kv_heads = parameters["layout"], parameter_of(sibling(step, right, "kq"), "kv_heads")
    if kind_of(step) == "v_read":
        return replace(step, op=_LAYOUTS[layout], params={"kv_heads": kv_heads})
    if PASSES in step.reads:  # by this change, or one below another
        raise NotApplicable(f"{step.makes}: the layout has been changed already")
    if len(step.reads) != 2:  # weights and values: another fault made it read queries and keys as well
        raise NotApplicable(f"{step.makes} is more than a sum of weighted values")
    mix = partial(step.op, **step.params)
    written = read_of(sibling(step, right, "v_read"), 0)
    return replace(
        step, op=_mixed, reads=(read_of(step, 0), written, PASSES), params={"mix": mix, "layout": layout, "kv_heads": kv_heads}
    )
