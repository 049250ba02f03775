"""Faults of the residual stream and of the order of layers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from .. import ops
from ..backend import Array
from ..graph import Read, Step, name_of, read_as
from ..inapplicable import NotApplicable
from .base import AT, COPY, Fault, Parameters, Steps, kind_of, layer_input, layer_of, read_of, sibling, subsets
from .edits import copied

_SUMS = ("ffn_inp", "l_out")


def _only(step: Step, name: Any) -> Step:
    return replace(step, op=copied, reads=(name,))


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
    prefix = f"blk.{layer_of(step)}."
    source = ""
    if kind_of(step) == "l_out" and f"{prefix}ffn_inp" in right:
        source = f"{prefix}ffn_inp"
    elif f"{prefix}attn_norm" in right:
        source = layer_input(step, right)
    for branch, stream in ((first, second), (second, first)):
        name = name_of(stream).rstrip(COPY)
        made = right.get(name)
        if name == source:
            return branch, stream, None
        if made is not None and made.op is ops.add and source in made.names and not source.endswith("ffn_inp"):
            return branch, stream, next(read for read in made.reads if name_of(read) != source)
    return first, second, None


def _beside_whole_stream(step: Step, right: Steps) -> Read:
    """The branch of a residual addition whose other operand is the plain stream.

    Raises:
        NotApplicable: the other operand contains a branch.
    """
    branch, _, other = _summed(step, right)
    if other is not None:
        raise NotApplicable(f"{step.makes}: its branches are parallel")
    return branch


def _no_residual(step: Step, right: Steps, _parameters: Parameters) -> Step:
    branch, _, other = _summed(step, right)
    return _only(step, branch) if other is None else replace(step, reads=(branch, other))


def _branch_missing(step: Step, right: Steps, _parameters: Parameters) -> Step:
    return _only(step, branch_and_stream(step, right)[1])


def _after_norm(step: Step, right: Steps, _parameters: Parameters) -> Step:
    norm = "attn_norm" if kind_of(step) == "ffn_inp" else "ffn_norm"
    copy = COPY if step.makes.endswith(COPY) else ""
    return replace(step, reads=(_beside_whole_stream(step, right), f"blk.{layer_of(step)}.{norm}{copy}"))


def _twice(x: Array, y: Array) -> Array:
    return x + y + y


def _added_twice(step: Step, right: Steps, parameters: Parameters) -> Step:
    branch, stream = branch_and_stream(step, right)
    if parameters["added"] == "residual":
        return replace(step, op=_twice, reads=(_beside_whole_stream(step, right), stream))
    return replace(step, op=_twice, reads=(stream, branch))


def _old_buffer(step: Step, right: Steps, parameters: Parameters) -> Step:
    old = {"the layer's input": layer_input(step, right), "the embedding": "embd"}[parameters["buffer"]]
    return replace(step, reads=(_beside_whole_stream(step, right), old))


def _skip(step: Step, right: Steps, _parameters: Parameters) -> Step:
    return _only(step, layer_input(step, right))


def _run_twice(step: Step, right: Steps, _parameters: Parameters) -> Sequence[Step]:
    """The layer's steps once more, reading its output; the first run's names end in "~", and the second run makes the point."""
    prefix = f"blk.{layer_of(step)}."
    source, first = layer_input(step, right), step.makes + COPY
    names = {name: name + COPY for name in right if name.startswith(prefix)} | {source: first}
    again = []
    for name, other in right.items():
        if name.startswith(prefix):
            reads = tuple(read_as(read, names.get(name_of(read), name_of(read))) for read in other.reads)
            again.append(replace(other, makes=name if name == step.makes else name + COPY, reads=reads))
    return [replace(step, makes=first), *again]


def _parallel(step: Step, right: Steps, _parameters: Parameters) -> Step:
    return replace(step, reads=(layer_input(step, right),))


def _sequential(step: Step, right: Steps, _parameters: Parameters) -> Step | Sequence[Step]:
    """The feed-forward reads the norm, its own or one that both branches share, of the stream after attention's result was added."""
    norm, attended = sibling(step, right, "attn_norm"), sibling(step, right, "attn_out")
    prefix = f"blk.{layer_of(step)}."
    added, normed = f"{prefix}added", f"{prefix}normed"
    own = right.get(f"{prefix}ffn_norm")
    if own is not None and name_of(read_of(own, 0)) == layer_input(step, right):
        if step is not own:
            return step
        return [
            Step(added, ops.add, (attended.makes, layer_input(step, right)), inner=True),
            replace(own, reads=(added, *own.reads[1:])),
        ]
    if read_of(step, 0) != norm.makes:
        raise NotApplicable(f"{step.makes} does not read what attention reads")
    changed = replace(step, reads=(normed, *step.reads[1:]))
    readers = [
        name
        for name, other in right.items()
        if kind_of(other) in _FED and name.startswith(prefix) and norm.makes in other.names
    ]
    if step.makes != readers[0]:
        return changed
    total = Step(added, ops.add, (attended.makes, layer_input(step, right)), inner=True)
    return [total, replace(norm, makes=normed, reads=(added,), inner=True), changed]


