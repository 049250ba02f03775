"""Faults of how experts' weights are laid out: their order, their three dimensions, gate and up in one tensor."""

from collections.abc import Callable
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..graph import Step, View
from ..inapplicable import NotApplicable
from .base import AT, Fault, Parameters, Steps, kind_of, read_of, sibling, weight_of
from .edits import ggml, require
from .weights import EXPERTS, altered, each_transposed, with_rows_moved

_PARTS = ("ffn_gate", "ffn_up", "ffn_moe_gate", "ffn_moe_up")  # if one product makes both
_GATED = ("ffn_swiglu", "ffn_geglu", "ffn_moe_swiglu", "ffn_moe_geglu", "ffn_moe_swiglu_oai")


def _by_text(count: int) -> list[int]:
    """Numbers sorted as text: 0, 1, 10, 11, 2, …"""
    return sorted(range(count), key=str)


_ORDERS: dict[str, Callable[[int], list[int]]] = {
    "one on": lambda count: [*range(1, count), 0],
    "one back": lambda count: [count - 1, *range(count - 1)],
    "in reverse": lambda count: list(range(count))[::-1],
    "sorted by their numbers as text": _by_text,
    "every second one first": lambda count: [*range(0, count, 2), *range(1, count, 2)],
}


def _experts(step: Step, change: Callable[[Array], Array]) -> Step:
    """The step with the matrices of its experts [E, out, in] changed."""

    def checked(weight: Array) -> Array:
        if weight.ndim != 3:
            raise NotApplicable(f"{step.makes} reads no matrices of experts")
        return change(weight)

    return altered(require(step, "MUL_MAT_ID"), checked)


