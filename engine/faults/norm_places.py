"""Norms at another place: not before one of the products that share it, or after the sum that their result is added to."""

from collections.abc import Callable
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from .. import ops
from ..backend import Array
from ..graph import Step
from .base import AT, Fault, Parameters, Steps, Values, kind_of
from .edits import ggml

_NORMS = (ops.rms_norm, ops.layer_norm)
_NONE = (("ffn_moe_logits",),)  # stands for the products of a model whose norms are all read by one product each
_PRODUCTS = ("MUL_MAT", "MUL_MAT_ID")


def _norm_of(step: Step, right: Steps) -> Step | None:
    """The norm whose result a product reads first, if that is a norm of the hidden state; None for any other step."""
    if not (step.op is ops.linear or ggml(step, *_PRODUCTS)) or not step.reads or not isinstance(step.reads[0], str):
        return None
    norm = right.get(step.reads[0])
    plain = norm is not None and norm.op in _NORMS and norm.params.get("heads", 1) == 1 and isinstance(norm.reads[0], str)
    return norm if plain else None


def _readers(right: Steps) -> Values:
    """The kinds of products that share their norm with others, each alone, then those that one operation multiplies or exchanges."""
    of_norm: dict[str, list[str]] = {}
    for step in right.values():
        if (norm := _norm_of(step, right)) is not None:
            of_norm.setdefault(norm.makes, []).append(step.makes)
    shared = {name for readers in of_norm.values() if len(readers) > 1 for name in readers}
    pairs = (step.names for step in right.values() if len(step.names) > 1 and shared.issuperset(step.names[:2]))
    several = (tuple(kind_of(right[name]) for name in names[:2]) for names in pairs)
    alone = ((kind_of(right[name]),) for name in right if name in shared)
    return tuple(dict.fromkeys((*alone, *several))) or _NONE


def _unnormed(step: Step, right: Steps, _parameters: Parameters) -> Step:
    norm = _norm_of(step, right)
    return step if norm is None else replace(step, reads=(norm.reads[0], *step.reads[1:]))


class _OfSum(Struct, frozen=True):
    """A norm of the sum of a branch and the hidden state."""

    norm: Callable[..., Array]

    def __call__(self, branch: Array, x: Array, *weights: Array, **params: Any) -> Array:
        """[T, n], [T, n] -> [T, n]."""
        return self.norm(branch + x, *weights, **params)


def _of_sum(step: Step, right: Steps, _parameters: Parameters) -> Step:
    if step.op is not ops.add or len(step.reads) != 2 or step.params or not all(isinstance(read, str) for read in step.reads):
        return step
    norms = [right.get(name) for name in step.names]
    at = next((at for at, norm in enumerate(norms) if norm is not None and norm.op in _NORMS), None)
    norm = None if at is None else norms[at]
    if at is None or norm is None or norm.params.get("heads", 1) != 1 or not isinstance(norm.reads[0], str):
        return step
    reads = (norm.reads[0], step.reads[1 - at])
    return replace(step, op=_OfSum(norm.op), reads=reads, weights=norm.weights, params=norm.params)


FAULTS = (
    Fault(
        name="norm-not-read",
        kinds=("MUL_MAT", "MUL_MAT_ID"),
        change=_unnormed,
        what="{at}: the product reads the hidden state, not what the norm makes of it, as its neighbours do",
        symptom="wrong from position 0 on, of plausible size",
        fix="read what the norm makes: the router and the shared expert read the same as the experts",
        seen="routers and shared experts that are given the residual; fused norms whose result only one product gets",
        parameters={AT: _readers},
    ),
    Fault(
        name="norm-of-sum",
        kinds=("SUM",),
        change=_of_sum,
        what="the norm after a branch is applied to the sum of the branch and the hidden state, not to the branch",
        symptom="values of the size of a norm's result, from layer 0 on",
        fix="x + norm(branch(x)), not norm(x + branch(x))",
        seen="post-norms of the first transformers in Gemma 2, Gemma 3, OLMo 2 and GLM-4",
    ),
)
