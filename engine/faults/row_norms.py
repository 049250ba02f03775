"""Faults of norms over the whole row, all heads together: of queries and keys (OLMo 2, OLMoE, MiniMax M2), of a scan's result."""

from typing import Any

from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..graph import Step
from ..inapplicable import NotApplicable
from .base import AT, Fault, Parameters, Steps, Values, kind_of, parameter_of, sibling, subsets
from .edits import HandsOn
from .recurrent_state import heads_of_scan, row_norms_of_scans, scan_behind

_NORMS = ("q_norm", "k_norm")
_OWN, _FIRST = "its own part of the weight", "the first part of the weight"


class _ByHead(HandsOn, frozen=True):
    """A norm of each head of a row by itself, multiplied by its part of the row's weight, or each by the first part."""

    heads: int
    weight: str

    def __call__(self, x: Array, weight: Array, *rest: Array | None, **params: Any) -> Array:
        """[T, H · d], [H · d] -> [T, H · d]."""
        xp, size = module_of(x), x.shape[1] // self.heads
        ones = xp.ones(size, dtype=x.dtype)
        normed = self.op(x, ones, **{**params, "heads": self.heads})
        factors = xp.tile(weight[:size], self.heads) if self.weight == _FIRST else weight
        scaled: Array = normed * factors
        return scaled if not rest or rest[0] is None else scaled + rest[0]


def _by_head(step: Step, right: Steps, parameters: Parameters) -> Step:
    if step.op not in (ops.rms_norm, ops.layer_norm) or step.params.get("heads", 1) != 1:
        raise NotApplicable(f"{step.makes} is no norm of a whole row")
    scan = scan_behind(step, right)
    if scan is not None:
        heads = heads_of_scan(scan)
    else:
        heads = int(parameter_of(sibling(step, right, "kq"), "kv_heads" if kind_of(step).startswith("k") else "heads"))
    if heads == 1:
        raise NotApplicable(f"{step.makes} has one head")
    return replace(step, op=_ByHead(step.op, heads, parameters["weight"]))


def _places(right: Steps) -> Values:
    """Queries, keys, and the norms of whole rows that scans make."""
    return (*subsets(*_NORMS), *((kind,) for kind in row_norms_of_scans(right)))


FAULTS = (
    Fault(
        name="row-norm-by-head",
        kinds=(*_NORMS, "RMS_NORM"),
        change=_by_head,
        what="each head is normalised by itself, where this model normalises the whole row, with {weight}, in {at}",
        symptom="position 0 is right, later ones are slightly wrong",
        fix="normalise all heads together: the norm's weight is as wide as the row",
        seen="Qwen3 code that loads OLMo 2 or OLMoE",
        parameters={"weight": (_OWN, _FIRST), AT: _places},
    ),
)
