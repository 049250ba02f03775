"""What wrong records show in place of their point: the first reading under which they are the reference's."""

import numpy as np

from checkpoints.points import LOGITS
from checkpoints.record import Rows

from .layouts import other_length, reordered
from .moments import likelihoods, other_position, other_type, renamed, scaled
from .readings import Allowed, Others, Reading
from .rotated import before_rope

_ENOUGH = 64  # most records that are looked at


def shown_by(ours: Rows, ref: Rows, allowed: Allowed, others: Others, head_size: int | None) -> Reading | None:
    """The first reading under which our records agree with the reference's; None if there is none.

    Args:
        ours, ref: records of one point, row i of one belongs to row i of the other; all of ours are wrong.
        allowed: how far off each may be.
        others: all records of the reference's points.
        head_size: the size of the model's attention heads, if it is known.
    """
    if len(ours) > _ENOUGH:
        spread = np.linspace(0, len(ours) - 1, _ENOUGH).astype(np.int64)
        ours, ref, allowed = ours.take(spread), ref.take(spread), allowed.take(spread)
    if ours.indices is not None or ref.indices is not None:
        return None
    same = others.points.get(ours.point)
    return (
        reordered(ours, ref, allowed, head_size)
        or other_length(ours, ref, allowed, head_size)
        or renamed(ours, allowed, others)
        or scaled(ours, ref, allowed)
        or (other_position(ours, allowed, same) if same is not None else None)
        or (before_rope(ours, ref, allowed, same) if same is not None and others.rotated else None)
        or other_type(ours, ref, allowed)
        or (likelihoods(ours, ref, allowed) if ours.point == LOGITS else None)
    )
