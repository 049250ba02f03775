"""Faults of the residual stream, in every sum that adds a branch to what the branch is computed from, whatever a model calls it."""

from collections.abc import Sequence

from msgspec.structs import replace

from checkpoints.points import parse

from .. import ops
from ..backend import Array
from ..graph import Read, Step, name_of
from ..inapplicable import NotApplicable
from .base import AT, COPY, Change, Fault, Parameters, Steps, kind_of, layer_input, layer_of, read_of, subsets
from .edits import ggml, only

_SUMS = ("ffn_inp", "l_out")
_NORMS = (ops.rms_norm, ops.layer_norm)
_PRODUCTS = ("MUL_MAT", "MUL_MAT_ID")


def branch_and_stream(step: Step, right: Steps) -> tuple[Read, Read]:
    """The branch that a residual addition adds to the stream, and the stream itself: llama.cpp's graphs have them in either order.

    Raises:
        NotApplicable: the step reads only one value.
    """
    return _summed(step, right)[:2]


def _summed(step: Step, right: Steps) -> tuple[Read, Read, Read | None]:
    """The branch and the stream of a residual addition, and a branch that the stream already contains; None if it contains none.

    Where both branches of a layer read its input (Command R), one of them is added to it, and the other to that sum.
    """
    first, second = read_of(step, 0), read_of(step, 1)
    for branch, stream in ((first, second), (second, first)):
        if _descends(branch, stream, step, right):
            return branch, stream, None
    source = _source(step, right)
    for branch, stream in ((first, second), (second, first)):
        made = right.get(name_of(stream).rstrip(COPY))
        if made is not None and made.op is ops.add and source in made.names and not source.endswith("ffn_inp"):
            return branch, stream, next(read for read in made.reads if name_of(read) != source)
    return first, second, None


def _source(step: Step, right: Steps) -> str:
    prefix = f"blk.{layer_of(step)}."
    if kind_of(step) == "l_out" and f"{prefix}ffn_inp" in right:
        return f"{prefix}ffn_inp"
    return layer_input(step, right) if f"{prefix}attn_norm" in right else ""


def _descends(branch: Read, stream: Read, step: Step, right: Steps) -> bool:
    """Whether a branch is computed from the stream, by steps of its own layer."""
    return name_of(stream) in _ancestors(branch, step, right)


def _ancestors(branch: Read, step: Step, right: Steps, until: str = "") -> Sequence[str]:
    """What a value is computed from by steps of the same layer, with what these read of other layers, the nearest first; not what
    `until` is computed from.
    """
    layer = parse(step.makes).layer
    found: dict[str, None] = {}
    waiting = [name_of(branch)]
    for name in waiting:
        made = right.get(name) or right.get(name.rstrip(COPY))
        if name == until or made is None or not (made.inner or parse(name).layer == layer):
            continue
        for read in made.names:
            if read not in found:
                found[read] = None
                waiting.append(read)
    return tuple(found)


def _beside_whole_stream(step: Step, right: Steps) -> Read:
    """The branch of a residual addition whose other operand is the plain stream.

    Raises:
        NotApplicable: the other operand contains a branch.
    """
    branch, _, other = _summed(step, right)
    if other is not None:
        raise NotApplicable(f"{step.makes}: its branches are parallel")
    return branch


def _in_layers(change: Change) -> Change:
    """The change of sums in the layers alone: outside of them, values may have the same names."""
    return lambda step, right, parameters: step if parse(step.makes).layer is None else change(step, right, parameters)


def _no_residual(step: Step, right: Steps, _parameters: Parameters) -> Step:
    branch, _, other = _summed(step, right)
    return only(step, branch) if other is None else replace(step, reads=(branch, other))


def _branch_missing(step: Step, right: Steps, _parameters: Parameters) -> Step:
    return only(step, branch_and_stream(step, right)[1])


def _after_norm(step: Step, right: Steps, parameters: Parameters) -> Step:
    """The sum with the stream after a norm that reads it: the one of the branch, or another; or with what the stream is the norm of."""
    branch, stream = _beside_whole_stream(step, right), branch_and_stream(step, right)[1]
    if parameters["norm"] == "before its norm":
        norm = right.get(name_of(stream))
        if norm is None or norm.op not in _NORMS or parse(norm.makes).layer != layer_of(step):
            raise NotApplicable(f"{step.makes} adds to no normalised stream")
        return replace(step, reads=(branch, norm.reads[0]))
    of_branch = _ancestors(branch, step, right)
    norms = [
        other.makes
        for other in right.values()
        if other.op in _NORMS and other.reads[0] == stream and parse(other.makes).layer == layer_of(step)
    ]
    own = [name for name in of_branch if name in norms]
    chosen = own if parameters["norm"] == "after its norm" else [name for name in norms if name not in own]
    if not chosen:
        raise NotApplicable(f"{step.makes}: there is no such norm of the stream")
    return replace(step, reads=(branch, chosen[0]))


def _twice(x: Array, y: Array) -> Array:
    return x + y + y


def _added_twice(step: Step, right: Steps, parameters: Parameters) -> Step:
    branch, stream = branch_and_stream(step, right)
    if parameters["added"] == "residual":
        return replace(step, op=_twice, reads=(_beside_whole_stream(step, right), stream))
    return replace(step, op=_twice, reads=(stream, branch))


