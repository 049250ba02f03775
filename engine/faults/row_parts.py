"""Faults of rows that steps read in parts: the parts of a recurrent layer's rows in another order, queries and gates of one product laid
out otherwise.
"""

from itertools import permutations
from math import prod

from msgspec.structs import replace

from checkpoints.graph import Size

from ..graph import Read, Step, View, name_of, weight_name
from .base import Fault, Parameters, Steps
from .index import views_of

_READERS = ("CONCAT", "CONT", "RMS_NORM", "L2_NORM", "SCALE", "SSM_SCAN", "GATED_DELTA_NET", "UNARY", "MUL", "ADD", "GLU")
_ROWS = {  # the rows whose parts may be exchanged, by the weights that made them
    "the input projection": ("ssm_in.weight",),
    "the convolution's result": ("ssm_conv1d.weight", "ssm_conv1d.bias"),
    "the projection to dt, B and C": ("ssm_x.weight",),
}
_FAR = 3  # steps from a row back to its weights: an activation, a bias, a convolution
_ORDERS = tuple(order for count in (3, 2) for order in permutations(range(count)) if order != tuple(range(count)))
_SAYS = {order: ", ".join(("first", "second", "third")[place] for place in order) for order in _ORDERS}

Part = tuple[int, int]  # of each row: where it begins, and how wide it is


def _part(view: View) -> Part | None:
    """The part of rows [T, n] that a view reads; None if it reads something else."""
    if len(view.whole) != 2 or not isinstance(view.of, str) or not view.offset.constant:
        return None
    width, begin = view.whole[-1].fixed, view.offset.fixed
    along = [stride for size, stride in zip(view.shape, view.strides, strict=True) if not size.constant]
    count = prod(size.fixed for size in view.shape if size.constant)
    return (begin, count) if along == [Size(width)] and begin + count <= width else None


def _parts(right: Steps, name: str, width: int) -> list[Part]:
    """The parts in which steps read the rows of a value, if together they are the whole row, each once; else none."""
    found = sorted({part for view in views_of(right, name) if (part := _part(view)) is not None})
    ends = [begin + count for begin, count in found]
    return found if [begin for begin, _ in found] == [0, *ends[:-1]] and ends[-1:] == [width] else []


def _made_by(name: str, right: Steps) -> str:
    """The name of the nearest weight that a value was made with, without its layer."""
    for _ in range(_FAR):
        step = right.get(name)
        weight = next((weight_name(weight) for weight in step.weights if weight is not None), "") if step else ""
        if weight or step is None or not step.names:
            return weight.partition(".")[2].partition(".")[2]
        name = step.names[0]
    return ""


def _other_order(step: Step, right: Steps, parameters: Parameters) -> Step:
    reads = tuple(_moved(read, right, parameters) for read in step.reads)
    return step if reads == step.reads else replace(step, reads=reads)


def _moved(read: Read, right: Steps, parameters: Parameters) -> Read:
    """A part of a row, read from where it would lie in another order; any other read as it is."""
    own = _part(read) if isinstance(read, View) else None
    if own is None or not isinstance(read, View) or _made_by(name_of(read), right) not in _ROWS[parameters["row"]]:
        return read
    parts, order = _parts(right, name_of(read), read.whole[-1].fixed), parameters["order"]
    if len(parts) != len(order):
        return read
    before = order[: order.index(parts.index(own))]
    return replace(read, offset=read.offset._replace(fixed=sum(parts[place][1] for place in before)))


_HALVES, _GATE_FIRST = "all queries before all gates", "each head's gate before its query"


def _gate_elsewhere(step: Step, right: Steps, parameters: Parameters) -> Step:
    """Queries or gates read from where they would lie in another layout of their product."""
    reads = tuple(_of_layout(read, right, parameters["as"]) for read in step.reads)
    return step if reads == step.reads else replace(step, reads=reads)


def _of_layout(read: Read, right: Steps, layout: str) -> Read:
    if not isinstance(read, View) or len(read.shape) < 2 or not read.offset.constant:
        return read
    (heads, size), stride, begin = (part.fixed for part in read.shape[-2:]), read.strides[-2].fixed, read.offset.fixed
    halved = stride == 2 * size and begin in (0, size) and read.whole[-1].fixed == 2 * size * heads
    if not halved or heads == 1 or _made_by(name_of(read), right) != "attn_q.weight":
        return read
    if layout == _GATE_FIRST:
        return replace(read, offset=Size(size - begin))
    return replace(read, offset=Size(begin * heads), strides=(*read.strides[:-2], Size(size), read.strides[-1]))


FAULTS = (
    Fault(
        name="row-parts-order",
        kinds=_READERS,
        change=_other_order,
        what="the parts of {row} are read in the order {order} (of how they lie in the file)",
        symptom="wrong from position 0 on, of plausible size",
        fix="Mamba-2's ssm_in makes z, then x, B and C, then dt; Mamba's makes x, then z; the delta rule's convolution q, k, v",
        seen="ports that split a fused projection in another order",
        parameters={"row": tuple(_ROWS), "order": _ORDERS},
        says=_SAYS,
    ),
    Fault(
        name="attention-gate-layout",
        kinds=("q", "CONT", "UNARY", "MUL"),
        change=_gate_elsewhere,
        what="the product of queries and gates is read as {as}",
        symptom="wrong from position 0 on in layers with attention",
        fix="attn_q makes, head by head, the query and then its gate",
        seen="chunk(2) before the row is split into heads; gates and queries exchanged",
        parameters={"as": (_HALVES, _GATE_FIRST)},
    ),
)