_FED = ("ffn_gate", "ffn_up", "ffn_gate_up", "ffn_moe_logits")


def _scaled(ids: Array, take: Any, *, by: str) -> Array:
    rows = ops.get_rows(ids, take)
    root = np.float32(np.sqrt(rows.shape[1]))
    return rows * root if by == "multiplied" else rows / root


def _scale(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if step.op is not ops.get_rows:
        raise NotApplicable(f"{step.makes} is not a plain look-up of rows")
    return replace(step, op=_scaled, params={"by": parameters["scaled"]})


def _residual_sums(right: Steps) -> tuple[tuple[str, ...], ...]:
    """The usual sums, then those that add to the layer's input under another name: all together with the usual ones, and each alone."""
    others = tuple(dict.fromkeys(kind_of(step) for step in right.values() if _adds_to_input(step, right)))
    return (*subsets(*_SUMS), *([(*_SUMS, *others), *((kind,) for kind in others)] if others else []))


def _adds_to_input(step: Step, right: Steps) -> bool:
    if step.op is not ops.add or step.inner or kind_of(step) in _SUMS or len(step.reads) != 2:
        return False
    try:
        return layer_input(step, right) in step.names
    except NotApplicable:
        return False


_EACH = {AT: subsets(*_SUMS)}

FAULTS = (
    Fault(
        name="residual-missing",
        kinds=(*_SUMS, "SUM"),
        change=_no_residual,
        what="the residual is not added at {at}",
        symptom="wrong from layer 0, position 0 on; values shrink",
        fix="ffn_inp = attention + input, l_out = feed-forward + ffn_inp",
        seen="blocks rewritten as functions",
        parameters={AT: _residual_sums},
    ),
    Fault(
        name="branch-missing",
        kinds=_SUMS,
        change=_branch_missing,
        what="a branch is not added to the residual stream at {at} (ffn_inp: attention; l_out: what is added last)",
        symptom="wrong from layer 0 on; the stream changes too little",
        fix="add the branch's output to the stream",
        seen="an output written to a buffer that nothing reads",
        parameters={AT: (("l_out",), ("ffn_inp",))},
    ),
    Fault(
        name="residual-after-norm",
        kinds=_SUMS,
        change=_after_norm,
        what="the residual is taken after the norm, at {at}",
        symptom="wrong from layer 0, position 0 on",
        fix="keep the stream as it was before the norm",
        seen="norms that overwrite their input",
        parameters=_EACH,
    ),
    Fault(
        name="residual-twice",
        kinds=_SUMS,
        change=_added_twice,
        what="the {added} is added twice at {at}",
        symptom="values grow from layer to layer",
        fix="add it once",
        seen="fused kernels that add the residual, and an add beside them",
        parameters={"added": ("residual", "branch"), AT: subsets(*_SUMS)},
    ),
    Fault(
        name="residual-old-buffer",
        kinds=_SUMS,
        change=_old_buffer,
        what="the residual comes from {buffer}, at {at}",
        symptom="wrong from layer 0 or 1 on",
        fix="the feed-forward's residual is ffn_inp, the attention's the layer's input",
        seen="two buffers that swap",
        parameters={"buffer": ("the layer's input", "the embedding"), AT: (("l_out",), ("ffn_inp",), _SUMS)},
    ),
    Fault(
        name="parallel-branches",
        kinds=("ffn_norm",),
        change=_parallel,
        what="the feed-forward reads the layer's input, not the attention's result",
        symptom="wrong from layer 0, position 0 on",
        fix="ffn_norm reads ffn_inp",
        seen="GPT-J and Falcon code",
    ),
    Fault(
        name="sequential-branches",
        kinds=("ffn_norm", *_FED),
        change=_sequential,
        what="the feed-forward reads attention's result, where this model computes both branches from the layer's input",
        symptom="wrong from layer 0, position 0 on",
        fix="both norms (or the one) read the layer's input; both results are added to it",
        seen="Llama code that loads Phi-2, Command R, Falcon or GPT-NeoX",
    ),
    Fault(
        name="layer-skipped",
        kinds=("l_out",),
        change=_skip,
        what="the layer is skipped",
        symptom="one layer's output equals its input",
        fix="run layers 0 to n − 1, each once",
        seen="off-by-one loops; pipelines cut between two devices",
    ),
    Fault(
        name="layer-twice",
        kinds=("l_out",),
        change=_run_twice,
        what="the layer is run twice",
        symptom="wrong from one layer on, of plausible size",
        fix="run each layer once",
        seen="pipelines cut between two devices",
    ),
    Fault(
        name="embedding-scaled",
        kinds=("embd",),
        change=_scale,
        what="the embedding is {scaled} by the square root of the width",
        symptom="embd is wrong by a constant factor",
        fix="only Gemma scales its embedding",
        seen="ports of Gemma code",
        parameters={"scaled": ("multiplied", "divided")},
        once=True,
    ),
)