def _old_buffer(step: Step, right: Steps, parameters: Parameters) -> Step:
    old = {"the layer's input": _input_of_layer(step, right), "the embedding": "embd"}[parameters["buffer"]]
    return replace(step, reads=(_beside_whole_stream(step, right), old))


def _input_of_layer(step: Step, right: Steps) -> str:
    """What a step's layer reads; where no norm comes first, the output of the layer before."""
    layer = layer_of(step)
    if f"blk.{layer}.attn_norm" in right:
        return layer_input(step, right)
    name = f"blk.{layer - 1}.l_out" if layer else "embd"
    if name not in right:
        raise NotApplicable(f"there is no {name}")
    return name


def _residual_sums(right: Steps) -> tuple[tuple[str, ...], ...]:
    """The usual sums, then those that add to the stream under another name: all together with the usual ones, and each alone."""
    others = tuple(dict.fromkeys(kind_of(step) for step in right.values() if _adds_to_stream(step, right)))
    usual = _usual(right)
    return (*subsets(*usual), *([(*usual, *others), *((kind,) for kind in others)] if others else []))


def _usual(right: Steps) -> tuple[str, ...]:
    """The usual sums that a model has: in BERT a norm makes l_out."""
    summed = {kind_of(step) for step in right.values() if len(step.reads) > 1}
    return tuple(kind for kind in _SUMS if kind in summed) or _SUMS


def _adds_to_stream(step: Step, right: Steps) -> bool:
    """Whether a sum under another name than the usual ones adds to the stream what a product makes of it: a mix with an earlier
    position is none.
    """
    if (
        step.op is not ops.add
        or step.inner
        or kind_of(step) in _SUMS
        or len(step.reads) != 2
        or parse(step.makes).layer is None
    ):
        return False
    first, second = step.reads
    for branch, stream in ((first, second), (second, first)):
        if _descends(branch, stream, step, right) and _is_stream(name_of(stream), step, right):
            between = (name_of(branch), *_ancestors(branch, step, right, name_of(stream)))
            made = (right[name] for name in between if name in right and name != name_of(stream))
            return any(other.op is ops.linear or ggml(other, *_PRODUCTS) for other in made)
    return False


def _is_stream(name: str, step: Step, right: Steps) -> bool:
    """Whether a value is what the layer reads, or made of it by sums, norms and multipliers alone."""
    made = right.get(name)
    if made is None or parse(name).layer != layer_of(step):
        return True
    if made.op is ops.add or ggml(made, "ADD"):
        return any(_is_stream(read, step, right) for read in made.names)
    return (made.op in _NORMS or ggml(made, "SCALE")) and _is_stream(made.names[0], step, right)


def _each_sum(right: Steps) -> tuple[tuple[str, ...], ...]:
    return tuple(dict.fromkeys((("l_out",), ("ffn_inp",), *(kinds for kinds in _residual_sums(right) if len(kinds) == 1))))


def _old_sums(right: Steps) -> tuple[tuple[str, ...], ...]:
    return tuple(dict.fromkeys((*_each_sum(right), _usual(right))))


_EVERYWHERE = (*_SUMS, "SUM")

FAULTS = (
    Fault(
        name="residual-missing",
        kinds=_EVERYWHERE,
        change=_in_layers(_no_residual),
        what="the residual is not added at {at}",
        symptom="wrong from layer 0, position 0 on; values shrink",
        fix="ffn_inp = attention + input, l_out = feed-forward + ffn_inp",
        seen="blocks rewritten as functions",
        parameters={AT: _residual_sums},
    ),
    Fault(
        name="branch-missing",
        kinds=_EVERYWHERE,
        change=_in_layers(_branch_missing),
        what="a branch is not added to the residual stream at {at} (ffn_inp: attention; l_out: what is added last)",
        symptom="wrong from the first layer on that has it; the stream changes too little",
        fix="add the branch's output to the stream",
        seen="an output written to a buffer that nothing reads",
        parameters={AT: _each_sum},
    ),
    Fault(
        name="residual-after-norm",
        kinds=_EVERYWHERE,
        change=_in_layers(_after_norm),
        what="the residual is taken {norm}, at {at}",
        symptom="wrong from layer 0, position 0 on",
        fix="keep the stream as it was before the norm; where the norm comes after the sum (BERT), it is what the norm makes",
        seen="norms that overwrite their input",
        parameters={"norm": ("after its norm", "after another norm of it", "before its norm"), AT: _residual_sums},
        says={
            "after its norm": "after the norm",
            "after another norm of it": "after another branch's norm",
            "before its norm": "before the norm",
        },
    ),
    Fault(
        name="residual-twice",
        kinds=_EVERYWHERE,
        change=_in_layers(_added_twice),
        what="the {added} is added twice at {at}",
        symptom="values grow from layer to layer",
        fix="add it once",
        seen="fused kernels that add the residual, and an add beside them",
        parameters={"added": ("residual", "branch"), AT: _residual_sums},
    ),
    Fault(
        name="residual-old-buffer",
        kinds=_EVERYWHERE,
        change=_in_layers(_old_buffer),
        what="the residual comes from {buffer}, at {at}",
        symptom="wrong from layer 0 or 1 on",
        fix="the feed-forward's residual is ffn_inp, the attention's the layer's input",
        seen="two buffers that swap",
        parameters={"buffer": ("the layer's input", "the embedding"), AT: _old_sums},
    ),
)
