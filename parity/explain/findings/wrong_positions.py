"""Which positions are wrong, and which operations act on those."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from checkpoints.points import of_scores, parse
from engine import ops
from engine.graph import State as PassState
from engine.graph import Step

from ..records.records import Expected

_OF_ROWS = (ops.linear, ops.rms_norm, ops.layer_norm)


def which(entry: Expected, wrong: NDArray[np.bool_], acting: Sequence[Step]) -> str:
    """Which positions are wrong, and what acts there; `acting` are the steps in question, empty if they should not be mentioned."""
    rows = entry.rows[wrong]
    if len(rows) == len(entry.rows):
        return f"all positions are wrong{_at_each_position(entry, acting)}"
    if rows.min() > 0 and len(rows) == (entry.rows >= rows.min()).sum():
        right = "position 0 is" if rows.min() == 1 else f"positions 0 to {rows.min() - 1} are"
        return f"{right} right, all later ones wrong{_from_earlier(acting)}"
    listed = f"{', '.join(str(int(row)) for row in rows[:6])}{', …' if len(rows) > 6 else ''}"
    return f"{len(rows)} of {len(entry.rows)} positions are wrong, the others right: {listed}"


def _attends(acting: Sequence[Step]) -> bool:
    """Whether attention is among the steps."""
    return any(step.histories or of_scores(step.makes) for step in acting)


def _recurs(acting: Sequence[Step]) -> bool:
    """Whether a state that positions hand on is among what the steps read."""
    return any(isinstance(read, PassState) for step in acting for read in step.reads)


def _at_each_position(entry: Expected, acting: Sequence[Step]) -> str:
    """The operations that act on every position alike, as the end of a sentence."""
    if not acting:
        return ""
    if parse(entry.point).layer is None:
        return ": this operation or its weights"
    if _recurs(acting) and not any(step.op in _OF_ROWS for step in acting):
        return ": the recurrence: its update, or when the state is read"
    if of_scores(entry.point):  # nothing after attention's scores acts on them
        return ": queries, keys, their products, the scale or the mask"
    acts = ["values", "output projection"] if _attends(acting) else ["a projection"] if any(map(_projects, acting)) else []
    acts += ["feed-forward"] if any(parse(step.makes).kind.startswith("ffn") for step in acting) else []
    acts += ["a norm or weights"] if any(step.op in _OF_ROWS or step.weights for step in acting) else []
    return f": {', '.join(acts)}" if acts else ""


def _projects(step: Step) -> bool:
    return step.op is ops.linear or getattr(step.op, "name", "") in ("MUL_MAT", "MUL_MAT_ID")


def _from_earlier(acting: Sequence[Step]) -> str:
    """The operations through which a position depends on earlier ones, as the end of a sentence."""
    acts = ["queries, keys, RoPE, scale, mask or cache"] if _attends(acting) else []
    if _recurs(acting):
        acts.append("the state that earlier positions leave (a recurrence, a convolution, a token shift)")
    return f": {'; or '.join(acts)}" if acts else ""
