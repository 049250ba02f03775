"""Faults of the capture: the engine computes the right values, but the dump shows others."""

from collections.abc import Callable
from itertools import count, takewhile

import numpy as np
from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..graph import PASSES, Step, name_of
from .base import AT, SEEN, Fault, Parameters, Steps, read_of, unchanged
from .edits import copied
from .residuals import branch_and_stream
from .rotation import ROTATED, both_then_each, is_rotation, not_rotated


def _show(point: str, other: str, right: Steps) -> Step | None:
    return Step(SEEN + point, copied, (other,)) if other in right and other != point else None


def _streams(right: Steps) -> list[str]:
    """The residual stream's values from layer to layer: embd, blk.0.l_out, …"""
    names = (f"blk.{layer}.l_out" for layer in count())
    return ["embd", *takewhile(right.__contains__, names)]  # called for every point, so it must not walk over all steps


def _overwritten(point: str, right: Steps, parameters: Parameters) -> Step | None:
    """What a pointer into one of two buffers that are swapped in each layer shows at the end of the pass."""
    streams = _streams(right)
    if point not in streams:
        return None
    left = (len(streams) - 1 - streams.index(point)) % 2 if parameters["buffers"] == 2 else 0
    return _show(point, streams[len(streams) - 1 - left], right)


def _late(point: str, right: Steps, parameters: Parameters) -> Step | None:
    names = list(right) if parameters["by"] == "step" else _streams(right)
    at = names.index(point) + 1 if point in names else len(names)
    return _show(point, names[at], right) if at < len(names) else None


def _early(point: str, right: Steps, parameters: Parameters) -> Step | None:
    names = list(right) if parameters["by"] == "step" else _streams(right)
    at = names.index(point) - 1 if point in names else -1
    return _show(point, names[at], right) if at >= 0 else None


# A row's number, and the first and last row of its pass -> the row that is shown.
_ROWS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "the next position": lambda t, _first, last: np.minimum(t + 1, last),
    "the position before": lambda t, first, _last: np.maximum(t - 1, first),
    "position 0": lambda _t, first, _last: first,
    "the last position": lambda _t, _first, last: last,
    "the mirrored position": lambda t, first, last: first + last - t,
}


def _row(x: Array, passes: Array, *, row: str) -> Array:
    first, last = (module_of(x).searchsorted(passes, passes, side=side) for side in ("left", "right"))
    return x[_ROWS[row](module_of(x).arange(len(passes)), first, last - 1)]


def _other_row(point: str, _right: Steps, parameters: Parameters) -> Step | None:
    return Step(SEEN + point, _row, (point, PASSES), (), {"row": parameters["row"]})


def _before_residual(point: str, right: Steps, parameters: Parameters) -> Step | None:
    step = right[point]
    if len(step.reads) != 2 or step.op is not ops.add:
        return None
    branch, stream = branch_and_stream(step, right)
    return _show(point, name_of(branch if parameters["shown"] == "the branch alone" else stream), right)


def _before_rope(point: str, right: Steps, _parameters: Parameters) -> Step | None:
    return replace(not_rotated(right[point]), makes=SEEN + point) if is_rotation(right[point]) else None


def _input(point: str, right: Steps, _parameters: Parameters) -> Step | None:
    read = read_of(right[point], 0)
    return _show(point, read, right) if isinstance(read, str) else None


def _normed(point: str, right: Steps, _parameters: Parameters) -> Step | None:
    """The last layer's output shown after the final norm, as is the last of Hugging Face's hidden states."""
    return _show(point, "output_norm", right) if point == _streams(right)[-1] else None


_STREAM = ("embd", "l_out")
_POINTS = (*_STREAM, "output_norm", "logits")
_ALONE = (_POINTS, *((kind,) for kind in _POINTS), _STREAM)

FAULTS = (
    Fault(
        name="capture-overwritten",
        kinds=_STREAM,
        change=unchanged,
        what="{at}: a buffer that was overwritten before it was read at the end of the pass ({buffers})",
        symptom="several points hold the same vector; logits are right",
        fix="copy when the value is computed, in the stream that computed it",
        seen="a pointer kept instead of a copy, and two buffers that are swapped in each layer",
        parameters={"buffers": (2, 1), AT: (_STREAM, ("l_out",), ("embd",))},
        says={1: "one buffer for all", 2: "two buffers that are swapped in each layer"},
        shows=_overwritten,
    ),
    Fault(
        name="capture-late",
        kinds=_POINTS,
        change=unchanged,
        what="{at}: captured one {by} too late",
        symptom="points hold the values of the ones after them; logits are right",
        fix="copy before the next kernel writes to the buffer",
        seen="layers counted from 1; copies that are not ordered after the kernels",
        parameters={"by": ("layer", "step"), AT: (_STREAM, ("l_out",), ("embd",), _POINTS)},
        shows=_late,
    ),
    Fault(
        name="capture-early",
        kinds=_POINTS,
        change=unchanged,
        what="{at}: captured one {by} too early",
        symptom="points hold the values of the ones before them; logits are right",
        fix="layer i's output, not its input",
        seen="Hugging Face's hidden_states[i], which is layer i's input",
        parameters={"by": ("layer", "step"), AT: (("l_out",), ("logits",), ("output_norm",), _POINTS)},
        shows=_early,
    ),
    Fault(
        name="capture-row",
        kinds=_POINTS,
        change=unchanged,
        what="{at}: {row} is shown instead of its own",
        symptom="values are right, but belong to another position",
        fix="row t of the batch is position t; a decode step has one row",
        seen="the last token's offset used for every token",
        parameters={"row": tuple(_ROWS), AT: _ALONE},
        shows=_other_row,
        whole=True,
    ),
    Fault(
        name="capture-before-residual",
        kinds=("l_out", "ffn_inp"),
        change=unchanged,
        what="{at} shows {shown}",
        symptom="single points are wrong, all others are right",
        fix="l_out and ffn_inp include the residual",
        seen="fused additions: the capture comes before them",
        parameters={"shown": ("the branch alone", "the residual alone"), AT: (("l_out",), ("ffn_inp",))},
        shows=_before_residual,
    ),
    Fault(
        name="capture-before-norm",
        kinds=("output_norm", "attn_norm", "ffn_norm"),
        change=unchanged,
        what="{at} shows the norm's input",
        symptom="single points are wrong, all others are right",
        fix="capture after the norm and its weight",
        seen="norms fused into the next product",
        parameters={AT: (("output_norm",), ("attn_norm", "ffn_norm"))},
        shows=_input,
    ),
    Fault(
        name="capture-before-rope",
        kinds=ROTATED,
        change=unchanged,
        what="{at} shows the values before RoPE",
        symptom="position 0 and all that follows are right",
        fix="capture after the rotation",
        seen="RoPE fused into attention's kernel",
        parameters={AT: both_then_each},
        shows=_before_rope,
    ),
    Fault(
        name="capture-normed",
        kinds=("l_out",),
        change=unchanged,
        what="the last layer's output is shown after the final norm",
        symptom="the last l_out equals output_norm",
        fix="hidden_states[-1] of Hugging Face is after the norm: record the layer's own output",
        seen="dumps made with Hugging Face's output_hidden_states",
        shows=_normed,
        once=True,
    ),
)
