"""Faults of RoPE that rotates a part of each head: which part it is."""

from typing import Any

from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..graph import Step
from ..inapplicable import NotApplicable
from .base import AT, Fault, Parameters, Steps
from .edits import ggml, integer, with_values
from .rotation import BEGIN, ROTATED, both_then_each, head_size, require_rotation, rotary


def _front(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    """A rotation of the head's first elements where the model rotates its last ones."""
    if not ggml(require_rotation(step), "ROPE") or not integer(step, BEGIN):
        raise NotApplicable(f"{step.makes} begins at the head's first element")
    return with_values(step, {BEGIN: 0})


def _rotated_last(x: Array, positions: Array, factors: Array | None = None, *, heads: int, dims: int, **params: Any) -> Array:
    """[T, H · d] with the last `dims` elements of each head rotated."""
    split = x.reshape(x.shape[0], heads, -1)
    kept = split.shape[-1] - dims
    if kept <= 0:
        raise NotApplicable("the whole head is rotated")
    xp = module_of(x)
    last = xp.ascontiguousarray(split[..., kept:]).reshape(x.shape[0], -1)
    turned = ops.rope(last, positions, factors, heads=heads, dims=dims, **params)
    both: Array = xp.concatenate([split[..., :kept], turned.reshape(x.shape[0], heads, dims)], axis=-1)
    return both.reshape(x.shape)


def _last(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    """A rotation of the head's last elements where the model rotates its first ones."""
    if step.op is ops.rope:
        return replace(step, op=_rotated_last)
    kept = head_size(step) - int(rotary(step, "dims"))
    if kept <= 0 or integer(step, BEGIN):
        raise NotApplicable(f"{step.makes} does not rotate the first elements of a head alone")
    return with_values(step, {BEGIN: kept})


FAULTS = (
    Fault(
        name="rope-front",
        kinds=ROTATED,
        change=_front,
        what="RoPE rotates the first dimensions of the head where this model rotates the last ones, on {at}",
        symptom="position 0 is right, later ones drift away",
        fix="multi-head latent attention keeps the part without position first: rotate the part after it",
        seen="partial rotation of GPT-NeoX or Phi carried over",
        parameters={AT: both_then_each},
    ),
    Fault(
        name="rope-last",
        kinds=ROTATED,
        change=_last,
        what="RoPE rotates the last dimensions of the head where this model rotates the first ones, on {at}",
        symptom="position 0 is right, later ones drift away",
        fix="partial rotation turns the first <architecture>.rope.dimension_count elements of each head",
        seen="multi-head latent attention's order (the part without position first) carried over",
        parameters={AT: both_then_each},
    ),
)
