"""Values that depend on where a pass begins and ends, not only on the tokens: lightning attention counts its decay from the pass's ends."""

from collections.abc import Sequence

from msgspec.structs import replace

from checkpoints.printable import first_names
from checkpoints.record import Dump
from engine import ops
from engine.faults.edits import ggml
from engine.graph import Step
from engine.lift import inputs


def without_values_of_passes(dump: Dump, steps: Sequence[Step], passes: Sequence[int]) -> tuple[Dump, tuple[str, ...]]:
    """The dump of several passes without such values, which the replay has as of one pass, and a note that names them.

    Args:
        passes: the number of each position's pass.
    """
    if len(set(passes)) < 2:
        return dump, ()
    depending = _depending(steps)
    left_out = [name for name in dump.points if name in depending]
    kept = {name: rows for name, rows in dump.points.items() if name not in depending}
    if not left_out or not kept:
        return dump, ()
    return replace(dump, points=kept), (
        f"left out, because they depend on where a pass begins: {first_names(left_out)} (parity diff compares them)",
    )


def _depending(steps: Sequence[Step]) -> frozenset[str]:
    """The values made from a decay. The parts of earlier passes and of the pass itself depend on it, but their sum does not."""
    depending: set[str] = set()
    for step in steps:
        parts = sum(name in depending for name in step.names)
        whole = parts > 1 and (step.op is ops.add or ggml(step, "ADD"))
        if step.op is inputs.decay or (parts and not whole):
            depending.add(step.makes)
    return frozenset(depending)
