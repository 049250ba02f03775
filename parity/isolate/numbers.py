"""What the numbers of a wrong operation say by themselves, as `parity explain` says it of the operation that it locates."""

from collections.abc import Mapping

import numpy as np

from engine.graph import Step, WeightSource, viewed

from ..laws.beside import Beside, room, room_of_others
from ..laws.heads import heads_of
from ..laws.laws import WRONG, law
from .held import Held
from .looks import error_in_words, look_of, siblings

_FEW = 16  # wrong rows in which a law is looked for first, before it is asked of all
_LARGEST = 1 << 22  # elements of a value in which laws are looked for: 32 MiB as float64
_WIDE = 1 << 14  # elements of a row in which the places of others are looked for


def in_words(
    step: Step,
    steps: Mapping[str, Step],
    held: Held,
    weights: WeightSource,
    limit: float,
) -> str:
    """What distinguishes a wrong operation, one of these steps: another operand, a law of its numbers, or how large its error is."""
    first = viewed(step.reads[0], held.inputs[0]) if held.inputs else held.dumped
    nmse = float(held.errors.max())
    if look := look_of(step, first, held.dumped, weights, nmse, limit, siblings(step, list(steps.values()))):
        return look
    law = law_of_numbers(step, steps, held, weights, limit)
    if law and not law.endswith(WRONG):
        return law
    # Which rows of a weight are wrong says more than which elements are.
    return error_in_words(step, first, held.dumped, weights, nmse, law)


@np.errstate(all="ignore")  # a foreign engine's values may be infinite, or as large as they like
def law_of_numbers(step: Step, steps: Mapping[str, Step], held: Held, weights: WeightSource, limit: float) -> str:
    """The law that all wrong rows of a recorded value follow; "" if none does, or it has no rows of one length."""
    dumped, right = held.wrong_rows(limit)
    if held.dumped.ndim != 2 or not dumped.size or held.ours.size > _LARGEST or len(held.errors) != len(held.dumped):
        return ""
    rows = np.flatnonzero(held.errors > limit)
    width = dumped.shape[1]
    whole = held.ours.reshape(held.dumped.shape).astype(np.float64) if width <= _WIDE else None
    name = step.weights[1] if len(step.weights) > 1 else None
    bias = weights.get(name).astype(np.float64) if isinstance(name, str) else np.zeros(0)
    heads = heads_of(steps, step.makes)
    noise = room(np.full(len(rows), limit), np.square(right).sum(axis=1), dumped, right)
    every = Beside(
        dumped=dumped,
        right=right,
        index=np.arange(width),
        room=noise,
        others=room_of_others(noise, right),
        printed=np.zeros(len(rows)),
        rows=rows,
        whole=whole,
        bias=bias if bias.shape == (width,) else None,
        heads=heads if whole is not None and heads and width % heads == 0 else None,
    )
    if len(rows) <= _FEW:
        return law(every)
    return law(every) if law(every.first(_FEW)) else ""