def _order(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return _experts(step, lambda weight: weight[_ORDERS[parameters["order"]](weight.shape[0])])


def _router(step: Step, _right: Steps, parameters: Parameters) -> Step:
    weight = weight_of(step, 0)
    if step.op is not ops.linear or not isinstance(weight, str) or not weight.endswith("ffn_gate_inp.weight"):
        return step
    order = _ORDERS[parameters["order"]]
    return with_rows_moved(step, lambda rows: rows[order(rows.shape[0])], bias=parameters["bias"])


def _turned_before(weight: Array) -> Array:
    """Matrices that were transposed in the file, read as [E, out, in] all the same."""
    return weight.swapaxes(1, 2).copy().reshape(weight.shape)


def _experts_last(weight: Array) -> Array:
    """[out, in, E] for [E, out, in]."""
    return weight.reshape(*weight.shape[1:], weight.shape[0]).transpose(2, 0, 1).copy()


def _experts_between(weight: Array) -> Array:
    """[out, E, in] for [E, out, in]."""
    experts, rows, columns = weight.shape
    return weight.reshape(rows, experts, columns).swapaxes(0, 1).copy()


_LAYOUTS = {
    "[expert, in, out]": each_transposed,
    "[expert, out, in] of transposed matrices": _turned_before,
    "[out, in, expert]": _experts_last,
    "[out, expert, in]": _experts_between,
}


def _layout(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return _experts(step, _LAYOUTS[parameters["layout"]])


def _in_turn(gate: Array, up: Array) -> tuple[Array, Array]:
    """Gate and up of rows that lie in halves but are taken alternately."""
    both = module_of(gate).concatenate([gate, up], axis=-1)
    return both[..., 0::2], both[..., 1::2]


def _in_halves(gate: Array, up: Array) -> tuple[Array, Array]:
    """Gate and up of rows that alternate but are taken as halves."""
    both = module_of(gate).stack([gate, up], axis=-1).reshape(*gate.shape[:-1], -1)
    return both[..., : gate.shape[-1]], both[..., gate.shape[-1] :]


def _exchanged(gate: Array, up: Array) -> tuple[Array, Array]:
    return up, gate


_SPLITS = {"in turn, for halves": _in_turn, "as halves, for rows in turn": _in_halves, "in the other order": _exchanged}


class _Resplit(Struct, frozen=True):
    """Gate and up that were split wrongly; `experts` lie side by side in a row."""

    how: str
    experts: int = 1

    def __call__(self, gate: Array, up: Array) -> tuple[Array, Array]:
        """The gate and up that were taken: [T, experts · F] each."""
        each = (gate, up) if self.experts == 1 else (x.reshape(x.shape[0], self.experts, -1) for x in (gate, up))
        taken, other = (module_of(gate).ascontiguousarray(part).reshape(gate.shape) for part in _SPLITS[self.how](*each))
        return taken, other


class _OfResplit(Struct, frozen=True):
    """A gated activation of gate and up that were split wrongly."""

    op: Callable[..., Array]
    split: _Resplit

    def __call__(self, gate: Array, up: Array, **params: Any) -> Array:
        """The activated product."""
        return self.op(*self.split(gate, up), **params)


class _PartOfResplit(Struct, frozen=True):
    """The gate (0) or up (1) of those that were split wrongly."""

    split: _Resplit
    part: int

    def __call__(self, gate: Array, up: Array) -> Array:
        """[T, experts · F]."""
        return self.split(gate, up)[self.part]


_SHOWN, _INSIDE = "as ffn_gate and ffn_up show", "in the activation alone"


def _split(step: Step, right: Steps, parameters: Parameters) -> Step:
    part = kind_of(step) in _PARTS
    if part and (step.op is not ops.part or parameters["seen"] == _INSIDE):
        return step
    routed = "moe" in kind_of(step)
    gate, up = _PARTS[2:] if routed else _PARTS[:2]
    if parameters["seen"] == _SHOWN and sibling(step, right, gate).op is not ops.part:
        raise NotApplicable(f"{step.makes}: gate and up are products of their own")
    if not part and (len(step.reads) != 2 or not (step.op is ops.swiglu or ggml(step, "GLU"))):
        raise NotApplicable(f"{step.makes} reads no gate and up")
    experts = 1
    if routed and (part or step.op is ops.swiglu):
        chosen = read_of(sibling(step, right, "ffn_moe_topk"), 0)
        if not isinstance(chosen, View) or not chosen.shape[-1].constant:
            raise NotApplicable(f"{step.makes}: the chosen experts are not a part of all")
        experts = chosen.shape[-1].fixed
    split = _Resplit(parameters["split"], experts)
    if not part:
        return replace(step, op=_OfResplit(step.op, split))
    reads = tuple(read_of(sibling(step, right, kind), 0) for kind in (gate, up))
    return replace(step, op=_PartOfResplit(split, (gate, up).index(kind_of(step))), reads=reads)


_RIGHT_ROUTING = "routing is right, the experts' results are not"

FAULTS = (
    Fault(
        name="experts-order",
        kinds=EXPERTS,
        change=_order,
        what="the experts' matrices are in another order ({order}), in {at}",
        symptom=_RIGHT_ROUTING,
        fix="expert e is row e of the first dimension of ffn_*_exps, and of the router's output",
        seen="experts collected from single tensors in the order of their names: 10 before 2",
        parameters={
            "order": tuple(_ORDERS),
            AT: (EXPERTS, ("ffn_moe_down",), ("ffn_moe_gate_up", "ffn_moe_gate", "ffn_moe_up")),
        },
    ),
    Fault(
        name="router-order",
        kinds=("ffn_moe_logits", "ffn_moe_probs"),
        change=_router,
        what="the router's rows are in another order ({order}; bias {bias})",
        symptom="other experts are chosen at most positions",
        fix="row e of ffn_gate_inp is expert e of ffn_*_exps",
        seen="experts sorted by their names on one side only",
        parameters={"order": tuple(_ORDERS), "bias": ("moved", "left")},
    ),
    Fault(
        name="experts-layout",
        kinds=EXPERTS,
        change=_layout,
        what="the experts' matrices are read as {layout}, in {at}",
        symptom=_RIGHT_ROUTING,
        fix="GGUF stores them as [expert, out, in], with `in` contiguous",
        seen="checkpoints of Hugging Face that hold [expert, in, out] (gpt-oss, Llama 4)",
        parameters={"layout": tuple(_LAYOUTS), AT: (EXPERTS, *((kind,) for kind in EXPERTS))},
    ),
    Fault(
        name="gate-up-split",
        kinds=(*_PARTS, *_GATED),
        change=_split,
        what="the rows of gate and up are split {split}, {seen}",
        symptom="fluent nonsense from the first such layer on",
        fix="in one tensor gate's rows come first, then up's; where a checkpoint has them in turn (gpt-oss) its converter separates them",
        seen="fused gate_up weights of one family read as those of another",
        parameters={"split": tuple(_SPLITS), "seen": (_INSIDE, _SHOWN)},
    ),
)
