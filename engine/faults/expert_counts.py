"""Faults of how many experts are used: more than the model's own number, or fewer where one is chosen too often."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..graph import PASSES, Step, View, name_of, read_as
from ..inapplicable import NotApplicable
from .base import COPY, Fault, Parameters, Steps, kind_of, layer_of, read_of, sibling
from .edits import ggml, integer, maker, number, require

_SOFT_MAX, _SUM = "soft max", "sum"
OTHER_COUNTS = (1, 2, 4)  # by how many experts an engine may be off: one by a loop, others by another model of the family


class _Weighting(Struct, frozen=True):
    """How the chosen experts' raw weights are processed: which norm, its least sum, and the scale."""

    norm: str = ""
    least: float = 0.0
    scale: float = 1.0


def _weighting(step: Step, right: Steps, raw: str) -> _Weighting:
    """The weighting that leads from the raw weights to those that a product with the experts' results reads.

    Raises:
        NotApplicable: other operations lie between them.
    """
    weighting = _Weighting()
    name = name_of(read_of(step, 1))
    while name != raw:
        producer = right.get(name, step)
        if ggml(producer, "SCALE"):
            weighting = replace(weighting, scale=weighting.scale * number(producer, 0))
        elif ggml(producer, "SOFT_MAX"):
            weighting = replace(weighting, norm=_SOFT_MAX)
        elif ggml(producer, "DIV"):
            clamped = maker(producer, right, 1)
            least = number(clamped, 0) if ggml(clamped, "CLAMP") else 0.0
            weighting = replace(weighting, norm=_SUM, least=least)
        else:
            raise NotApplicable(f"{step.makes}: the experts' weights are computed by another operation")
        name = name_of(read_of(producer, 0))
    return weighting


def _mixed(down: Array, next_down: Array, raw: Array, next_raw: Array, *, used: int, more: int, weighting: _Weighting) -> Array:
    """The weighted sum with further experts: results [T, used · D] and raw weights [T, used] of ranks 1 to n, and as many later ones."""
    xp, rows = module_of(down), down.shape[0]
    weights = xp.concatenate([raw.reshape(rows, used), next_raw.reshape(rows, used)[:, -more:]], axis=1)
    if weighting.norm == _SOFT_MAX:
        weights = xp.exp(weights - weights.max(axis=1, keepdims=True))
    if weighting.norm:
        least = weights.dtype.type(weighting.least if weighting.norm == _SUM else 0.0)
        weights = weights / xp.maximum(weights.sum(axis=1, keepdims=True), least)
    experts = xp.concatenate([down.reshape(rows, used, -1), next_down.reshape(rows, used, -1)[:, -more:]], axis=1)
    summed: Array = (experts * (weights * weights.dtype.type(weighting.scale))[:, :, None]).sum(axis=1)
    return summed


def _sum_of_more(raw: Array, next_raw: Array, *, used: int, more: int) -> Array:
    """The sum of the raw weights [T, used] of ranks 1 to n, and of as many later ones: [T, 1]."""
    rows = raw.shape[0]
    summed: Array = raw.reshape(rows, used).sum(axis=1) + next_raw.reshape(rows, used)[:, -more:].sum(axis=1)
    return summed[:, None]


def _counts(chosen: Step, right: Steps, more: int) -> tuple[View, int]:
    """The ranks that the chosen experts are a part of, and how many are used.

    Raises:
        NotApplicable: they are chosen by another operation, or there are not so many further ones.
    """
    ranks = read_of(chosen, 0)
    if chosen.op is not ops.part or not isinstance(ranks, View) or not ranks.shape[-1].constant:
        raise NotApplicable(f"{chosen.makes} is no part of all ranks")
    used, all_ranks, by = ranks.shape[-1].fixed, ranks.whole[-1].fixed, maker(chosen, right)
    if more > used or used + more > all_ranks or not ggml(by, "ARGSORT") or integer(by, 0) != 1:
        raise NotApplicable(f"{chosen.makes}: there are not {more} further experts")
    return ranks, used


def _of_next_ranks(chosen: Step, right: Steps, more: int, until: str, mark: str) -> list[Step]:
    """The steps from the chosen experts to the value `until`, computed of the next ranks, under names that end in `mark`.

    Raises:
        NotApplicable: that value is not computed from the chosen ids.
    """
    ranks, _ = _counts(chosen, right, more)
    moved = replace(ranks, offset=ranks.offset._replace(fixed=more))
    copies, copied = [replace(chosen, makes=chosen.makes + mark, reads=(moved,), inner=True)], {chosen.makes}
    for name, other in right.items():
        if name.startswith(f"blk.{layer_of(chosen)}.") and not copied.isdisjoint(other.names):
            copied.add(name)
            reads = tuple(read_as(read, name_of(read) + mark) if name_of(read) in copied else read for read in other.reads)
            copies.append(replace(other, makes=name + mark, reads=reads, inner=True))
            if name == until:
                return copies
    raise NotApplicable(f"{until} is not computed from the chosen ids")


