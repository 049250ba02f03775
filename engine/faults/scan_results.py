"""Faults of what is done with a scan's result: the gate and the norm, and D · x."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from checkpoints.graph import Size

from .. import ops
from ..backend import Array
from ..graph import Read, Step, View, read_as
from ..inapplicable import NotApplicable
from ..lift.node import GgmlOperation
from .base import Fault, Parameters, Steps, read_of
from .edits import ggml, maker, require
from .recurrent_state import scan_behind

_T = Size(0, 1)


def _gate_before_norm(step: Step, right: Steps, _parameters: Parameters) -> Step | Sequence[Step]:
    """norm(y · gate), where the model has norm(y) · gate."""
    places = [place for place, name in enumerate(step.names) if name in right and right[name].op is ops.rms_norm]
    if len(places) != 1 or len(step.reads) != 2 or not (ggml(step, "MUL") or step.op is ops.swiglu):
        return step
    norm = maker(step, right, places[0])
    if scan_behind(norm, right) is None or not isinstance(read_of(step, places[0]), str):
        return step
    reads = tuple(read_of(norm, 0) if place == places[0] else read for place, read in enumerate(step.reads))
    gated = replace(step, makes=f"{step.makes}.alone", reads=reads, inner=True)
    return gated, replace(norm, makes=step.makes, reads=(gated.makes,))


class _ByElement(GgmlOperation, frozen=True):
    """x · D with D's elements taken one after the other along the row, not one for each head."""

    def compute(self, *arguments: Any, params: Any, shape: tuple[int, ...]) -> Array:
        """[1, T, H, d], [1, 1, H, 1] -> [1, T, H, d]."""
        x, skip = arguments
        heads, size = x.shape[-2:]
        if heads == 1 or size == 1 or skip.size != heads:
            raise NotApplicable("each element has its own D")
        by_element = skip.reshape(-1)[np.arange(heads * size) % heads].reshape(heads, size)
        product: Array = (x * by_element).reshape(shape)
        return product


_ELEMENT, _RAW, _LINEAR = "D of the element, not of the head, times x", "D · x before the convolution", "D · x before SiLU"


def _other_skip(step: Step, right: Steps, parameters: Parameters) -> Step:
    if not any("ssm_d" in str(weight) for weight in require(step, "MUL").weights):
        return step
    if parameters["added"] == _ELEMENT:
        return replace(step, op=_ByElement("MUL"))
    activated = maker(step, right)
    before = read_of(activated, 0)
    if not ggml(activated, "UNARY") or not isinstance(before, str):
        raise NotApplicable(f"{step.makes} multiplies no convolution")
    if parameters["added"] == _LINEAR:
        return replace(step, reads=(read_as(read_of(step, 0), before), *step.reads[1:]))
    return replace(step, reads=(_before_convolution(read_of(step, 0), activated, right), *step.reads[1:]))


def _before_convolution(read: Read, step: Step, right: Steps) -> View:
    """What a step reads of a convolution's result, read of what the convolution reads.

    Raises:
        NotApplicable: that is no part of a row.
    """
    while not ggml(step, "CONCAT"):
        step = maker(step, right)
    rows = [part for part in step.reads if isinstance(part, View) and len(part.whole) == 2]  # the other is the state
    raw = rows[0] if rows else None
    if raw is None or not raw.offset.constant:
        raise NotApplicable(f"{step.makes} joins no part of a row")
    width, channels = raw.whole[-1], raw.shape[-2]
    if not isinstance(read, View):
        return View(raw.of, raw.whole, (_T, channels), (width, Size(1)), raw.offset)
    strides = tuple(stride if size.constant else width for size, stride in zip(read.shape, read.strides, strict=True))
    begin = Size(raw.offset.fixed + read.offset.fixed)
    return View(raw.of, raw.whole, read.shape, strides, begin)


FAULTS = (
    Fault(
        name="gate-before-norm",
        kinds=("MUL", "GLU"),
        change=_gate_before_norm,
        what="the gate is applied before the norm, norm(y · gate), not after it",
        symptom="wrong from position 0 on, of plausible size",
        fix="norm(y) · silu(z), each head normed by itself",
        seen="Mamba-2's gated norm taken for that of Qwen3-Next, Qwen3.5 or Kimi Linear",
    ),
    Fault(
        name="skip-of-other",
        kinds=("MUL",),
        change=_other_skip,
        what="{added} is added to the scan's result",
        symptom="wrong from position 0 on",
        fix="y + D · x: one D for each head, x after the convolution and SiLU",
        seen="D broadcast along the wrong axis; x kept from before the convolution",
        parameters={"added": (_ELEMENT, _RAW, _LINEAR)},
    ),
)
