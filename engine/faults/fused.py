"""Faults of fused projections and of gates after attention: parts taken from the wrong place of one product."""

from msgspec import Struct
from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..graph import Step, View, name_of
from ..inapplicable import NotApplicable
from .base import Fault, Parameters, Steps, kind_of, parameter_of, read_of, sibling
from .edits import only, require
from .weights import altered, permuted

_QKV = ("q", "k", "v")
_OTHERS = {"K, Q, V": ("k", "q", "v"), "Q, V, K": ("q", "v", "k"), "V, K, Q": ("v", "k", "q"), "K, V, Q": ("k", "v", "q")}


_INSTEAD = {"V where K lies": {"v": "k"}, "K where V lies": {"k": "v"}, "K and V where Q begins": {"k": "q", "v": "q"}}


def _fused(step: Step, right: Steps) -> dict[str, View]:
    """The parts of one product that the layer's q, k and v read.

    Raises:
        NotApplicable: they are separate products.
    """
    views: dict[str, View] = {}
    for kind in _QKV:
        part = sibling(step, right, kind)
        read = read_of(part, 0)
        if part.weights or not isinstance(read, View) or not read.shape[-1].constant:
            raise NotApplicable(f"{part.makes} is not a part of a product")
        views[kind] = read
    if len({name_of(read) for read in views.values()}) != 1:
        raise NotApplicable(f"{step.makes}: Q, K and V are not parts of one product")
    return views


_READ, _LAID = "the product is read", "the weights lie"


def _widths(parts: dict[str, View]) -> dict[str, int]:
    return {kind: read.shape[-1].fixed for kind, read in parts.items()}


def _in_order(step: Step, right: Steps, parameters: Parameters) -> Step:
    """The part read from where it would lie if the product's rows were in another order."""
    parts = _fused(step, right)
    widths, kind, offset = _widths(parts), kind_of(step), 0
    own_place = _INSTEAD.get(parameters["order"], {}).get(kind, kind)
    for other in _OTHERS.get(parameters["order"], _QKV):
        if other == own_place:
            break
        offset += widths[other]
    own = parts[kind]
    return replace(step, reads=(replace(own, offset=own.offset._replace(fixed=offset)), *step.reads[1:]))


class _ByGroup(Struct, frozen=True):
    """One of Q, K and V, read group by group from their product [T, (H + 2K) · d]: each group is its queries, its key, its value."""

    kind: str
    queries: int
    groups: int

    def __call__(self, whole: Array) -> Array:
        """[T, H · d] or [T, K · d]."""
        rows = whole.reshape(whole.shape[0], self.groups, self.queries + 2, -1)
        first, last = {
            "q": (0, self.queries),
            "k": (self.queries, self.queries + 1),
            "v": (self.queries + 1, self.queries + 2),
        }[self.kind]
        part: Array = module_of(whole).ascontiguousarray(rows[:, :, first:last]).reshape(whole.shape[0], -1)
        return part


class _LaidByGroup(Struct, frozen=True):
    """One of Q, K and V, read as one range of columns of their product, whose columns lie group by group in the engine's weights."""

    queries: int
    groups: int
    begin: int
    end: int

    def __call__(self, whole: Array) -> Array:
        """[T, (H + 2K) · d] -> [T, H · d] or [T, K · d]."""
        xp, rows, heads = module_of(whole), whole.shape[0], self.queries * self.groups
        parts = whole.reshape(rows, heads + 2 * self.groups, -1)
        queries = parts[:, :heads].reshape(rows, self.groups, self.queries, -1)
        keys, values = parts[:, heads : heads + self.groups, None], parts[:, heads + self.groups :, None]
        laid: Array = xp.concatenate([queries, keys, values], axis=2).reshape(rows, -1)
        return xp.ascontiguousarray(laid[:, self.begin : self.end])


def _by_group(step: Step, right: Steps, parameters: Parameters) -> Step:
    parts = _fused(step, right)
    scores = sibling(step, right, "kq")
    heads, groups = int(parameter_of(scores, "heads")), int(parameter_of(scores, "kv_heads"))
    widths = _widths(parts)
    if step.op is not ops.part or widths["q"] * groups != widths["k"] * heads or widths["k"] != widths["v"]:
        raise NotApplicable(f"{step.makes}: the product has more than one head size")
    if parameters["wrong"] == _LAID:
        own = parts[kind_of(step)]
        begin = own.offset.fixed
        laid = _LaidByGroup(heads // groups, groups, begin, begin + own.shape[-1].fixed)
        return replace(step, op=laid, reads=(name_of(own),))
    return replace(step, op=_ByGroup(kind_of(step), heads // groups, groups), reads=(name_of(parts["q"]),))


def _keys_by_query_heads(step: Step, right: Steps, parameters: Parameters) -> Step:
    """Rows of keys permuted as if there were as many key heads as query heads."""
    scores = sibling(step, right, "kq")
    heads, to = int(parameter_of(scores, "heads")), parameters["to"]
    if parameter_of(scores, "kv_heads") == heads:
        raise NotApplicable(f"{step.makes}: there are as many key heads as query heads")
    return altered(step, lambda weight: permuted(weight, heads, to))


def _no_gate(step: Step, right: Steps, _parameters: Parameters) -> Step:
    """Attention's result without the gate that multiplies it."""
    gated = require(step, "MUL")
    attended = sibling(step, right, "kqv_out").makes
    for read in gated.reads:
        if name_of(read) == attended:
            return only(gated, read)
    raise NotApplicable(f"{step.makes} gates no attention")


_WRONG = "wrong from position 0 or 1 on, of plausible size"

FAULTS = (
    Fault(
        name="fused-qkv-order",
        kinds=_QKV,
        change=_in_order,
        what="the product of Q, K and V is read as {order}",
        symptom=_WRONG,
        fix="fused QKV is all of Q, then all of K, then all of V",
        seen="fused weights split in the wrong order",
        parameters={"order": (*_OTHERS, *_INSTEAD)},
    ),
    Fault(
        name="fused-qkv-by-group",
        kinds=_QKV,
        change=_by_group,
        what="of Q, K and V fused {wrong} group by group: queries, key, value of each key/value head",
        symptom=_WRONG,
        fix="GGUF's attn_qkv is all of Q, then all of K, then all of V: converters have undone the groups",
        seen="Falcon's, GPT-NeoX's or InternLM 2's layout carried over",
        parameters={"wrong": (_READ, _LAID)},
    ),
    Fault(
        name="keys-permuted-by-query-heads",
        kinds=("k",),
        change=_keys_by_query_heads,
        what="the rows of K are permuted as for {to}, with the number of query heads",
        symptom="position 0 is right, later ones are wrong",
        fix="permute K with the number of key/value heads",
        seen="converters from before grouped-query attention",
        parameters={"to": ("gguf", "hf")},
    ),
    Fault(
        name="attention-gate-missing",
        kinds=("attn_gated",),
        change=_no_gate,
        what="attention's result is not multiplied by its gate",
        symptom="wrong from position 0 on in layers with attention",
        fix="multiply by sigmoid of the second half of each head's query projection",
        seen="Qwen3 code that loads Qwen3-Next or Qwen3.5",
    ),
)
