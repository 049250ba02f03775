"""Faults of the order of layers and of their branches, and of the scale of the embeddings."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from .. import ops
from ..backend import Array
from ..graph import Step, name_of, read_as
from ..inapplicable import NotApplicable
from .base import COPY, Fault, Parameters, Steps, kind_of, layer_input, layer_of, read_of, sibling
from .edits import only


def _skip(step: Step, right: Steps, _parameters: Parameters) -> Step:
    return only(step, layer_input(step, right))


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


FAULTS = (
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