def _more(step: Step, right: Steps, parameters: Parameters) -> Sequence[Step]:
    more: int = parameters["count"]
    chosen, raw = sibling(step, right, "ffn_moe_topk"), sibling(step, right, "ffn_moe_weights").makes
    _, used = _counts(chosen, right, more)
    if (
        kind_of(step) == "ffn_moe_weights_sum"
    ):  # what an engine shows of the weights' sum; the result below has a sum of its own
        mark = COPY * 2
        copies = _of_next_ranks(chosen, right, more, raw, mark)
        return [*copies, replace(step, op=_sum_of_more, reads=(raw, raw + mark), params={"used": used, "more": more})]
    weighted = require(sibling(step, right, "ffn_moe_weighted"), "MUL")
    if step.op is not ops.add:
        raise NotApplicable(f"{step.makes} sums no chosen experts")
    weighting, down = _weighting(weighted, right, raw), name_of(read_of(weighted, 0))
    copies = _of_next_ranks(chosen, right, more, down, COPY)
    reads = (down, down + COPY, raw, raw + COPY)
    return [*copies, replace(step, op=_mixed, reads=reads, params={"used": used, "more": more, "weighting": weighting})]


class _WithCapacity(Struct, frozen=True):
    """A product of the experts' results and weights, 0 for a choice of an expert that has no room: it takes its even share of a pass
    times `factor`, rounded up, in the order of the tokens or all first choices first.
    """

    product: Callable[..., Array]
    experts: int
    factor: float
    order: str

    def __call__(self, down: Array, weights: Array, ids: Array, passes: Array, **params: Any) -> Array:
        """[T, k · D] or [T, k, D], weights and ids of k experts per token."""
        xp, rows = module_of(down), len(passes)
        chosen, value = ids.reshape(rows, -1), self.product(down, weights, **params)
        used = chosen.shape[1]
        has_room = xp.ones((rows, used), dtype=bool)
        for one in xp.unique(passes):
            here = xp.nonzero(passes == one)[0]
            turns = chosen[here] if self.order == "token by token" else chosen[here].T
            is_of = turns.reshape(-1, 1) == xp.arange(self.experts)
            place = (is_of.cumsum(axis=0) * is_of).sum(axis=1).reshape(turns.shape)
            room = place <= math.ceil(self.factor * used * len(here) / self.experts)
            has_room[here] = room if self.order == "token by token" else room.T
        kept: Array = (value.reshape(rows, used, -1) * has_room[:, :, None]).reshape(value.shape)
        return kept


def _limited(step: Step, right: Steps, parameters: Parameters) -> Step:
    chosen = sibling(step, right, "ffn_moe_topk")
    ranks = read_of(chosen, 0)
    if len(require(step, "MUL").reads) != 2 or not isinstance(ranks, View) or not ranks.whole[-1].constant:
        raise NotApplicable(f"{step.makes}: how many experts there are is not known")
    op = _WithCapacity(step.op, ranks.whole[-1].fixed, parameters["factor"], parameters["order"])
    return replace(step, op=op, reads=(*step.reads, chosen.makes, PASSES))


FAULTS = (
    Fault(
        name="experts-capacity",
        kinds=("ffn_moe_weighted",),
        change=_limited,
        what="an expert takes no more than {factor} times its even share of a pass, {order}; what else chose it is dropped",
        symptom="the first tokens are right; later ones lose experts that earlier ones chose, the more so in long prompts",
        fix="no capacity limit in inference (capacity_factor of training): each token gets all of its experts",
        seen="training code with a capacity factor; buffers of a fixed number of tokens per expert",
        parameters={"factor": (1.0, 1.25, 1.5, 2.0), "order": ("token by token", "all first choices first")},
        whole=True,
    ),
    Fault(
        name="experts-too-many",
        kinds=("ffn_moe_out", "ffn_moe_weights_sum"),
        change=_more,
        what="more experts are used than this model asks for, by {count}",
        symptom="the router's scores are right, the experts' combined result is not",
        fix="use as many experts as <architecture>.expert_used_count says",
        seen="a loop that runs once too often; another size of the same family",
        parameters={"count": OTHER_COUNTS},
    ),
)
